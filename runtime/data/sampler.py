"""Which samples make which step: a pure function of the seed and the global sample index.

[Note: sample order]
Samples are numbered over the whole job: step s has the samples s·G to (s+1)·G − 1 for a global batch of G.
The corpus is cut into windows; epoch e visits each window once, in an order drawn from (seed, e), the cuts
shifted by an offset drawn likewise. Neither ranks nor micro-batches enter, so the order is the same in any
layout; they only say who computes which samples of a step. Going on at step s costs no more than beginning.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dstrain.runtime.data.samples import share_of
from dstrain.runtime.data.shuffle import Order
from dstrain.runtime.data.tokens import Tokens
from dstrain.runtime.spec.errors import UsageError


@dataclass(frozen=True)
class BatchLayout:
    """Who computes which samples of a step: `ranks` × `accumulation` micro-batches of `micro` samples."""

    rank: int
    ranks: int
    micro: int
    accumulation: int

    def samples(self, step: int, micro_batch: int) -> range:
        """Global sample indices of this rank's micro-batch; steps and micro-batches count from 0."""
        turn = step * self.accumulation + micro_batch
        start = (turn * self.ranks + self.rank) * self.micro
        return range(start, start + self.micro)


class TokenWindows:
    """Windows of `length` tokens and their successors, over a flat sequence of tokens: Samples and Validation."""

    def __init__(self, tokens: Tokens, length: int, seed: int, *, shuffle: bool = True, key: str = "data") -> None:
        """key: what an error names. Raises UsageError when the tokens do not fill one window."""
        if len(tokens) < 2 * length:
            raise UsageError(
                f"{key}: expected at least {2 * length} tokens (twice sequence_length), found {len(tokens)}; "
                "give more text, a shorter sequence_length or another validation_fraction"
            )
        self._tokens, self._length, self._seed, self._shuffle = tokens, length, seed, shuffle
        self._windows = (len(tokens) - length) // length  # one less than fit leaves room for the offset

    def __len__(self) -> int:
        return self._windows

    def batch(self, samples: Sequence[int]) -> Tensor:
        """The samples of those global indices, (len(samples), length + 1), int64. [Note: sample order]"""
        epochs, places = np.divmod(np.asarray(samples, dtype=np.int64), self._windows)
        starts = places * self._length
        if self._shuffle:
            for epoch in np.unique(epochs):
                order, mine = Order(self._seed, int(epoch), self._windows), epochs == epoch
                starts[mine] = order.at(places[mine]) * self._length + order.offset(self._length)
        return self._at(starts.tolist())

    def batches(self, count: int, rank: int, ranks: int, micro: int) -> Iterator[Tensor]:
        """This rank's share of `count` windows, up to `micro` at once. See `evenly_spaced`."""
        return (self.evenly_spaced(numbers, count) for numbers in share_of(count, rank, ranks, micro))

    def evenly_spaced(self, numbers: Sequence[int], count: int) -> Tensor:
        """Those of `count` windows that are spread evenly over the tokens, always the same ones; as `batch`."""
        last = len(self._tokens) - self._length - 1
        return self._at([last * number // max(1, count - 1) for number in numbers])

    def _at(self, starts: list[int]) -> Tensor:
        rows = np.empty((len(starts), self._length + 1), dtype=np.int64)
        for row, start in zip(rows, starts, strict=True):
            row[:] = self._tokens.read(start, self._length + 1)
        return torch.from_numpy(rows)
