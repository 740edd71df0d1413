"""What a rank knows to have arrived, without being told. Pure.

[Note: arrivals]
A neighbour that sends something has taken all that stands before it in its row. So with each message that a rank takes
it knows which of its own have been taken, and their memory is free. Gloo says no such thing: whether a send has gone
is known only to those who wait for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from dstrain.runtime.spec.schedule import Action, Kind


class Message(NamedTuple):
    """Of a micro-batch, over the boundary behind a stage: its output, or that one's gradient."""

    is_output: bool
    boundary: int
    micro_batch: int

    @property
    def sender(self) -> int:
        """The stage."""
        return self.boundary if self.is_output else self.boundary + 1

    @property
    def receiver(self) -> int:
        """The stage."""
        return self.boundary + 1 if self.is_output else self.boundary


def taken(action: Action, stages: int) -> Message | None:
    """What an action needs from another stage."""
    if action.kind is Kind.FORWARD:
        return Message(True, action.stage - 1, action.micro_batch) if action.stage else None
    is_there = action.kind is not Kind.WEIGHT_GRADIENT and action.stage < stages - 1
    return Message(False, action.stage, action.micro_batch) if is_there else None


def given(action: Action, stages: int) -> Message | None:
    """What another stage needs from an action."""
    if action.kind is Kind.FORWARD:
        return Message(True, action.stage, action.micro_batch) if action.stage < stages - 1 else None
    is_there = action.kind is not Kind.WEIGHT_GRADIENT and action.stage > 0
    return Message(False, action.stage - 1, action.micro_batch) if is_there else None


def arrivals(rows: Sequence[Sequence[Action]], rank_of: Sequence[int], rank: int) -> dict[Action, list[Message]]:
    """By each action of a rank's row that takes a message: which of its own it then knows to have been taken.
    [Note: arrivals] rows: of all ranks. rank_of: for each stage its rank."""
    stages = len(rank_of)
    of_rank = {other: _Neighbour(row, rank_of, rank) for other, row in enumerate(rows) if other != rank}
    found: dict[Action, list[Message]] = {}
    for action in rows[rank]:
        message = taken(action, stages)
        if message is not None and rank_of[message.sender] != rank:
            found[action] = list(of_rank[rank_of[message.sender]].until(message))
    return found


class _Neighbour:
    """A rank's row, as another rank learns of it."""

    def __init__(self, row: Sequence[Action], rank_of: Sequence[int], to: int) -> None:
        stages = len(rank_of)
        self._taken: list[Message] = []
        self._before: dict[Message, int] = {}
        self._known = 0
        for action in row:
            message = taken(action, stages)
            if message is not None and rank_of[message.sender] == to:
                self._taken.append(message)
            message = given(action, stages)
            if message is not None and rank_of[message.receiver] == to:
                self._before[message] = len(self._taken)

    def until(self, message: Message) -> Iterator[Message]:
        """What it has taken when it sends `message`, and was not known before."""
        known, self._known = self._known, max(self._known, self._before[message])
        yield from self._taken[known : self._known]
