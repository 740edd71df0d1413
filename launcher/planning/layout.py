"""One way to spread a job over its ranks, and the schedule of its steps."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from dstrain.runtime.spec.config import JobConfig
from dstrain.runtime.spec.errors import UsageError
from dstrain.runtime.spec.job_layout import dims_of, micro_batches_of
from dstrain.runtime.spec.parallel_dims import ParallelDims
from dstrain.runtime.spec.schedule import Schedule, endings, find_schedule
from dstrain.runtime.spec.schedule.plan import in_a_loop, in_a_v
from dstrain.runtime.spec.training_config import OffloadConfig, ZeroConfig

ROUNDS, FEWER_ROUNDS, WINDOW = 6, 4, 2
"""[Note: enough micro-batches] as many as these times the pipeline's ranks."""
LONG = 16
"""Ranks of a pipeline from which on fewer rounds are enough: they would take the simulator seconds."""
WHOLE = 2048
"""[Note: enough micro-batches] stages × micro-batches: 50 ms in the simulator."""


@dataclass(frozen=True)
class Layout:
    """schedule, stages_per_rank, partition: of `parallel`. micro: samples; micro_batches: of a step, on each rank."""

    dims: ParallelDims
    zero: ZeroConfig
    micro: int
    micro_batches: int
    schedule: str | Path = "1f1b"
    stages_per_rank: int | None = None
    partition: str | tuple[int, ...] = "parameters"

    def __str__(self) -> str:
        """For people, short."""
        words = [f"stage {self.zero.stage}"]
        if self.dims.pipeline > 1:
            words.insert(0, f"pipeline {self.dims.pipeline} ({self.schedule})")
        return ", ".join(words)


def layout_of(job: JobConfig, world_size: int) -> Layout:
    """What the job asks for. Raises UsageError, with all factors, where it does not fit its ranks or its batch."""
    parallel, batch = job.parallel, job.batch
    if batch is None:
        raise UsageError.mismatch("batch", "a section with global and micro", "none")
    dims = dims_of(job, world_size)
    return Layout(
        dims=dims,
        zero=job.zero,
        micro=batch.micro,
        micro_batches=micro_batches_of(batch, dims),
        schedule=parallel.schedule,
        stages_per_rank=parallel.stages_per_rank,
        partition=parallel.partition,
    )


def zero_at(zero: ZeroConfig, stage: int) -> ZeroConfig:
    """The section `zero` at another stage, without keys that it does not have there."""
    changes: dict[str, object] = {"stage": stage}
    if stage < 3:
        changes |= {"reshard": "micro_batch", "offload": OffloadConfig(optimizer=zero.offload.optimizer and stage > 0)}
    if stage == 0:
        changes |= {"accumulate": None, "comm": zero.comm if zero.comm in ("direct", "native") else "auto"}
    return zero.model_copy(update=changes)


def known_schedule(schedule: str | Path, ranks: int, micro_batches: int, stages_per_rank: int | None) -> Schedule:
    """The runtime's; those with names are made once. Raises UsageError."""
    if isinstance(schedule, Path):
        return find_schedule(schedule, ranks, micro_batches)
    return _named_schedule(schedule, ranks, micro_batches, stages_per_rank)


@lru_cache(maxsize=64)
def _named_schedule(name: str, ranks: int, micro_batches: int, stages_per_rank: int | None) -> Schedule:
    return find_schedule(name, ranks, micro_batches, stages_per_rank)


def rank_of(layout: Layout) -> tuple[int, ...]:
    """The pipeline rank of each stage, without the schedule itself where its name says it."""
    ranks = layout.dims.pipeline
    match layout.schedule:
        case "zb_v":
            return in_a_v(ranks)
        case "interleaved_1f1b":
            return in_a_loop(ranks, layout.stages_per_rank or 2)
        case str():
            return in_a_loop(ranks, 1)
    return known_schedule(layout.schedule, ranks, layout.micro_batches, None).rank_of


def ended(layout: Layout) -> tuple[tuple[int, ...], ...]:
    """Of each rank, its stages in the order in which they end."""
    ranks, micro_batches = layout.dims.pipeline, enough(layout)
    if isinstance(layout.schedule, Path):
        return _ended(known_schedule(layout.schedule, ranks, micro_batches, None))
    return _named_ended(layout.schedule, ranks, micro_batches, layout.stages_per_rank)


@lru_cache(maxsize=4096)
def _named_ended(name: str, ranks: int, micro_batches: int, stages_per_rank: int | None) -> tuple[tuple[int, ...], ...]:
    """As `ended`; where a rank has one stage, without its schedule."""
    if name in ("interleaved_1f1b", "zb_v"):
        return _ended(_named_schedule(name, ranks, micro_batches, stages_per_rank))
    return tuple((rank,) for rank in range(ranks))


def _ended(schedule: Schedule) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(endings(row)) for row in schedule.ranks)


def enough(layout: Layout) -> int:
    """[Note: enough micro-batches]
    A small schedule is simulated whole, and so is a user's own. Any other repeats itself once its pipeline is full:
    ROUNDS are simulated, the others take as long as the last WINDOW of these (interleaved, every other round may be
    faster). Interleaving spreads the rest of a division by the ranks over its groups; the largest is kept so large.
    """
    ranks, micro_batches = layout.dims.pipeline, layout.micro_batches
    if isinstance(layout.schedule, Path) or micro_batches * len(rank_of(layout)) <= WHOLE:
        return micro_batches
    rounds = ROUNDS if ranks < LONG else FEWER_ROUNDS
    groups, rest = divmod(micro_batches, ranks)
    return min(micro_batches, rounds * ranks + min(rest, -(-rest // max(groups, 1)) * rounds))
