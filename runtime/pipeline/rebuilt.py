"""Inputs of linear layers that need not be kept, for they follow from what their makers keep anyway.

[Note: rebuilt]
Behind a GELU a linear layer keeps the GELU's output, for its weight's gradient, and the GELU its own input: twice the
widest tensors of a transformer. The same of norms, and of products of two activations (SwiGLU). So their outputs are
computed again in the backward, elementwise and to the same bits, just before the makers' own backwards, which still
have all that they need (Korthikanti et al. 2022 choose by the same measure: much memory, few operations). Not so under
others' hooks for saved tensors (activation checkpointing, offload to the host): these may give what they have once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Rebuild = Callable[[], Tensor]

_SMALL = 1 / 8
"""Of a tensor: parameters that are copied to build it again, as they may be sharded by then."""

_hooks: Callable[[bool], Any] = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: (None,))


class Makers:
    """Of a model's activations. [Note: rebuilt]"""

    def __init__(self, model: nn.Module) -> None:
        self._eps = {
            module.weight: module.eps
            for module in model.modules()
            if type(module) is nn.LayerNorm and (module.bias is None or module.bias.requires_grad)
        }
        self._find: dict[str, Callable[[Any, Tensor], Rebuild | None]] = {
            "GeluBackward0": self._gelu,
            "SiluBackward0": self._silu,
            "MulBackward0": self._product,
            "NativeLayerNormBackward0": self._layer_norm,
        }

    def rebuild(self, made: Tensor) -> Rebuild | None:
        """What computes `made` again as long as the backward has not passed its maker; None where it must be kept."""
        hooks = _hooks(False)
        return None if hooks is not None and not getattr(hooks[0], "is_repeatable", False) else self.find(made)

    def find(self, made: Tensor) -> Rebuild | None:
        """The same, whatever becomes of saved tensors."""
        maker = made.grad_fn
        find = None if maker is None else self._find.get(maker.name())
        return None if find is None else find(maker, made)

    def _gelu(self, maker: Any, _: Tensor) -> Rebuild:
        return lambda: F.gelu(maker._saved_self, approximate=maker._saved_approximate)

    def _silu(self, maker: Any, _: Tensor) -> Rebuild:
        return lambda: F.silu(maker._saved_self)

    def _product(self, maker: Any, made: Tensor) -> Rebuild | None:
        """Where both factors need gradients: else not both are saved."""
        sources = [source for source, _ in maker.next_functions]
        leaves = [getattr(source, "variable", None) for source in sources]
        if None in sources or any(leaf is not None and leaf.numel() > _SMALL * made.numel() for leaf in leaves):
            return None
        one, other = (None if leaf is None else leaf.detach().clone() for leaf in leaves)
        return lambda: (maker._saved_self if one is None else one) * (maker._saved_other if other is None else other)

    def _layer_norm(self, maker: Any, _: Tensor) -> Rebuild | None:
        """By its parameters themselves: of a sharded one something else is saved."""
        of_weight, of_bias = (getattr(leaf, "variable", None) for leaf, _ in maker.next_functions[1:])
        eps = None if of_weight is None else self._eps.get(of_weight)
        if of_weight is None or eps is None:
            return None
        weight, bias = of_weight.detach().clone(), None if of_bias is None else of_bias.detach().clone()
        return lambda: F.layer_norm(maker._saved_input, weight.shape, weight, bias, eps)
