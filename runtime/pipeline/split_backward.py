"""A backward in two: first the gradients of the inputs, which another stage waits for, later those of the weights.

[Note: split]
Zero-bubble schedules (Qi et al. 2023) fill a stage's waits with weights' gradients. Those of a linear layer, nearly all
of the work, are one product of its input and its output's gradient: the layer's backward gives the input's gradient
and keeps the two. What else has parameters (norms, embeddings, biases) gives its gradients at once, and they are kept
until the weights' turn, so that whoever takes gradients sees those of one micro-batch together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _Product(NamedTuple):
    """weight: its gradient is that of `output`, transposed, times `given`."""

    layer: nn.Linear
    given: Tensor
    output: Tensor


class WeightGradients:
    """What a backward has left to be done."""

    def __init__(self) -> None:
        self.products: list[_Product] = []
        self.ready: dict[Tensor, Tensor] = {}

    def compute(self, parameters: Sequence[nn.Parameter]) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each of these parameters with its gradient, the last first, as a backward makes them: so buckets fill in
        turn."""
        found, self.ready = self.ready, {}
        of_layer: dict[nn.Parameter, list[_Product]] = {}
        while self.products:
            product = self.products.pop()
            for parameter in product.layer.parameters(recurse=False):
                if parameter.requires_grad:
                    of_layer.setdefault(parameter, []).append(product)
        for parameter in reversed(parameters):
            for layer, given, output in of_layer.pop(parameter, ()):
                given, output = given.reshape(-1, given.shape[-1]), output.reshape(-1, output.shape[-1])
                _add(found, parameter, output.t() @ given if parameter is layer.weight else output.sum(0))
            if parameter in found:
                yield parameter, found.pop(parameter)


class Splitter:
    """Splits the backwards of a model's linear layers, from now on, while `splitting`."""

    def __init__(self, model: nn.Module) -> None:
        self._current: WeightGradients | None = None
        self._is_on = False
        for module in model.modules():
            if type(module) is nn.Linear and "forward" not in vars(module):
                module.forward = MethodType(self._forward_of(), module)  # type: ignore[method-assign]

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around a forward whose backward will be split."""
        self._is_on = True
        try:
            yield
        finally:
            self._is_on = False

    @contextmanager
    def backward(self, parameters: Sequence[nn.Parameter]) -> Iterator[WeightGradients]:
        """Around the gradients of inputs; gives what is left, of these parameters."""
        before = [(parameter, parameter.grad) for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        self._current = left = WeightGradients()
        self._is_on = True  # for recomputations
        try:
            yield left
        finally:
            self._current, self._is_on = None, False
        for parameter, grad in before:
            if parameter.grad is not None:
                left.ready[parameter] = parameter.grad
            parameter.grad = grad

    def _forward_of(self) -> Any:
        def forward(layer: nn.Linear, given: Tensor) -> Tensor:
            if self._is_on and torch.is_grad_enabled() and not torch.is_autocast_enabled(given.device.type):
                split: Tensor = _SplitLinear.apply(given, layer.weight, layer.bias, layer, self)  # type: ignore[no-untyped-call]
                return split
            return F.linear(given, layer.weight, layer.bias)

        return forward

    def keep(self, layer: nn.Linear, given: Tensor, output: Tensor) -> None:
        """A linear layer's backward has come."""
        assert self._current is not None, "a forward that was split has its backward split"
        self._current.products.append(_Product(layer, given, output))


class _SplitLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, given: Tensor, weight: Tensor, bias: Tensor | None, layer: nn.Linear, splitter: Splitter
    ) -> Tensor:
        ctx.save_for_backward(given, weight)
        ctx.layer, ctx.splitter = layer, splitter
        return F.linear(given, weight, bias)

    @staticmethod
    def backward(ctx: Any, output: Tensor) -> Any:
        given, weight = ctx.saved_tensors
        ctx.splitter.keep(ctx.layer, given, output)
        return (output @ weight if ctx.needs_input_grad[0] else None), None, None, None, None


def _add(found: dict[Tensor, Tensor], parameter: Tensor, gradient: Tensor) -> None:
    if parameter in found:
        found[parameter] = found[parameter] + gradient
    else:
        found[parameter] = gradient
