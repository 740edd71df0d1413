"""What the stages of a pipeline cost, and its bubble: HTML of what a trace has measured."""

from __future__ import annotations

from dstrain.runtime.spec.schedule import Kind
from dstrain.runtime.spec.trace import Measured

_COLUMNS = {
    Kind.FORWARD: "Forward",
    Kind.BACKWARD: "Backward",
    Kind.INPUT_GRADIENT: "Input's gradient",
    Kind.WEIGHT_GRADIENT: "Weights' gradient",
}


def costs(measured: Measured | None) -> str | None:
    """A row for each stage, and one line on each traced step; None where there is nothing to say."""
    if measured is None or not measured.stages:
        return None
    kinds = [kind for kind in _COLUMNS if measured.seconds[kind]]
    heads = ["Stage", *(_COLUMNS[kind] for kind in kinds), *(["Message to the next"] if measured.messages else [])]
    rows = []
    for stage in sorted({stage for kind in kinds for stage in measured.seconds[kind]}):
        cells = [_ms(measured.seconds[kind].get(stage)) for kind in kinds]
        if measured.messages:
            cells.append(_ms(measured.messages.get(stage)))
        rows.append(f'<tr><th scope="row">{stage}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>')
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    table = f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    return f"<p>Medians of {_steps(measured)}, without waits.</p>{table}"


def bubble(measured: Measured | None) -> str:
    """`21.3%, 20.8% to 22.0% in 3 steps`; empty where there is no pipeline."""
    if measured is None or measured.stages < 2 or measured.bubble is None:
        return ""
    of_steps = [step.bubble for step in measured.steps]
    return f"{measured.bubble:.1%}, {min(of_steps):.1%} to {max(of_steps):.1%} in {_steps(measured)}"


def _steps(measured: Measured) -> str:
    count = len(measured.steps)
    return f"{count} traced step{'' if count == 1 else 's'}"


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.3g} ms"
