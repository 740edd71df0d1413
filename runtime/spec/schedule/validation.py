"""Whether a schedule can run: each action exactly once, in an order that ends."""

from __future__ import annotations

from collections import defaultdict

from dstrain.runtime.spec.errors import ScheduleError, UsageError
from dstrain.runtime.spec.schedule.action import Action, Kind
from dstrain.runtime.spec.schedule.grid import error_at
from dstrain.runtime.spec.schedule.plan import Schedule
from dstrain.runtime.spec.schedule.simulator import simulate

_BEFORE = {Kind.FORWARD: "", Kind.BACKWARD: "F", Kind.INPUT_GRADIENT: "F", Kind.WEIGHT_GRADIENT: "FI"}
"""What of a micro-batch a stage must have done before, all of it."""
_WHOLE = ("FB", "FIW")


def check(schedule: Schedule) -> None:
    """Raises ScheduleError at the first cell that is wrong, UsageError for numbers that are.

    Every stage has for every micro-batch one F, then one B or one I and later one W, on its own rank; simulated, all
    ranks come to their ends; and neighbouring stages take micro-batches in one order, as messages are.
    """
    _check_numbers(schedule)
    done: defaultdict[tuple[int, int], str] = defaultdict(str)
    for rank, row in enumerate(schedule.ranks):
        for cell, action in enumerate(row):
            fault = _out_of_range(schedule, rank, action)
            if not fault:
                key = action.stage, action.micro_batch
                fault = _out_of_order(action, done[key])
                done[key] += action.kind
            if fault:
                raise error_at(schedule, {(rank, cell): str(action)}, *fault)
    for stage, rank in enumerate(schedule.rank_of):
        for micro_batch in range(schedule.micro_batches):
            if done[stage, micro_batch] not in _WHOLE:
                raise _incomplete(schedule, rank, Action(Kind.FORWARD, stage, micro_batch), done[stage, micro_batch])
    simulate(schedule)
    _check_orders(schedule)


def _check_orders(schedule: Schedule) -> None:
    """Messages from one stage to the next, and back, are taken in the order in which they are sent."""
    forwards: list[list[tuple[int, int, Action]]] = [[] for _ in range(schedule.stages)]
    backwards: list[list[tuple[int, int, Action]]] = [[] for _ in range(schedule.stages)]
    for rank, row in enumerate(schedule.ranks):
        for cell, action in enumerate(row):
            if action.kind is not Kind.WEIGHT_GRADIENT:
                (forwards if action.kind is Kind.FORWARD else backwards)[action.stage].append((rank, cell, action))
    for stage in range(schedule.stages - 1):
        if schedule.rank_of[stage] != schedule.rank_of[stage + 1]:
            _check_order(schedule, forwards[stage], forwards[stage + 1])
            _check_order(schedule, backwards[stage + 1], backwards[stage])


def _check_order(schedule: Schedule, sent: list[tuple[int, int, Action]], taken: list[tuple[int, int, Action]]) -> None:
    for (_, _, sends), (rank, cell, takes) in zip(sent, taken, strict=True):
        if sends.micro_batch != takes.micro_batch:
            expected = (
                f"{takes._replace(micro_batch=sends.micro_batch)}, for {sends} comes first from stage {sends.stage}"
            )
            fix = "let neighbours take micro-batches in one order"
            raise error_at(schedule, {(rank, cell): str(takes)}, expected, str(takes), fix)


def _check_numbers(schedule: Schedule) -> None:
    where = f"schedule {schedule.name}"
    if schedule.micro_batches < 1 or schedule.stages < 1:
        found = f"{schedule.stages} stages, {schedule.micro_batches} micro-batches"
        raise UsageError.mismatch(where, "at least 1 stage and 1 micro-batch", found)
    if len(schedule.rank_of) != schedule.stages or not set(schedule.rank_of) <= {*range(len(schedule.ranks))}:
        expected = f"one rank below {len(schedule.ranks)} for each of {schedule.stages} stages"
        raise UsageError.mismatch(where, expected, f"rank_of {schedule.rank_of}")
    for rank in range(len(schedule.ranks)):
        if rank not in schedule.rank_of:
            raise UsageError.mismatch(f"{where}, rank {rank}", "at least one stage", "none", "use fewer ranks")


def _out_of_range(schedule: Schedule, rank: int, action: Action) -> tuple[str, str, str] | None:
    """(expected, found, fix)"""
    if not 0 <= action.stage < schedule.stages:
        return f"a stage from 0 to {schedule.stages - 1}", f"stage {action.stage}", "correct its number"
    if not 0 <= action.micro_batch < schedule.micro_batches:
        expected = f"a micro-batch from 0 to {schedule.micro_batches - 1}"
        return expected, f"micro-batch {action.micro_batch}", "correct its number or change the micro-batches"
    holder = schedule.rank_of[action.stage]
    if holder != rank:
        expected = f"an action of its stages ({', '.join(map(str, schedule.stages_on(rank)))})"
        return expected, f"{action}, whose stage rank {holder} holds", f"move it to rank {holder}"
    return None


def _out_of_order(action: Action, done: str) -> tuple[str, str, str] | None:
    """done: the letters of what the stage has done before for the micro-batch. (expected, found, fix)"""
    kind, stage, micro_batch = action
    if kind in done:
        return "each action once", f"{action} for the second time", "delete one of the two"
    if (kind is Kind.BACKWARD and "I" in done) or (kind in "IW" and "B" in done):
        other = action._replace(kind=Kind.INPUT_GRADIENT if kind is Kind.BACKWARD else Kind.BACKWARD)
        return "either a B or an I and a W", f"{action} after {other}", f"delete {action}, or split {other}"
    for letter in _BEFORE[kind]:
        if letter not in done:
            needed = f"{stage}{letter}{micro_batch}"
            return f"{needed} before {action}", "none", f"put {needed} before it, on this rank"
    return None


def _incomplete(schedule: Schedule, rank: int, forward: Action, done: str) -> ScheduleError:
    """forward: of the stage and micro-batch whose letters are `done`. Marked is the row's end."""
    missing = {"": Kind.FORWARD, "F": Kind.BACKWARD, "FI": Kind.WEIGHT_GRADIENT}[done]
    action = forward._replace(kind=missing)
    split = f" (or {forward._replace(kind=Kind.INPUT_GRADIENT)} and {forward._replace(kind=Kind.WEIGHT_GRADIENT)})"
    expected = f"{action}{split if missing is Kind.BACKWARD else ''} somewhere in the row"
    marks = {(rank, len(schedule.ranks[rank])): f"{action}?"}
    return error_at(schedule, marks, expected, "none", "add it")
