"""What every trace's file keeps, and traces whose costs are known."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from dstrain.runtime.spec.schedule import Action, Kind, Timeline
from dstrain.runtime.spec.trace import Category, RankTrace, Span


def check_file(path: Path, ranks: int, steps: list[int]) -> dict[tuple[int, int], list[Any]]:
    """All ranks, all steps, nothing beside a step, no two spans of a row at once. Returns the rows, in order."""
    rows = defaultdict(list)
    for event in json.loads(path.read_text())["traceEvents"]:
        if event["ph"] == "X":
            rows[event["pid"], event["tid"]].append(event)
    assert {rank for rank, _ in rows} == set(range(ranks))
    for (rank, number), row in rows.items():
        row.sort(key=lambda event: (event["ts"], event["dur"]))
        for one, other in pairwise(row):
            assert one["ts"] + one["dur"] <= other["ts"] + 2e-3, (rank, number, one, other)
        inside = {step["args"]["step"]: step for step in rows[rank, 0]}
        assert list(inside) == steps
        for event in row:
            step = inside[event["args"]["step"]]
            assert step["ts"] <= event["ts"] + 2e-3
            assert event["ts"] + event["dur"] <= step["ts"] + step["dur"] + 2e-3
    return rows


def names(row: list[Any], step: int, *categories: Category) -> list[str]:
    return [event["name"] for event in row if event["args"]["step"] == step and event["cat"] in categories]


def source(timeline: Timeline, action: Action) -> Action | None:
    """What an action needs of another rank."""
    schedule = timeline.schedule
    every = {each for row in schedule.ranks for each in row}
    if action.kind is Kind.WEIGHT_GRADIENT:
        return None
    other = action.stage + (-1 if action.kind is Kind.FORWARD else 1)
    if not 0 <= other < schedule.stages or schedule.rank_of[other] == schedule.rank_of[action.stage]:
        return None
    kinds = [Kind.FORWARD] if action.kind is Kind.FORWARD else [Kind.BACKWARD, Kind.INPUT_GRADIENT]
    return next(each for kind in kinds if (each := Action(kind, other, action.micro_batch)) in every)


def ns(seconds: float) -> int:
    return round(seconds * 1e9)


def recorded(timeline: Timeline, step: int, zero: int) -> list[RankTrace]:
    """What ranks would record that go through a timeline, with the wait for what an action needs inside of it."""
    schedule = timeline.schedule
    traces = [RankTrace(rank, f"host{rank}") for rank in range(len(schedule.ranks))]
    for rank, row in enumerate(timeline.spans):
        free, spans = 0.0, traces[rank].spans
        for action, start, end in row:
            spans.append(Span(step, Category.of(action.kind), str(action), zero + ns(free), zero + ns(end)))
            needed = source(timeline, action)
            if needed is not None:
                peer = schedule.rank_of[needed.stage]
                spans.append(Span(step, Category.WAIT, str(needed), zero + ns(free), zero + ns(start), peer))
                traces[peer].spans.append(_send(timeline, needed, step, zero, rank))
            free = end
    return traces


def _send(timeline: Timeline, action: Action, step: int, zero: int, peer: int) -> Span:
    end = next(span.end_s for row in timeline.spans for span in row if span.action == action)
    return Span(step, Category.SEND, str(action), zero + ns(end), zero + ns(end), peer)
