"""Inputs of linear layers that need not be kept, for they follow from what their makers keep anyway.

[Note: rebuilt]
Behind a GELU a linear layer keeps the GELU's output, for its weight's gradient, and the GELU its own input: twice the
widest tensors of a transformer. The same of norms, and of products of two activations (SwiGLU). So their outputs are
computed again in the backward, elementwise and to the same bits, just before the makers' own backwards, which still
have all that they need (Korthikanti et al. 2022 choose by the same measure: much memory, few operations). Not so where
the maker's saved tensors are under others' hooks (activation checkpointing, offload to the host): these may give what
they have once. Parameters may be sharded by then, so their values of the forward are copied, where they are small.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Rebuild = Callable[[], Tensor]
"""Computes a tensor again; differentiably where gradients are on, for a forward that asks for gradients itself."""

_SMALL = 1 / 8
"""Of a tensor: parameters that are copied to build it again."""

_NOTED = "dstrain.rebuilt"
"""In the metadata of a node: its parameters, with copies. What is noted once holds for forwards that are run again."""


def note_norms(model: nn.Module) -> None:
    """Let the model's layer norms note what `rebuild_of` must know of them."""
    for module in model.modules():
        if type(module) is nn.LayerNorm and "forward" not in vars(module):
            module.forward = partial(_norm, module)  # type: ignore[method-assign] # as a Splitter does


def rebuild_of(made: Tensor) -> Rebuild | None:
    """What computes `made` again as long as the backward has not passed its maker; None where it must be kept."""
    maker = made.grad_fn
    if maker is None or made._version:  # changed in place
        return None
    find = _FIND.get(maker.name())
    return None if find is None else find(maker, made)


class _Copy:
    """Of a parameter, by its values in the forward."""

    def __init__(self, parameter: Tensor) -> None:
        self._parameter, self._values = parameter, parameter.detach().clone()

    def get(self) -> Tensor:
        return self._parameter if torch.is_grad_enabled() else self._values


def _norm(layer: nn.LayerNorm, input: Tensor) -> Tensor:
    weight, bias = layer.weight, layer.bias
    output = F.layer_norm(input, layer.normalized_shape, weight, bias, layer.eps)
    maker: Any = output.grad_fn
    if maker is not None and (weight is None or weight.numel() <= _SMALL * output.numel()):
        copies = (None if own is None else _Copy(own) for own in (weight, bias))
        maker.metadata[_NOTED] = layer.normalized_shape, *copies, layer.eps
    return output


def _has(maker: Any, *names: str) -> bool:
    """Whether what a node has saved can be had more than once."""
    hooks = (getattr(maker, f"_raw_saved_{name}").unpack_hook for name in names)
    return all(hook is None or getattr(hook, "is_repeatable", False) for hook in hooks)


def _gelu(maker: Any, _: Tensor) -> Rebuild | None:
    if not _has(maker, "self"):
        return None
    return lambda: F.gelu(maker._saved_self, approximate=maker._saved_approximate)


def _silu(maker: Any, _: Tensor) -> Rebuild | None:
    return (lambda: F.silu(maker._saved_self)) if _has(maker, "self") else None


def _layer_norm(maker: Any, _: Tensor) -> Rebuild | None:
    noted = maker.metadata.get(_NOTED)
    if noted is None or not _has(maker, "input"):
        return None
    shape, weight, bias, eps = noted
    return lambda: F.layer_norm(maker._saved_input, shape, weight and weight.get(), bias and bias.get(), eps)


def _product(maker: Any, made: Tensor) -> Rebuild | None:
    """Where both factors need gradients: else not both are saved."""
    if _NOTED not in maker.metadata:
        maker.metadata[_NOTED] = _factors(maker, made)
    noted = maker.metadata[_NOTED]
    if noted is None:
        return None
    one, other = (copy.get if copy else partial(getattr, maker, f"_saved_{name}") for name, copy in noted.items())
    return lambda: one() * other()


def _factors(maker: Any, made: Tensor) -> dict[str, _Copy | None] | None:
    """Copies of those that are parameters; None: a product that cannot be computed again."""
    found: dict[str, _Copy | None] = {}
    for (source, _), name in zip(maker.next_functions, ("self", "other"), strict=True):
        leaf = getattr(source, "variable", None)
        if source is None or (leaf is None and not _has(maker, name)):
            return None
        if leaf is not None and (leaf.numel() > _SMALL * made.numel() or not _is_there(leaf)):
            return None
        found[name] = None if leaf is None else _Copy(leaf)
    return found


def _is_there(parameter: Tensor) -> bool:
    """And no placeholder of one that is sharded by now."""
    return parameter.untyped_storage().nbytes() >= parameter.numel() * parameter.element_size()


_FIND: dict[str, Callable[[Any, Tensor], Rebuild | None]] = {
    "GeluBackward0": _gelu,
    "SiluBackward0": _silu,
    "MulBackward0": _product,
    "NativeLayerNormBackward0": _layer_norm,
}
