"""Which parameters are trained how: an optimizer's groups, by the parameters' names. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from torch import nn

from dstrain.runtime.spec.errors import UsageError
from dstrain.runtime.spec.training_config import OptimizerConfig

NamedParameters: TypeAlias = Sequence[tuple[str, nn.Parameter]]

VECTORS = "1d"
"""Among the patterns of `optimizer.no_decay`: every parameter of fewer than two dimensions."""


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that are trained alike.

    lr_ratio: their learning rate ÷ `optimizer.lr`. weight_decay: per unit of learning rate.
    """

    parameters: dict[str, nn.Parameter]
    lr_ratio: float
    weight_decay: float

    def for_torch(self, lr: float) -> dict[str, Any]:
        """The group as a torch optimizer takes it, and two keys of ours that it keeps: `names` and `lr_ratio`."""
        return {
            "params": list(self.parameters.values()),
            "names": list(self.parameters),
            "lr": lr * self.lr_ratio,
            "lr_ratio": self.lr_ratio,
            "weight_decay": self.weight_decay,
        }


def group_parameters(parameters: NamedParameters, config: OptimizerConfig) -> list[ParameterGroup]:
    """Every parameter in one group: the rest first, then those of `config.groups` in their order.

    The first of `config.groups` with a pattern that matches takes the parameter. What `config.no_decay` names has no
    decay, in whichever group. Each group is divided into what decays and what does not; none is empty.
    Raises UsageError for a pattern that matches no parameter.
    """
    names = [name for name, _ in parameters]
    check_patterns([pattern for pattern in config.no_decay if pattern != VECTORS], names, "optimizer.no_decay")
    for index, group in enumerate(config.groups):
        check_patterns(group.match, names, f"optimizer.groups.{index}.match")
    members: dict[tuple[int, bool], dict[str, nn.Parameter]] = {}
    for name, parameter in parameters:
        chosen = (index for index, group in enumerate(config.groups) if matches(name, group.match))
        key = (next(chosen, -1), _is_exempt(name, parameter, config.no_decay))
        members.setdefault(key, {})[name] = parameter
    return [_group(config, index, exempt, members[index, exempt]) for index, exempt in sorted(members)]


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns (`fnmatch`, case matters) matches the whole name."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def dimensions(parameter: nn.Parameter) -> int:
    """Of the whole parameter, where this is one rank's flat piece of it."""
    return len(getattr(parameter, "whole_shape", parameter.shape))


def check_patterns(patterns: Iterable[str], names: Sequence[str], key: str) -> None:
    """Raises UsageError for the first pattern of the configuration's `key` that matches no name."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            expected = "patterns that each match a trained parameter"
            raise UsageError.mismatch(key, expected, repr(pattern), _advice(pattern, names))


def _is_exempt(name: str, parameter: nn.Parameter, no_decay: tuple[str, ...]) -> bool:
    return (VECTORS in no_decay and dimensions(parameter) < 2) or matches(name, no_decay)


def _group(config: OptimizerConfig, index: int, exempt: bool, parameters: dict[str, nn.Parameter]) -> ParameterGroup:
    """index: of `config.groups`, or -1. exempt: without decay."""
    ratio, decay = 1.0, config.weight_decay
    if index >= 0:
        ratio = config.groups[index].lr_ratio
        own_decay = config.groups[index].weight_decay
        decay = decay if own_decay is None else own_decay
    return ParameterGroup(parameters, ratio, 0.0 if exempt else decay)


def _advice(pattern: str, names: Sequence[str]) -> str:
    candidates = dict.fromkeys(candidate for name in names for candidate in _patterns_of(name))
    if close := difflib.get_close_matches(pattern, candidates, n=3, cutoff=0.75):
        return f"did you mean {' or '.join(map(repr, close))}?"
    return f"parameters are named as in {', '.join(names[:3])}"


def _patterns_of(name: str) -> Iterator[str]:
    """The name itself and what a person may write for it: 'head.*' and '*.weight' for 'head.weight'."""
    yield name
    parts = name.split(".")
    for count in range(1, len(parts)):
        yield ".".join(parts[:count]) + ".*"
        yield "*." + ".".join(parts[count:])
