"""A timeline as plain text: one row per rank, time to scale."""

from __future__ import annotations

import textwrap

from dstrain.runtime.spec.errors import UsageError
from dstrain.runtime.spec.schedule.simulator import Span, Timeline

LEAST_WIDTH = 40
IDLE, BUSY = ".", "-"


KIND_NAMES = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}


def draw_text(timeline: Timeline, width: int = 80) -> str:
    """Lines of at most `width` characters.

    A span shows what fits of stage, kind and micro-batch (2F13), kind and micro-batch, kind; then `-` to its end. A
    rank's second and later stages are in lower case. A span shorter than half a character may not be seen.
    """
    if width < LEAST_WIDTH:
        raise UsageError.mismatch("drawing of a schedule", f"a width of at least {LEAST_WIDTH}", str(width))
    label = len(f"rank {len(timeline.spans) - 1} ")
    columns = width - label
    lines = textwrap.wrap(title(timeline), width)
    for rank, spans in enumerate(timeline.spans):
        stages = timeline.schedule.stages_on(rank)
        lines.append(f"rank {rank}".ljust(label) + _row(spans, columns, timeline.makespan_s, stages))
    lines.append(" " * label + "0" + duration(timeline.makespan_s).rjust(columns - 1))
    kinds = {span.action.kind for spans in timeline.spans for span in spans}
    words = [f"{kind} {name}" for kind, name in KIND_NAMES.items() if kind in kinds]
    later = ["lower case: a rank's later stages"] if timeline.schedule.stages > len(timeline.spans) else []
    return "\n".join([*lines, *textwrap.wrap(", ".join([*words, f"{IDLE} idle", *later]), width)])


def title(timeline: Timeline) -> str:
    """The schedule's name and sizes, its makespan and bubble."""
    schedule = timeline.schedule
    sizes = f"{len(schedule.ranks)} ranks, {schedule.stages} stages, {schedule.micro_batches} micro-batches"
    return f"{schedule.name}: {sizes}, {duration(timeline.makespan_s)}, bubble {100 * timeline.bubble:.1f} %"


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds < 1000 * size else f"{seconds / size:.0f} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def _row(spans: tuple[Span, ...], columns: int, makespan_s: float, stages: tuple[int, ...]) -> str:
    scale = columns / makespan_s if makespan_s else 0.0
    cells = [IDLE] * columns
    for action, start_s, end_s in spans:
        start, stop = round(start_s * scale), round(end_s * scale)
        kind = action.kind if action.stage == stages[0] else action.kind.lower()
        short = f"{kind}{action.micro_batch}"
        long = f"{action.stage}{short}{BUSY}" if len(stages) > 1 else short
        text = next((text for text in (long, short, kind) if len(text) <= stop - start), "")
        cells[start:stop] = text.ljust(stop - start, BUSY)
    return "".join(cells)
