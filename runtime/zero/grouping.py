"""Which parameters of a model form units: by size where all stay whole, by module where they are gathered for use."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from dstrain.runtime.activation_checkpointing import blocks_of
from dstrain.runtime.zero import groups
from dstrain.runtime.zero.groups import by_size, grouped

__all__ = ["Group", "Named", "by_module", "by_size", "grouped"]

Named = tuple[str, nn.Parameter]
Group = groups.Group[nn.Parameter]


def by_module(model: nn.Module, small: int, sections: Sequence[frozenset[str]] = ()) -> list[Group]:
    """A unit for each block of the model, the repeated ones (`blocks_of`), and for modules outside: see `by_place`."""
    return groups.by_place(list(model.named_parameters()), groups.outermost(blocks_of(model)), small, sections)
