"""`model_parameters`: what DeepSpeed's optimizers move, and in which groups."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dstrain.runtime.spec.config import JobConfig
from dstrain.runtime.spec.errors import UsageError
from dstrain.runtime.spec.training_config import GroupConfig

Item = nn.Parameter | dict[str, Any]
"""A parameter, or a group of them as torch's optimizers take it."""

Factory = Callable[[Iterable[Any]], torch.optim.Optimizer]


def trained_items(model: nn.Module, given: Iterable[Any]) -> list[Item]:
    """model_parameters as they were given, without those that require no gradient.

    Raises UsageError where trained parameters of the model are missing or somebody else's are among them.
    """
    names = _trained_names(model)
    items: list[Item] = []
    seen: set[Tensor] = set()
    for item in given:
        listed = item["params"] if isinstance(item, Mapping) else item
        members = [listed] if isinstance(listed, Tensor) or not isinstance(item, Mapping) else list(listed)
        if strange := [member for member in members if not isinstance(member, Tensor)]:
            found = type(strange[0]).__name__
            raise UsageError.mismatch("model_parameters", "parameters or groups of them", f"a {found}")
        trained = [member for member in members if member.requires_grad]
        if foreign := [member for member in trained if member not in names]:
            found = f"{len(foreign)} that are not its own, the first of shape {tuple(foreign[0].shape)}"
            fix = "make what a loss trains a part of the model"
            raise UsageError.mismatch("model_parameters", "parameters of the model", found, fix)
        seen.update(trained)
        items += [{**item, "params": trained}] if isinstance(item, Mapping) else trained
    if missing := [name for parameter, name in names.items() if parameter not in seen]:
        found = f"{len(missing)} without ({', '.join(missing[:3])})"
        fix = "model_parameters=model.parameters(), or requires_grad_(False) for what is not trained"
        raise UsageError.mismatch("model_parameters", "all parameters that require a gradient", found, fix)
    return items


def factory_of_groups(make: Factory, model: nn.Module, items: Sequence[Item]) -> Factory:
    """`make`, called with these items as DeepSpeed does, of what the engine trains in the model's place."""
    names = _trained_names(model)

    def made(trained: Iterable[Any]) -> torch.optim.Optimizer:
        own = dict(zip(names, trained, strict=True))
        return make(
            [
                {**item, "params": [own[member] for member in item["params"]]} if isinstance(item, dict) else own[item]
                for item in items
            ]
        )

    return made


def job_of_groups(job: JobConfig, model: nn.Module, items: Sequence[Item]) -> JobConfig:
    """The job whose configured optimizer has these groups. Raises UsageError for what a group cannot say there."""
    names, groups = _trained_names(model), []
    for item in items:
        if not isinstance(item, dict):
            continue
        if unknown := item.keys() - {"params", "lr", "weight_decay", "name"}:
            found = ", ".join(sorted(unknown))
            raise UsageError.mismatch("model_parameters", "groups with lr and weight_decay", found, "pass an optimizer")
        if item["params"] and ("lr" in item or "weight_decay" in item):
            ratio = float(item.get("lr", job.optimizer.lr)) / job.optimizer.lr
            match = tuple(names[member] for member in item["params"])
            groups.append(GroupConfig(match=match, lr_ratio=ratio, weight_decay=item.get("weight_decay")))
    return job.model_copy(update={"optimizer": job.optimizer.model_copy(update={"groups": tuple(groups)})})


def _trained_names(model: nn.Module) -> dict[nn.Parameter, str]:
    """In the order in which the engine trains them."""
    return {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
