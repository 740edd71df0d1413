"""GPipe, 1F1B and interleaved 1F1B: schedules with whole backward passes. Pure.

Sources: GPipe, Huang et al. 2019 (arXiv:1811.06965); 1F1B, Narayanan et al. 2019 (PipeDream) with its flush, 2021
(arXiv:2006.09503); interleaved, Narayanan et al. 2021 (arXiv:2104.04473).
"""

from __future__ import annotations

from itertools import pairwise

from dstrain.runtime.spec.schedule.action import Action, Kind
from dstrain.runtime.spec.schedule.plan import Schedule, in_a_loop, schedule_of


def gpipe(ranks: int, micro_batches: int) -> Schedule:
    """All forwards, then all backwards, both in the order of the micro-batches. In flight: all of them.

    Idle on every rank: (p − 1)(F + B).
    """
    rows = [
        [Action(kind, rank, number) for kind in (Kind.FORWARD, Kind.BACKWARD) for number in range(micro_batches)]
        for rank in range(ranks)
    ]
    return schedule_of("gpipe", micro_batches, rows, in_a_loop(ranks, 1))


def one_f_one_b(ranks: int, micro_batches: int) -> Schedule:
    """A warm-up of min(m, p − rank − 1) forwards, then a forward and a backward in turn, then the backwards left.

    In flight on a rank: min(m, p − rank). Idle on every rank: (p − 1)(F + B).
    """
    rows = []
    for rank in range(ranks):
        forwards = [Action(Kind.FORWARD, rank, number) for number in range(micro_batches)]
        backwards = [Action(Kind.BACKWARD, rank, number) for number in range(micro_batches)]
        rows.append(_in_turn(forwards, backwards, ranks - rank - 1))
    return schedule_of("1f1b", micro_batches, rows, in_a_loop(ranks, 1))


def interleaved(ranks: int, micro_batches: int, stages_per_rank: int) -> Schedule:
    """1F1B over v chunks per rank, stage s on rank s % p: the bubble's time is divided by v.

    [Note: groups of p]
    A rank takes micro-batches in groups: a group through its first chunk, then, as it comes back from the last rank,
    through its second, and so on; backwards likewise, last chunk first. A group of p comes back just in time. Where p
    does not divide m, there are ⌊m/p⌋ groups as even as can be: none is smaller than p, so that nobody waits; the
    larger ones, g ≤ 2p − 1, cost (v − 1)(g − p) more activations. Only fewer micro-batches than p leave gaps.

    In flight on a rank: min(vm, 2(p − rank − 1) + (v − 1)g + 1) chunks. Idle on every rank: (p − 1)(F + B) of a chunk,
    and (v − 1)(p − m)(F + B) more where m < p.
    """
    rows = []
    for rank in range(ranks):
        stages = [chunk * ranks + rank for chunk in range(stages_per_rank)]
        groups = _groups(ranks, micro_batches)
        forwards = [Action(Kind.FORWARD, stage, number) for group in groups for stage in stages for number in group]
        backwards = [
            Action(Kind.BACKWARD, stage, number) for group in groups for stage in reversed(stages) for number in group
        ]
        warm_up = 2 * (ranks - rank - 1) + (stages_per_rank - 1) * len(groups[0])
        rows.append(_in_turn(forwards, backwards, warm_up))
    return schedule_of("interleaved_1f1b", micro_batches, rows, in_a_loop(ranks, stages_per_rank))


def _groups(ranks: int, micro_batches: int) -> list[range]:
    """[Note: groups of p] Consecutive micro-batches; the larger groups first."""
    count = max(1, micro_batches // ranks)
    smaller, larger = divmod(micro_batches, count)
    starts = [group * smaller + min(group, larger) for group in range(count + 1)]
    return [range(start, stop) for start, stop in pairwise(starts)]


def _in_turn(forwards: list[Action], backwards: list[Action], warm_up: int) -> list[Action]:
    """Forwards of the warm-up, pairs of one forward and one backward, the backwards that are left."""
    warm_up = min(warm_up, len(forwards))
    row = forwards[:warm_up]
    for forward, backward in zip(forwards[warm_up:], backwards, strict=False):
        row += (forward, backward)
    return row + backwards[len(forwards) - warm_up :]
