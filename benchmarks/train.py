"""A training step of the engine at ZeRO stage 0: against torch's DDP, and against a plain loop.

    python benchmarks/train.py step [ROUNDS]        2 ranks: seconds of a step (bar: 1.02 of DDP's), and the peak of
                                                    memory above the floor (bar: 0.97 of DDP's)
    python benchmarks/train.py overhead [ROUNDS]    one process: seconds of a step (bar: 1.02 of a plain loop's)

A GPT of 29.5 M parameters in fp32, 2 x 128 tokens a rank, fused AdamW, clipping, Gloo, one thread a rank. A round of
`step` is a job of each contender: 3 steps, then the median of 8. The floor is the peak of a process that has imported
torch and joined the other ranks. A round of `overhead` is 8 steps of each, in turn, in this process.

What data cost a step, and the first batch of a cached corpus, are measured by `data.py`.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch

from contenders import contender
from gpt import Work, batches
from jobs import Job, interleave
from measure import Series, describe, report


def main(what: str, rounds: int) -> None:
    describe()
    {"step": measure_step, "overhead": measure_overhead}[what](rounds)


def measure_step(rounds: int) -> None:
    """Also a part of `zero.py table`."""
    figures = interleave([Job("DDP", "ddp", Work()), Job("dstrain", "stage0", Work())], rounds)
    report(figures["dstrain"].step, figures["DDP"].step)
    report(figures["dstrain"].peak, figures["DDP"].peak)


def measure_overhead(rounds: int) -> None:
    torch.set_num_threads(1)
    ours, theirs = Series("engine, one process"), Series("plain loop")
    contenders = [(contender("plain", Work()).step, theirs), (contender("stage0", Work()).step, ours)]
    data = batches(Work(), rank=0, ranks=1)
    for number in range(rounds + 1):  # the first to warm up
        seconds: dict[str, list[float]] = {series.name: [] for _, series in contenders}
        for _ in range(Work().steps):
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


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 15)
