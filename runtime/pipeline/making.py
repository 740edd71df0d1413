"""A job's pipeline: its arrangement, its schedule, and which layers each stage has."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import nn

from dstrain.runtime.comm import Communicator
from dstrain.runtime.data.agreement import together
from dstrain.runtime.data.loader import to_device
from dstrain.runtime.data.samples import Batch
from dstrain.runtime.first_batch import explained
from dstrain.runtime.pipeline.cuts import Chain, chain_of
from dstrain.runtime.pipeline.partition import partition
from dstrain.runtime.pipeline.pipeline import Pipeline
from dstrain.runtime.pipeline.timing import LayerTimer, recorded
from dstrain.runtime.precision import DTYPES, parameter_dtype
from dstrain.runtime.spec.config import JobConfig
from dstrain.runtime.spec.parallel_dims import ParallelDims
from dstrain.runtime.spec.schedule import Schedule, check, find_schedule
from dstrain.runtime.task import task_of


def schedule_of(job: JobConfig, micro_batches: int) -> Schedule:
    """The schedule of a step, proved to end. Raises UsageError with the faulty cell."""
    parallel = job.parallel
    schedule = find_schedule(parallel.schedule, parallel.pipeline, micro_batches, parallel.stages_per_rank)
    check(schedule)
    return schedule


def make_pipeline(
    job: JobConfig,
    model: nn.Module,
    comm: Communicator,
    dims: ParallelDims,
    micro_batches: int,
    batch: Callable[[], Batch],
    folder: Path | None = None,
) -> Pipeline:
    """This rank's part of `model`, which is taken apart; all ranks call it. Raises UsageError.

    batch: gives a micro-batch, for a partition by time. folder: where measured times are kept.
    """
    schedule, chain = schedule_of(job, micro_batches), chain_of(model)
    wished = job.parallel.partition
    seconds: list[float] = []
    if wished == "time":
        seconds = comm.broadcast_object(together(lambda: _seconds(job, model, chain, comm, batch, folder), comm))
    counts = partition(wished, seconds or parameters_of(model, chain), schedule.stages)
    return Pipeline(model, comm, dims, schedule, counts, seconds)


def _seconds(
    job: JobConfig,
    model: nn.Module,
    chain: Chain,
    comm: Communicator,
    batch: Callable[[], Batch],
    folder: Path | None,
) -> list[float]:
    """Of each layer, on rank 0."""
    if comm.rank != 0:
        return []
    assert job.model is not None
    precision, here = job.precision, to_device(batch(), comm.device)

    def autocast() -> AbstractContextManager[None]:
        return torch.autocast(comm.device.type, DTYPES[precision.dtype], enabled=precision.autocast)

    timer = LayerTimer(model, chain, comm.device, parameter_dtype(precision), autocast)
    with explained(here, comm.device):
        of_job = {"model": job.model.model_dump(mode="json"), "autocast": precision.autocast, "loss": job.train.loss}
        key = {**timer.key(here), **of_job}
        return recorded(folder, key, lambda: timer.seconds(task_of(here, job.train.loss), here))


def parameters_of(model: nn.Module, chain: Chain) -> list[float]:
    """Of each layer; a tied one counts in each layer that has it."""
    modules = dict(model.named_modules(remove_duplicate=False))
    return [
        float(sum(p.numel() for name in layer.modules for p in modules[name].parameters())) for layer in chain.layers
    ]
