"""Where a run's time went, as a bar and tables: HTML of the ledger."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from dstrain.launcher.ledger import Ledger
from dstrain.launcher.report.tables import clock


class _Part(NamedTuple):
    """A kind of time. `key`: of the ledger's JSON, without `_s`."""

    key: str
    title: str
    tone: str


_PARTS = (
    _Part("trained", "Trained, and it counts", "#2a9d6f"),
    _Part("startup", "Start, up to the first step", "#3aa6b9"),
    _Part("checkpoint_stall", "Stood still for checkpoints", "#8a63d2"),
    _Part("repeated", "Steps that were done again", "#e8871e"),
    _Part("detection", "From the last step to the failure's detection", "#c94f3d"),
    _Part("teardown", "Ending what was left", "#c8497f"),
    _Part("restart", "Restarts, up to their first step", "#8c8c2f"),
    _Part("end", "Behind the last step", "#667085"),
)
_COLUMNS = {
    "wait": "Wait",
    "startup": "Start",
    "trained": "Trained",
    "stall": "Checkpoints",
    "repeated": "In vain",
    "detection": "Detection",
    "teardown": "Teardown",
}


def times(ledger: Ledger) -> str | None:
    """A bar of the whole run, what its parts are, and a row for each attempt; None for a run without steps."""
    goodput = ledger.goodput
    if goodput is None:
        return None
    sums = ledger.to_json()
    parts = [(part, sums[f"{part.key}_s"]) for part in _PARTS if sums[f"{part.key}_s"] > 0]
    total = sum(seconds for _, seconds in parts)
    bar = "".join(
        f'<span style="width:{100 * seconds / total:.3f}%;background:{part.tone}" title="{escape(part.title)}"></span>'
        for part, seconds in parts
    )
    rows = "".join(
        f'<tr><th scope="row"><span class="swatch" style="background:{part.tone}"></span>{escape(part.title)}</th>'
        f"<td>{clock(seconds)}</td><td>{seconds / total:.1%}</td></tr>"
        for part, seconds in parts
    )
    table = f'<div class="wide"><table><tbody>{rows}</tbody></table></div>'
    return f'<div class="bar">{bar}</div>{table}{"".join(_attempts(sums["attempts"]))}'


def _attempts(attempts: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Only of a run that was restarted."""
    if len(attempts) < 2:
        return
    heads = "".join(f'<th scope="col">{title}</th>' for title in ["Attempt", "Steps", *_COLUMNS.values(), "Ended by"])
    yield f'<div class="wide"><table class="attempts"><thead><tr>{heads}</tr></thead><tbody>'
    for attempt in attempts:
        first, last = attempt["first_step"], attempt["last_step"]
        steps = "" if first is None else f"{first:,} to {last:,}"
        cells = [str(attempt["attempt"] + 1), steps, *(clock(attempt[f"{key}_s"]) for key in _COLUMNS)]
        cells.append(str(attempt["cause"] or ""))
        yield f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
    yield "</tbody></table></div>"
