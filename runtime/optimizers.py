"""The optimizer of a job: torch's by name, or any by import path.

[Note: Muon]
Muon (Jordan et al. 2024) orthogonalises the update of a matrix, which means something only for the matrices that map
hidden vectors to hidden vectors. Embeddings, the head, biases, norms and convolutions go to AdamW. Both stand in one
`CombinedOptimizer`. A module's type is not to be seen from here, so names decide: a parameter is Muon's if it has two
dimensions and none of the parts of its name between dots matches NOT_HIDDEN; `args: {adamw: [patterns]}` in the job
replaces that rule by patterns of whole names.

torch's Muon scales an update by sqrt(max(1, rows / columns)), and then wants a learning rate 10 to 20 times that of
AdamW. With `adjust_lr_fn: match_rms_adamw`, our default, the scale is 0.2·sqrt(max(rows, columns)): an element then
moves by 0.2·lr in the root mean square, as AdamW moves it (Liu et al. 2025, arXiv:2502.16982), and one `optimizer.lr`
and one `weight_decay` serve both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dstrain.runtime.imports import load_object
from dstrain.runtime.parameter_groups import (
    NamedParameters,
    ParameterGroup,
    check_patterns,
    dimensions,
    group_parameters,
    matches,
)
from dstrain.runtime.spec.errors import UsageError
from dstrain.runtime.spec.training_config import OptimizerConfig
from dstrain.runtime.without_dynamo import without_dynamo

NOT_HIDDEN = ("*embed*", "wte", "wpe", "token*", "position*", "*bias*", "head", "*_head", "classifier", "shared")
"""Parts of the names of matrices that Muon leaves to AdamW: 'token.weight', 'lm_head.weight'."""

SGD_MOMENTUM = 0.9
MUON_MOMENTUM = 0.95

_FUSED_DEVICES = ("cpu", "cuda")
_IMPLEMENTATIONS = {"fused", "foreach", "differentiable", "capturable"}
"""Arguments by which a user chooses among torch's implementations of one optimizer."""


def make_optimizer(parameters: NamedParameters, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer of `config` over all `parameters`.

    Each of its param_groups carries `names` (its parameters', in their order) and `lr_ratio`; its `lr` is
    `config.lr` × lr_ratio. Raises UsageError for a pattern that matches nothing and for arguments that do not fit.
    """
    groups = group_parameters(parameters, config)
    if config.factory is not None:
        return _from_factory(config.factory, groups, config)
    if config.name == "muon":
        return _muon_and_adamw(groups, config)
    kind, own = _KINDS[config.name]
    return _torchs(kind, groups, config, own(config), config.args)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group of a `make_optimizer` its learning rate: lr × lr_ratio."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_ratio"]


@without_dynamo
class CombinedOptimizer(torch.optim.Optimizer):
    """Several optimizers of different parameters, with the interface, the state and the state_dict of one.

    Its param_groups are those of the parts, in their order.
    """

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._parts = parts
        self._share()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override] # overloads
        """One step of every part; returns what `closure` does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's: the groups' numbers and sizes must be the same."""
        super().load_state_dict(state_dict)
        self._share()

    def _share(self) -> None:
        """Let the parts work on this optimizer's groups and state: torch replaces both when it loads."""
        groups = iter(self.param_groups)
        for part in self._parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state


def _adams(config: OptimizerConfig) -> dict[str, Any]:
    return {"betas": config.betas, "eps": config.eps}


def _momentum(config: OptimizerConfig, default: float) -> dict[str, Any]:
    return {"momentum": default if config.momentum is None else config.momentum}


_KINDS: Mapping[str, tuple[type[torch.optim.Optimizer], Callable[[OptimizerConfig], dict[str, Any]]]] = {
    "adamw": (torch.optim.AdamW, _adams),
    "adam": (torch.optim.Adam, _adams),
    "sgd": (torch.optim.SGD, lambda config: _momentum(config, SGD_MOMENTUM)),
    "adafactor": (torch.optim.Adafactor, lambda config: {}),
}
_FUSED = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)


def _torchs(
    kind: type[torch.optim.Optimizer],
    groups: Sequence[ParameterGroup],
    config: OptimizerConfig,
    own: dict[str, Any],
    args: Mapping[str, Any],
) -> torch.optim.Optimizer:
    """torch's optimizer `kind`. own: arguments that have keys of their own in the configuration."""
    own = {"lr": config.lr, "weight_decay": config.weight_decay, **own}
    _check_free(args, own)
    if kind in _FUSED and not _IMPLEMENTATIONS & args.keys() and all(map(_is_fusible, groups)):
        own["fused"] = True
    label = f"torch.optim.{kind.__name__}"
    optimizer: torch.optim.Optimizer = _call(without_dynamo(kind), label, _for_torch(groups, config), own, args)
    return optimizer


def _for_torch(groups: Sequence[ParameterGroup], config: OptimizerConfig) -> list[dict[str, Any]]:
    return [group.for_torch(config.lr) for group in groups]


def _is_fusible(group: ParameterGroup) -> bool:
    return all(p.is_floating_point() and p.device.type in _FUSED_DEVICES for p in group.parameters.values())


def _from_factory(path: str, groups: Sequence[ParameterGroup], config: OptimizerConfig) -> torch.optim.Optimizer:
    own = {"lr": config.lr}
    _check_free(config.args, own)
    factory = load_object(path, "optimizer.factory")
    optimizer = _call(factory, path, _for_torch(groups, config), own, config.args)
    if not isinstance(optimizer, torch.optim.Optimizer):
        found = type(optimizer).__name__
        raise UsageError.mismatch("optimizer.factory", "a function that returns a torch.optim.Optimizer", found)
    if not all("lr_ratio" in group for group in optimizer.param_groups):
        expected = "an optimizer that keeps the keys of the groups it is given"
        raise UsageError.mismatch("optimizer.factory", expected, f"{path} that drops lr_ratio")
    return optimizer


def _muon_and_adamw(groups: Sequence[ParameterGroup], config: OptimizerConfig) -> torch.optim.Optimizer:
    """[Note: Muon]"""
    args = {"adjust_lr_fn": "match_rms_adamw", **config.args}
    patterns = args.pop("adamw", None)
    if patterns is not None:
        _check_adamw_patterns(patterns, [name for group in groups for name in group.parameters])
    hidden = [_part(group, patterns, hidden=True) for group in groups]
    others = [_part(group, patterns, hidden=False) for group in groups]
    hidden, others = [g for g in hidden if g.parameters], [g for g in others if g.parameters]
    if not hidden:
        expected, found = "a model with hidden matrices for muon", "none; name: adamw trains all the rest"
        raise UsageError.mismatch("optimizer.name", expected, found)
    muon = _torchs(torch.optim.Muon, hidden, config, _momentum(config, MUON_MOMENTUM), args)
    adamw = [_torchs(torch.optim.AdamW, others, config, _adams(config), {})] if others else []
    return CombinedOptimizer([muon, *adamw])


def _part(group: ParameterGroup, patterns: Sequence[str] | None, *, hidden: bool) -> ParameterGroup:
    """The group's matrices of hidden layers, or all the rest."""
    chosen = {name: p for name, p in group.parameters.items() if _is_hidden(name, p, patterns) == hidden}
    return ParameterGroup(chosen, group.lr_ratio, group.weight_decay)


def _is_hidden(name: str, parameter: nn.Parameter, patterns: Sequence[str] | None) -> bool:
    if patterns is not None:
        return dimensions(parameter) == 2 and not matches(name, patterns)
    return dimensions(parameter) == 2 and not any(matches(part, NOT_HIDDEN) for part in name.split("."))


def _check_adamw_patterns(patterns: Any, names: Sequence[str]) -> None:
    if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
        raise UsageError.mismatch("optimizer.args.adamw", "a list of patterns of parameters' names", repr(patterns))
    check_patterns(patterns, names, "optimizer.args.adamw")


def _check_free(args: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raises UsageError if an argument has a key of its own in the configuration."""
    for name in args:
        if name in own:
            expected = f"no such key: it is optimizer.{name}"
            raise UsageError.mismatch(f"optimizer.args.{name}", expected, repr(args[name]))


def _call(
    factory: Callable[..., Any],
    label: str,
    param_groups: list[dict[str, Any]],
    own: Mapping[str, Any],
    args: Mapping[str, Any],
) -> Any:
    """factory(param_groups, **own, **args); what it has against them is one line for the user, its cause attached."""
    try:
        return factory(param_groups, **own, **args)
    except (TypeError, ValueError, RuntimeError) as error:
        expected = f"arguments that {label} takes"
        raise UsageError.mismatch("optimizer.args", expected, f"{dict(args)} ({error})") from error
