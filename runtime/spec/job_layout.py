"""How a job's ranks are arranged, and what follows for its steps: found alike by the head before any host is touched,
by `dstrain plan`, and by the ranks. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dstrain.runtime.spec.errors import UsageError
from dstrain.runtime.spec.parallel_dims import ParallelDims, parallel_dims

if TYPE_CHECKING:
    from dstrain.runtime.spec.config import JobConfig
    from dstrain.runtime.spec.data_config import BatchConfig


def dims_of(job: JobConfig, world_size: int) -> ParallelDims:
    """How the ranks of a job are arranged. Raises UsageError, with all factors, where they cannot be."""
    parallel = job.parallel
    return parallel_dims(world_size, job.zero.stage, parallel.pipeline, parallel.data_replicate, parallel.data_shard)


def micro_batches_of(batch: BatchConfig, dims: ParallelDims) -> int:
    """Of one step, on each data rank. Raises UsageError with the nearest batch that divides; where there is a pipeline,
    with all its factors."""
    together = batch.micro * dims.data
    if batch.global_ % together and dims.pipeline > 1:
        expected = (
            f"a multiple of batch.micro × data ranks = {batch.micro} × {dims.data} = {together} "
            f"({dims.world_size} ranks / pipeline {dims.pipeline} = {dims.data})"
        )
        nearest = max(1, round(batch.global_ / together)) * together
        raise UsageError.mismatch("batch.global", expected, str(batch.global_), f"the nearest is {nearest}")
    return batch.accumulation(dims.data)
