"""From a trace's file to what it says of a schedule: what its actions and messages cost, and its bubble.

[Note: own time]
An action's span begins with the wait for what it needs. Its own time is the span without such waits: what `simulate`
asks for. A message's time is known where its receiver had begun to wait before it was sent: from its begin to the
wait's end; where nobody ever waited, the shortest such time is an upper bound.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from dstrain.runtime.spec.errors import UsageError
from dstrain.runtime.spec.schedule import Action, Costs, Kind
from dstrain.runtime.spec.trace.span import Category, Span


class Executed(NamedTuple):
    """One step. makespan_s: from the first action's begin to the last one's end. bubble: the share of all ranks' time
    in it that is no action's own, 0 to 1."""

    step: int
    makespan_s: float
    bubble: float


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


def read_trace(path: Path) -> Measured:
    """Raises UsageError where the file is no trace of ours."""
    try:
        content = json.loads(path.read_bytes())
        spans = _spans(content["traceEvents"])
        uncertain = [float(each) for each in content["otherData"]["uncertainty_us"].values()]
        own = {rank: _own_times(mine) for rank, mine in spans.items()}
        times = _by_kind(own.values())
    except OSError as error:
        raise UsageError.mismatch(str(path), "a trace", str(error.strerror)) from None
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, UsageError) as error:
        raise UsageError.mismatch(str(path), "a trace that dstrain has written", repr(error)) from None
    worst = sorted(uncertain)[-2:]  # of two ranks both are uncertain
    return Measured(tuple(sorted(spans)), tuple(_executed(own)), times, _messages(spans), sum(worst) / 1e6)


class _Own(NamedTuple):
    action: Action
    span: Span
    own_s: float


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


def _own_times(spans: Sequence[Span]) -> list[_Own]:
    """Of a rank's actions. [Note: own time]"""
    waits = [span for span in spans if span.category is Category.WAIT]
    begins = [wait.begin_ns for wait in waits]
    found = []
    for span in spans:
        if span.category.is_action:
            inside = waits[bisect_left(begins, span.begin_ns) : bisect_left(begins, span.end_ns)]
            waited = sum(min(wait.end_ns, span.end_ns) - wait.begin_ns for wait in inside)
            found.append(_Own(Action.parse(span.name), span, (span.end_ns - span.begin_ns - waited) / 1e9))
    return found


def _by_kind(own: Iterable[Sequence[_Own]]) -> dict[Kind, dict[int, float]]:
    samples: dict[Kind, defaultdict[int, list[float]]] = {kind: defaultdict(list) for kind in Kind}
    for each in own:
        for action, _, seconds in each:
            samples[action.kind][action.stage].append(seconds)
    return {kind: {stage: median(of) for stage, of in by_stage.items()} for kind, by_stage in samples.items()}


def _executed(own: Mapping[int, Sequence[_Own]]) -> list[Executed]:
    """Whole steps: those with as many actions as any."""
    by_step: defaultdict[int, list[_Own]] = defaultdict(list)
    for each in own.values():
        for one in each:
            by_step[one.span.step].append(one)
    most = max(map(len, by_step.values()), default=0)
    ranks = sum(1 for each in own.values() if each)
    executed = []
    for step, actions in sorted(by_step.items()):
        begin, end = min(one.span.begin_ns for one in actions), max(one.span.end_ns for one in actions)
        makespan_s = (end - begin) / 1e9
        if len(actions) == most and makespan_s > 0:
            busy_s = sum(one.own_s for one in actions)
            executed.append(Executed(step, makespan_s, 1 - busy_s / (ranks * makespan_s)))
    return executed


def _messages(spans: Mapping[int, Sequence[Span]]) -> dict[int, float]:
    """[Note: own time]"""
    sent = {
        (span.step, span.name, rank, span.peer): span
        for rank, mine in spans.items()
        for span in mine
        if span.category is Category.SEND and span.peer is not None
    }
    awaited: defaultdict[int, list[float]] = defaultdict(list)
    bounds: dict[int, float] = {}
    for rank, mine in spans.items():
        for wait in mine:
            if wait.category is not Category.WAIT or wait.peer is None:
                continue
            send = sent.get((wait.step, wait.name, wait.peer, rank))
            if send is None:
                continue
            action = Action.parse(wait.name)
            boundary = action.stage if action.kind is Kind.FORWARD else action.stage - 1
            seconds = max(0.0, (wait.end_ns - send.begin_ns) / 1e9)
            bounds[boundary] = min(seconds, bounds.get(boundary, seconds))
            if wait.begin_ns <= send.begin_ns:
                awaited[boundary].append(seconds)
    return bounds | {boundary: median(seconds) for boundary, seconds in awaited.items()}
