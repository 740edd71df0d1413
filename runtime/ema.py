"""An exponential moving average of the weights (Polyak and Juditsky 1992): with it a model often validates better."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dstrain.runtime.parameter_groups import NamedParameters


class WeightAverage:
    """average ← decay·average + (1 − decay)·weight after every step, in fp32, beside the parameters.

    It begins as a copy of the parameters. Those are random at first, so update number n (from 1) decays by
    min(decay, (1 + n) / (10 + n)) only, as TensorFlow's ExponentialMovingAverage(num_updates) does: 2/11 at first,
    0.9 after 80 updates, 0.999 after 8,990. Buffers, such as a batch norm's statistics, are not averaged.

    tensors: the averages by the parameters' names, fp32; they change in place. updates: how many there have been.
    """

    def __init__(self, parameters: NamedParameters, decay: float) -> None:
        self._parameters = [parameter for _, parameter in parameters]
        self._decay = decay
        self._is_swapped = False
        self.tensors = {name: p.detach().to(torch.float32, copy=True) for name, p in parameters}
        self.updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters as they are."""
        assert not self._is_swapped, "update() is not for inside swapped()"
        self.updates += 1
        decay = min(self._decay, (1 + self.updates) / (10 + self.updates))
        weights = [parameter.detach().float() for parameter in self._parameters]  # of fp32, no copies
        torch._foreach_lerp_(list(self.tensors.values()), weights, 1 - decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside, the parameters hold the averages, rounded to their dtype; afterwards their own values, bit for bit.

        Costs a copy of the parameters while it lasts. The parameters keep their memory: views of them see the change.
        """
        assert not self._is_swapped, "swapped() is not for inside swapped()"
        kept = [parameter.detach().clone() for parameter in self._parameters]
        self._is_swapped = True
        try:
            self._write(list(self.tensors.values()))
            yield
        finally:
            self._write(kept)
            self._is_swapped = False

    def restart(self) -> None:
        """Begin anew with the weights as they are: they have been replaced."""
        for average, weight in zip(self.tensors.values(), self._parameters, strict=True):
            average.copy_(weight.detach())
        self.updates = 0

    @torch.no_grad()
    def _write(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.copy_(value)
