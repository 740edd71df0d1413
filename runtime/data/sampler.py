"""Which samples make which step: a pure function of the seed and the global sample index.

[Note: sample order]
Samples are numbered over the whole job: step s has the samples s·G to (s+1)·G − 1 for a global batch of G.
The corpus is cut into windows; epoch e visits each window once, in an order drawn from (seed, e), the cuts
shifted by an offset drawn likewise. Neither ranks nor micro-batches enter, so the order is the same in any
layout; they only say who computes which samples of a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

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
    """Windows of `length` tokens and their successors, over a flat tensor of tokens."""

    def __init__(self, tokens: Tensor, length: int, seed: int) -> None:
        """tokens: integers, one dimension. Raises UsageError when they do not fill one window."""
        if len(tokens) < 2 * length:
            raise UsageError(
                f"data: expected at least {2 * length} tokens (twice sequence_length), found {len(tokens)}; "
                "give more text, a shorter sequence_length or another validation_fraction"
            )
        self._tokens, self._length = tokens, length
        self._windows = (len(tokens) - length) // length  # one less than fit leaves room for the offset
        self._order_of = lru_cache(maxsize=2)(self._draw_order)
        self._seed = seed

    def shuffled(self, samples: range) -> Tensor:
        """The samples of those global indices, (len(samples), length + 1), int64. [Note: sample order]"""
        starts = []
        for sample in samples:
            epoch, index = divmod(sample, self._windows)
            offset, order = self._order_of(epoch)
            starts.append(offset + int(order[index]) * self._length)
        return self._at(starts)

    def evenly_spaced(self, count: int, part: slice = slice(None)) -> Tensor:
        """`part` of `count` samples that are spread evenly over the tokens, always the same ones."""
        last = len(self._tokens) - self._length - 1
        return self._at([last * i // max(1, count - 1) for i in range(count)[part]])

    def _at(self, starts: list[int]) -> Tensor:
        rows = [self._tokens[start : start + self._length + 1] for start in starts]
        return torch.stack(rows).long() if rows else torch.empty(0, self._length + 1, dtype=torch.long)

    def _draw_order(self, epoch: int) -> tuple[int, Tensor]:
        generator = torch.Generator().manual_seed((self._seed << 20) + epoch)
        offset = int(torch.randint(self._length, (), generator=generator))
        return offset, torch.randperm(self._windows, generator=generator)
