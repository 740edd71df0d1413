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

import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from measure import Series, describe, report
from train_rank import batches, engine_step, gpt, plain_step

RANKS = 2
WARMUP, STEPS = 3, 8
FLOOR_JOBS = 3


def main(what: str, rounds: int) -> None:
    describe()
    {"step": measure_step, "overhead": measure_overhead}[what](rounds)


def measure_step(rounds: int) -> None:
    ours, theirs = Series("dstrain, a step"), Series("DDP, a step")
    floor = statistics.median(job("floor")["peak_mib"] for _ in range(FLOOR_JOBS))
    our_peak, their_peak = Series("dstrain, peak above the floor", unit="MiB"), Series("DDP, the same", unit="MiB")
    contenders = [("ddp", theirs, their_peak), ("dstrain", ours, our_peak)]
    for number in range(rounds):
        for name, series, peak in contenders if number % 2 else reversed(contenders):
            found = job(name)
            series.values.append(found["step_s"])
            peak.values.append(found["peak_mib"] - floor)
            print(f"round {number + 1:2} {name:8} {found['step_s']:.3f} s   {found['peak_mib'] - floor:.1f} MiB   "
                  f"losses {found['losses']}", file=sys.stderr)  # fmt: skip
    report(ours, theirs)
    print(f"{'floor':36} median {floor:.1f} MiB   jobs {FLOOR_JOBS}")
    report(our_peak, their_peak)


def measure_overhead(rounds: int) -> None:
    torch.set_num_threads(1)
    ours, theirs = Series("engine, one process"), Series("plain loop")
    contenders = [(plain_step(gpt()), theirs), (engine_step(), ours)]
    data = batches(rank=0, ranks=1)
    for number in range(rounds + 1):  # the first to warm up
        seconds: dict[str, list[float]] = {series.name: [] for _, series in contenders}
        for _ in range(STEPS):
            tokens = next(data)
            contenders.reverse()
            for step, series in contenders:
                begun = time.perf_counter()
                step(tokens)
                seconds[series.name].append(time.perf_counter() - begun)
        if number:
            for _, series in contenders:
                series.values.append(statistics.median(seconds[series.name]))
    report(ours, theirs)


def job(contender: str) -> dict[str, Any]:
    """One job's figures: rank 0's, of memory those of the rank with the larger peak."""
    environment = {**os.environ, "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, Path(__file__).with_name("train_rank.py"), contender, str(WARMUP), str(STEPS)]
    ranks = [
        subprocess.Popen(command, env={**environment, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(RANKS)
    ]
    answers = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise SystemExit(f"{contender}: exit {[rank.returncode for rank in ranks]}")
    found = [json.loads(answer) for answer in answers]
    return {**found[0], "peak_mib": max(answer["peak_mib"] for answer in found)}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 15)
