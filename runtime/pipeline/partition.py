"""Which layers each stage has: neighbours, so that the slowest stage is as fast as it can be. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from dstrain.runtime.spec.errors import UsageError


def partition(wished: str | Sequence[int], costs: Sequence[float], stages: int) -> list[int]:
    """Layers of each stage. wished: the numbers, or how `costs`, one for each layer, were found. Raises UsageError."""
    check_partition(wished, len(costs), stages)
    return balanced(costs, stages) if isinstance(wished, str) else list(wished)


def check_partition(wished: str | Sequence[int], layers: int, stages: int) -> None:
    """Raises UsageError where a model of so many layers cannot be cut so."""
    if isinstance(wished, str):
        if layers < stages:
            expected = f"at most the {layers} layers of the model"
            raise UsageError.mismatch("parallel.pipeline", expected, f"{stages} stages")
        return
    if len(wished) != stages:
        raise UsageError.mismatch("parallel.partition", f"{stages} numbers, one for each stage", str(len(wished)))
    if sum(wished) != layers:
        found = f"{' + '.join(map(str, wished))} = {sum(wished)}"
        fix = "the embedding is the first layer, the head the last"
        raise UsageError.mismatch("parallel.partition", f"all {layers} layers of the model", found, fix)


def balanced(costs: Sequence[float], stages: int) -> list[int]:
    """Cut layers of these costs into `stages` runs of neighbours, none empty, so that the dearest run is as cheap as
    possible, and among those ways one whose runs differ least; returns the layers of each stage.

    Dynamic programming, O(stages × layers²). There are at least as many layers as stages: `check_partition`.
    """
    layers = len(costs)
    before = [0.0]
    for cost in costs:
        before.append(before[-1] + cost)
    # best[end]: (the dearest run, the sum of squares) of the first `end` layers in so many stages, and the last cut
    best: list[tuple[float, float, int] | None] = [(0.0, 0.0, 0)] + [None] * layers
    cuts: list[list[int]] = []
    for stage in range(stages):
        following: list[tuple[float, float, int] | None] = [None] * (layers + 1)
        for end in range(stage + 1, layers - (stages - stage - 1) + 1):
            ways = []
            for start in range(stage, end):
                known = best[start]
                if known is not None:
                    run = before[end] - before[start]
                    ways.append((max(known[0], run), known[1] + run * run, start))
            following[end] = min(ways)
        best = following
        cuts.append([way[2] if way is not None else 0 for way in best])
    ends = [layers]
    for stage in reversed(range(stages)):
        ends.append(cuts[stage][ends[-1]])
    return [stop - start for start, stop in pairwise(reversed(ends))]


def bounds(counts: Sequence[int]) -> list[range]:
    """The layers of each stage."""
    found, start = [], 0
    for count in counts:
        found.append(range(start, start + count))
        start += count
    return found
