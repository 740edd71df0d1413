"""A backward in two: first the gradients of the inputs, which another stage waits for, later those of the weights.

[Note: split]
Zero-bubble schedules (Qi et al. 2023) fill a stage's waits with weights' gradients. Those of a linear layer, nearly all
of the work, are one product of its input and its output's gradient: the layer's backward gives the input's gradient
and keeps the two. What else has parameters (norms, embeddings, biases) gives its gradients at once, and they are kept
until the weights' turn, so that whoever takes gradients sees those of one micro-batch together.

[Note: products]
In whole backwards too a linear layer gives its weight's gradient as a product, which the sum over micro-batches takes
in as it is computed (as Megatron-LM's fused accumulation): autograd would write it, and somebody else read and add it.
A layer that a forward uses several times gives the sum of its products, when the first use's has come.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dstrain.runtime.gradients import GradientReducer, Product


class _Use(NamedTuple):
    """Of a linear layer, with its output's gradient: (n, in), (n, out)."""

    given: Tensor
    output: Tensor


class WeightGradients:
    """What a backward has left to be done."""

    def __init__(self) -> None:
        self.uses: list[tuple[nn.Linear, _Use]] = []
        self.ready: dict[Tensor, Tensor] = {}

    def compute(self, parameters: Sequence[nn.Parameter]) -> Iterator[tuple[nn.Parameter, Product | None]]:
        """Each of these parameters with its gradient, the last first, as a backward makes them: so buckets fill in
        turn. It is the product, or in `parameter.grad`."""
        ready, self.ready = self.ready, {}
        of_parameter: dict[nn.Parameter, list[tuple[nn.Linear, _Use]]] = {}
        while self.uses:
            layer, use = self.uses.pop()
            for parameter in layer.parameters(recurse=False):
                if parameter.requires_grad:
                    of_parameter.setdefault(parameter, []).append((layer, use))
        for parameter in reversed(parameters):
            uses, gradient = of_parameter.pop(parameter, []), ready.pop(parameter, None)
            if gradient is None and len(uses) == 1 and uses[0][0].weight is parameter:
                yield parameter, _product(uses[0][1])
                continue
            for layer, use in uses:
                more = _whole(_product(use)) if layer.weight is parameter else use.output.sum(0)
                gradient = more if gradient is None else gradient + more
            if gradient is not None:
                parameter.grad = gradient
                yield parameter, None


class Splitter:
    """Takes over the weights' gradients of a model's linear layers. [Note: split], [Note: products]"""

    def __init__(self, model: nn.Module) -> None:
        self._left: WeightGradients | None = None
        self._reducer: GradientReducer | None = None
        self._is_on = self._in_backward = False
        self._uses: Counter[nn.Linear] = Counter()
        self._waiting: dict[nn.Linear, list[_Use]] = {}
        everywhere = (module for _, module in model.named_modules(remove_duplicate=False))
        holders = Counter(id(p) for module in everywhere for p in module._parameters.values())
        self._shared = {known for known, count in holders.items() if count > 1}
        for module in model.modules():
            if type(module) is nn.Linear and "forward" not in vars(module):
                module.forward = MethodType(self._forward_of(), module)  # type: ignore[method-assign]

    @contextmanager
    def forward(self, splits: bool) -> Iterator[None]:
        """Around a forward. splits: its backward will be in two."""
        self._is_on, self._splits = True, splits
        self._uses.clear()
        try:
            yield
        finally:
            self._is_on = False

    @contextmanager
    def backward(self, reducer: GradientReducer) -> Iterator[None]:
        """Around a whole backward, whose products `reducer` takes."""
        self._reducer = reducer
        try:
            with self._recomputing():
                yield
            for layer in list(self._waiting):  # the first use had no part in the loss
                self._give(layer, self._waiting.pop(layer))
        finally:
            self._reducer = None
            self._waiting.clear()

    @contextmanager
    def input_gradients(self, parameters: Sequence[nn.Parameter]) -> Iterator[WeightGradients]:
        """Around the gradients of inputs; gives what is left, of these parameters."""
        before = [(parameter, parameter.grad) for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        self._left = left = WeightGradients()
        try:
            with self._recomputing():
                yield left
        finally:
            self._left = None
        for parameter, grad in before:
            if parameter.grad is not None:
                left.ready[parameter] = parameter.grad
            parameter.grad = grad

    def keep(self, layer: nn.Linear, is_first: bool, given: Tensor, output: Tensor) -> None:
        """A linear layer's backward has come. is_first: of its uses in the forward."""
        use = _Use(given.reshape(-1, given.shape[-1]), output.reshape(-1, output.shape[-1]))
        if self._left is not None:
            self._left.uses.append((layer, use))
        elif not is_first:
            self._waiting.setdefault(layer, []).append(use)
        else:
            self._give(layer, [*self._waiting.pop(layer, ()), use])

    @torch.no_grad()
    def _give(self, layer: nn.Linear, uses: Sequence[_Use]) -> None:
        assert self._reducer is not None, "a backward is the pipeline's"
        weight, bias = layer._parameters["weight"], layer._parameters["bias"]
        if bias is not None and bias.requires_grad:
            bias.grad = sum((use.output.sum(0) for use in uses[1:]), uses[0].output.sum(0))
            self._reducer.take(bias)
        if weight is not None and weight.requires_grad:
            if len(uses) == 1:
                self._reducer.take(weight, _product(uses[0]))
            else:
                weight.grad = sum((_whole(_product(use)) for use in uses[1:]), _whole(_product(uses[0])))
                self._reducer.take(weight)

    @contextmanager
    def _recomputing(self) -> Iterator[None]:
        """Forwards that are run again are no new uses."""
        self._is_on = self._in_backward = True
        try:
            yield
        finally:
            self._is_on = self._in_backward = False

    def _forward_of(self) -> Any:
        def forward(layer: nn.Linear, given: Tensor) -> Tensor:
            if not self._is_on or not torch.is_grad_enabled() or not self._takes(layer, given):
                return F.linear(given, layer.weight, layer.bias)
            is_first = not self._uses[layer]
            self._uses[layer] += not self._in_backward
            split: Tensor = _SplitLinear.apply(given, layer.weight, layer.bias, layer, self, is_first)  # type: ignore[no-untyped-call]
            return split

        return forward

    def _takes(self, layer: nn.Linear, given: Tensor) -> bool:
        """Whether nobody else looks at the gradients of a layer; in a whole backward, nor adds to them."""
        if torch.is_autocast_enabled(given.device.type) or "weight" not in layer._parameters:  # made of others
            return False
        parameters = [p for p in layer._parameters.values() if p is not None]
        return not any(p._backward_hooks or (id(p) in self._shared and not self._splits) for p in parameters)


class _SplitLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        given: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layer: nn.Linear,
        splitter: Splitter,
        is_first: bool,
    ) -> Tensor:
        ctx.save_for_backward(given, weight)
        ctx.layer, ctx.splitter, ctx.is_first = layer, splitter, is_first
        return F.linear(given, weight, bias)

    @staticmethod
    def backward(ctx: Any, output: Tensor) -> Any:
        given, weight = ctx.saved_tensors
        inner = output @ weight if ctx.needs_input_grad[0] else None
        ctx.splitter.keep(ctx.layer, ctx.is_first, given, output)
        return inner, None, None, None, None, None


def _product(use: _Use) -> Product:
    """The gradient of the weight."""
    return Product(use.output.t(), use.given)


def _whole(product: Product) -> Tensor:
    return product.left @ product.right
