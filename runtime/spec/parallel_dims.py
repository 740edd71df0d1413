"""How the ranks of a job are arranged: pipeline × data_replicate × data_shard × tensor, the first axis outermost.

[Note: places]
Neighbouring ranks are on one host, so the axis that talks most is the innermost: rank = ((pipeline × data_replicate +
replica) × data_shard + shard) × tensor + t. Pipeline stages, which send each other the least, are the farthest apart;
ranks that share one copy of the state are neighbours. Tensor parallelism is not built yet: its axis has one place.
"""

from __future__ import annotations

from dataclasses import dataclass

from dstrain.runtime.spec.errors import UsageError


@dataclass(frozen=True)
class ParallelDims:
    """[Note: places] Each number is that of the ranks along one axis; their product is `world_size`."""

    pipeline: int
    data_replicate: int
    data_shard: int
    tensor: int = 1

    @property
    def world_size(self) -> int:
        return self.pipeline * self.data

    @property
    def data(self) -> int:
        """Ranks that hold the same part of the model, and see different samples."""
        return self.data_replicate * self.data_shard * self.tensor

    def pipeline_rank(self, rank: int) -> int:
        """Which part of the model a rank holds, from 0."""
        return rank // self.data

    def data_rank(self, rank: int) -> int:
        """Which samples a rank sees, from 0."""
        return rank % self.data

    def data_ranks(self, pipeline_rank: int) -> list[int]:
        """The ranks that hold one part of the model."""
        return list(range(pipeline_rank * self.data, (pipeline_rank + 1) * self.data))

    def pipeline_ranks(self, data_rank: int) -> list[int]:
        """The ranks that hold one copy of the model, part by part."""
        return list(range(data_rank, self.world_size, self.data))

    def __str__(self) -> str:
        return (
            f"pipeline {self.pipeline} × data_replicate {self.data_replicate} × data_shard {self.data_shard} "
            f"= {self.world_size} ranks"
        )


def parallel_dims(
    world_size: int, stage: int, pipeline: int = 1, data_replicate: int | None = None, data_shard: int | None = None
) -> ParallelDims:
    """The arrangement of `world_size` ranks at a ZeRO stage; what is not given follows from the rest: at stage 0 all
    data ranks are replicas, at others they share one copy. Raises UsageError, with all factors, where it is none."""
    wished = f"pipeline {pipeline} × data_replicate {data_replicate or '?'} × data_shard {data_shard or '?'}"
    if world_size % pipeline:
        raise UsageError.mismatch("parallel.pipeline", f"a divisor of {world_size} ranks", f"{pipeline} ({wished})")
    data = world_size // pipeline
    if stage == 0:
        if data_replicate not in (None, data):
            expected = f"{data}, the data ranks, at stage 0"
            raise UsageError.mismatch("parallel.data_replicate", expected, f"{data_replicate} ({wished})")
        return ParallelDims(pipeline, data, 1)
    shard = data // (data_replicate or 1) if data_shard is None else data_shard
    replicate = data // shard if data_replicate is None and shard and not data % shard else data_replicate or 0
    if shard * replicate != data:
        whole = f"{data} ranks" if pipeline == 1 else f"{world_size} ranks / pipeline {pipeline} = {data}"
        found = f"{shard} × {data_replicate}" if data_replicate else str(shard)
        raise UsageError.mismatch("parallel.data_shard", f"data_shard × data_replicate = {whole}", found)
    return ParallelDims(pipeline, replicate, shard)
