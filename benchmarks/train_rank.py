"""One rank of a job of the training benchmarks: trains the GPT under one contender.

    RANK=… WORLD_SIZE=… MASTER_ADDR=… MASTER_PORT=… python benchmarks/train_rank.py CONTENDER WORK

WORK: fields of `gpt.Work` as JSON. Prints one JSON line: `Found`. Besides those of `contenders.py`, `floor` only joins
the other ranks, `activations` runs one forward of a plain model and counts what its backward will need, and `checks`
compares replicas in every second step.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from pipes import PIPELINE, PIPES

import torch
import torch.distributed as dist
from torch import Tensor

from contenders import Contender, contender, dstrain
from gpt import Work, batches, gpt, loss_of


@dataclass
class Found:
    """step_s: median of a step. peak_mib: the most resident memory that the process has ever had; device_peak_mib:
    what torch has had of a GPU's. losses: of its own samples in the first and the last step. sent_bytes: in a step.
    checked_s: of `checks`, the median of the steps that compare replicas, step_s that of the others. first_peak_mib: of
    rank 0."""

    peak_mib: float = 0.0
    step_s: float = 0.0
    losses: tuple[float, ...] = ()
    sent_bytes: float | None = None
    device_peak_mib: float = 0.0
    activations_mib: float = 0.0
    checked_s: float = 0.0
    first_peak_mib: float = 0.0


def measure(trains: Contender, work: Work, data: Iterator[list[Tensor]]) -> Found:
    """Time and traffic; memory is the caller's."""
    seconds, losses, sent = [], [], 0
    for number in range(work.warmup + work.steps):
        micros = next(data)
        if number == work.warmup and trains.take_traffic:
            trains.take_traffic()
        dist.barrier()
        begun = time.perf_counter()
        losses.append(trains.step(micros))
        if work.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    if trains.take_traffic:
        sent = trains.take_traffic()
    return Found(
        step_s=statistics.median(seconds[work.warmup :]),
        losses=(losses[0], losses[-1]),
        sent_bytes=sent / work.steps if trains.take_traffic else None,
    )


def measure_checks(work: Work, data: Iterator[list[Tensor]]) -> Found:
    """Every second step compares what the ranks hold alike: steps with and without it in turn, in one process."""
    trains = dstrain(work, stage=0, check_replicas_every=2)
    seconds: list[list[float]] = [[], []]
    for number in range(2 * (work.warmup + work.steps)):
        micros = next(data)
        dist.barrier()
        begun = time.perf_counter()
        trains.step(micros)
        seconds[number % 2].append(time.perf_counter() - begun)
    plain, checked = (statistics.median(some[work.warmup :]) for some in seconds)
    return Found(step_s=plain, checked_s=checked)


def activations_mib(work: Work) -> float:
    """What the backward of a micro-batch needs besides parameters."""
    model = gpt(work)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}  # a storage's address -> bytes; they live until the backward, so none comes twice

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = next(batches(work, 0, 1))[0]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loss_of(model(tokens[:, :-1]), tokens[:, 1:])
    loss.backward()
    return sum(kept.values()) / 2**20


def peak_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def main(name: str, work: Work) -> None:
    if work.device == "cpu":
        torch.set_num_threads(1)
    if work.device == "cuda" and os.environ["WORLD_SIZE"] == "1":
        dist.init_process_group("nccl", device_id=torch.device("cuda", 0))
    else:
        dist.init_process_group("gloo")  # also of two ranks on one GPU, which NCCL refuses
    dist.all_reduce(torch.ones(1, device=work.device))
    found = Found()
    if name == "activations":
        found.activations_mib = activations_mib(work)
    elif name == "checks":
        found = measure_checks(work, batches(work, dist.get_rank(), dist.get_world_size()))
    elif name in PIPES:
        data = dist.get_rank() % (dist.get_world_size() // PIPELINE)
        found = measure(PIPES[name](work), work, batches(work, data, dist.get_world_size() // PIPELINE))
    elif name != "floor":
        found = measure(contender(name, work), work, batches(work, dist.get_rank(), dist.get_world_size()))
    if work.device == "cuda":
        found.device_peak_mib = torch.cuda.max_memory_allocated() / 2**20
    found.peak_mib = peak_mib()
    print(json.dumps(asdict(found)), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Work(**json.loads(sys.argv[2])))
