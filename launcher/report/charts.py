"""Runs to charts: figures as plotly.js takes them, without the page's colours."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, NamedTuple

import numpy as np

from dstrain.launcher.report import series
from dstrain.launcher.report.read import RANK_FIELDS, Curve, Run

PALETTE = ("#2f7ed8", "#e8871e", "#2a9d6f", "#c8497f", "#8a63d2", "#c94f3d", "#3aa6b9", "#8c8c2f")
"""By run, or by rank; told apart on white and on black."""

POINTS = 1500  # of a line that shows every spike: more than the page has pixels
AVERAGED_POINTS = 150  # of the line through its middle
AVERAGED_STEPS = 8  # the fewest that one of those stands for: with less it would be the line itself
LINES = 8  # more ranks than this are a picture, not lines
GRID = (400, 128)  # columns, rows of that picture
GIB = 2.0**30


@dataclass(frozen=True)
class Chart:
    """data, layout: plotly.js's own terms. note: how to read it."""

    title: str
    note: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]


class _Quantity(NamedTuple):
    """A number of a step: the event's field, and how it is drawn."""

    field: str
    title: str
    unit: str
    note: str = ""
    scale: float = 1.0
    jumpy: bool = False  # faint, with its mean above it
    from_zero: bool = False


_BEFORE_STEP_TIME = (
    _Quantity("lr", "Learning rate", "learning rate"),
    _Quantity("grad_norm", "Gradient norm", "global L2 norm", "Before clipping.", jumpy=True, from_zero=True),
    _Quantity("tokens_per_s", "Throughput", "tokens/s", "All ranks together.", jumpy=True, from_zero=True),
    _Quantity("mfu", "Model FLOPs utilization", "%", "Of the devices' peak.", 100.0, jumpy=True, from_zero=True),
)
_AFTER_STEP_TIME = (
    _Quantity("data_wait_s", "Waiting for data", "s", "The rank that waited longest.", jumpy=True, from_zero=True),
    _Quantity("memory_bytes", "Memory", "GiB", "Peak of the rank that holds most.", 1 / GIB, from_zero=True),
    _Quantity("loss_scale", "Loss scale", "scale"),
)


def charts_of(runs: Sequence[Run]) -> list[Chart]:
    """All charts that the runs have numbers for."""
    charts = [
        _loss(runs),
        *(_chart(quantity, runs) for quantity in _BEFORE_STEP_TIME),
        *(_step_time(run, alone=len(runs) == 1) for run in runs),
        *(_chart(quantity, runs) for quantity in _AFTER_STEP_TIME),
    ]
    return [chart for chart in charts if chart.data]


def color(index: int) -> str:
    """Of the run (or rank) with this number."""
    return PALETTE[index % len(PALETTE)]


def attempts_of(run: Run, field: str) -> list[Curve]:
    """The run's curve of each attempt: rank 0's, or the highest of all ranks where each has its own."""
    if field not in RANK_FIELDS:
        return run.attempts(0, field)
    by_attempt: dict[int, list[Curve]] = {}
    for place, curves in sorted(run.steps.items()):
        if field in curves:
            by_attempt.setdefault(place.attempt, []).append(series.finite(curves[field]))
    return [series.highest(curves) for curves in by_attempt.values()]


# --- the charts ----------------------------------------------------------------------------------------------


def _chart(quantity: _Quantity, runs: Sequence[Run]) -> Chart:
    data, restarts, histories = [], [], []
    for index, run in enumerate(runs):
        scaled = [Curve(step, value * quantity.scale) for step, value in attempts_of(run, quantity.field)]
        histories.append(series.resumed(scaled))
        data += _traces(histories[-1], color(index), run.id, quantity.jumpy)
        restarts += _restarts(histories[-1], index, alone=len(runs) == 1)
    layout = _layout(quantity.unit, restarts)
    note = quantity.note
    if quantity.from_zero:
        layout["yaxis"]["range"], above = _from_zero(histories)
        note = " ".join(filter(None, (note, above)))
    return Chart(quantity.title, note, data, layout)


def _loss(runs: Sequence[Run]) -> Chart:
    alone = len(runs) == 1
    data, restarts = [], []
    for index, run in enumerate(runs):
        history = series.resumed(attempts_of(run, "loss"))
        data += _traces(history, color(index), "training" if alone else f"{run.id} training", jumpy=True)
        restarts += _restarts(history, index, alone)
        if run.validations:
            name = "validation" if alone else f"{run.id} validation"
            line = _line(_validations(run), color(1 if alone else index), name)
            data.append(line | {"mode": "lines+markers", "marker": {"size": 6}, "line": line["line"] | {"dash": "dot"}})
    note = "Dots: validation. Of many training steps each is faint and their mean is bold." if data else ""
    return Chart("Loss", note, data, _layout("loss", restarts) | {"showlegend": alone})


def _validations(run: Run) -> Curve:
    """What a later attempt validated again counts as it was then."""
    by_step = {validation.step: validation.loss for validation in run.validations}
    steps = sorted(by_step)
    return Curve(np.array(steps, dtype=np.float64), np.array([by_step[step] for step in steps]))


def _step_time(run: Run, alone: bool) -> Chart:
    title = "Step time per rank" if alone else f"Step time per rank: {run.id}"
    histories = {rank: series.resumed(run.attempts(rank, "step_s")) for rank in run.ranks}
    histories = {rank: history for rank, history in histories.items() if history.counted}
    first = min(histories, default=0)
    restarts = _restarts(histories[first], 0, alone=True) if histories else []
    if len(histories) > LINES:
        counted = {rank: history.counted for rank, history in histories.items()}
        return Chart(title, _spread(histories), [_picture(counted)], _layout("rank", restarts))
    data = []
    for rank, history in histories.items():
        data += _traces(history, color(rank), f"rank {rank}", jumpy=True)
    layout = _layout("s", restarts) | {"showlegend": len(histories) > 1}
    layout["yaxis"]["range"], above = _from_zero(list(histories.values()))
    return Chart(title, " ".join(filter(None, (_spread(histories), above))), data, layout)


def _spread(histories: Mapping[int, series.Resumed]) -> str:
    """Who is slow, by the median; ranks that wait for each other all look like the slowest."""
    medians = {
        rank: float(np.median(value))
        for rank, history in histories.items()
        if len(value := series.finite(series.joined(history.counted)).value)
    }
    if len(medians) < 2:
        return ""
    slow, fast = max(medians, key=lambda rank: medians[rank]), min(medians, key=lambda rank: medians[rank])
    return f"Medians from {medians[fast]:.4g} s (rank {fast}) to {medians[slow]:.4g} s (rank {slow})."


def _picture(curves: Mapping[int, Sequence[Curve]]) -> dict[str, Any]:
    picture = series.grid(curves, *GRID)
    usual = picture.value[np.isfinite(picture.value)]
    return {
        "type": "heatmap",
        "x": _packed(picture.step),
        "y": picture.ranks,
        "z": _packed(picture.value.astype(np.float32)) | {"shape": f"{len(picture.ranks)},{len(picture.step)}"},
        "zmin": float(usual.min()),
        "zmax": float(np.quantile(usual, 0.99)),  # the first step would leave one colour for all others
        "colorscale": "Viridis",
        "colorbar": {"title": {"text": "s"}, "thickness": 12, "outlinewidth": 0},
        "hovertemplate": "rank %{y}, step %{x:.0f}: %{z:.4g} s<extra></extra>",
    }


# --- their parts ---------------------------------------------------------------------------------------------


def _traces(history: series.Resumed, tone: str, name: str, jumpy: bool) -> list[dict[str, Any]]:
    """The lines of one history: what counts, and faint what a restart did again."""
    every = series.drawn(history.counted, POINTS, series.thinned)
    if not len(every.step):
        return []
    traces = []
    again = series.drawn(history.overtaken, POINTS, series.thinned)
    if len(again.step):
        dotted = {"color": tone, "width": 1, "dash": "dot"}
        traces.append(_line(again, tone, name) | {"line": dotted, "opacity": 0.6, "hoverinfo": "skip"} | _UNNAMED)
    points = min(AVERAGED_POINTS, sum(len(curve.step) for curve in history.counted) // AVERAGED_STEPS)
    if not jumpy or points < AVERAGED_STEPS:
        return [*traces, _line(every, tone, name)]
    mean = series.drawn(history.counted, points, series.averaged)
    faint = {"line": {"color": tone, "width": 1}, "opacity": 0.3, "hoverinfo": "skip"}
    return [*traces, _line(every, tone, name) | faint | _UNNAMED, _line(mean, tone, name)]


_UNNAMED = {"showlegend": False, "hovertemplate": None}


def _line(curve: Curve, tone: str, name: str) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines" if len(curve.step) > 1 else "lines+markers",
        "x": _packed(curve.step),
        "y": _packed(curve.value.astype(np.float32)),
        "name": escape(name),  # plotly reads names as HTML
        "line": {"color": tone, "width": 2},
        "hovertemplate": "%{y:.4g}",
    }


def _packed(values: Any) -> dict[str, str]:
    """An array as plotly.js takes it in a third of the text's length: base64 of little-endian numbers."""
    little = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
    return {"dtype": f"f{little.itemsize}", "bdata": base64.b64encode(little.tobytes()).decode()}


def _restarts(history: series.Resumed, index: int, alone: bool) -> list[dict[str, Any]]:
    """A vertical mark at the first step of each later attempt."""
    marks = []
    for count, step in enumerate(history.restarts, 1):
        mark: dict[str, Any] = {"type": "line", "x0": step, "x1": step, "y0": 0, "y1": 1, "yref": "paper"}
        mark["line"] = {"width": 1, "dash": "dash", "color": "gray" if alone else color(index)}
        if alone:
            mark["label"] = {
                "text": f"restart {count}",
                "textposition": "end",
                "textangle": 0,
                "xanchor": "left",
                "yanchor": "top",
            }
        marks.append(mark)
    return marks


def _from_zero(histories: Sequence[series.Resumed]) -> tuple[list[float], str]:
    """A range of values from zero that a few steps far above the others (the first, mostly) do not flatten.

    Also a note of what it leaves out.
    """
    curves = [series.finite(series.joined(history.counted)).value for history in histories]
    values = np.concatenate([*curves, np.zeros(1)])
    most, usual = float(values.max()), float(np.quantile(values, 0.98))
    if most <= 3 * usual or not usual:
        return [0.0, 1.05 * most or 1.0], ""
    return [0.0, 1.5 * usual], f"Peaks of up to {most:.3g} lie above."


def _layout(unit: str, restarts: list[dict[str, Any]]) -> dict[str, Any]:
    value_axis: dict[str, Any] = {"title": {"text": unit}, "exponentformat": "SI" if unit == "tokens/s" else "e"}
    if unit == "rank":
        value_axis["autorange"] = "reversed"
    return {"xaxis": {"title": {"text": "step"}}, "yaxis": value_axis, "shapes": restarts, "showlegend": False}
