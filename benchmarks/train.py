"""A training step of the engine at ZeRO stage 0: against torch's DDP, and against a plain loop.

    python benchmarks/train.py step [ROUNDS]        2 ranks: seconds of a step (bar: 1.02 of DDP's), and the peak of
                                                    memory above the floor (bar: 0.97 of DDP's)
    python benchmarks/train.py overhead [ROUNDS]    one process: seconds of a step (bar: 1.02 of a plain loop's)
    python benchmarks/train.py checks [ROUNDS]      2 ranks: a step that compares replicas (bar: 1.05 of one that
                                                    does not; a tenth of the steps do, which makes it 0.5 %)

A GPT of 29.5 M parameters in fp32, 2 x 128 tokens a rank, fused AdamW, clipping, Gloo, one thread a rank. A round of
`step` is a job of each contender: 3 steps, then the median of 8. The floor is the peak of a process that has imported
torch and joined the other ranks. A round of `overhead` is 8 steps of each, in turn, in this process.

A round of `checks` is a job of 2 x 40 steps, with and without the comparison in turn. `--tiny`, behind it, tries a mode
with a model that means nothing.

What data cost a step, and the first batch of a cached corpus, are measured by `data.py`.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import replace

import torch

from contenders import contender
from gpt import TINY, Work, batches
from jobs import Job, interleave, run_job
from measure import Series, describe, report


def main(what: str, rounds: int, work: Work) -> None:
    describe()
    {"step": measure_step, "overhead": measure_overhead, "checks": measure_checks}[what](rounds, work)


def measure_step(rounds: int, work: Work) -> None:
    """Also a part of `zero.py table`."""
    figures = interleave([Job("DDP", "ddp", work), Job("dstrain", "stage0", work)], rounds)
    report(figures["dstrain"].step, figures["DDP"].step)
    report(figures["dstrain"].peak, figures["DDP"].peak)


def measure_overhead(rounds: int, work: Work) -> None:
    torch.set_num_threads(1)
    ours, theirs = Series("engine, one process"), Series("plain loop")
    contenders = [(contender("plain", work).step, theirs), (contender("stage0", work).step, ours)]
    data = batches(work, rank=0, ranks=1)
    for number in range(rounds + 1):  # the first to warm up
        seconds: dict[str, list[float]] = {series.name: [] for _, series in contenders}
        for _ in range(work.steps):
            micros = next(data)
            contenders.reverse()
            for step, series in contenders:
                begun = time.perf_counter()
                step(micros)
                seconds[series.name].append(time.perf_counter() - begun)
        if number:
            for _, series in contenders:
                series.values.append(statistics.median(seconds[series.name]))
    report(ours, theirs)


def measure_checks(rounds: int, work: Work) -> None:
    job = Job("checks", "checks", replace(work, steps=5 * work.steps))
    checked, plain = Series("step that compares replicas"), Series("step that does not")
    for _ in range(rounds):
        found = run_job(job)
        checked.values.append(found.checked_s)
        plain.values.append(found.step_s)
    report(checked, plain)


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--tiny"]
    main(words[0], int(words[1]) if len(words) > 1 else 15, TINY if "--tiny" in sys.argv else Work())
