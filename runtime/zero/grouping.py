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


def by_size(parameters: Sequence[Named], elements: int, sections: Sequence[frozenset[str]] = ()) -> list[Group]:
    """Neighbours of one dtype, up to `elements` together, in the order in which the backward makes their gradients.

    sections: names that share no group with others."""
    parts: list[Sequence[Named]] = [
        [named for named in parameters if named[0] in section] for section in reversed(sections)
    ]
    groups = [group for part in parts or [parameters] for group in grouped(reversed(part), elements)]
    return [Group(f"unit {number} ({group[0][0]} …)", tuple(group)) for number, group in enumerate(groups)]


def by_module(model: nn.Module, small: int, sections: Sequence[frozenset[str]] = ()) -> list[Group]:
    """A unit for each block of the model, and for each module outside of blocks: what is needed at once.

    Blocks: the repeated ones (`blocks_of`). Modules outside with fewer than `small` elements of their own share one
    unit. Trained and frozen parameters, dtypes, and sections (by names) never share one. Groups come in the order of
    the model's parameters.
    """
    blocks = _outermost(blocks_of(model))
    outside: dict[str, int] = {}
    places = {}
    for name, parameter in model.named_parameters():
        block = next((block for block in blocks if name.startswith(f"{block}.")), "")
        places[name] = block, name.rpartition(".")[0] or name
        if not block:
            outside[places[name][1]] = outside.get(places[name][1], 0) + parameter.numel()
    section_of = {name: number for number, section in enumerate(sections) for name in section}
    groups: dict[tuple[int, str, str, bool, torch.dtype], list[Named]] = {}
    for name, parameter in model.named_parameters():
        block, module = places[name]
        own = "" if block or outside[module] < small else module
        kind = section_of.get(name, 0), block, own, parameter.requires_grad, parameter.dtype
        groups.setdefault(kind, []).append((name, parameter))
    kinds = [kind[1:] for kind in groups]
    return [Group(_name(kind[1:], kinds), tuple(members), kind[1]) for kind, members in groups.items()]


def _name(kind: tuple[str, str, bool, torch.dtype], kinds: Sequence[tuple[str, str, bool, torch.dtype]]) -> str:
    """The place, and what tells the unit from others of that place."""
    block, own, trained, dtype = kind
    others = [other for other in kinds if other[:2] == kind[:2] and other != kind]
    details = ["trained" if trained else "frozen"] if any(other[2] != trained for other in others) else []
    details += [str(dtype).removeprefix("torch.")] if any(other[3] != dtype for other in others) else []
    return (block or own or "(outside of blocks)") + (f" ({', '.join(details)})" if details else "")


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
