"""Curves made ready to be drawn: nothing that matters is lost, and no more points are kept than are seen."""

from __future__ import annotations

import numpy as np
import pytest

from dstrain.launcher.report import series
from dstrain.launcher.report.read import Curve


def curve(steps, values) -> Curve:
    return Curve(np.array(list(steps), dtype=float), np.array(list(values), dtype=float))


def pairs(found: Curve) -> list[tuple[float, float]]:
    return list(zip(found.step.tolist(), found.value.tolist(), strict=True))


def test_thinned_keeps_ends_and_every_spike():
    step = np.arange(1, 100_001.0)
    value = np.sin(step / 5000)
    for index, height in ((12_345, 9.0), (77_777, -9.0)):
        value[index] = height
    few = series.thinned(Curve(step, value), 1000)
    assert 500 < len(few.step) <= 1002
    assert (np.diff(few.step) > 0).all()
    assert (few.step[0], few.step[-1]) == (1, 100_000)
    assert {(12_346.0, 9.0), (77_778.0, -9.0)} <= set(pairs(few))
    assert set(pairs(few)) <= set(pairs(Curve(step, value)))


@pytest.mark.parametrize("count", [1, 2, 3, 10, 11, 999, 1000, 1001, 1999, 2001])
def test_reductions_of_any_length(count):
    whole = curve(range(count), range(count))
    few, means = series.thinned(whole, 10), series.averaged(whole, 10)
    assert (few.step[0], few.step[-1]) == (0, count - 1)
    assert len(few.step) <= 12
    assert len(means.step) == min(count, 10)
    np.testing.assert_allclose(means.step, means.value)  # on y = x a stretch's mean lies on the line
    assert means.value.mean() == pytest.approx(whole.value.mean(), rel=0.1)


def test_what_a_restart_did_again_does_not_count():
    first, second, third = curve(range(1, 8), "1111111"), curve(range(5, 10), "22222"), curve(range(4, 6), "33")
    history = series.resumed([first, second, third, curve([], [])])
    assert [found.step.tolist() for found in history.counted] == [[1, 2, 3], [], [4, 5]]
    assert [found.step.tolist() for found in history.overtaken] == [[4, 5, 6, 7], [5, 6, 7, 8, 9], []]
    assert history.restarts == [5, 4]


def test_attempts_are_drawn_apart_and_without_what_has_no_height():
    parts = [curve([1, 2, 3], [1, np.inf, 3]), curve([], []), curve([4, 5], [np.nan, 5])]
    line = series.drawn(parts, 100, series.thinned)
    np.testing.assert_array_equal(line.step, [1, 3, 5, 5])
    np.testing.assert_array_equal(line.value, [1, 3, np.nan, 5])
    assert len(series.drawn([], 100, series.averaged).step) == 0


def test_points_are_shared_between_attempts():
    line = series.drawn([curve(range(9000), range(9000)), curve(range(9000, 10_000), range(1000))], 100, series.thinned)
    (lifted,) = np.flatnonzero(np.isnan(line.value))
    assert 80 <= lifted <= 92
    assert len(line.step) <= 106


def test_highest_of_ranks_that_have_different_steps():
    assert pairs(series.highest([curve([1, 2, 4], [5, 1, 1]), curve([1, 2, 3], [4, 2, 9])])) == [
        (1, 5),
        (2, 2),
        (3, 9),
        (4, 1),
    ]
    assert pairs(series.highest([curve([], [])])) == []


def test_grid_means_by_stretch_and_highest_of_neighbours():
    ranks = {rank: [curve(range(1, 9), [rank + 1] * 8)] for rank in range(3)}
    ranks[2].append(curve(range(9, 13), [10] * 4))
    picture = series.grid(ranks, columns=4, rows=2)
    assert picture.ranks == [0, 2]
    np.testing.assert_allclose(picture.step, [2, 5, 8, 11])
    np.testing.assert_array_equal(picture.value, [[2, 2, 2, np.nan], [3, 3, (3 + 3 + 10) / 3, 10]])


def test_grid_has_no_more_columns_than_steps():
    picture = series.grid({rank: [curve([7], [rank])] for rank in range(9)}, columns=400, rows=128)
    assert picture.value.tolist() == [[rank] for rank in range(9)]
    assert picture.step.tolist() == [7]
