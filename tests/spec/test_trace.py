"""A trace's file says again what was recorded: costs and bubble are those that the simulator was given and gave."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from trace_lab import recorded

from dstrain.runtime.spec.errors import UsageError
from dstrain.runtime.spec.schedule import Costs, make_schedule, simulate
from dstrain.runtime.spec.trace import (
    Category,
    Collected,
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
