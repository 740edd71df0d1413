"""Groups of parameters by their names and sizes alone. Pure: the planner makes the same groups without a model."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar


class Shaped(Protocol):
    """A parameter, or what is known of one."""

    @property
    def dtype(self) -> Hashable: ...

    @property
    def requires_grad(self) -> bool: ...

    def numel(self) -> int: ...


P = TypeVar("P", bound=Shaped)


@dataclass(frozen=True)
class Group(Generic[P]):
    """The parameters of one unit. module: whose forward needs them all at once; "" for the whole model's."""

    name: str
    parameters: tuple[tuple[str, P], ...]
    module: str = ""


def by_size(
    parameters: Sequence[tuple[str, P]], elements: int, sections: Sequence[frozenset[str]] = ()
) -> list[Group[P]]:
    """Neighbours of one dtype, up to `elements` together, in the order in which the backward makes their gradients.

    sections: names that share no group with others."""
    parts = [[named for named in parameters if named[0] in section] for section in reversed(sections)]
    groups = [group for part in parts or [list(parameters)] for group in grouped(reversed(part), elements)]
    return [Group(f"unit {number} ({group[0][0]} …)", tuple(group)) for number, group in enumerate(groups)]


def by_place(
    parameters: Sequence[tuple[str, P]], blocks: Sequence[str], small: int, sections: Sequence[frozenset[str]] = ()
) -> list[Group[P]]:
    """A unit for each block, and for each module outside of blocks: what is needed at once.

    parameters: all of a model, in its order. blocks: names of modules, none inside another. Modules outside with fewer
    than `small` elements of their own share one unit. Trained and frozen parameters, dtypes, and sections (by names)
    never share one. Groups come in the order of the parameters.
    """
    outside: dict[str, int] = {}
    places = {}
    known = set(blocks)
    for name, parameter in parameters:
        block = next((place for place in _places_above(name) if place in known), "")
        places[name] = block, name.rpartition(".")[0] or name
        if not block:
            outside[places[name][1]] = outside.get(places[name][1], 0) + parameter.numel()
    section_of = {name: number for number, section in enumerate(sections) for name in section}
    groups: dict[tuple[int, str, str, bool, Hashable], list[tuple[str, P]]] = {}
    for name, parameter in parameters:
        block, module = places[name]
        own = "" if block or outside[module] < small else module
        kind = section_of.get(name, 0), block, own, parameter.requires_grad, parameter.dtype
        groups.setdefault(kind, []).append((name, parameter))
    kinds = [kind[1:] for kind in groups]
    return [Group(_name(kind[1:], kinds), tuple(members), kind[1]) for kind, members in groups.items()]


def grouped(parameters: Iterable[tuple[str, P]], elements: int) -> Iterator[list[tuple[str, P]]]:
    """Neighbours of one dtype, up to `elements` elements together; a larger parameter stands alone."""
    group: list[tuple[str, P]] = []
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


def outermost(names: Sequence[str]) -> list[str]:
    """Without those inside of others."""
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


def _places_above(name: str) -> Iterator[str]:
    """The modules that a parameter is in, the outermost first."""
    words = name.split(".")
    return (".".join(words[:count]) for count in range(1, len(words)))


def _name(kind: tuple[str, str, bool, Hashable], kinds: Sequence[tuple[str, str, bool, Hashable]]) -> str:
    """The place, and what tells the unit from others of that place."""
    block, own, trained, dtype = kind
    others = [other for other in kinds if other[:2] == kind[:2] and other != kind]
    details = ["trained" if trained else "frozen"] if any(other[2] != trained for other in others) else []
    details += [str(dtype).removeprefix("torch.")] if any(other[3] != dtype for other in others) else []
    return (block or own or "(outside of blocks)") + (f" ({', '.join(details)})" if details else "")
