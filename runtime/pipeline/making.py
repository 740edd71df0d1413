"""A job's pipeline: its arrangement, its schedule, and which layers each stage has."""

from __future__ import annotations

from torch import nn

from dstrain.runtime.comm import Communicator
from dstrain.runtime.pipeline.cuts import Chain, chain_of
from dstrain.runtime.pipeline.partition import partition
from dstrain.runtime.pipeline.pipeline import Pipeline
from dstrain.runtime.spec.config import JobConfig
from dstrain.runtime.spec.parallel_dims import ParallelDims, parallel_dims
from dstrain.runtime.spec.schedule import Schedule, check, find_schedule


def dims_of(job: JobConfig, world_size: int) -> ParallelDims:
    """How the ranks of a job are arranged. Raises UsageError where they cannot be."""
    parallel = job.parallel
    return parallel_dims(world_size, job.zero.stage, parallel.pipeline, parallel.data_replicate, parallel.data_shard)


def schedule_of(job: JobConfig, micro_batches: int) -> Schedule:
    """The schedule of a step, proved to end. Raises UsageError with the faulty cell."""
    parallel = job.parallel
    schedule = find_schedule(parallel.schedule, parallel.pipeline, micro_batches, parallel.stages_per_rank)
    check(schedule)
    return schedule


def make_pipeline(
    job: JobConfig, model: nn.Module, comm: Communicator, dims: ParallelDims, micro_batches: int
) -> Pipeline:
    """This rank's part of `model`, which is taken apart; all ranks call it. Raises UsageError."""
    schedule = schedule_of(job, micro_batches)
    chain = chain_of(model)
    counts = partition(job.parallel.partition, parameters_of(model, chain), schedule.stages)
    return Pipeline(model, comm, dims, schedule, counts)


def parameters_of(model: nn.Module, chain: Chain) -> list[float]:
    """Of each layer; a tied one counts in each layer that has it."""
    modules = dict(model.named_modules())
    return [
        float(sum(p.numel() for name in layer.modules for p in modules[name].parameters())) for layer in chain.layers
    ]
