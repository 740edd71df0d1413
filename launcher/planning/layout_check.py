"""Whether a job's layout fits the ranks that it gets: said by the head, in the words that the ranks would end with.

The ranks look again: they alone have the model, the schedule's file where it is theirs, and GPUs that nobody counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from dstrain.launcher.plan import Request, Target
from dstrain.launcher.request import TRAINER

if TYPE_CHECKING:
    from dstrain.runtime.spec.config import JobConfig


def check_layout(request: Request, slots: Sequence[int | None]) -> None:
    """slots: ranks on each host; None: nobody has said. A script's layout is its own. Raises UsageError."""
    world_size = sum(count or 0 for count in slots)
    if request.job is None or request.target != Target("module", TRAINER) or None in slots or not world_size:
        return
    from dstrain.runtime.spec.config import JobConfig
    from dstrain.runtime.spec.job_layout import dims_of, micro_batches_of

    job = JobConfig.model_validate_json(request.job)
    assert job.batch is not None, "a trainer's job has one"
    dims = dims_of(job, world_size)
    micro_batches = micro_batches_of(job.batch, dims)
    if dims.pipeline > 1 and _has_schedule_here(job, request.cwd):
        _check_stages(job, micro_batches)


def _has_schedule_here(job: JobConfig, cwd: str) -> bool:
    """The file that ranks would read. One that is missing where they would look for it too is a slip of the hand."""
    schedule = job.parallel.schedule
    if not isinstance(schedule, Path):
        return True
    with suppress(OSError):  # this directory may be gone
        if Path(cwd) == Path.cwd():
            return True
    return schedule.is_absolute() and schedule.is_file()


def _check_stages(job: JobConfig, micro_batches: int) -> None:
    from dstrain.runtime.pipeline.partition import check_partition
    from dstrain.runtime.spec.gpt_shapes import gpt_shapes
    from dstrain.runtime.spec.schedule import stages_of

    parallel = job.parallel
    stages = stages_of(parallel.schedule, parallel.pipeline, micro_batches, parallel.stages_per_rank)
    if job.gpt is not None:
        layers = gpt_shapes(job.gpt, sequence_length=1, item_bytes=4).layers
        check_partition(parallel.partition, len(layers), stages)
