"""A schedule as data: what each pipeline rank computes, in which order. What is drawn is what runs.

[Note: compact rows]
A row lists actions, not time slots: when each begins follows from what it waits for (`simulator`), so idle cells say
nothing and are not kept. "Cell 3 of rank 1" is the fourth action of that row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dstrain.runtime.spec.schedule.action import Action, Kind


@dataclass(frozen=True)
class Schedule:
    """[Note: compact rows]"""

    name: str
    """For messages and titles: of a builder, or of the user's file."""
    stages: int
    """Pieces of the model, all ranks together."""
    micro_batches: int
    """Of one step."""
    ranks: tuple[tuple[Action, ...], ...]
    """For each pipeline rank its actions in order."""
    rank_of: tuple[int, ...]
    """For each stage the pipeline rank that holds it."""

    def stages_on(self, rank: int) -> tuple[int, ...]:
        """The stages (model chunks) that a rank holds, ascending."""
        return tuple(stage for stage, holder in enumerate(self.rank_of) if holder == rank)


def in_a_loop(ranks: int, stages_per_rank: int) -> tuple[int, ...]:
    """Stage s on rank s % ranks: stage -> rank."""
    return tuple(range(ranks)) * stages_per_rank


def in_a_v(ranks: int) -> tuple[int, ...]:
    """Two stages per rank, down the ranks and up again; the first rank has the first and the last: stage -> rank."""
    return (*range(ranks), *reversed(range(ranks)))


def schedule_of(name: str, micro_batches: int, rows: Iterable[Sequence[Action]], rank_of: tuple[int, ...]) -> Schedule:
    """A builder's rows as a schedule."""
    return Schedule(name, len(rank_of), micro_batches, tuple(map(tuple, rows)), rank_of)


def endings(row: Sequence[Action]) -> dict[int, Action]:
    """The last action of each stage that gives gradients of parameters, in the order of a rank's row."""
    found: dict[int, Action] = {}
    for action in row:
        if action.kind in (Kind.BACKWARD, Kind.WEIGHT_GRADIENT):
            found.pop(action.stage, None)
            found[action.stage] = action
    return found


def hastened(schedule: Schedule) -> Schedule:
    """The same, with all backwards behind a rank's last forward in two, but those of the first stage: what the stage
    before waits for leaves before the weights' gradients are computed.

    At the end of a step stages wait for these one behind the other: GPipe and 1F1B are shorter by (p - 1) · W. What a
    split keeps besides is that of one backward, while activations become fewer.
    """
    return schedule_of(schedule.name, schedule.micro_batches, map(_hasty, schedule.ranks), schedule.rank_of)


def _hasty(row: Sequence[Action]) -> Sequence[Action]:
    last_forward = max(place for place, action in enumerate(row) if action.kind is Kind.FORWARD)
    found = list(row[:last_forward])
    for kind, stage, micro_batch in row[last_forward:]:
        halves = kind is Kind.BACKWARD and stage
        kinds = (Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT) if halves else (kind,)
        found += [Action(each, stage, micro_batch) for each in kinds]
    return found
