"""For which rank do the others wait? Pure: where each rank stands to those that are behind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from dstrain.launcher import stacks
from dstrain.launcher.console_text import fold_numbers


@dataclass(frozen=True)
class Standing:
    """One rank, asked where it is.

    state: of its process as in /proc (S, R, D, T, …), and what it sleeps in. text: its stack; empty without an answer.
    step: its last one, 0 before the first; None: it reports none.
    """

    rank: int
    host: str
    state: str
    text: str
    step: int | None = None

    @property
    def stack(self) -> stacks.Stack:
        return stacks.main_thread(self.text)

    @property
    def waits(self) -> bool:
        """For other ranks, in a collective."""
        return stacks.waits(self.stack, is_running=self.state.startswith("R"))

    @property
    def is_stopped(self) -> bool:
        return self.state.startswith("T")

    @property
    def in_debugger(self) -> bool:
        return self.state.startswith("t") or stacks.in_debugger(self.stack)


@dataclass(frozen=True)
class Blame:
    """behind: the ranks that are the reason, the likeliest first. waiting: those that wait for them.

    all_wait: those behind stand in a collective too. can_be_asked: somebody has answered.
    """

    behind: tuple[Standing, ...]
    waiting: tuple[int, ...]
    all_wait: bool
    can_be_asked: bool

    @property
    def others_wait(self) -> bool:
        """Does somebody wait? Assumed of ranks that cannot be asked."""
        return bool(self.waiting) or self.all_wait or not self.can_be_asked

    @property
    def are_apart(self) -> bool:
        """Are several behind, in different places, with nobody seen to wait? One of them may wait where none sees it,
        on a GPU, say."""
        places = {stacks.place(one.text) for one in self.behind}
        return len(places) > 1 and not self.others_wait

    @property
    def takes_long(self) -> bool:
        """Are they where a rank may be for much longer than a step? Assumed of ranks that cannot be asked."""
        return not self.can_be_asked or any(stacks.takes_long(one.stack) for one in self.behind)

    def words(self, verb: str, text: str = "") -> str:
        """`rank 1 on h2 hangs in load (data.py:31), rank 0 waits for it`. text: a newer stack of the first behind."""
        first, numbers = self.behind[0], fold_numbers(one.rank for one in self.behind)
        if self.all_wait and len(self.behind) > 1:
            return f"ranks {numbers} {_plural(verb)} in a collective, rank {first.rank} {_how(first, '', text).strip()}"
        words = f"rank {first.rank} on {first.host} "
        if len(self.behind) > 1:
            words = f"ranks {numbers} {_plural(verb)}, {words}{_how(first, '', text).strip()}"
        else:
            words += _how(first, verb, text)
        if self.waiting:
            many = len(self.waiting) > 1
            words += (
                f", {'ranks' if many else 'rank'} {fold_numbers(self.waiting)} {'wait' if many else 'waits'} for it"
            )
        return words


def _plural(verb: str) -> str:
    return {"is": "are", "hangs": "hang"}[verb]


def _how(one: Standing, verb: str, text: str) -> str:
    prefix = "hangs: it " if verb == "hangs" else ""
    if one.is_stopped:
        return f"{prefix}is stopped (SIGSTOP)"
    disk = ""
    if not one.text and one.state.startswith("D"):
        where = one.state.removeprefix("D").strip()
        disk = f"waits for a disk or a network file system{f' ({where})' if where else ''}"
    if place := stacks.place(text or one.text):
        return f"{verb} in {place}{f': it {disk}' if disk else ''}"
    if disk:
        return f"{prefix}{disk}"
    return f"{prefix}does not say where it is"


def blame(ranks: Sequence[Standing]) -> Blame:
    """One that is stopped or does not answer; else outside of any collective, while others wait in one; of several
    those with the fewest steps; of those the one that stands elsewhere than all others. Without any sign, all."""
    answered = [one for one in ranks if one.stack]
    in_collective = {one.rank for one in ranks if one.waits}
    behind = [one for one in ranks if one.is_stopped]
    if not behind and answered:
        behind = [one for one in ranks if not one.stack]
    behind = behind or [one for one in ranks if one.rank not in in_collective] or list(ranks)
    behind = _elsewhere(_fewest_steps(behind))
    names = {one.rank for one in behind}
    waiting = in_collective - names
    if len(behind) == 1 and not waiting and len(answered) > 2:
        waiting = {one.rank for one in ranks} - names  # they stand together, but not where one sees that they wait
    all_wait = len(ranks) > 1 and names <= in_collective
    return Blame(tuple(behind), tuple(sorted(waiting)), all_wait, bool(answered))


def _fewest_steps(ranks: list[Standing]) -> list[Standing]:
    steps = [one.step for one in ranks if one.step is not None]
    return [one for one in ranks if one.step == min(steps)] if len(steps) == len(ranks) else ranks


def _elsewhere(ranks: list[Standing]) -> list[Standing]:
    """The one that is alone in its place, where all others are together; else all."""
    if len(ranks) < 3:
        return ranks
    places = Counter(stacks.place(one.text) for one in ranks)
    alone = [one for one in ranks if places[stacks.place(one.text)] == 1]
    return alone if len(alone) == 1 and len(places) == 2 else ranks
