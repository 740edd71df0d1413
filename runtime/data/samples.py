"""What the trainer asks of data: samples by their global index, and some held out to validate on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

Batch = Tensor | Sequence[Any] | Mapping[str, Any]
"""Samples as torch's default_collate puts them together; of language models int64, (samples, sequence_length + 1)."""


class Samples(Protocol):
    """Samples to train on, one epoch after another for ever, by global index. [Note: sample order]"""

    def __len__(self) -> int:
        """Samples of one epoch. Raises UsageError where the data do not know it."""

    def batch(self, samples: Sequence[int]) -> Batch:
        """The samples of those global indices, which may run over epochs; on the CPU."""


class Validation(Protocol):
    """Samples to validate on."""

    def batches(self, count: int, rank: int, ranks: int, micro: int) -> Iterator[Batch]:
        """This rank's share of `count` samples, up to `micro` at once, on the CPU.

        They are spread evenly over what is held out and always the same, in any layout. A rank may get none.
        """


def share_of(count: int, rank: int, ranks: int, micro: int) -> Iterator[range]:
    """The numbers below `count` that are this rank's, up to `micro` at once."""
    mine = range(rank, count, ranks)
    return (mine[start : start + micro] for start in range(0, len(mine), micro))
