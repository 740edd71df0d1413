"""A plan for people, in 80 columns, and as JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

from dstrain.launcher.planning.advice import warnings
from dstrain.launcher.planning.memory import HEADROOM, Memory
from dstrain.launcher.planning.parts import Part, has_operations
from dstrain.launcher.planning.planner import Plan, Planner
from dstrain.launcher.planning.search import Found
from dstrain.launcher.planning.units import gib, gigabytes, number, seconds
from dstrain.runtime.spec.schedule import draw_text

WIDTH = 80
ROWS = 12
"""Of a table: what is more is left out in its middle."""
LABELS = 8
"""Columns of a schedule's drawing that say whose a row is."""
DRAWN_RANKS = 16
"""A schedule of more pipeline ranks is drawn only with --svg."""
_COLUMNS = ("parameters", "gradients", "optimizer", "live", "buckets", "activations", "messages")
_SHORT = {
    "parameters": "params",
    "gradients": "grads",
    "optimizer": "optim.",
    "activations": "activ.",
    "messages": "msgs",
}


def plan_lines(planner: Planner, plan: Plan) -> Iterator[str]:
    """All of a plan, in lines of at most WIDTH characters."""
    yield from _head(planner, plan)
    yield ""
    yield from _grid(planner, plan)
    yield ""
    yield from _memory(planner, plan)
    yield ""
    yield from _traffic(plan)
    yield ""
    yield from _time(planner, plan)
    yield ""
    yield from _foot(planner, plan)


def search_lines(planner: Planner, found: Found) -> Iterator[str]:
    """The ten best, and why the first is."""
    yield f"{found.tried:,} layouts of {planner.cluster.world_size:,} ranks; the best that fit:"
    yield ""
    yield f" # pipe schedule    shard copies stage micro {'step':>8} {'bubble':>6} {'memory':>9} {'sent':>8}"
    for place, plan in enumerate(found.plans, start=1):
        dims, layout = plan.layout.dims, plan.layout
        schedule = "-" if dims.pipeline == 1 else str(layout.schedule).removesuffix("_1f1b")
        yield (
            f"{place:2} {dims.pipeline:4} {schedule:<11} {dims.data_shard:5} {dims.data_replicate:6} "
            f"{layout.zero.stage:5} {layout.micro:5} {seconds(plan.step_s):>8} {100 * plan.bubble:4.1f} % "
            f"{gib(plan.most_bytes):>9} {gigabytes(plan.host_bytes):>8}"
        )
    yield "sent: the most that one host sends to others in a step"
    yield ""
    yield from _wrapped(found.why, "why: ")
    yield ""
    yield from layout_yaml(found.plans[0])


def layout_yaml(plan: Plan) -> Iterator[str]:
    """The keys of a job that has this layout."""
    layout, dims = plan.layout, plan.layout.dims
    parallel: dict[str, object] = {}
    if dims.pipeline > 1:
        parallel = {"pipeline": dims.pipeline, "schedule": layout.schedule}
        if layout.schedule == "interleaved_1f1b":
            parallel["stages_per_rank"] = layout.stages_per_rank or 2
    if layout.zero.stage:
        parallel |= {"data_shard": dims.data_shard, "data_replicate": dims.data_replicate}
    zero = {"stage": layout.zero.stage}
    batch = {"global": layout.micro * layout.micro_batches * dims.data, "micro": layout.micro}
    for name, values in (("parallel", parallel), ("zero", zero), ("batch", batch)):
        words = [f"{key}: {value}" for key, value in values.items()]
        line = f"{name}: {{{', '.join(words)}}}"
        if len(line) <= WIDTH:
            yield from [line] if words else []
        else:
            yield from [f"{name}:", *(f"  {word}" for word in words)]


# --- sections --------------------------------------------------------------------------------------------------


def _head(planner: Planner, plan: Plan) -> Iterator[str]:
    job, dims, layout = planner.job, plan.layout.dims, plan.layout
    optimizer = job.optimizer.factory or job.optimizer.name
    yield from _wrapped(
        f"{planner.shapes.name}: {number(planner.shapes.elements)} parameters in {len(planner.shapes.layers)} layers, "
        f"{job.precision.dtype}, {optimizer}, ZeRO stage {layout.zero.stage}"
    )
    hosts = len(planner.cluster.nodes)
    yield from _wrapped(f"{dims}, on {hosts:,} {'host' if hosts == 1 else 'hosts'}")
    total = layout.micro * dims.data * layout.micro_batches
    yield from _wrapped(
        f"batch.global {total:,} = micro {layout.micro:,} × {dims.data:,} data ranks × {layout.micro_batches:,} "
        "micro-batches"
    )


def _grid(planner: Planner, plan: Plan) -> Iterator[str]:
    width = plan.layout.dims.data
    yield f"{'pipeline':<9} {'layers':<33} {'ranks':<15} hosts"
    rows = []
    for rank, part in enumerate(plan.parts):
        ranks = range(rank * width, (rank + 1) * width)
        hosts = planner.cluster.names(ranks)
        span = f"{ranks.start}-{ranks.stop - 1}" if width > 1 else str(ranks.start)
        rows.append(f"{rank:<9} {_cut(_layers(part), 33):<33} {span:<15} {_cut(hosts, 20)}")
    yield from _folded(rows)


def _layers(part: Part) -> str:
    spans = []
    for layers in part.layers:
        first, last = layers[0].name, layers[-1].name
        spans.append(first if len(layers) == 1 else f"{first} to {last}")
    return ", ".join(spans)


def _memory(planner: Planner, plan: Plan) -> Iterator[str]:
    """Equal neighbours share a row."""
    columns = [name for name in _COLUMNS if any(getattr(memory, name) for memory in plan.memory)]
    rows = []
    for memory, group in groupby(enumerate(plan.memory), key=lambda one: one[1]):
        ranks = [rank for rank, _ in group]
        label = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
        values = [gib(getattr(memory, name)) for name in columns]
        rows.append((label, *(value.removesuffix("iB") for value in values), gib(memory.total)))
    heads = ("pipeline", *(_SHORT.get(name, name) for name in columns), "sum")
    yield "bytes of each rank (G: GiB, M: MiB, K: KiB)"
    yield _row(heads)
    yield from _folded([_row(row) for row in rows])
    if host := max(memory.host for memory in plan.memory):
        yield f"in the host's memory, of each rank: {gib(host)}"
    nodes = [planner.node_of(plan.layout, rank) for rank in range(len(plan.memory))]
    smallest = min(node.memory_bytes for node in nodes)
    verdict = "fits" if plan.fits else "does not fit"
    yield f"{verdict}: {gib(plan.most_bytes)} of {gib(smallest)}, of which {100 * HEADROOM:.0f} % stay free"


def _row(words: Sequence[str]) -> str:
    return f"{words[0]:<8}" + "".join(f"{word:>9}" for word in words[1:])


def _traffic(plan: Plan) -> Iterator[str]:
    yield f"{'bytes of a step':<30} {'a rank sends':>12} {'a host sends':>12} {'in hosts':>11} {'between':>11}"
    if not plan.flows:
        yield "none: a single rank"
    for flow in plan.flows:
        between, host = gigabytes(flow.between_bytes), gigabytes(flow.host_bytes)
        rank, inside = gigabytes(flow.rank_bytes), gigabytes(flow.inside_bytes)
        yield f"{flow.name:<30} {rank:>12} {host:>12} {inside:>11} {between:>11}"


def _time(planner: Planner, plan: Plan) -> Iterator[str]:
    step, parts = seconds(plan.step_s), [f"{seconds(plan.makespan_s)} computing and pipeline"]
    if plan.exposed_s:
        parts.append(f"{seconds(plan.exposed_s)} waiting for links")
    yield from _wrapped(f"a step: about {step} ({', '.join(parts)})")
    if len(plan.parts) == 1:
        return
    replayed = ""
    if plan.replayed:
        replayed = f", median of {plan.replayed} traced {'step' if plan.replayed == 1 else 'steps'}, replayed"
    yield from _wrapped(f"bubble {100 * plan.bubble:.1f} % of {plan.layout.micro_batches:,} micro-batches{replayed}")
    if len(plan.parts) > DRAWN_RANKS:
        yield f"{len(plan.parts)} pipeline ranks: --svg FILE draws their schedule"
        return
    yield ""
    sketch = planner.sketch(plan, WIDTH - LABELS)
    if sketch.schedule.micro_batches < plan.layout.micro_batches:
        yield f"as {sketch.schedule.micro_batches} micro-batches would be (--svg FILE draws more of them):"
    yield from draw_text(sketch, WIDTH).splitlines()


def _foot(planner: Planner, plan: Plan) -> Iterator[str]:
    yield from _wrapped(", ".join(assumptions(planner)), "assumed: ")
    for unknown in planner.shapes.unknown:
        yield from _wrapped(unknown, "unknown: ")
    for warning in warnings(planner, plan):
        yield from _wrapped(warning, "warning: ")


def assumptions(planner: Planner) -> list[str]:
    """What the plan takes for granted, each with its option."""
    nodes = planner.cluster.nodes
    memory = sorted({node.memory_bytes for node in nodes})
    links = sorted({node.link_gbit for node in nodes})
    inside = sorted({node.node_link_gbit for node in nodes})
    found = [f"{' or '.join(map(gib, memory))} a rank (--gpu-memory)"]
    if len(nodes) > 1:
        found.append(f"{' or '.join(f'{link:g}' for link in links)} Gbit/s between hosts (--link-gbit)")
    found.append(f"{' or '.join(f'{link:g}' for link in inside)} Gbit/s inside (--node-link-gbit)")
    found.append(f"{planner.cluster.tflops:g} Tflop/s a rank (--tflops)")
    if planner.job.optimizer.factory is not None:
        found.append("two numbers of state for each parameter (optimizer.factory)")
    if plan_by_time(planner):
        size = "operations" if has_operations(planner.shapes) else "parameters"
        found.append(f"layers as slow as their {size} (parallel.partition: time)")
    return found


def plan_by_time(planner: Planner) -> bool:
    """Whether the runtime will measure what the plan takes from operations."""
    return planner.job.parallel.pipeline > 1 and planner.job.parallel.partition == "time"


# --- JSON ------------------------------------------------------------------------------------------------------


def plan_json(planner: Planner, plan: Plan) -> dict[str, Any]:
    """One plan; bytes and seconds, no words but in `warnings` and `assumed`."""
    layout, dims = plan.layout, plan.layout.dims
    width = dims.data
    return {
        "model": {
            "name": planner.shapes.name,
            "parameters": planner.shapes.elements,
            "layers": len(planner.shapes.layers),
            "unknown": list(planner.shapes.unknown),
        },
        "world_size": dims.world_size,
        "hosts": len(planner.cluster.nodes),
        "layout": {
            "pipeline": dims.pipeline,
            "data_replicate": dims.data_replicate,
            "data_shard": dims.data_shard,
            "stage": layout.zero.stage,
            "schedule": str(layout.schedule) if dims.pipeline > 1 else None,
            "stages": plan.schedule.stages,
            "micro": layout.micro,
            "micro_batches": layout.micro_batches,
        },
        "pipeline_ranks": [
            {
                "rank": rank,
                "layers": [[layer.name for layer in layers] for layers in part.layers],
                "ranks": [rank * width, (rank + 1) * width],
                "hosts": planner.cluster.names(range(rank * width, (rank + 1) * width)),
                "memory": _memory_json(memory),
            }
            for rank, (part, memory) in enumerate(zip(plan.parts, plan.memory, strict=True))
        ],
        "fits": plan.fits,
        "flows": [asdict(flow) for flow in plan.flows],
        "costs_s": plan.costs._asdict(),
        "bubble": plan.bubble,
        "makespan_s": plan.makespan_s,
        "replayed_steps": plan.replayed,
        "exposed_s": plan.exposed_s,
        "step_s": plan.step_s,
        "assumed": assumptions(planner),
        "warnings": list(warnings(planner, plan)),
    }


def search_json(planner: Planner, found: Found) -> dict[str, Any]:
    """The best plans, the winner first."""
    return {
        "tried": found.tried,
        "why": found.why,
        "yaml": "\n".join(layout_yaml(found.plans[0])),
        "plans": [plan_json(planner, plan) for plan in found.plans],
    }


def _memory_json(memory: Memory) -> dict[str, int]:
    return {**asdict(memory), "total": memory.total}


# --- lines -----------------------------------------------------------------------------------------------------


def _wrapped(text: str, label: str = "") -> list[str]:
    indent = " " * len(label)
    return textwrap.wrap(label + text, WIDTH, subsequent_indent=indent, break_on_hyphens=False)


def _folded(rows: Sequence[str]) -> list[str]:
    """The first and the last of many rows."""
    if len(rows) <= ROWS:
        return list(rows)
    half = ROWS // 2
    return [*rows[:half], f"… {len(rows) - 2 * half} more", *rows[-half:]]


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"
