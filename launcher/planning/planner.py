"""What a layout of a job will cost: memory, bytes, and time.

[Note: time]
A step takes as long as its schedule in the simulator, and what of the communication does not hide behind computing:
    gradients    behind the backwards of all micro-batches where each is reduced, else behind the last one's
    parameters   stage 3: behind all forwards and backwards; else behind the first forward
    messages     of pipeline stages, behind all that a rank computes; each delays the next stage besides
    tied ones    behind nothing
Operations take what the GPU does in a second; memory-bound ones, the optimizer and the launch of kernels are left out.
So the numbers compare layouts; they foretell a step only as well as `--tflops` and the links are known, or `--costs`.
With a trace of the very schedule its steps are simulated instead, each by its own times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from dstrain.launcher.planning.activations import Kept, kept_by, message_bytes, peak_bytes, recomputed
from dstrain.launcher.planning.cluster import Cluster, Node
from dstrain.launcher.planning.costs import GivenCosts, StageCosts, apply_given, estimated
from dstrain.launcher.planning.layout import WINDOW, Layout, ended, enough, known_schedule, rank_of
from dstrain.launcher.planning.memory import HEADROOM, Memory, StateMemory, accumulates
from dstrain.launcher.planning.parts import Part, counts_of, parts_of
from dstrain.launcher.planning.traffic import (
    COPIES,
    GATHERING,
    REDUCTION,
    STAGES,
    TIED,
    Flow,
    between_stages,
    collectives,
)
from dstrain.runtime.spec.config import JobConfig
from dstrain.runtime.spec.model_shapes import ModelShapes
from dstrain.runtime.spec.schedule import Schedule, Timeline, simulate
from dstrain.runtime.spec.trace import Measured, Replay

SPLIT = ("zb_h1", "zb_v")
"""Schedules with weights' gradients apart."""


class Exposed(NamedTuple):
    """Communication that nothing hides: within_s: between the actions of a schedule, behind_s: after them."""

    within_s: float
    behind_s: float


class Estimate(NamedTuple):
    """What is known of a layout without simulating it. least_s: no step is shorter."""

    costs: StageCosts
    flows: tuple[Flow, ...]
    exposed: Exposed
    least_s: float


@dataclass(frozen=True)
class Plan:
    """A layout and its costs. parts, memory: of each pipeline rank. timeline: of as many micro-batches as `enough`
    says; makespan_s, bubble: of all. exposed_s: communication besides. replayed: traced steps that makespan and bubble
    are medians of, or 0. [Note: time]"""

    layout: Layout
    parts: tuple[Part, ...]
    schedule: Schedule
    memory: tuple[Memory, ...]
    flows: tuple[Flow, ...]
    costs: StageCosts
    timeline: Timeline
    makespan_s: float
    bubble: float
    exposed_s: float
    fits: bool
    replayed: int = 0

    @property
    def step_s(self) -> float:
        """One optimizer step."""
        return self.makespan_s + self.exposed_s

    @property
    def most_bytes(self) -> int:
        """Of the rank that needs most."""
        return max(memory.total for memory in self.memory)

    @property
    def host_bytes(self) -> float:
        """The most that a host sends to others in a step."""
        return sum(flow.host_bytes for flow in self.flows)

    @property
    def between_bytes(self) -> float:
        """Between all hosts in a step."""
        return sum(flow.between_bytes for flow in self.flows)


class Planner:
    """Plans layouts of one job on one cluster; parts and schedules are made once."""

    def __init__(self, job: JobConfig, shapes: ModelShapes, cluster: Cluster) -> None:
        self.job, self.shapes, self.cluster = job, shapes, cluster
        self.state = StateMemory(job, shapes)
        self.again = recomputed(shapes, job.train.activation_checkpointing)
        self._counts: dict[tuple[int, str | tuple[int, ...]], list[int]] = {}
        self._parts: dict[tuple[object, ...], tuple[Part, ...]] = {}
        self._kept: dict[Part, dict[int, Kept]] = {}

    def schedule(self, layout: Layout) -> Schedule:
        """Of as many micro-batches as `enough` says. Raises UsageError."""
        return known_schedule(layout.schedule, layout.dims.pipeline, enough(layout), layout.stages_per_rank)

    def parts(self, layout: Layout) -> tuple[Part, ...]:
        """Of each pipeline rank. Raises UsageError where the model cannot be cut so."""
        holders, ends = rank_of(layout), ended(layout)
        key = holders, ends, layout.partition
        if key not in self._parts:
            cut = len(holders), layout.partition
            if cut not in self._counts:
                self._counts[cut] = counts_of(self.shapes, *cut)
            self._parts[key] = tuple(parts_of(self.shapes, self._counts[cut], holders, ends))
        return self._parts[key]

    def estimate(self, layout: Layout, given: GivenCosts | None = None) -> Estimate:
        """Everything but the simulation."""
        parts = self.parts(layout)
        stages, messages = between_stages(layout, self._boundaries(layout, parts), rank_of(layout), self.cluster)
        by_operations = estimated(parts, self.again, layout.micro, self.cluster.tflops)
        costs = apply_given(given, by_operations._replace(message=messages))
        flows = [*([stages] if stages else []), *collectives(layout, parts, self.state, self.cluster)]
        exposed = _exposed(layout, flows, costs, parts)
        least_s = _least_s(layout, costs, parts) + sum(exposed)
        return Estimate(costs, tuple(flows), exposed, least_s)

    def plan(self, layout: Layout, given: GivenCosts | None = None) -> Plan:
        """Raises UsageError where the layout is none of this model's."""
        estimate, parts, schedule = self.estimate(layout, given), self.parts(layout), self.schedule(layout)
        timeline = simulate(schedule, estimate.costs.for_simulator())
        traced = given.traced if given is not None else None
        replay = _replayed(layout, traced) if traced is not None else None
        makespan_s, bubble = replay[1:] if replay is not None else self._simulated(layout, timeline, estimate.costs)
        memory = self.memory(layout)
        return Plan(
            layout=layout,
            parts=parts,
            schedule=schedule,
            memory=memory,
            flows=estimate.flows,
            costs=estimate.costs,
            timeline=timeline,
            makespan_s=makespan_s,
            bubble=bubble,
            exposed_s=sum(estimate.exposed) if replay is None else estimate.exposed.behind_s,
            fits=self.fits(layout, memory),
            replayed=replay.steps if replay is not None else 0,
        )

    def _simulated(self, layout: Layout, timeline: Timeline, costs: StageCosts) -> tuple[float, float]:
        """Makespan and bubble of all micro-batches."""
        makespan_s, known = timeline.makespan_s, timeline.schedule.micro_batches
        if known < layout.micro_batches:
            makespan_s += (layout.micro_batches - known) * self._one_more_s(layout, timeline, costs)
        busy_s = sum(costs.whole) * layout.micro_batches
        total_s = layout.dims.pipeline * makespan_s
        return makespan_s, max(0.0, 1 - busy_s / total_s) if total_s else 0.0  # a rounding is no idle time

    def _one_more_s(self, layout: Layout, timeline: Timeline, costs: StageCosts) -> float:
        """What another micro-batch adds: computing, or waiting for messages, whichever is slower."""
        ranks, known = layout.dims.pipeline, timeline.schedule.micro_batches
        least, most = (
            simulate(known_schedule(layout.schedule, ranks, count, layout.stages_per_rank), costs.for_simulator())
            for count in (known - known % ranks - WINDOW * ranks, known - known % ranks)
        )
        return (most.makespan_s - least.makespan_s) / (WINDOW * ranks)

    def sketch(self, plan: Plan, columns: int) -> Timeline:
        """The schedule of as many micro-batches as can be told apart in so many columns, which are most often fewer."""
        layout, ranks = plan.layout, plan.layout.dims.pipeline
        per_rank = plan.schedule.stages // ranks
        fewer = max(ranks, columns // (3 * per_rank))
        if isinstance(layout.schedule, Path) or fewer >= plan.schedule.micro_batches:
            return plan.timeline
        short = known_schedule(layout.schedule, ranks, fewer, layout.stages_per_rank)
        return simulate(short, plan.costs.for_simulator())

    def memory(self, layout: Layout) -> tuple[Memory, ...]:
        """Of each pipeline rank, at its peak."""
        parts, schedule = self.parts(layout), self.schedule(layout)
        boundaries = self._boundaries(layout, parts)
        return tuple(
            replace(
                self.state.of(part, layout.dims, layout.zero, layout.micro_batches),
                activations=round(self._activations(layout, part, schedule, rank)),
                messages=round(message_bytes(schedule.ranks[rank], schedule.rank_of, boundaries)),
            )
            for rank, part in enumerate(parts)
        )

    def state_memory(self, layout: Layout) -> int:
        """What the fullest rank holds at least: its state, and one micro-batch."""
        return max(
            self.state.of(part, layout.dims, layout.zero, layout.micro_batches).total
            + round(layout.micro * max(kept.held for kept in self._kept_of(layout, part).values()))
            for part in self.parts(layout)
        )

    def fits(self, layout: Layout, memory: Sequence[Memory]) -> bool:
        """Whether every rank has the room."""
        return all(one.total <= room(self.node_of(layout, rank)) for rank, one in enumerate(memory))

    def node_of(self, layout: Layout, pipeline_rank: int) -> Node:
        """The host with the least memory of those that a part of the model is on."""
        width = layout.dims.data
        nodes = self.cluster.nodes_of(range(pipeline_rank * width, (pipeline_rank + 1) * width))
        return min(nodes, key=lambda node: node.memory_bytes)

    def _kept_of(self, layout: Layout, part: Part) -> dict[int, Kept]:
        """Of each stage, for one sample."""
        if part not in self._kept:
            rebuilds = layout.dims.pipeline > 1 and not self.job.precision.autocast
            both = zip(part.stages, part.layers, strict=True)
            self._kept[part] = {stage: kept_by(layers, self.again, rebuilds) for stage, layers in both}
        return self._kept[part]

    def _activations(self, layout: Layout, part: Part, schedule: Schedule, rank: int) -> float:
        kept = self._kept_of(layout, part)
        peak = peak_bytes(schedule.ranks[rank], kept, layout.micro)
        whole, simulated = layout.micro * sum(one.held for one in kept.values()), schedule.micro_batches
        if simulated < layout.micro_batches and peak >= simulated * whole:  # all at once, however many there are
            peak = layout.micro_batches * whole
        return peak + layout.micro * max(one.again for one in kept.values())

    def _boundaries(self, layout: Layout, parts: Sequence[Part]) -> list[float]:
        """Bytes of one micro-batch behind each stage but the last."""
        sizes = {
            stage: layers[-1].output_bytes * layout.micro
            for part in parts
            for stage, layers in zip(part.stages, part.layers, strict=True)
        }
        return [sizes[stage] for stage in range(len(sizes) - 1)]


def _replayed(layout: Layout, traced: Measured) -> Replay | None:
    """None where another schedule was traced, or another number of ranks."""
    ranks, micro_batches = layout.dims.pipeline, layout.micro_batches
    if ranks == 1 or (len(traced.ranks), traced.micro_batches) != (layout.dims.world_size, micro_batches):
        return None
    return traced.replay(known_schedule(layout.schedule, ranks, micro_batches, layout.stages_per_rank))


def room(node: Node) -> float:
    """Bytes that a plan may fill on each rank of a host."""
    return node.memory_bytes * (1 - HEADROOM)


def _exposed(layout: Layout, flows: Sequence[Flow], costs: StageCosts, parts: Sequence[Part]) -> Exposed:
    """[Note: time]"""
    link_s = {flow.name: flow.link_s for flow in flows}
    backwards = costs.backward
    forward = max(sum(costs.forward[stage] for stage in part.stages) for part in parts)
    backward = max(sum(backwards[stage] for stage in part.stages) for part in parts)
    times = layout.micro_batches
    gradients = link_s.get(REDUCTION, 0.0) + link_s.get(COPIES, 0.0)
    behind = backward * (times if accumulates(layout.zero) == "sharded" else 1)
    parameters = link_s.get(GATHERING, 0.0)
    hiding = (forward + backward) * times if layout.zero.stage == 3 else forward
    messages = link_s.get(STAGES, 0.0) - (forward + backward) * times
    return Exposed(
        within_s=max(0.0, parameters - hiding) + max(0.0, messages),
        behind_s=max(0.0, gradients - behind) + link_s.get(TIED, 0.0),
    )


def _least_s(layout: Layout, costs: StageCosts, parts: Sequence[Part]) -> float:
    """For each rank: until the first micro-batch has come to it, its own work, and the last one's way back to the first
    stage; where weights' gradients are split off (of other schedules those of the last one), they may be done
    meanwhile."""
    is_split = layout.schedule in SPLIT
    back_costs = list(costs.input_gradient)
    if not is_split:
        back_costs[0] = costs.backward[0]
    way = 0.0
    there: list[float] = []
    back: list[float] = []
    for stage, forward in enumerate(costs.forward):
        there.append(way)
        back.append((back[-1] + back_costs[stage - 1] + costs.message[stage - 1]) if stage else 0.0)
        way += forward + (costs.message[stage] if stage < len(costs.message) else 0.0)
    found, wholes = [], costs.whole
    for part in parts:
        first, times = min(part.stages), layout.micro_batches
        whole = times * sum(wholes[stage] for stage in part.stages)
        weights = sum(costs.weight_gradient[stage] for stage in part.stages) * times
        needed = whole - (weights if is_split else costs.weight_gradient[first])
        found.append(there[first] + max(whole, needed + back[first]))
    return max(found)
