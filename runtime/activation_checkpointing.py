"""Activation checkpointing: modules that keep only their inputs, and compute again in the backward (Chen et al. 2016).

A block's activations then live in memory only while that block is in its backward, for about a third more time.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from types import MethodType
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dstrain.runtime.elsewhere import Elsewhere
from dstrain.runtime.spec.errors import UsageError

_KEY = "train.activation_checkpointing"
_NAMES_SHOWN = 12


def checkpoint_activations(model: nn.Module, spec: Literal["all"] | int | tuple[str, ...]) -> list[str]:
    """Let some modules of `model` recompute their activations; returns their names.

    spec: "all" blocks, every k-th block, or patterns of modules' names ('blocks.*', the outermost that match).
    Blocks: see `blocks_of`. Parameters keep their names, and gradients their bits: the recomputation sees the same
    random numbers. Raises UsageError, naming candidates, when nothing matches.
    """
    modules = dict(model.named_modules())
    names = list(_matching(modules, spec)) if isinstance(spec, tuple) else _every(blocks_of(model), spec, modules)
    for name in names:
        modules[name].forward = MethodType(_forward, modules[name])
    return names


def blocks_of(model: nn.Module) -> list[str]:
    """Names of the repeated blocks: the children of the longest nn.ModuleList or nn.Sequential that holds modules
    of one class, and of all others that hold that class (encoder and decoder; the stages of a ResNet)."""
    lists = {
        name: {child: inner for child, inner in module.named_children() if not isinstance(inner, Elsewhere)}
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
    }
    alike = {name: children for name, children in lists.items() if _are_blocks([*children.values()])}
    if not alike:
        return []
    block = type(next(iter(max(alike.values(), key=len).values())))
    return [
        f"{name}.{child}".lstrip(".")
        for name, children in alike.items()
        for child, module in children.items()
        if type(module) is block
    ]


def _are_blocks(children: list[nn.Module]) -> bool:
    """Whether all are of one class, which is no single layer."""
    return (
        bool(children) and len({type(child) for child in children}) == 1 and any(True for _ in children[0].children())
    )


def _every(blocks: list[str], spec: Literal["all"] | int, modules: dict[str, nn.Module]) -> list[str]:
    every = 1 if spec == "all" else spec
    if names := blocks[every - 1 :: every]:
        return names
    if blocks:
        raise UsageError.mismatch(_KEY, f"at most the {len(blocks)} blocks of the model", str(spec))
    expected = "a list of repeated blocks in the model"
    raise UsageError.mismatch(_KEY, expected, "none", f"give patterns of its modules' names: {_shown(modules)}")


def _matching(modules: dict[str, nn.Module], patterns: tuple[str, ...]) -> Iterator[str]:
    """Names that a pattern matches, without those inside of others."""
    for pattern in patterns:
        if not any(name and fnmatchcase(name, pattern) for name in modules):
            raise UsageError.mismatch(_KEY, f"patterns of modules' names ({_shown(modules)})", repr(pattern))
    outer = None
    for name in modules:  # a module stands before those inside it
        is_inside = outer is not None and name.startswith(f"{outer}.")
        if name and not is_inside and any(fnmatchcase(name, pattern) for pattern in patterns):
            outer = name
            yield name


def _shown(modules: dict[str, nn.Module]) -> str:
    near = [name for name in modules if name and name.count(".") < 2]
    return ", ".join(near[:_NAMES_SHOWN]) + (", …" if len(near) > _NAMES_SHOWN else "")


def _forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """In place of the class's forward, which is called through."""
    if not torch.is_grad_enabled():
        return type(module).forward(module, *args, **kwargs)
    return checkpoint(type(module).forward, module, *args, use_reentrant=False, **kwargs)
