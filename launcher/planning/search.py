"""All layouts of a job on a cluster, and the ten that are fastest of those that fit.

[Note: best first]
No step is shorter than what `Planner.estimate` says, and that is cheap. So layouts are looked at in the order of that
bound, and the search ends when it is above the time of the last that would be shown: no other can be faster.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import isqrt

from dstrain.launcher.planning.layout import Layout, zero_at
from dstrain.launcher.planning.planner import Plan, Planner, room
from dstrain.launcher.planning.units import gib, gigabytes, seconds
from dstrain.runtime.spec.errors import UsageError
from dstrain.runtime.spec.parallel_dims import ParallelDims
from dstrain.runtime.spec.schedule import SCHEDULE_NAMES
from dstrain.runtime.spec.training_config import ZeroConfig

SHOWN = 10
_STAGES = (0, 1, 2, 3)
_PER_RANK = {"interleaved_1f1b": 2, "zb_v": 2}
"""Stages of a rank, by default."""


@dataclass(frozen=True)
class Found:
    """plans: the best, the best first. tried: layouts. why: one line on the first."""

    plans: tuple[Plan, ...]
    tried: int
    why: str


def search(planner: Planner) -> Found:
    """Raises UsageError where no layout divides the batch, or none fits, with what is nearest to fitting."""
    layouts = list(_layouts(planner))
    if not layouts:
        batch = planner.job.batch
        assert batch is not None, "a trainer's job has one"
        world = planner.cluster.world_size
        expected = f"a multiple of the data ranks of some layout of {world} ranks"
        raise UsageError.mismatch("batch.global", expected, str(batch.global_), f"such as {world}")
    plans = best(planner, layouts, SHOWN)
    if not plans:
        raise _none_fits(planner, layouts)
    return Found(tuple(plans), len(layouts), _why(planner, plans, layouts))


def best(planner: Planner, layouts: Iterable[Layout], count: int) -> list[Plan]:
    """The fastest that fit. [Note: best first]"""
    bounds = sorted(
        ((planner.estimate(layout).least_s, _simplicity(layout), layout) for layout in layouts),
        key=lambda bound: bound[:2],
    )
    smallest = min(room(node) for node in planner.cluster.nodes)
    is_even = len({node.memory_bytes for node in planner.cluster.nodes}) == 1
    plans: list[Plan] = []
    for least_s, _, layout in bounds:
        if len(plans) >= count and least_s > plans[count - 1].step_s:
            break
        if is_even and planner.state_memory(layout) > smallest:
            continue
        if not planner.fits(layout, planner.memory(layout)):
            continue
        plans.append(planner.plan(layout))
        plans.sort(key=lambda plan: (_rounded(plan.step_s), _simplicity(plan.layout)))
    return plans[:count]


def _rounded(step_s: float) -> float:
    """Differences below a thousandth are not worth a more complicated layout."""
    return float(f"{step_s:.3g}")


def _simplicity(layout: Layout) -> tuple[int, ...]:
    """Of two layouts alike in time, the one with the lower numbers."""
    name = SCHEDULE_NAMES.index(layout.schedule) if isinstance(layout.schedule, str) else len(SCHEDULE_NAMES)
    return layout.dims.pipeline, layout.zero.stage, name, layout.dims.data_shard, layout.micro_batches


def _layouts(planner: Planner) -> Iterator[Layout]:
    job, world = planner.job, planner.cluster.world_size
    assert job.batch is not None, "a trainer's job has one"
    layers = 1 if planner.shapes.uncut or job.train.compile else len(planner.shapes.layers)
    wished = job.parallel.partition if isinstance(job.parallel.partition, str) else "parameters"
    for pipeline in _divisors(world):
        data = world // pipeline
        if pipeline > layers or job.batch.global_ % data:
            continue
        share = job.batch.global_ // data
        for schedule, per_rank in _schedules(planner, pipeline, layers):
            for zero, shard in _shardings(planner, data):
                dims = ParallelDims(pipeline, data // shard, shard)
                for micro in _divisors(share):
                    yield Layout(dims, zero, micro, share // micro, schedule, per_rank, wished)


def _schedules(planner: Planner, pipeline: int, layers: int) -> Iterator[tuple[str, int | None]]:
    if pipeline == 1:
        yield "1f1b", None
        return
    for name in SCHEDULE_NAMES:
        per_rank = _PER_RANK.get(name, 1)
        if name == "interleaved_1f1b":
            per_rank = planner.job.parallel.stages_per_rank or per_rank
        if pipeline * per_rank <= layers:
            yield name, per_rank if name == "interleaved_1f1b" else None


def _shardings(planner: Planner, data: int) -> Iterator[tuple[ZeroConfig, int]]:
    job = planner.job
    for stage in _STAGES:
        if stage == 3 and (job.train.compile or job.precision.autocast):
            continue
        zero = zero_at(job.zero, stage)
        if stage == 0:
            yield zero, 1
        else:
            yield from ((zero, shard) for shard in _divisors(data) if shard > 1)


def _divisors(number: int) -> list[int]:
    small = [one for one in range(1, isqrt(number) + 1) if number % one == 0]
    return sorted({*small, *(number // one for one in small)})


# --- words -----------------------------------------------------------------------------------------------------


def _none_fits(planner: Planner, layouts: Sequence[Layout]) -> UsageError:
    nearest = min(layouts, key=planner.state_memory)
    node = min(planner.cluster.nodes, key=lambda node: node.memory_bytes)
    expected = (
        f"at most {gib(room(node))} on each rank of {node.name} (--gpu-memory {gib(node.memory_bytes)}, less 10 %)"
    )
    found = f"at least {gib(planner.state_memory(nearest))} in each of {len(layouts)} layouts"
    fix = "more hosts, train.activation_checkpointing: all or a smaller model"
    return UsageError.mismatch("memory", expected, found, fix)


def _why(planner: Planner, plans: Sequence[Plan], layouts: Sequence[Layout]) -> str:
    """The winner against the best of the other kind."""
    winner = plans[0]
    is_pipeline = winner.layout.dims.pipeline > 1
    other = "without a pipeline" if is_pipeline else "with a pipeline"
    rivals = [layout for layout in layouts if (layout.dims.pipeline > 1) != is_pipeline]
    words = f"{winner.layout}: {seconds(winner.step_s)} a step, {_costs(winner)}"
    if not rivals:
        return words
    rival = next((plan for plan in plans if (plan.layout.dims.pipeline > 1) != is_pipeline), None)
    found = [rival] if rival is not None else best(planner, rivals, 1)
    if not found:
        return f"{words}; {other} nothing fits"
    return f"{words}; the best {other} ({found[0].layout}): {seconds(found[0].step_s)}, {_costs(found[0])}"


def _costs(plan: Plan) -> str:
    parts = [f"bubble {100 * plan.bubble:.0f} %"] if plan.layout.dims.pipeline > 1 else []
    if plan.exposed_s > 0.01 * plan.step_s:
        parts.append(f"{100 * plan.exposed_s / plan.step_s:.0f} % waiting for links")
    sent = f"{gigabytes(plan.host_bytes)} from a host to others" if plan.host_bytes else "nothing between hosts"
    return ", ".join([*parts, sent])
