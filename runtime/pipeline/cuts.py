"""Where a model can be cut: its layers, in the order in which they run.

[Note: layers]
A chain of layers, each of which takes what the one before has given. Our GPT and transformers' decoders are such a
chain inside of a forward of their own: an embedding, the blocks, norm and head. That forward is kept: on each stage the
whole of it runs, with the layers of other stages replaced by modules that give back what they get (`part.py`). So masks
and positions, which every layer needs besides, are made on each stage from the micro-batch, and are not sent.
An nn.Sequential can be cut between any two of its modules.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from dstrain.runtime.models.gpt import GPT
from dstrain.runtime.spec.errors import UsageError


@dataclass(frozen=True)
class Layer:
    """Modules that run one behind the other, by their names, and are never parted."""

    name: str
    modules: tuple[str, ...]


@dataclass(frozen=True)
class Chain:
    """The layers of a model. [Note: layers]

    entry: the module whose result other stages receive in its place; "": what the model itself is given. zeros: modules
    of the first layer whose result is added to the entry's.
    """

    layers: tuple[Layer, ...]
    entry: str = ""
    zeros: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Decoder:
    """Names of a decoder's modules. types: `config.model_type` of those whose forward does nothing with activations
    outside of these modules (others scale them, on every stage again); none: not transformers'. after: between the
    entry and the blocks, of the first layer."""

    types: tuple[str, ...]
    entry: str
    blocks: str
    exits: tuple[str, ...]
    zeros: tuple[str, ...] = ()
    after: tuple[str, ...] = ()


_DECODERS = (
    _Decoder((), "token", "blocks", ("norm", "head")),
    _Decoder(("llama", "qwen2"), "model.embed_tokens", "model.layers", ("model.norm", "lm_head")),
    _Decoder(
        ("gpt2",),
        "transformer.wte",
        "transformer.h",
        ("transformer.ln_f", "lm_head"),
        ("transformer.wpe",),
        ("transformer.drop",),
    ),
)
"""Our GPT; Llama and Qwen2 of transformers; GPT-2."""


def chain_of(model: nn.Module) -> Chain:
    """The layers of a model. Raises UsageError for one that is no chain that is known here."""
    if isinstance(model, nn.Sequential):
        names = list(model._modules)  # named_children leaves out what is there a second time
        return Chain(tuple(Layer(name, (name,)) for name in names))
    modules = dict(model.named_modules())
    for kind in _DECODERS:
        first = (kind.entry, *kind.zeros, *kind.after)
        is_known = isinstance(model, GPT) if not kind.types else _type_of(model) in kind.types
        if is_known and all(name in modules for name in (*first, kind.blocks, *kind.exits)):
            blocks = [f"{kind.blocks}.{name}" for name, _ in modules[kind.blocks].named_children()]
            layers = [Layer(kind.entry, first), *(Layer(name, (name,)) for name in blocks)]
            chain = Chain((*layers, Layer(kind.exits[-1], kind.exits)), kind.entry, kind.zeros)
            _refuse_strays(model, chain)
            return chain
    expected = "our GPT, an nn.Sequential, or transformers' Llama, Qwen2 or GPT-2"
    fix = "let model.factory return an nn.Sequential, or a list of its layers"
    raise UsageError.mismatch("parallel.pipeline", expected, type(model).__name__, fix)


def _type_of(model: nn.Module) -> str | None:
    """transformers' word."""
    return getattr(getattr(model, "config", None), "model_type", None)


def _refuse_strays(model: nn.Module, chain: Chain) -> None:
    """Every parameter belongs to a layer."""
    inside = tuple(f"{module}." for layer in chain.layers for module in layer.modules)
    for name, _ in model.named_parameters():
        if not name.startswith(inside):
            raise UsageError.mismatch("parallel.pipeline", "all parameters in layers of the model", f"{name} outside")
