"""Several sources with weights.

[Note: mixture]
Sample i of the job comes from a source that follows from i alone. Source 1 with the share p gets sample i where
⌊(i+1)·p⌋ > ⌊i·p⌋ (Beatty's sequence): its samples stand as evenly as whole numbers can, and ⌊i·p⌋ of them stand before
i. The samples it does not get are numbered anew, and the next source takes its share of them likewise. So a source's
own sample index is known without counting, each prefix has the right shares to within one sample for each source, and
each source goes through its own epochs. Shares are fractions of whole numbers: nothing drifts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from dstrain.runtime.data.sampler import TokenWindows
from dstrain.runtime.data.samples import share_of


class Shares:
    """Which source has which sample. [Note: mixture]"""

    def __init__(self, weights: Sequence[float]) -> None:
        """weights: positive."""
        exact = [Fraction(str(weight)) for weight in weights]  # 0.7 is 7/10, not the nearest double
        self._shares = [weight / sum(exact[source:]) for source, weight in enumerate(exact)]  # the last one's is 1

    def place(self, sample: int) -> tuple[int, int]:
        """The source of a sample, and which of that source's samples it is."""
        for source, share in enumerate(self._shares):
            before = _floor(sample * share)
            if _floor((sample + 1) * share) > before:
                return source, before
            sample -= before
        raise AssertionError("the last source takes what is left")

    def counts(self, samples: int) -> list[int]:
        """How many of the first `samples` samples each source has."""
        counts = []
        for share in self._shares:
            counts.append(_floor(samples * share))
            samples -= counts[-1]
        return counts


class MixedWindows:
    """Windows of several corpora: Samples and Validation."""

    def __init__(self, sources: Sequence[TokenWindows], weights: Sequence[float]) -> None:
        self._sources, self._shares = sources, Shares(weights)

    def __len__(self) -> int:
        """As many samples as all sources have together; a source of large weight is then seen more than once."""
        return sum(len(source) for source in self._sources)

    def batch(self, samples: Sequence[int]) -> Tensor:
        """The samples of those global indices, (len(samples), length + 1), int64. [Note: mixture]"""
        return self._gather(samples, lambda source, numbers: self._sources[source].batch(numbers))

    def batches(self, count: int, rank: int, ranks: int, micro: int) -> Iterator[Tensor]:
        """This rank's share of `count` windows, in each source evenly spaced, as many as its weight says."""
        counts = self._shares.counts(count)
        for samples in share_of(count, rank, ranks, micro):
            yield self._gather(
                samples, lambda source, numbers: self._sources[source].evenly_spaced(numbers, counts[source])
            )

    def _gather(self, samples: Sequence[int], read: Callable[[int, list[int]], Tensor]) -> Tensor:
        """The rows of all sources in the order of `samples`."""
        places = [self._shares.place(sample) for sample in samples]
        rows: dict[int, Tensor] = {}
        for source in {source for source, _ in places}:
            mine = [row for row, (other, _) in enumerate(places) if other == source]
            rows |= dict(zip(mine, read(source, [places[row][1] for row in mine]), strict=True))
        return torch.stack([rows[row] for row in range(len(places))])


def _floor(fraction: Fraction) -> int:
    return fraction.numerator // fraction.denominator
