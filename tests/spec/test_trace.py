"""A trace's file says again what was recorded: costs and bubble are those that the simulator was given and gave."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from trace_lab import recorded

from dstrain.runtime.spec.errors import UsageError
from dstrain.runtime.spec.schedule import SCHEDULE_NAMES, Action, Costs, Kind, Schedule, Took, make_schedule, simulate
from dstrain.runtime.spec.trace import (
    Category,
    Collected,
    Measured,
    RankTrace,
    Reading,
    Span,
    read_trace,
    trace_events,
    write_trace,
)

COSTS = Costs(
    forward=[3e-3, 4e-3, 5e-3, 6e-3],
    input_gradient=[4e-3, 5e-3, 6e-3, 7e-3],
    weight_gradient=[2e-3, 3e-3, 4e-3, 5e-3],
    message=[1e-3, 2e-3, 3e-3],
)


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb_h1"])
def test_the_costs_and_the_bubble_are_those_of_the_simulator(name: str, tmp_path: Path) -> None:
    timeline = simulate(make_schedule(name, 4, 8), COSTS)
    write_trace(tmp_path / "trace.json", recorded(timeline, 4, zero=10**15))
    measured = read_trace(tmp_path / "trace.json")
    assert measured.ranks == (0, 1, 2, 3)
    [step] = measured.steps
    assert step.makespan_s == pytest.approx(timeline.makespan_s, abs=1e-8)
    assert measured.bubble == pytest.approx(timeline.bubble, abs=1e-5)
    costs = measured.costs
    assert costs is not None
    assert costs.forward == pytest.approx(COSTS.forward, abs=1e-8)
    assert costs.message == pytest.approx(COSTS.message, abs=1e-8)
    assert simulate(timeline.schedule, costs).bubble == pytest.approx(timeline.bubble, abs=1e-5)
    if name == "zb_h1":
        assert costs.weight_gradient == pytest.approx(COSTS.weight_gradient, abs=1e-8)


def test_a_message_that_waits_for_its_receiver_costs_no_more(tmp_path: Path) -> None:
    """Each rank is slow where the other is quick, so most messages come before they are needed."""
    costs = Costs([1e-3, 9e-3], [9e-3, 1e-3], [0.0, 0.0], 2e-3)
    write_trace(tmp_path / "trace.json", recorded(simulate(make_schedule("gpipe", 2, 8), costs), 1, zero=0))
    assert read_trace(tmp_path / "trace.json").messages == {0: pytest.approx(2e-3, abs=1e-8)}


def uneven(schedule: Schedule, seed: int) -> dict[Action, Took]:
    """Actions of 1 to 9 ms, messages of 1 ms."""
    numbers = random.Random(seed)
    found = {}
    for kind, stage, micro_batch in (action for row in schedule.ranks for action in row):
        other = stage + (-1 if kind is Kind.FORWARD else 1)
        is_other = 0 <= other < schedule.stages and schedule.rank_of[other] != schedule.rank_of[stage]
        is_sent = is_other and kind is not Kind.WEIGHT_GRADIENT
        found[Action(kind, stage, micro_batch)] = Took(numbers.uniform(1e-3, 9e-3), 1e-3 * is_sent)
    return found


@pytest.mark.parametrize("name", SCHEDULE_NAMES)
def test_uneven_steps_are_replayed_by_their_own_times(name: str, tmp_path: Path) -> None:
    """Two pipelines side by side, three steps; medians would be wrong by more than 5 %."""
    schedule, traces = make_schedule(name, 3, 6), [RankTrace(rank) for rank in range(6)]
    makespans, bubbles = [], []
    for step in range(3):
        timelines = [simulate(schedule, uneven(schedule, 2 * step + place)) for place in range(2)]
        for place, timeline in enumerate(timelines):
            for trace in recorded(timeline, step, zero=step * 10**12):
                traces[2 * trace.rank + place].spans += [
                    span if span.peer is None else span._replace(peer=2 * span.peer + place) for span in trace.spans
                ]
        makespans.append(max(timeline.makespan_s for timeline in timelines))
        busy_s = sum(len(each.spans) * each.makespan_s * (1 - each.bubble) for each in timelines)
        bubbles.append(1 - busy_s / (6 * makespans[-1]))
    write_trace(tmp_path / "trace.json", traces)
    measured = read_trace(tmp_path / "trace.json")
    assert [step.bubble for step in measured.steps] == pytest.approx(bubbles, abs=1e-5)
    found = measured.replay(schedule)
    assert found is not None
    assert found.steps == 3
    assert found.makespan_s == pytest.approx(sorted(makespans)[1], abs=1e-7)
    assert found.bubble == pytest.approx(sorted(bubbles)[1], abs=1e-5)
    assert measured.costs is not None
    assert simulate(schedule, measured.costs).bubble < 0.95 * found.bubble
    for other in SCHEDULE_NAMES:
        assert other == name or measured.replay(make_schedule(other, 3, 6)) is None
    assert measured.replay(make_schedule(name, 3, 5)) is None


Spans = list[tuple[str, str, int, int, int | None]]
"""A rank's, by hand: kind, name, begin and end in ms, and peer."""


def by_hand(folder: Path, ranks: list[Spans]) -> Measured:
    kinds = {"F": Category.FORWARD, "B": Category.BACKWARD, "s": Category.SEND, "w": Category.WAIT}
    traces = [
        RankTrace(rank, spans=[Span(4, kinds[k], name, b * 10**6, e * 10**6, peer) for k, name, b, e, peer in spans])
        for rank, spans in enumerate(ranks)
    ]
    write_trace(folder / "trace.json", traces)
    return read_trace(folder / "trace.json")


def test_what_happens_between_actions_is_replayed_too(tmp_path: Path) -> None:
    """By hand, in ms. Rank 1 begins late, both have gaps, rank 0 waits for its parameters besides the message."""
    ranks: list[Spans] = [
        [
            *[("F", "0F0", 0, 10, None), ("s", "0F0", 9, 10, 1)],
            *[("B", "0B0", 13, 50, None), ("w", "1B0", 13, 42, 1), ("w", "parameters", 44, 46, None)],
        ],
        [
            *[("F", "1F0", 2, 25, None), ("w", "0F0", 2, 12, 0)],
            *[("B", "1B0", 26, 40, None), ("s", "1B0", 39, 40, 0)],
        ],
    ]
    measured = by_hand(tmp_path, ranks)
    [step] = measured.steps
    own = {str(action): each for row in step.took.values() for action, each in row.items()}
    expected = {
        "0F0": Took(10e-3),
        "0B0": Took(6e-3, message_s=4e-3, before_s=5e-3),
        "1F0": Took(13e-3, message_s=2e-3, before_s=2e-3),
        "1B0": Took(14e-3, before_s=1e-3),
    }
    assert own == {name: pytest.approx(each, abs=1e-9) for name, each in expected.items()}
    assert measured.replay(make_schedule("gpipe", 2, 1)) == pytest.approx((1, 50e-3, 0.57))
    assert measured.bubble == pytest.approx(0.57)


def test_a_message_that_came_early_is_as_quick_as_others(tmp_path: Path) -> None:
    """What it took is not known: its receiver came late."""
    schedule = make_schedule("gpipe", 2, 4)
    took = uneven(schedule, 7)
    took = {action: each._replace(own_s=9e-3 if action.stage else 1e-3) for action, each in took.items()}
    write_trace(tmp_path / "trace.json", recorded(simulate(schedule, took), 1, zero=0))
    [step] = read_trace(tmp_path / "trace.json").steps
    found = [each.message_s for action, each in step.took[1].items() if action.kind is Kind.FORWARD]
    assert found == pytest.approx([1e-3] * 4, abs=1e-8)


def test_a_message_that_was_late_is_late_again(tmp_path: Path) -> None:
    """By hand, in ms. Rank 1 needs 0F1 only 1 ms behind its end, when such a message would be there, and gets it
    7 ms later."""
    rank_0: Spans = [
        *[("F", "0F0", 0, 10, None), ("s", "0F0", 9, 10, 1)],
        *[("F", "0F1", 10, 12, None), ("s", "0F1", 11, 12, 1)],
        *[("B", "0B0", 12, 27, None), ("w", "1B0", 12, 25, 1)],
        *[("B", "0B1", 27, 29, None), ("w", "1B1", 27, 27, 1)],
    ]
    rank_1: Spans = [
        *[("F", "1F0", 0, 13, None), ("w", "0F0", 0, 11, 0)],
        *[("F", "1F1", 13, 22, None), ("w", "0F1", 13, 20, 0)],
        *[("B", "1B0", 22, 24, None), ("s", "1B0", 23, 24, 0)],
        *[("B", "1B1", 24, 26, None), ("s", "1B1", 25, 26, 0)],
    ]
    measured = by_hand(tmp_path, [rank_0, rank_1])
    [step] = measured.steps
    found = {str(action): each.message_s for row in step.took.values() for action, each in row.items()}
    expected = {"1F0": 1e-3, "1F1": 8e-3, "0B0": 1e-3, "0B1": 1e-3}
    assert found == pytest.approx(dict.fromkeys(found, 0.0) | expected, abs=1e-9)
    replayed = measured.replay(make_schedule("gpipe", 2, 2))
    assert replayed == pytest.approx((1, 29e-3, measured.bubble))


ENDLESS = """{"otherData": {"uncertainty_us": {}},
"traceEvents": [{"ph": "X", "cat": "forward", "name": "0F0", "pid": 0,
"ts": Infinity, "dur": 1, "args": {"step": 1}}]}"""


def test_a_step_that_was_cut_short_has_no_bubble(tmp_path: Path) -> None:
    timeline = simulate(make_schedule("1f1b", 2, 4))
    traces = recorded(timeline, 4, zero=0)
    for trace, more in zip(traces, recorded(timeline, 5, zero=10**12), strict=True):
        trace.spans += more.spans[:5]
    write_trace(tmp_path / "trace.json", traces)
    assert [step.step for step in read_trace(tmp_path / "trace.json").steps] == [4]


def test_clocks_that_differ_and_drift_are_one_clock() -> None:
    trace = RankTrace(1, clock=[Reading(1_000_000, 500, 20), Reading(2_000_000, 700, 30)])
    trace.spans = [Span(1, Category.FORWARD, "1F0", 1_000_000, 1_500_000), Span(1, Category.WAIT, "x", 2, 2_000_000)]
    assert [(span.begin_ns, span.end_ns) for span in trace.aligned()] == [(1_000_500, 1_500_600), (302, 2_000_700)]
    assert trace.uncertainty_ns == 30


def test_pieces_come_together_and_what_is_no_trace_is_left_out() -> None:
    spans = [Span(3, Category.FORWARD, f"0F{n}", 10**15 + n, 10**15 + 5 * n, n % 2 or None) for n in range(450)]
    trace = RankTrace(1, "gpu1", "stage 0", [Reading(5, 6, 7)], spans)
    collected = Collected()
    events = [{"kind": "trace", "attempt": 1, "rank": 1, **fields} for fields in trace_events(trace)]
    assert len(events) == 3
    assert max(len(json.dumps(event)) for event in events) < 16384
    broken: list[dict[str, Any]] = [
        {"kind": "trace"},
        events[0] | {"spans": [[1]]},
        events[0] | {"spans": 7},
        events[0] | {"clock": [["x"]]},
        events[0] | {"attempt": 0, "rank": 0},  # one that failed
    ]
    for event in [*broken[:2], *events, *broken[2:]]:
        collected.take(json.loads(json.dumps(event)))
    assert collected.traces == [trace]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"traceEvents": [{"ph": "X"}], "otherData": {"uncertainty_us": {}}}', ENDLESS]
)
def test_a_file_that_is_no_trace_is_refused_in_a_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "trace.json").write_text(text)
    with pytest.raises(UsageError, match=r"trace\.json: expected a trace"):
        read_trace(tmp_path / "trace.json")


def rows_of(events: Sequence[Any]) -> dict[tuple[int, int], list[Any]]:
    rows = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            rows[event["pid"], event["tid"]].append(event)
    return rows


def test_the_file_is_what_perfetto_reads(tmp_path: Path) -> None:
    """Names of ranks in their order, three rows each, arrows that begin and end within a span."""
    timeline = simulate(make_schedule("1f1b", 2, 4), Costs(1e-3, 1e-3, 1e-3, 1e-4))
    write_trace(tmp_path / "trace.json", recorded(timeline, 7, zero=123456789))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert names == {0: "rank 0 (host0)", 1: "rank 1 (host1)"}
    rows = rows_of(events)
    assert sorted(rows) == [(rank, row) for rank in range(2) for row in range(3)]
    assert {event["name"] for event in rows[0, 0]} == {"step 7"}
    arrows = [event for event in events if event["ph"] in "sf"]
    assert len(arrows) == 2 * 8
    for arrow in arrows:
        messages = rows[arrow["pid"], arrow["tid"]]
        assert any(each["ts"] <= arrow["ts"] <= each["ts"] + each["dur"] + 1e-3 for each in messages)
    assert min(event["ts"] for event in events if event["ph"] == "X") == 0
