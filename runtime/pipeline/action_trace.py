"""What the executor tells the trace: its actions by their names in the schedule, what each waits for, what it sends."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

from dstrain.runtime.spec.schedule import Action, Kind, Schedule
from dstrain.runtime.spec.trace import Category
from dstrain.runtime.tracing.recorder import NOTHING, Recorder


class ActionTrace:
    """Of one rank."""

    def __init__(self, trace: Recorder, schedule: Schedule, place: int, ranks: Sequence[int]) -> None:
        """place: the pipeline rank. ranks: of the job, by pipeline rank."""
        self._trace, self._place, self._ranks = trace, place, list(ranks)
        self._rank_of, self._last = schedule.rank_of, schedule.stages - 1
        self._split = {action[1:] for row in schedule.ranks for action in row if action.kind is Kind.INPUT_GRADIENT}

    @property
    def is_on(self) -> bool:
        """Whether anything is recorded now; else these all do nothing, in some microseconds."""
        return self._trace.is_on

    def action(self, action: Action) -> AbstractContextManager[None]:
        """Around it, with the wait for what it needs."""
        return self._trace.span(Category.of(action.kind), action) if self._trace.is_on else NOTHING

    def waiting(self, action: Action) -> AbstractContextManager[None]:
        """Around the wait of an action that needs another stage's."""
        if not self._trace.is_on:
            return NOTHING
        stage, micro = action.stage, action.micro_batch
        if action.kind is Kind.FORWARD:
            needed = Action(Kind.FORWARD, stage - 1, micro)
        else:
            is_split = (stage + 1, micro) in self._split
            needed = Action(Kind.INPUT_GRADIENT if is_split else Kind.BACKWARD, stage + 1, micro)
        return self._message(Category.WAIT, needed, needed.stage)

    def sending(self, action: Action) -> AbstractContextManager[None]:
        """Around the begin of a message with what an action has made."""
        if not self._trace.is_on:
            return NOTHING
        return self._message(Category.SEND, action, action.stage + (1 if action.kind is Kind.FORWARD else -1))

    def finishing(self) -> AbstractContextManager[None]:
        """Around the wait for all messages to have gone."""
        return self._trace.span(Category.WAIT, "messages to have gone")

    def _message(self, category: Category, made_by: Action, other: int) -> AbstractContextManager[None]:
        """other: the stage at the other end. What stays on this rank is no message."""
        place = self._rank_of[other]
        return NOTHING if place == self._place else self._trace.span(category, made_by, self._ranks[place])
