"""The simulator: times by hand and by an oracle, costs, deadlocks."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dstrain.runtime.spec.errors import ScheduleError, UsageError
from dstrain.runtime.spec.schedule import (
    SCHEDULE_NAMES,
    Action,
    Costs,
    Kind,
    Schedule,
    Timeline,
    Took,
    make_schedule,
    simulate,
)


def rows(*texts: str) -> tuple[tuple[Action, ...], ...]:
    return tuple(tuple(map(Action.parse, text.split())) for text in texts)


def times(timeline: Timeline) -> list[list[tuple[str, float, float]]]:
    return [[(str(action), start, end) for action, start, end in spans] for spans in timeline.spans]


def test_times_by_hand() -> None:
    """Two stages of different costs, a message of 10 s: rank 1 computes while messages travel."""
    schedule = Schedule("hand", 2, 2, rows("0F0 0F1 0I0 0I1 0W0 0W1", "1F0 1B0 1F1 1B1"), (0, 1))
    timeline = simulate(schedule, Costs([1.0, 2.0], [3.0, 4.0], [5.0, 6.0], 10.0))
    assert times(timeline) == [
        [("0F0", 0, 1), ("0F1", 1, 2), ("0I0", 33, 36), ("0I1", 45, 48), ("0W0", 48, 53), ("0W1", 53, 58)],
        [("1F0", 11, 13), ("1B0", 13, 23), ("1F1", 23, 25), ("1B1", 25, 35)],
    ]
    assert timeline.makespan_s == 58
    assert timeline.idle_s == (58 - 18, 58 - 24)
    assert timeline.bubble == pytest.approx((40 + 34) / 116)
    assert timeline.peak_in_flight == (2, 1)
    assert timeline.peak_until_input_gradient == (2, 1)


def test_actions_that_take_other_times_each() -> None:
    """0F1 begins 4 s late, 1F1's message comes 1 s before 0F1 has ended, 1B0 has nothing to wait for."""
    schedule = Schedule("hand", 2, 2, rows("0F0 0F1 0B0 0B1", "1F0 1B0 1F1 1B1"), (0, 1))
    took = {
        "0F0": Took(1.0),
        "0F1": Took(5.0, before_s=4.0),
        "0B0": Took(2.0, message_s=3.0, before_s=1.0),
        "0B1": Took(1.0, message_s=0.5),
        "1F0": Took(3.0, message_s=2.0, before_s=1.0),
        "1B0": Took(1.0, before_s=0.5),
        "1F1": Took(2.0, message_s=-1.0),
        "1B1": Took(4.0),
    }
    timeline = simulate(schedule, {Action.parse(text): each for text, each in took.items()})
    assert times(timeline) == [
        [("0F0", 0, 1), ("0F1", 5, 10), ("0B0", 11, 13), ("0B1", 15.5, 16.5)],
        [("1F0", 3, 6), ("1B0", 6.5, 7.5), ("1F1", 9, 11), ("1B1", 11, 15)],
    ]
    assert timeline.bubble == pytest.approx(1 - (9 + 10) / (2 * 16.5))


def test_stages_on_one_rank_need_no_message() -> None:
    """At the bottom of the V, between stages 1 and 2, the message costs nothing; the others cost 5 s and 7 s."""
    timeline = simulate(make_schedule("zb_v", 2, 1), Costs(1.0, 1.0, 1.0, [5.0, 100.0, 7.0]))
    assert timeline.spans[0][-1].end_s == 4 + 4 + 1 + 2 * (5 + 7)


@settings(max_examples=50)
@given(st.data(), st.sampled_from(SCHEDULE_NAMES), st.integers(1, 5), st.integers(1, 8))
def test_every_start_is_as_early_as_its_needs_allow(data: st.DataObject, name: str, p: int, m: int) -> None:
    """Against the definition: an action starts at the end of the row's last, or when its last message arrives."""
    schedule = make_schedule(name, p, m)
    stages = schedule.stages
    numbers = st.floats(0, 9, allow_nan=False)
    each = st.lists(numbers, min_size=stages, max_size=stages)
    forward, inputs, weights = data.draw(each), data.draw(each), data.draw(each)
    message = data.draw(st.lists(numbers, min_size=stages - 1, max_size=stages - 1))
    timeline = simulate(schedule, Costs(forward, inputs, weights, message))
    end = {str(span.action).replace("B", "I"): span.end_s for spans in timeline.spans for span in spans}

    def travel(stage: int) -> float:
        return message[stage] if schedule.rank_of[stage] != schedule.rank_of[stage + 1] else 0.0

    for spans in timeline.spans:
        free = 0.0
        for (kind, stage, number), start_s, end_s in spans:
            arrivals = [free]
            if kind is Kind.FORWARD and stage:
                arrivals.append(end[f"{stage - 1}F{number}"] + travel(stage - 1))
            if kind in (Kind.BACKWARD, Kind.INPUT_GRADIENT) and stage + 1 < stages:
                arrivals.append(end[f"{stage + 1}I{number}"] + travel(stage))
            own = {"F": forward[stage], "I": inputs[stage], "W": weights[stage], "B": inputs[stage] + weights[stage]}
            assert start_s == max(arrivals)
            assert end_s == start_s + own[kind]
            free = end_s
    assert timeline.makespan_s == max(spans[-1].end_s for spans in timeline.spans)
    for spans, idle in zip(timeline.spans, timeline.idle_s, strict=True):
        busy = sum(span.end_s - span.start_s for span in spans)
        assert math.isclose(idle, timeline.makespan_s - busy, abs_tol=1e-9)


@pytest.mark.parametrize(
    ("costs", "message"),
    [
        (Costs([1.0, 1.0], 1.0, 1.0), "costs, forward: expected one number or 4 (the stages), found 2 numbers"),
        (Costs(1.0, 1.0, [1.0] * 5), "costs, weight_gradient: expected one number or 4 (the stages), found 5 numbers"),
        (Costs(1.0, 1.0, 1.0, [1.0] * 4), "costs, message: expected one number or 3 (the boundaries between stages)"),
        (Costs(1.0, -1.0, 1.0), "costs, input_gradient: expected seconds, at least 0 and finite, found -1.0"),
        (Costs(1.0, 1.0, math.nan), "found nan"),
        (Costs(1.0, 1.0, 1.0, math.inf), "found inf"),
    ],
)
def test_costs_that_cannot_be(costs: Costs, message: str) -> None:
    with pytest.raises(UsageError) as raised:
        simulate(make_schedule("1f1b", 4, 2), costs)
    assert message in str(raised.value)


def test_a_deadlock_of_two_ranks() -> None:
    schedule = Schedule("mine", 2, 2, rows("0F0 0B0 0F1 0B1", "1F0 1F1 1B0 1B1"), (0, 1))
    with pytest.raises(ScheduleError) as raised:
        simulate(schedule)
    assert str(raised.value).splitlines() == [
        "schedule mine, rank 0, cell 1: expected rows that come to their ends, found a deadlock: rank 0 at cell 1 "
        "(0B0) waits for cell 2 of rank 1, rank 1 at cell 1 (1F1) waits for cell 2 of rank 0; move one of these "
        "up, before the cell that waits",
        "cell       0     1     2     3",
        "rank 0   0F0  >0B0<  0F1   0B1",
        "rank 1   1F0  >1F1<  1B0   1B1",
    ]
    assert (raised.value.rank, raised.value.cell) == (0, 1)


def test_who_only_waits_for_a_deadlock_is_not_to_blame() -> None:
    """Ranks 1 and 2 wait for one another; rank 0 waits for rank 1, rank 3 for rank 2."""
    whole = make_schedule("1f1b", 4, 4)
    broken = list(whole.ranks)
    broken[1] = rows("1F0 1B0 1F1 1F2 1B1 1F3 1B2 1B3")[0]
    with pytest.raises(ScheduleError) as raised:
        simulate(Schedule("mine", 4, 4, tuple(broken), whole.rank_of))
    assert (raised.value.rank, raised.value.cell) == (1, 1)
    text = str(raised.value)
    assert (
        "rank 1 at cell 1 (1B0) waits for cell 2 of rank 2, rank 2 at cell 1 (2F1) waits for cell 2 of rank 1" in text
    )
    assert text.count(">") == 2
    assert ">1B0<" in text
    assert ">2F1<" in text


def test_a_circle_is_told_from_its_lowest_rank_on() -> None:
    """Rank 0 waits for rank 2, and ranks 2 and 1 for one another."""
    broken = rows("0F0 0F1 0B0 0B1", "2F0 2F1 2B0 2B1", "1F0 1B0 1F1 1B1")
    with pytest.raises(ScheduleError) as raised:
        simulate(Schedule("mine", 3, 2, broken, (0, 2, 1)))
    assert (raised.value.rank, raised.value.cell) == (1, 1)
    assert "rank 1 at cell 1 (2F1) waits for cell 2 of rank 2, rank 2 at cell 1 (1B0) waits for" in str(raised.value)


def test_waiting_for_what_nobody_does() -> None:
    with pytest.raises(ScheduleError) as raised:
        simulate(Schedule("mine", 3, 1, rows("0F0 0B0", "1F0 1B0", "2F0"), (0, 1, 2)))
    assert (raised.value.rank, raised.value.cell) == (1, 1)
    assert "rank 1 at cell 1 (1B0) waits for 2I0 or 2B0, which no rank does; add it" in str(raised.value)
