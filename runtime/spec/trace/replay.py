"""Traced steps in the simulator once more, each action with the time that it took in that step.

[Note: replay]
An action takes longer one time than another, and whoever is slower makes the others wait: with medians for all actions
a schedule's bubble comes out smaller than it is. So where the schedule that is planned is the very one that was traced,
each traced step is simulated by its own times: what each action took, how long its message was under way, and how long
a rank was between two actions, which is no action's own time. The waits follow from the schedule.
"""

from __future__ import annotations

import math
from collections import ChainMap, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import NamedTuple

from dstrain.runtime.spec.schedule import Action, Schedule, Took, simulate
from dstrain.runtime.spec.trace.done import Done, Message, Taker


class Executed(NamedTuple):
    """One step. makespan_s: from the first action's begin to the last one's end. bubble: the share of all ranks' time
    in it that is no action's own, 0 to 1. took: for each rank its actions, in their order."""

    step: int
    makespan_s: float
    bubble: float
    took: Mapping[int, Mapping[Action, Took]]


class Replay(NamedTuple):
    """Medians over so many traced steps. [Note: replay]"""

    steps: int
    makespan_s: float
    bubble: float


def executed(
    done: Mapping[int, Sequence[Done]], messages: Mapping[Taker, Message], typical: Mapping[int, float]
) -> list[Executed]:
    """Whole steps: those with as many actions as any. typical: seconds of a message, by boundary."""
    by_step: defaultdict[int, dict[int, list[Done]]] = defaultdict(dict)
    for rank, mine in done.items():
        for one in mine:
            by_step[one.span.step].setdefault(rank, []).append(one)
    counts = {step: sum(map(len, rows.values())) for step, rows in by_step.items()}
    found = []
    for step, rows in sorted(by_step.items()):
        begin_ns = min(row[0].span.begin_ns for row in rows.values())
        makespan_s = (max(row[-1].span.end_ns for row in rows.values()) - begin_ns) / 1e9
        if counts[step] == max(counts.values()) and makespan_s > 0:
            took = {rank: _took(rank, row, begin_ns, messages, typical) for rank, row in rows.items()}
            found.append(Executed(step, makespan_s, _bubble(took, makespan_s), took))
    return found


def _took(
    rank: int, row: Sequence[Done], begin_ns: int, messages: Mapping[Taker, Message], typical: Mapping[int, float]
) -> dict[Action, Took]:
    """What an action waited for besides its message counts as if it had begun so much later. [Note: replay]"""
    found, free_ns = {}, begin_ns
    for action, span, own_s, _, others_s in row:
        message, message_s = messages.get((span.step, rank, action)), 0.0
        if message is not None:
            usual_s = typical[message.boundary]
            is_known = message.was_awaited or message.waited_s > usual_s
            message_s = message.seconds if is_known else min(message.seconds, usual_s)
        before_s = (span.begin_ns - free_ns) / 1e9
        found[action] = Took(own_s, message_s + others_s, before_s + others_s)
        free_ns = span.end_ns
    return found


def replay(steps: Iterable[Executed], schedule: Schedule) -> Replay | None:
    """None where no step has gone through this very schedule. [Note: replay]"""
    makespans, bubbles = [], []
    for step in steps:
        pipelines = _pipelines(step, schedule)
        if makespan_s := max((simulate(schedule, took).makespan_s for took in pipelines), default=0.0):
            makespans.append(makespan_s)
            bubbles.append(_bubble(step.took, makespan_s))
    return Replay(len(bubbles), median(makespans), median(bubbles)) if bubbles else None


def _pipelines(step: Executed, schedule: Schedule) -> list[Mapping[Action, Took]]:
    """What the actions of each pipeline took: there are as many, side by side, as data ranks."""
    by_row: defaultdict[tuple[Action, ...], list[Mapping[Action, Took]]] = defaultdict(list)
    for _, took in sorted(step.took.items()):
        by_row[tuple(took)].append(took)
    if set(by_row) != set(schedule.ranks) or len({len(ranks) for ranks in by_row.values()}) > 1:
        return []
    return [dict(ChainMap(*ranks)) for ranks in zip(*(by_row[row] for row in schedule.ranks), strict=True)]


def _bubble(took: Mapping[int, Mapping[Action, Took]], makespan_s: float) -> float:
    busy_s = math.fsum(each.own_s for row in took.values() for each in row.values())
    return 1 - busy_s / (len(took) * makespan_s)
