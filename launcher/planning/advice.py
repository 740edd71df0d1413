"""What makes a plan a bad choice, in words."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dstrain.launcher.planning.memory import accumulates
from dstrain.launcher.planning.planner import SPLIT, Plan, Planner, room
from dstrain.launcher.planning.traffic import STAGES, TIED, Flow
from dstrain.launcher.planning.units import gib, gigabytes, number, seconds
from dstrain.runtime.spec.schedule import Kind

MUCH_BUBBLE = 0.2
MUCH_WAITING = 0.1


def warnings(planner: Planner, plan: Plan) -> Iterator[str]:
    """One line each."""
    yield from _of_memory(planner, plan)
    yield from _of_links(planner, plan)
    yield from _of_splits(planner, plan)
    if plan.bubble > MUCH_BUBBLE:
        fix = "a larger batch.global, a smaller batch.micro, or another parallel.schedule"
        times, ranks = plan.layout.micro_batches, plan.layout.dims.pipeline
        yield f"bubble {100 * plan.bubble:.0f} %, of {times} micro-batches on {ranks} pipeline ranks; {fix}"


def _of_memory(planner: Planner, plan: Plan) -> Iterator[str]:
    """The rank that lacks most, and a smaller GPU that alone is too small."""
    lacking = []
    for rank, memory in enumerate(plan.memory):
        node = planner.node_of(plan.layout, rank)
        if memory.total > room(node):
            lacking.append((memory.total - room(node), rank, node))
    if not lacking:
        return
    _, rank, node = max(lacking, key=lambda one: one[0])
    largest = max(planner.cluster.nodes, key=lambda one: one.memory_bytes)
    needed, limit = plan.memory[rank].total, room(node)
    words = f"does not fit: pipeline rank {rank} needs {gib(needed)}, and {node.name} has room for {gib(limit)}"
    if room(largest) >= needed:
        yield f"{words}; other hosts, such as {largest.name}, have room for {gib(room(largest))}: leave it out"
    else:
        yield f"{words}; {_remedy(planner, plan)}"


def _remedy(planner: Planner, plan: Plan) -> str:
    memory = max(plan.memory, key=lambda one: one.total)
    if memory.activations > memory.total / 2 and not planner.again:
        return "train.activation_checkpointing: all, or a smaller batch.micro"
    if plan.layout.zero.stage < 3 and plan.layout.dims.data > 1:
        return "a higher zero.stage, or parallel.pipeline"
    return "more hosts, or --search for a layout that fits"


def _of_links(planner: Planner, plan: Plan) -> Iterator[str]:
    waiting = plan.exposed_s / plan.step_s if plan.step_s else 0.0
    if waiting > MUCH_WAITING:
        flow = max(plan.flows, key=lambda one: one.link_s)
        slowest = min(planner.cluster.nodes, key=lambda one: one.link_gbit)
        if flow.between_bytes:
            link = f"{slowest.name}'s link to other hosts ({number(slowest.link_gbit)} Gbit/s)"
            words = f"{gigabytes(flow.host_bytes)} of {flow.name} a step over {link}"
        else:
            words = f"{gigabytes(flow.rank_bytes)} of {flow.name} a step from each rank inside of a host"
        share = f"{100 * waiting:.0f} % of a step ({seconds(plan.exposed_s)})"
        yield f"{share} is waiting for links: {words}; {_less(plan, flow)}"
    messages = max(plan.costs.message, default=0.0)
    shortest = max(plan.costs.forward)
    if messages > shortest:
        yield (
            f"a message between pipeline stages takes {seconds(messages)}, a forward {seconds(shortest)}: the link is "
            "too slow for this cut"
        )


def _of_splits(planner: Planner, plan: Plan) -> Iterator[str]:
    """What the runtime cannot split is planned as if it could."""
    schedule, precision = plan.layout.schedule, planner.job.precision
    if not precision.autocast or plan.layout.dims.pipeline == 1:
        return
    own = isinstance(schedule, Path)
    if schedule in SPLIT or (
        own and any(one.kind is Kind.INPUT_GRADIENT for row in plan.schedule.ranks for one in row)
    ):
        yield (
            f"{plan.schedule.name} splits nothing under precision.autocast: weights' gradients come with the inputs', "
            f"so ranks wait longer than planned; take 1f1b, or precision.dtype: {precision.dtype} without autocast"
        )


def _less(plan: Plan, flow: Flow) -> str:
    """How less would be sent."""
    layout = plan.layout
    if flow.name == TIED:
        return "parallel.schedule: zb_v has the first and the last stage on one rank"
    if flow.name == STAGES:
        return "fewer pipeline ranks, or stages_per_rank, send less"
    if accumulates(layout.zero) == "sharded" and layout.micro_batches > 1:
        return "zero.accumulate: local reduces once a step, a larger batch.micro less often"
    if layout.dims.pipeline == 1:
        return "--search may find a pipeline across hosts that sends less"
    return "fewer data ranks on more pipeline ranks send less"
