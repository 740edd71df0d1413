"""Runs a schedule without torch: when each action begins and ends, or which rank waits forever.

[Note: model of time]
A rank computes one action at a time, in its row's order, as soon as what the action needs has arrived. A message to
another rank takes its time but does not block the sender, and links do not hinder one another. What an action needs:
- F: the forward of the stage before.
- B and I: the own forward, and the input gradient of the stage behind (of its B: when the whole B has ended).
- W: the own I.
Orders within ranks are fixed, so each start is a maximum of known ends: no queue of events, one visit per action.
What an action takes follows from its kind and stage (`Costs`), or is known of each (`Took`), as of a traced step.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dstrain.runtime.spec.errors import UsageError
from dstrain.runtime.spec.schedule.action import Action, Kind
from dstrain.runtime.spec.schedule.deadlock import as_needed, deadlock
from dstrain.runtime.spec.schedule.plan import Schedule

Seconds = float | Sequence[float]
"""One number for all, or one for each."""


@dataclass(frozen=True)
class Costs:
    """What one micro-batch takes, in seconds. A B takes input_gradient + weight_gradient."""

    forward: Seconds
    """For all stages or for each."""
    input_gradient: Seconds
    weight_gradient: Seconds
    message: Seconds = 0.0
    """Between stages s and s + 1, the same in both directions; one number, or one for each of stages − 1 boundaries.
    Between stages on one rank it counts as 0."""


UNIT = Costs(1.0, 1.0, 1.0)
"""One slot for F, I and W, two for B."""


class Took(NamedTuple):
    """What one action takes, in seconds."""

    own_s: float
    message_s: float = 0.0
    """From the end of what it needs of another rank until it is here; below 0 where that came before the end."""
    before_s: float = 0.0
    """Its rank does nothing for so long behind its last action, or at the step's begin."""


class Span(NamedTuple):
    """An action in time."""

    action: Action
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Timeline:
    """A schedule in time, from the first start (0) to the last end."""

    schedule: Schedule
    spans: tuple[tuple[Span, ...], ...]
    """For each rank, in the order of its row."""

    @property
    def makespan_s(self) -> float:
        return max((row[-1].end_s for row in self.spans if row), default=0.0)

    @property
    def idle_s(self) -> tuple[float, ...]:
        """For each rank what of the makespan it does not compute: its bubble."""
        makespan = self.makespan_s
        busy = (math.fsum(span.end_s - span.start_s for span in row) for row in self.spans)
        return tuple(max(0.0, makespan - each) for each in busy)  # a sum's rounding is no idle time

    @property
    def bubble(self) -> float:
        """Idle share of all ranks' time, 0 to 1."""
        total = self.makespan_s * len(self.spans)
        return math.fsum(self.idle_s) / total if total else 0.0

    @property
    def peak_in_flight(self) -> tuple[int, ...]:
        """For each rank the most activations at once, in chunks: forward begun, last gradient (B or W) not yet done."""
        return tuple(_peak(row, Kind.WEIGHT_GRADIENT) for row in self.schedule.ranks)

    @property
    def peak_until_input_gradient(self) -> tuple[int, ...]:
        """The same, where an activation counts only until its I (or B) is done."""
        return tuple(_peak(row, Kind.INPUT_GRADIENT) for row in self.schedule.ranks)


def simulate(schedule: Schedule, costs: Costs | Mapping[Action, Took] = UNIT) -> Timeline:
    """[Note: model of time] Raises UsageError for costs that do not fit, ScheduleError for a deadlock.

    costs: the same for all micro-batches, or of each action. What else can be wrong with a schedule finds
    `validation.check`.
    """
    clock = _Clock(schedule, costs)
    spans: list[list[Span]] = [[] for _ in schedule.ranks]
    waiting: defaultdict[Action, list[int]] = defaultdict(list)
    runnable = list(range(len(schedule.ranks)))
    while runnable:
        rank = runnable.pop()
        row, done = schedule.ranks[rank], spans[rank]
        while len(done) < len(row):
            action = row[len(done)]
            needs = clock.needs(action)
            missing = [needed for needed in needs if needed not in clock.ended]
            if missing:
                waiting[missing[0]].append(rank)
                break
            done.append(clock.run(action, needs, done[-1].end_s if done else 0.0))
            if waiting:
                runnable += waiting.pop(as_needed(action), ())
    blocked = {rank: action for action, ranks in waiting.items() for rank in ranks}
    if blocked:
        raise deadlock(schedule, [len(done) for done in spans], blocked)
    return Timeline(schedule, tuple(map(tuple, spans)))


def _peak(row: Sequence[Action], freed_by: Kind) -> int:
    held = peak = 0
    for action in row:
        held += action.kind is Kind.FORWARD
        peak = max(peak, held)
        held -= action.kind in (freed_by, Kind.BACKWARD)
    return peak


class _Clock:
    """What each action takes, and when each that has run ended."""

    def __init__(self, schedule: Schedule, costs: Costs | Mapping[Action, Took]) -> None:
        self.last = schedule.stages - 1
        self.took = costs.__getitem__ if isinstance(costs, Mapping) else _by_stage(schedule, costs)
        self.ended: dict[Action, float] = {}

    def needs(self, action: Action) -> list[Action]:
        """What must have ended; what comes from another stage last."""
        kind, stage, micro_batch = action
        if kind is Kind.FORWARD:
            return [Action(kind, stage - 1, micro_batch)] if stage > 0 else []
        if kind is Kind.WEIGHT_GRADIENT:
            return [Action(Kind.INPUT_GRADIENT, stage, micro_batch)]
        own = Action(Kind.FORWARD, stage, micro_batch)
        return [own] if stage == self.last else [own, Action(Kind.INPUT_GRADIENT, stage + 1, micro_batch)]

    def run(self, action: Action, needs: list[Action], free_s: float) -> Span:
        """All that it needs has ended; free_s: when its rank is free."""
        own_s, message_s, before_s = self.took(action)
        start = free_s + before_s
        if needs:  # one's own has ended before `free_s`
            start = max(start, self.ended[needs[-1]] + message_s)
        end = start + own_s
        self.ended[as_needed(action)] = end
        return Span(action, start, end)


def _by_stage(schedule: Schedule, costs: Costs) -> Callable[[Action], Took]:
    stages, holders = schedule.stages, schedule.rank_of
    forward = _each("forward", costs.forward, stages, "stages")
    inputs = _each("input_gradient", costs.input_gradient, stages, "stages")
    weights = _each("weight_gradient", costs.weight_gradient, stages, "stages")
    messages = _each("message", costs.message, stages - 1, "boundaries between stages")
    between = [0.0 if holders[s] == holders[s + 1] else cost for s, cost in enumerate(messages)]
    behind = [*between, 0.0]
    took = {
        Kind.FORWARD: list(map(Took, forward, [0.0, *between])),
        Kind.INPUT_GRADIENT: list(map(Took, inputs, behind)),
        Kind.WEIGHT_GRADIENT: list(map(Took, weights)),
        Kind.BACKWARD: [
            Took(one + other, message) for one, other, message in zip(inputs, weights, behind, strict=True)
        ],
    }
    return lambda action: took[action.kind][action.stage]


def _each(name: str, seconds: Seconds, count: int, of: str) -> list[float]:
    """One number for each of `count`."""
    values = [float(seconds)] * count if isinstance(seconds, int | float) else [float(each) for each in seconds]
    if len(values) != count:
        raise UsageError.mismatch(f"costs, {name}", f"one number or {count} (the {of})", f"{len(values)} numbers")
    for value in values:
        if not 0 <= value < math.inf:
            raise UsageError.mismatch(f"costs, {name}", "seconds, at least 0 and finite", str(value))
    return values
