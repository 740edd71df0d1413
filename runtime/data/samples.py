"""What the trainer asks of data: samples by their global index, and some held out to validate on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from dstrain.runtime.comm import Communicator
from dstrain.runtime.spec.errors import UsageError

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


def in_step(
    batches: Iterator[Batch], first_share: Callable[[], Iterator[Batch]], comm: Communicator
) -> Iterator[tuple[Batch, bool]]:
    """As many batches on each rank as on the one with the most, and whether a batch counts; one all-reduce for each.

    For forwards that gather parameters from all ranks. A rank that has run out repeats its last batch, or takes the
    first of `first_share`, rank 0's. Raises UsageError where a rank finds nothing at all to repeat.
    """
    last: Batch | None = None
    while True:
        batch = next(batches, None)
        having = torch.tensor(int(batch is not None), device=comm.device)
        comm.all_reduce(having)
        if not having.item():
            return
        if batch is not None:
            last = batch
        elif last is None:
            last = next(first_share(), None)
        if last is None:
            raise UsageError.mismatch("data", "the same samples to validate on, on all ranks", "none on this one")
        yield last, batch is not None
