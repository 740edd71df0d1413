"""Optimizers over shards, and over whole tensors where they must see them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from zero_oracle import (
    ADAM,
    LR,
    ODD,
    SGD,
    STAGES,
    Frozen,
    Odd,
    RunRanks,
    compare,
    engine_of,
)

from dstrain.runtime.comm import Communicator
from dstrain.runtime.engine import TorchSchedule
from dstrain.runtime.optimizers import make_optimizer
from dstrain.runtime.spec.errors import UsageError
from dstrain.runtime.spec.training_config import (
    GroupConfig,
    OptimizerConfig,
)
from dstrain.runtime.zero.spread import needs_whole_tensors


@pytest.mark.parametrize(
    "config",
    [
        OptimizerConfig(
            lr=LR,
            eps=1e-6,
            no_decay=("1d",),
            groups=(
                GroupConfig(match=("head.*",), lr_ratio=0.1),
                GroupConfig(match=("blocks.0.*", "*norm*"), weight_decay=0.5),
            ),
        ),
        SGD,
        OptimizerConfig(name="adafactor", lr=LR),
        OptimizerConfig(name="muon", lr=LR, eps=1e-6),
        OptimizerConfig(factory="torch.optim:RMSprop", lr=LR, args={"eps": 1e-6}),
    ],
    ids=lambda config: config.factory or (f"{config.name} groups" if config.groups else config.name),
)
def test_optimizers(run_ranks: RunRanks, config: OptimizerConfig) -> None:
    compare(run_ranks, 3, replace(ODD, optimizer=config, clip=None))


def users_own(model: nn.Module) -> tuple[torch.optim.Optimizer, TorchSchedule]:
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": others}], lr=LR, eps=1e-6)
    return optimizer, TorchSchedule(torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5))


@pytest.mark.parametrize("model", [Odd, Frozen])
def test_a_users_own_optimizer_and_scheduler(run_ranks: RunRanks, model: Callable[[], nn.Module]) -> None:
    compare(run_ranks, 2, replace(ODD, model=model, optimizer=users_own))


def factory_of_the_models_own(model: nn.Module) -> tuple[Any, TorchSchedule]:
    return lambda _: users_own(model)[0], TorchSchedule(None)


@pytest.mark.parametrize("model", [Odd, Frozen])
def test_a_factory_that_looks_at_the_model_alone(run_ranks: RunRanks, model: Callable[[], nn.Module]) -> None:
    compare(run_ranks, 2, replace(ODD, model=model, optimizer=factory_of_the_models_own))


def test_a_factory_of_somebody_elses_parameters_is_refused() -> None:
    comm = Communicator(0, 1, 0, torch.device("cpu"))
    other = torch.optim.SGD([nn.Parameter(torch.zeros(7))], lr=LR)
    training = replace(ODD, optimizer=lambda _: (lambda _: other, TorchSchedule(None)))
    for zero in ({"stage": 0}, *STAGES.values()):
        with pytest.raises(UsageError, match=r"optimizer: expected parameters of the model .* of shape \(7,\)"):
            engine_of(training, comm, zero)


def test_an_optimizer_that_cannot_be_sharded_is_refused_with_its_reason() -> None:
    comm = Communicator(0, 1, 0, torch.device("cpu"))
    training = replace(ODD, optimizer=lambda model: (torch.optim.LBFGS(model.parameters()), TorchSchedule(None)))
    with pytest.raises(
        UsageError, match=r"zero.stage: expected 0 with LBFGS \(its history is of all parameters at once"
    ):
        engine_of(training, comm, STAGES["3"])


def test_only_optimizers_that_look_at_tensors_are_cut_between_them() -> None:
    groups = (GroupConfig(match=("head.*",), lr_ratio=0.1),)

    def is_cut(optimizer: Any) -> bool:
        model = Odd()
        if isinstance(optimizer, OptimizerConfig):
            return needs_whole_tensors(lambda named: make_optimizer(named, optimizer), list(model.named_parameters()))
        return needs_whole_tensors(optimizer, list(model.named_parameters()))

    assert not is_cut(ADAM)
    assert not is_cut(ADAM.model_copy(update={"groups": groups, "no_decay": ("*norm*", "1d")}))
    assert not is_cut(OptimizerConfig(factory="torch.optim:SGD"))
    assert not is_cut(torch.optim.Adam(Odd().parameters(), fused=True))
    assert is_cut(OptimizerConfig(name="muon"))
    assert is_cut(OptimizerConfig(name="adafactor"))
    assert is_cut(Adam(Odd().parameters()))


class Adam(torch.optim.Adam):
    """Of torch's name, but with a step of its own."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def test_a_factory_may_go_by_dimensions(run_ranks: RunRanks) -> None:
    """As nanoGPT does: a part of a matrix has two dimensions too."""

    def made(named: Any) -> torch.optim.Optimizer:
        parameters = [parameter for _, parameter in named]
        groups = [{"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.5}]
        groups += [{"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=LR, eps=1e-6)

    compare(run_ranks, 3, replace(ODD, optimizer=lambda model: (made, TorchSchedule(None))))
