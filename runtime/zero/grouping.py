"""Which parameters form units: by size where all stay whole, by module where they are gathered for use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from dstrain.runtime.activation_checkpointing import blocks_of

Named = tuple[str, nn.Parameter]


@dataclass(frozen=True)
class Group:
    """The parameters of one unit. module: whose forward needs them all at once; "" for the whole model's."""

    name: str
    parameters: tuple[Named, ...]
    module: str = ""


def by_size(parameters: Sequence[Named], elements: int) -> list[Group]:
    """Neighbours of one dtype, up to `elements` together, in the order in which the backward makes their gradients."""
    groups = list(grouped(reversed(parameters), elements))
    return [Group(f"unit {number} ({group[0][0]} …)", tuple(group)) for number, group in enumerate(groups)]


def by_module(model: nn.Module, small: int) -> list[Group]:
    """A unit for each block of the model, the parameters outside of blocks in units of their own.

    Blocks: the repeated ones (`blocks_of`). What is outside is used in places of its own: an embedding in one, the
    head in another. Those of fewer than `small` elements share one unit. Trained and frozen parameters, and dtypes,
    never share one. Groups come in the order of the model's parameters.
    """
    blocks = _outermost(blocks_of(model))
    groups: dict[tuple[str, str, bool, torch.dtype], list[Named]] = {}
    for name, parameter in model.named_parameters():
        block = next((block for block in blocks if name.startswith(f"{block}.")), "")
        own = "" if block or parameter.numel() < small else name
        groups.setdefault((block, own, parameter.requires_grad, parameter.dtype), []).append((name, parameter))
    kinds = [(block, own) for block, own, _, _ in groups]
    return [
        Group(_name(block, own, trained if kinds.count((block, own)) > 1 else None), tuple(members), block)
        for (block, own, trained, _), members in groups.items()
    ]


def _name(block: str, own: str, trained: bool | None) -> str:
    name = block or own or "(outside of blocks)"
    return name if trained is None else f"{name} ({'trained' if trained else 'frozen'})"


def _outermost(names: list[str]) -> list[str]:
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


def grouped(parameters: Iterable[Named], elements: int) -> Iterator[list[Named]]:
    """Neighbours of one dtype, up to `elements` elements together; a larger parameter stands alone."""
    group: list[Named] = []
    total = 0
    for name, parameter in parameters:
        is_full = total + parameter.numel() > elements
        if group and (is_full or parameter.dtype != group[0][1].dtype):
            yield group
            group, total = [], 0
        group.append((name, parameter))
        total += parameter.numel()
    if group:
        yield group
