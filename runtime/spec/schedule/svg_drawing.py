"""A timeline as one self-contained SVG, readable on a light and on a dark ground."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from dstrain.runtime.spec.schedule.action import Kind
from dstrain.runtime.spec.schedule.simulator import Span, Timeline
from dstrain.runtime.spec.schedule.text_drawing import KIND_NAMES, duration, title

# All in pixels.
WIDTH, MARGIN, LABEL = 1000, 12, 64
CELL, WIDEST = 8, 8000
"""Of many cells the drawing is wider, so that each has so much on average."""
ROW, GAP, HEAD, FOOT = 26, 4, 58, 24
DIGIT = 7.0
"""What one digit of a micro-batch's number needs."""
GREY = "#848d97"
COLOURS = {
    Kind.FORWARD: ("#4184e4", "#2f5fa6"),
    Kind.BACKWARD: ("#b3772b", "#7f541e"),
    Kind.INPUT_GRADIENT: ("#3d9a50", "#2b6d38"),
    Kind.WEIGHT_GRADIENT: ("#986ee2", "#6a4aa3"),
}
"""Of a rank's first stage, and of its later ones. Middle tones: white numbers can be read in them, and they stand out
from white and from black."""


def draw_svg(timeline: Timeline) -> str:
    """Title with the bubble, legend, a row per rank, numbers in cells that are wide enough, times as tooltips."""
    ranks, width = len(timeline.spans), _width(timeline)
    height = HEAD + ranks * (ROW + GAP) + FOOT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" font-family="system-ui, sans-serif" font-size="12" fill="{GREY}">',
        f"<title>{_clean(title(timeline))}</title>",
        f'<text x="{MARGIN}" y="20" font-size="14" font-weight="600">{_clean(title(timeline))}</text>',
        *_legend(timeline),
    ]
    for rank, spans in enumerate(timeline.spans):
        parts += _row(timeline, rank, spans, width - LABEL - MARGIN)
    base = height - FOOT + 14
    parts += [
        f'<text x="{LABEL}" y="{base}">0</text>',
        f'<text x="{width - MARGIN}" y="{base}" text-anchor="end">{duration(timeline.makespan_s)}</text>',
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _width(timeline: Timeline) -> int:
    most = max((len(spans) for spans in timeline.spans), default=0)
    return max(WIDTH, min(WIDEST, LABEL + CELL * most + MARGIN))


def _clean(text: str) -> str:
    """Escaped, without the characters that XML cannot hold."""
    return escape("".join(character if character.isprintable() else "\ufffd" for character in text))


def _legend(timeline: Timeline) -> Iterator[str]:
    kinds = {span.action.kind for spans in timeline.spans for span in spans}
    x = MARGIN
    for kind, (colour, _) in COLOURS.items():
        if kind in kinds:
            yield f'<rect x="{x}" y="32" width="12" height="12" rx="2" fill="{colour}"/>'
            yield f'<text x="{x + 17}" y="42">{KIND_NAMES[kind]}</text>'
            x += 34 + 7 * len(KIND_NAMES[kind])
    if timeline.schedule.stages > len(timeline.spans):
        yield f'<text x="{x}" y="42">darker: a rank\'s later stages</text>'


def _row(timeline: Timeline, rank: int, spans: tuple[Span, ...], room: int) -> Iterator[str]:
    y = HEAD + rank * (ROW + GAP)
    scale = room / timeline.makespan_s if timeline.makespan_s else 0.0
    first = min(timeline.schedule.stages_on(rank), default=0)
    yield f'<text x="{MARGIN}" y="{y + 17}">rank {rank}</text>'
    yield f'<rect x="{LABEL}" y="{y}" width="{room}" height="{ROW}" fill="{GREY}" fill-opacity="0.15"/>'
    for action, start_s, end_s in spans:
        x, width = LABEL + start_s * scale, (end_s - start_s) * scale
        colour = COLOURS[action.kind][action.stage != first]
        tooltip = f"{action}: {duration(start_s)} to {duration(end_s)}"
        yield (
            f'<rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="{ROW}" fill="{colour}" '
            f'stroke="{GREY}" stroke-width="0.5"><title>{tooltip}</title></rect>'
        )
        number = str(action.micro_batch)
        if width >= DIGIT * len(number) + 2:
            middle = f'x="{x + width / 2:.2f}" y="{y + 17}"'
            yield f'<text {middle} text-anchor="middle" fill="#fff" pointer-events="none">{number}</text>'
