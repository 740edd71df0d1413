"""Curves made ready to be drawn: resumed steps, few enough points, ranks together. Pure: arrays to arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dstrain.launcher.report.read import Curve, Numbers


class Resumed(NamedTuple):
    """Attempts as one history, a curve for each.

    counted: the steps that led to the end. overtaken: the steps that a later attempt did again. restarts: the first
    step of each later attempt.
    """

    counted: list[Curve]
    overtaken: list[Curve]
    restarts: list[float]


def resumed(attempts: Sequence[Curve]) -> Resumed:
    """Tell the steps that count from those that a later attempt did again."""
    attempts = [curve for curve in attempts if len(curve.step)]
    counted, overtaken = [], []
    limit = np.inf
    for curve in reversed(attempts):
        kept = curve.step < limit
        counted.append(Curve(curve.step[kept], curve.value[kept]))
        overtaken.append(Curve(curve.step[~kept], curve.value[~kept]))
        limit = min(limit, curve.step[0])
    return Resumed(counted[::-1], overtaken[::-1], [float(curve.step[0]) for curve in attempts[1:]])


def finite(curve: Curve) -> Curve:
    """Without what cannot be drawn: NaN and infinities."""
    kept = np.isfinite(curve.value)
    return Curve(curve.step[kept], curve.value[kept])


def thinned(curve: Curve, points: int) -> Curve:
    """At most about `points` points that look the same: each stretch's lowest and highest.

    No spike is lost, unlike with every k-th point. Values are finite.
    """
    count = len(curve.step)
    if count <= points:
        return curve
    stretch = -(-2 * count // points)
    rows = np.pad(curve.value, (0, -count % stretch), mode="edge").reshape(-1, stretch)
    first = np.arange(len(rows)) * stretch
    kept = np.unique(np.concatenate([first + rows.argmin(1), first + rows.argmax(1), [0, count - 1]]))
    return Curve(curve.step[kept], curve.value[kept])


def averaged(curve: Curve, points: int) -> Curve:
    """The mean of each of `points` stretches, at the stretch's middle; a short curve as it is. Values are finite."""
    count = len(curve.step)
    if count <= points:
        return curve
    edges = np.linspace(0, count, points + 1).astype(np.int64)
    sizes = np.diff(edges)
    return Curve(np.add.reduceat(curve.step, edges[:-1]) / sizes, np.add.reduceat(curve.value, edges[:-1]) / sizes)


def joined(curves: Sequence[Curve]) -> Curve:
    """The curves one behind the other, with a NaN between that lifts the pen."""
    steps: list[Numbers] = [np.empty(0)]
    values: list[Numbers] = [np.empty(0)]
    for curve in curves:
        if len(curve.step):
            steps += [curve.step[:1], curve.step]
            values += [np.array([np.nan]), curve.value]
    return Curve(np.concatenate(steps)[1:], np.concatenate(values)[1:])


def drawn(curves: Sequence[Curve], points: int, reduce: Callable[[Curve, int], Curve]) -> Curve:
    """The curves joined, each reduced to its share of `points` points."""
    curves = [finite(curve) for curve in curves]
    together = max(1, sum(len(curve.step) for curve in curves))
    return joined([reduce(curve, max(4, points * len(curve.step) // together)) for curve in curves])


def highest(curves: Sequence[Curve]) -> Curve:
    """Over several ranks: the highest value at each step that any of them has."""
    step = np.concatenate([curve.step for curve in curves])
    value = np.concatenate([curve.value for curve in curves])
    order = np.argsort(step, kind="stable")
    step, value = step[order], value[order]
    first = np.flatnonzero(np.append(True, np.diff(step) > 0)[: len(step)])
    return Curve(step[first], np.fmax.reduceat(value, first)) if len(step) else Curve(step, value)


class Grid(NamedTuple):
    """`value[row, column]`: the mean over a stretch of steps; `step`: the columns' middles; `ranks`: of the rows."""

    step: Numbers
    ranks: list[int]
    value: Numbers


def grid(curves: Mapping[int, Sequence[Curve]], columns: int, rows: int) -> Grid:
    """Ranks over steps as a picture. With more than `rows` ranks a row is the highest of several neighbours."""
    together = {rank: finite(joined(parts)) for rank, parts in curves.items()}
    together = {rank: curve for rank, curve in sorted(together.items()) if len(curve.step)}
    low = min(curve.step.min() for curve in together.values())
    high = max(curve.step.max() for curve in together.values())
    columns = int(min(columns, high - low + 1))
    width = (high - low + 1) / columns
    value = np.full((len(together), columns), np.nan)
    for row, curve in enumerate(together.values()):
        column = ((curve.step - low) / width).astype(np.int64)
        counts = np.bincount(column, minlength=columns)
        sums = np.bincount(column, weights=curve.value, minlength=columns)
        value[row, counts > 0] = sums[counts > 0] / counts[counts > 0]
    first = np.arange(0, len(together), -(-len(together) // rows))
    middles = low + (np.arange(columns) + 0.5) * width - 0.5
    ranks = list(together)
    return Grid(middles, [ranks[index] for index in first], np.fmax.reduceat(value, first, axis=0))
