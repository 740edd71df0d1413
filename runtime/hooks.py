"""Hooks on a user's modules, and on the tensors that they save."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Unpack = TypeVar("Unpack", bound=Callable[..., Any])


class Hook:
    """A hook that stays with the module: a copy of it (deepcopy, torch.save), which nobody trains, does nothing."""

    def __init__(self, call: Callable[..., None]) -> None:
        self._call = call

    def __call__(self, *given: Any) -> None:
        self._call(*given)

    def __reduce__(self) -> tuple[Any, ...]:
        return Hook, (_do_nothing,)


def _do_nothing(*_: Any) -> None:
    """In a copy."""


def repeatable(unpack: Unpack) -> Unpack:
    """Marks a hook that unpacks saved tensors, and does no harm if it is called more than once."""
    unpack.is_repeatable = True  # type: ignore[attr-defined]
    return unpack
