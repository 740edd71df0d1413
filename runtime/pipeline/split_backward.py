"""A backward in two: first the gradients of the inputs, which another stage waits for, later those of the weights.

[Note: split]
Zero-bubble schedules (Qi et al. 2023) fill a stage's waits with weights' gradients. Those of a linear layer, nearly all
of the work, are one product of its input and its output's gradient: the layer's backward gives the input's gradient
and keeps the two. What else has parameters (norms, embeddings, biases) gives its gradients at once, and they are kept
until the weights' turn, so that whoever takes gradients sees those of one micro-batch together.

[Note: lazy]
In whole backwards too a linear layer or an embedding gives its weight's gradient uncomputed, and the sum over
micro-batches takes it in as it is computed (lazy_gradients.py). A layer that a forward uses several times gives the
sum, when the first use's has come.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dstrain.runtime.gradients import GradientReducer
from dstrain.runtime.lazy_gradients import LazyGradient, Product, Rows, Sum
from dstrain.runtime.pipeline.rebuilt import Rebuild, note_norms, rebuild_of

_Layer = nn.Linear | nn.Embedding

_hooks: Callable[[bool], Any] = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: None)

_NAMES = {nn.Linear: {"weight", "bias"}, nn.Embedding: {"weight"}}
"""Of a layer's parameters."""

_Use = Sequence[tuple[nn.Parameter, LazyGradient]]
"""Of a layer, in its backward: the gradients of its parameters."""


class WeightGradients:
    """What a backward has left to be done."""

    def __init__(self) -> None:
        self.uses: list[_Use] = []
        self.ready: dict[Tensor, Tensor] = {}

    def compute(self, parameters: Sequence[nn.Parameter]) -> Iterator[tuple[nn.Parameter, LazyGradient | None]]:
        """Each of these parameters with its gradient, the last first, as a backward makes them: so buckets fill in
        turn. It is there uncomputed, or in `parameter.grad`."""
        ready, self.ready = self.ready, {}
        of_parameter: dict[nn.Parameter, list[LazyGradient]] = {}
        while self.uses:
            for parameter, lazy in self.uses.pop():
                of_parameter.setdefault(parameter, []).append(lazy)
        for parameter in reversed(parameters):
            lazies, gradient = of_parameter.pop(parameter, []), ready.pop(parameter, None)
            if gradient is None and len(lazies) == 1:
                yield parameter, lazies[0]
            elif gradient is not None or lazies:
                parameter.grad = _sum(lazies, gradient)
                yield parameter, None


class Splitter:
    """Takes over the weights' gradients of a model's linear layers and embeddings. [Note: split], [Note: lazy]"""

    def __init__(self, model: nn.Module) -> None:
        self._left: WeightGradients | None = None
        self._reducer: GradientReducer | None = None
        self._is_on = self._in_backward = self._splits = False
        self._uses: Counter[_Layer] = Counter()
        self._waiting: dict[_Layer, list[_Use]] = {}
        everywhere = (module for _, module in model.named_modules(remove_duplicate=False))
        holders = Counter(id(p) for module in everywhere for p in module._parameters.values())
        self._shared = {known for known, count in holders.items() if count > 1}
        self._maker: tuple[Any, int] = None, 0  # of the last linear layer's input in a forward, and its version
        self._rebuild: Rebuild | None = None  # the same
        self._rebuilt: tuple[Rebuild, Tensor] | None = None  # the last one in a backward
        for module in filter(is_split, model.modules()):
            run: Callable[..., Tensor] = self._linear if isinstance(module, nn.Linear) else self._embedding
            module.forward = partial(run, module)
        note_norms(model)

    @contextmanager
    def forward(self, splits: bool) -> Iterator[None]:
        """Around a forward. splits: its backward will be in two."""
        self._is_on, self._splits = True, splits
        self._uses.clear()
        try:
            yield
        finally:
            self._is_on = False
            self._forget()

    @contextmanager
    def backward(self, reducer: GradientReducer) -> Iterator[None]:
        """Around a whole backward, whose products `reducer` takes."""
        self._reducer = reducer
        try:
            with self._recomputing(splits=False):
                yield
            with torch.no_grad():
                for layer in list(self._waiting):  # the first use had no part in the loss
                    self._give(self._waiting.pop(layer))
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
            with self._recomputing(splits=True):
                yield left
        finally:
            self._left = None
        for parameter, grad in before:
            if parameter.grad is not None:
                left.ready[parameter] = parameter.grad
            parameter.grad = grad

    def keep(self, layer: _Layer, is_first: bool, use: _Use) -> None:
        """A layer's backward has come. is_first: of its uses in the forward."""
        if self._left is not None:
            self._left.uses.append(use)
        elif not is_first:
            self._waiting.setdefault(layer, []).append(use)
        else:
            self._give([*self._waiting.pop(layer, ()), use])

    def _give(self, uses: Sequence[_Use]) -> None:
        """Of one layer."""
        assert self._reducer is not None, "a backward is the pipeline's"
        for each in zip(*uses, strict=True):  # a parameter's, of all uses
            parameter, lazy = each[0]
            if len(each) > 1:
                parameter.grad, lazy = _sum([one for _, one in each]), None
            self._reducer.take(parameter, lazy)

    @contextmanager
    def _recomputing(self, splits: bool) -> Iterator[None]:
        """Forwards that are run again are no new uses. splits: as in the forward."""
        self._is_on = self._in_backward = True
        self._splits = splits
        try:
            yield
        finally:
            self._is_on = self._in_backward = False
            self._forget()

    def _forget(self) -> None:
        self._maker, self._rebuild, self._rebuilt = (None, 0), None, None

    def rebuilt(self, rebuild: Rebuild) -> Tensor:
        """Computed once for all neighbours that have the same input."""
        if self._rebuilt is None or self._rebuilt[0] is not rebuild:
            self._rebuilt = rebuild, rebuild()
        return self._rebuilt[1]

    def takes_gradients(self, is_again: bool) -> bool:
        """Else somebody else is asking for them: `torch.autograd.grad` within a forward. is_again: within one that a
        checkpoint runs again for its saved tensors alone."""
        return not is_again and (self._reducer is not None or self._left is not None)

    def _linear(self, layer: nn.Linear, input: Tensor) -> Tensor:
        if not self._takes(layer, input):
            return F.linear(input, layer.weight, layer.bias)
        maker = input.grad_fn, input._version
        if maker[0] is None or maker != self._maker:
            self._maker, self._rebuild = maker, rebuild_of(input)
        own = layer._parameters
        words = layer, self, self._is_first(layer), self._rebuild
        output: Tensor = _Linear.apply(input, own["weight"], own["bias"], *words)  # type: ignore[no-untyped-call]
        return output

    def _embedding(self, layer: nn.Embedding, input: Tensor) -> Tensor:
        if not self._takes(layer, input):
            return F.embedding(input, layer.weight)
        output: Tensor = _Embedding.apply(layer.weight, input, layer, self, self._is_first(layer))  # type: ignore[no-untyped-call]
        return output

    def runs_again(self) -> bool:
        """Whether a checkpoint is running this forward again, for its saved tensors alone."""
        hooks = _hooks(False) if self._in_backward else None
        return hooks is not None and not getattr(hooks[1], "is_repeatable", False)

    def _is_first(self, layer: _Layer) -> bool:
        """Of a layer's uses in a forward."""
        is_first = not self._uses[layer]
        self._uses[layer] += not self._in_backward
        return is_first

    def _takes(self, layer: _Layer, given: Tensor) -> bool:
        """Whether nobody else looks at the gradients of a layer; in a whole backward, nor adds to them."""
        if not self._is_on or not torch.is_grad_enabled() or torch.is_autocast_enabled(given.device.type):
            return False
        if not is_trained(layer):
            return False
        for parameter in layer._parameters.values():
            if parameter is not None and (
                parameter._backward_hooks
                or len(parameter._post_accumulate_grad_hooks or ()) > 1  # besides the reducer's
                or (not self._splits and id(parameter) in self._shared)
            ):
                return False
        return True


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        given: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layer: nn.Linear,
        splitter: Splitter,
        is_first: bool,
        rebuild: Rebuild | None,
    ) -> Tensor:
        ctx.save_for_backward(weight, None if rebuild else given)
        ctx.layer, ctx.splitter, ctx.is_first, ctx.rebuild = layer, splitter, is_first, rebuild
        ctx.is_again = splitter.runs_again()
        return F.linear(given, weight, bias)

    @staticmethod
    def backward(ctx: Any, output: Tensor) -> Any:
        splitter, own = ctx.splitter, ctx.layer._parameters
        weight, given = ctx.saved_tensors
        inner = output @ weight if ctx.needs_input_grad[0] else None
        flat = output.reshape(-1, output.shape[-1])
        if not splitter.takes_gradients(ctx.is_again):
            given = ctx.rebuild() if given is None else given
            whole = flat.t() @ given.reshape(-1, given.shape[-1])
            return inner, whole, None if own["bias"] is None else flat.sum(0), None, None, None, None
        if given is None:
            given, ctx.rebuild = splitter.rebuilt(ctx.rebuild), None
        use: list[tuple[nn.Parameter, LazyGradient]] = []
        if (bias := own["bias"]) is not None and bias.requires_grad:
            use.append((bias, Sum(flat)))
        use.append((own["weight"], Product(flat.t(), given.reshape(-1, given.shape[-1]))))
        splitter.keep(ctx.layer, ctx.is_first, use)
        return inner, None, None, None, None, None, None


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, places: Tensor, layer: nn.Embedding, splitter: Splitter, is_first: bool
    ) -> Tensor:
        ctx.save_for_backward(places)
        ctx.layer, ctx.splitter, ctx.is_first = layer, splitter, is_first
        ctx.is_again = splitter.runs_again()
        return F.embedding(places, weight)

    @staticmethod
    def backward(ctx: Any, output: Tensor) -> Any:
        flat = output.reshape(-1, output.shape[-1])
        rows = Rows(ctx.saved_tensors[0].reshape(-1), flat, ctx.layer.num_embeddings)
        if not ctx.splitter.takes_gradients(ctx.is_again):
            return rows.whole(), None, None, None, None
        ctx.splitter.keep(ctx.layer, ctx.is_first, [(ctx.layer.weight, rows)])
        return None, None, None, None, None


def _sum(lazies: Sequence[LazyGradient], gradient: Tensor | None = None) -> Tensor:
    """Of at least one."""
    for lazy in lazies:
        more = lazy.whole()
        gradient = more if gradient is None else gradient + more
    assert gradient is not None
    return gradient


def is_split(module: nn.Module) -> bool:
    """Whether its weight's gradient can be taken over: a linear layer's, and an embedding's that is of its rows and
    nothing else."""
    weight = module._parameters.get("weight")
    if "forward" in vars(module) or (weight is not None and weight.is_complex()):
        return False
    if type(module) is nn.Embedding:
        return not (module.sparse or module.scale_grad_by_freq or module.max_norm or module.padding_idx is not None)
    return type(module) is nn.Linear


def is_trained(layer: nn.Module) -> bool:
    """A layer that `is_split`: whether its weight is trained, and what it has is its own, and not made of others."""
    parameters, names = layer._parameters, _NAMES.get(type(layer))
    if names is None or not names <= parameters.keys():
        return False
    weight = parameters["weight"]
    return weight is not None and weight.requires_grad
