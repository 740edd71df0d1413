"""From a trace's file to what it says of a schedule: what its actions and messages cost, and its bubble."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from dstrain.runtime.spec.errors import UsageError
from dstrain.runtime.spec.schedule import Costs, Kind, Schedule
from dstrain.runtime.spec.trace.done import Done, Message, done_by, messages
from dstrain.runtime.spec.trace.replay import Executed, Replay, executed, replay
from dstrain.runtime.spec.trace.span import Category, Span


@dataclass(frozen=True)
class Measured:
    """ranks: all that are in the file. steps: those that are whole. seconds: medians of own times, by kind and stage.
    messages: medians by boundary; 0 within a rank. uncertainty_s: of what is compared across ranks.
    [Note: own time]"""

    ranks: tuple[int, ...]
    steps: tuple[Executed, ...]
    seconds: Mapping[Kind, Mapping[int, float]]
    messages: Mapping[int, float]
    uncertainty_s: float

    @property
    def stages(self) -> int:
        return 1 + max((stage for by_stage in self.seconds.values() for stage in by_stage), default=-1)

    @property
    def micro_batches(self) -> int:
        """Of a step, on each rank; 0 where no step is whole."""
        rows = [row for step in self.steps for row in step.took.values()]
        return max((1 + action.micro_batch for row in rows for action in row), default=0)

    @property
    def bubble(self) -> float | None:
        """The median over the steps; None where there is no whole one."""
        return median(step.bubble for step in self.steps) if self.steps else None

    @property
    def costs(self) -> Costs | None:
        """For `simulate`; None where a stage has no forward or no backward. Where a stage's backwards are never split,
        either half of one is half of its time: no schedule of such asks for more."""
        stages = range(self.stages)
        of = self.seconds
        inputs, weights = dict(of[Kind.INPUT_GRADIENT]), dict(of[Kind.WEIGHT_GRADIENT])
        for stage, seconds in of[Kind.BACKWARD].items():  # there are more of these: the halves say how they divide
            both = inputs.get(stage, 0.0) + weights.get(stage, 0.0)
            share = inputs[stage] / both if stage in inputs and both else 0.5
            inputs[stage], weights[stage] = seconds * share, seconds * (1 - share)
        if not stages or any(stage not in each for each in (of[Kind.FORWARD], inputs, weights) for stage in stages):
            return None
        return Costs(
            forward=[of[Kind.FORWARD][stage] for stage in stages],
            input_gradient=[inputs[stage] for stage in stages],
            weight_gradient=[weights[stage] for stage in stages],
            message=[self.messages.get(boundary, 0.0) for boundary in stages[:-1]],
        )

    def replay(self, schedule: Schedule) -> Replay | None:
        """None where it is not this schedule that was traced. [Note: replay]"""
        return replay(self.steps, schedule)


def read_trace(path: Path) -> Measured:
    """Raises UsageError where the file is no trace of ours."""
    try:
        content = json.loads(path.read_bytes())
        spans = _spans(content["traceEvents"])
        uncertain = [float(each) for each in content["otherData"]["uncertainty_us"].values()]
        done = {rank: done_by(mine) for rank, mine in spans.items()}
        under_way = messages(spans, done)
    except OSError as error:
        raise UsageError.mismatch(str(path), "a trace", str(error.strerror)) from None
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, UsageError) as error:
        raise UsageError.mismatch(str(path), "a trace that dstrain has written", repr(error)) from None
    worst = sorted(uncertain)[-2:]  # of two ranks both are uncertain
    typical = _typical(under_way.values())
    steps = tuple(executed(done, under_way, typical))
    between = {boundary: max(0.0, seconds) for boundary, seconds in typical.items()}
    return Measured(tuple(sorted(spans)), steps, _by_kind(done.values()), between, sum(worst) / 1e6)


def _spans(events: Iterable[Mapping[str, Any]]) -> dict[int, list[Span]]:
    """By rank, in order of their begin."""
    found: defaultdict[int, list[Span]] = defaultdict(list)
    for event in events:
        if event["ph"] == "M":
            found[int(event["pid"])] += []
        elif event["ph"] == "X" and event["cat"] != "step":
            begin, took, more = round(event["ts"] * 1000), round(event["dur"] * 1000), event["args"]
            span = Span(more["step"], Category(event["cat"]), event["name"], begin, begin + took, more.get("peer"))
            found[int(event["pid"])].append(span)
    return {rank: sorted(spans, key=lambda span: span.begin_ns) for rank, spans in found.items()}


def _by_kind(done: Iterable[Sequence[Done]]) -> dict[Kind, dict[int, float]]:
    samples: dict[Kind, defaultdict[int, list[float]]] = {kind: defaultdict(list) for kind in Kind}
    for each in done:
        for one in each:
            samples[one.action.kind][one.action.stage].append(one.own_s)
    return {kind: {stage: median(of) for stage, of in by_stage.items()} for kind, by_stage in samples.items()}


def _typical(under_way: Iterable[Message]) -> dict[int, float]:
    """Medians of those that were awaited, by boundary; where none was, the least bound. [Note: own time]"""
    awaited: defaultdict[int, list[float]] = defaultdict(list)
    bounds: dict[int, float] = {}
    for boundary, seconds, was_awaited, _ in under_way:
        bounds[boundary] = min(seconds, bounds.get(boundary, seconds))
        if was_awaited:
            awaited[boundary].append(seconds)
    return bounds | {boundary: median(seconds) for boundary, seconds in awaited.items()}
