"""An exponential moving average of the weights (Polyak and Juditsky 1992): with it a model often validates better."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from dstrain.runtime.parameter_groups import NamedParameters
from dstrain.runtime.spec.errors import UsageError


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

    def load(self, tensors: Mapping[str, Tensor], updates: int) -> None:
        """Go on from saved averages, after `updates` updates. Raises UsageError if names or shapes are others."""
        for name in sorted(self.tensors.keys() | tensors.keys()):
            expected, found = _shape(self.tensors, name), _shape(tensors, name)
            if expected != found:
                fix = "it is of another model; train.ema_decay: null goes on without an average"
                raise UsageError.mismatch(f"saved average of {name}", expected, found, fix)
        for name, average in self.tensors.items():
            average.copy_(tensors[name])
        self.updates = updates

    @torch.no_grad()
    def _write(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.copy_(value)


def _shape(tensors: Mapping[str, Tensor], name: str) -> str:
    return f"shape {tuple(tensors[name].shape)}" if name in tensors else "no such tensor"
