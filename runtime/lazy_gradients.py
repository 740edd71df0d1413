"""Gradients that nobody has computed yet: they are computed into the sums that take them.

One pass over memory writes a weight's gradient, where autograd would write it, and somebody else read and add it (as
Megatron-LM's fused accumulation does); and of an embedding's, which is zero but for a few rows, only these are touched.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Product(NamedTuple):
    """Of a linear layer's weight, (out, in): (out, n) times (n, in)."""

    left: Tensor
    right: Tensor

    def write_to(self, into: Tensor) -> None:
        """In place of what is there."""
        if self.left.dtype == into.dtype:
            torch.mm(self.left, self.right, out=into)
        else:
            into.copy_(self.whole())

    def add_to(self, into: Tensor) -> None:
        """To what is there."""
        if self.left.dtype == into.dtype:
            into.addmm_(self.left, self.right)
        else:
            into.add_(self.whole())

    def whole(self) -> Tensor:
        """Computed, alone."""
        return self.left @ self.right


class Rows(NamedTuple):
    """Of an embedding's weight, (size, width): gradients (n, width) of the rows `places`, (n), which may come twice."""

    places: Tensor
    rows: Tensor
    size: int

    def write_to(self, into: Tensor) -> None:
        """In place of what is there."""
        self.add_to(into.zero_())

    def add_to(self, into: Tensor) -> None:
        """To what is there."""
        into.index_put_((self.places,), self.rows.to(into.dtype), accumulate=True)  # in one order, on GPUs too

    def whole(self) -> Tensor:
        """Computed, alone."""
        whole = self.rows.new_zeros(self.size, self.rows.shape[-1])
        self.add_to(whole)
        return whole


class Sum(NamedTuple):
    """Of a bias, (out,): of gradients (n, out)."""

    rows: Tensor

    def write_to(self, into: Tensor) -> None:
        """In place of what is there."""
        torch.sum(self.rows, 0, out=into) if self.rows.dtype == into.dtype else into.copy_(self.whole())

    def add_to(self, into: Tensor) -> None:
        """To what is there."""
        into.add_(self.whole())

    def whole(self) -> Tensor:
        """Computed, alone."""
        return self.rows.sum(0)


LazyGradient = Product | Rows | Sum
