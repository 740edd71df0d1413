"""ZB-H1 and ZB-V: the weights' gradients, which nobody waits for, fill the bubble. Pure.

Source: Qi et al. 2023, Zero Bubble Pipeline Parallelism (arXiv:2401.10241). Their B is our I.
"""

from __future__ import annotations

from itertools import count

from dstrain.runtime.spec.schedule.action import Action, Kind
from dstrain.runtime.spec.schedule.plan import Schedule, in_a_loop, in_a_v, schedule_of


def zb_h1(ranks: int, micro_batches: int) -> Schedule:
    """1F1B whose backwards are split; rank r owes up to r weight gradients, and pays them when the rest is done.

    In flight: min(m, p) on every rank, what the first rank has in 1F1B. Idle on every rank: (p − 1)(F + I) −
    (min(m, p) − 1) min(F, I, W), the paper's (p − 1)(F + I − W) where m ≥ p and W is the smallest.
    """
    rows = []
    for rank in range(ranks):
        warm_up = min(micro_batches, ranks - rank - 1)
        row = [Action(Kind.FORWARD, rank, number) for number in range(warm_up)]
        for number in range(micro_batches):
            if warm_up + number < micro_batches:
                row.append(Action(Kind.FORWARD, rank, warm_up + number))
            row.append(Action(Kind.INPUT_GRADIENT, rank, number))
            if number >= rank:
                row.append(Action(Kind.WEIGHT_GRADIENT, rank, number - rank))
        owed = range(max(0, micro_batches - rank), micro_batches)
        rows.append(row + [Action(Kind.WEIGHT_GRADIENT, rank, number) for number in owed])
    return schedule_of("zb_h1", micro_batches, rows, in_a_loop(ranks, 1))


def zb_v(ranks: int, micro_batches: int) -> Schedule:
    """Two chunks per rank in a V: stage s on rank s, and up again, so that the first rank has the last stage too.

    From 2p − 1 micro-batches on it is [Note: phases of a V], below that [Note: greedy order], which then wastes less.
    In flight: min(2m, 2p) chunks on every rank, as much as p whole ranks' activations. Idle on every rank where
    F = I = W: the p − 1 F of a chunk until the last rank has its first input, and nothing else where m ≥ 2p − 1.
    """
    if micro_batches >= 2 * ranks - 1:
        rows = [_phases(rank, ranks, micro_batches) for rank in range(ranks)]
    else:
        rows = _Greedy(ranks, micro_batches).rows()
    return schedule_of("zb_v", micro_batches, rows, in_a_v(ranks))


def _phases(rank: int, ranks: int, micro_batches: int) -> list[Action]:
    """[Note: phases of a V]
    In slots of one F, I or W, of the first chunk (0) or the second (1): micro-batch 0 is back from the V's bottom
    after 2(p − r) − 1 slots; from there the two forwards alternate until the first gradient arrives. Then every slot
    has its work: F, I and W of the second chunk until the first chunk's gradients arrive too, then of both in turn.
    At the end the last weight gradients fill what the missing forwards leave.
    """
    above = ranks - rank
    phases = [
        (2 * above - 1, "F0"),
        (rank, "F1 F0"),
        (above, "F1 I1 W1"),
        (micro_batches - (2 * above - 1) - rank, "F0 I0 W0 F1 I1 W1"),
        (above - 1, "I0 W0 F1 I1 W1"),
        (rank, "I0 I1"),
        (above, "I0 W0"),
        (rank, "W1"),
        (rank, "W0"),
    ]
    numbers = {word: count() for _, words in phases for word in words.split()}
    stages = {"0": rank, "1": 2 * ranks - 1 - rank}
    return [
        Action(Kind(word[0]), stages[word[1]], next(numbers[word]))
        for times, words in phases
        for word in words.split() * times
    ]


class _Greedy:
    """[Note: greedy order]
    Slot by slot (F, I and W take one each) every rank does the first that it can of: the first chunk's input gradient
    (its micro-batch is the oldest), the second chunk's forward, the first chunk's forward, the second chunk's input
    gradient, a weight gradient. A forward needs one of the rank's 2p places for activations of chunks; the last free
    one is kept for the second chunk, so that the oldest micro-batch can always go on. Each kind takes the micro-batches
    in their order: for each stage three counters say all.
    """

    def __init__(self, ranks: int, micro_batches: int) -> None:
        self.ranks, self.micro_batches = ranks, micro_batches
        self.done = {kind: [0] * (2 * ranks) for kind in Kind}

    def rows(self) -> list[list[Action]]:
        rows: list[list[Action]] = [[] for _ in range(self.ranks)]
        while min(self.done[Kind.WEIGHT_GRADIENT]) < self.micro_batches:
            chosen = [self._choice(rank) for rank in range(self.ranks)]  # all see what was done before the slot
            for row, action in zip(rows, chosen, strict=True):
                if action:
                    row.append(action)
                    self.done[action.kind][action.stage] += 1
        return rows

    def _choice(self, rank: int) -> Action | None:
        first, second = rank, 2 * self.ranks - 1 - rank
        forwards, weights = self.done[Kind.FORWARD], self.done[Kind.WEIGHT_GRADIENT]
        places = 2 * self.ranks - sum(forwards[stage] - weights[stage] for stage in (first, second))
        order = [
            (Kind.INPUT_GRADIENT, first, True),
            (Kind.FORWARD, second, places >= 1),
            (Kind.FORWARD, first, places >= 2),
            (Kind.INPUT_GRADIENT, second, True),
            (Kind.WEIGHT_GRADIENT, first, True),
            (Kind.WEIGHT_GRADIENT, second, True),
        ]
        for kind, stage, allowed in order:
            number = self.done[kind][stage]
            if allowed and number < self._arrived(kind, stage):
                return Action(kind, stage, number)
        return None

    def _arrived(self, kind: Kind, stage: int) -> int:
        """Of how many micro-batches the stage has what this kind needs."""
        forwards, inputs = self.done[Kind.FORWARD], self.done[Kind.INPUT_GRADIENT]
        if kind is Kind.FORWARD:
            return forwards[stage - 1] if stage else self.micro_batches
        if kind is Kind.WEIGHT_GRADIENT:
            return inputs[stage]
        return min(forwards[stage], inputs[stage + 1]) if stage + 1 < 2 * self.ranks else forwards[stage]
