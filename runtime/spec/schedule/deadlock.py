"""Who waits for whom when a schedule cannot go on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dstrain.runtime.spec.errors import ScheduleError
from dstrain.runtime.spec.schedule.action import Action, Kind
from dstrain.runtime.spec.schedule.grid import error_at
from dstrain.runtime.spec.schedule.plan import Schedule

Places = Mapping[Action, tuple[int, int]]
"""(rank, cell) of what has not run."""


def as_needed(action: Action) -> Action:
    """By what name others wait for it: a B gives what an I gives."""
    kind, stage, micro_batch = action
    return Action(Kind.INPUT_GRADIENT, stage, micro_batch) if kind is Kind.BACKWARD else action


def deadlock(schedule: Schedule, done: Sequence[int], blocked: Mapping[int, Action]) -> ScheduleError:
    """The error on the ranks that wait for one another in a circle, or on the one that waits for what nobody does.

    done: for each rank how many cells have run. blocked: rank -> what its next cell waits for.
    """
    places = {
        as_needed(action): (rank, cell)
        for rank in blocked
        for cell, action in enumerate(schedule.ranks[rank])
        if cell >= done[rank]
    }
    circle = _circle(blocked, places)
    marks = {(rank, done[rank]): str(schedule.ranks[rank][done[rank]]) for rank in circle}
    waits = [
        f"rank {rank} at cell {cell} ({action}) waits for {_told(blocked[rank], places)}"
        for (rank, cell), action in marks.items()
    ]
    fix = "add it" if blocked[circle[-1]] not in places else "move one of these up, before the cell that waits"
    return error_at(schedule, marks, "rows that come to their ends", f"a deadlock: {', '.join(waits)}", fix)


def _circle(blocked: Mapping[int, Action], places: Places) -> list[int]:
    """Each waits for the next, the last for the first; or one alone, whose need nobody meets. Lowest rank first."""
    chain = [min(blocked)]
    while (place := places.get(blocked[chain[-1]])) and place[0] not in chain:
        chain.append(place[0])
    if not place:
        return chain[-1:]
    circle = chain[chain.index(place[0]) :]
    first = circle.index(min(circle))
    return circle[first:] + circle[:first]


def _told(needed: Action, places: Places) -> str:
    if needed not in places:
        alternative = f" or {needed._replace(kind=Kind.BACKWARD)}" if needed.kind is Kind.INPUT_GRADIENT else ""
        return f"{needed}{alternative}, which no rank does"
    rank, cell = places[needed]
    return f"cell {cell} of rank {rank}"
