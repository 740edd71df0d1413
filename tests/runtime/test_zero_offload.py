"""Offload: the optimizer's copies in the host's memory. Here both memories are the CPU's; what moves is the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

from dstrain.runtime.comm import Communicator
from dstrain.runtime.engine import Engine, EngineConfig, TorchSchedule
from dstrain.runtime.optimizers import make_optimizer
from dstrain.runtime.spec.training_config import OffloadConfig, OptimizerConfig, PrecisionConfig, ZeroConfig
from dstrain.runtime.zero import spread
from dstrain.runtime.zero.gradients import ShardedGradients
from dstrain.runtime.zero.weights import ShardedWeights

from .conftest import RunRanks
from .test_pipeline import assert_same, pipelined

OPTIMIZER = OptimizerConfig(lr=0.01)


@contextmanager
def moving(offload: OffloadConfig | None) -> Iterator[None]:
    """Engines that are made within offload as they would on a GPU; `spread` leaves it out on a CPU, where it moves
    nothing."""
    made: list[ShardedWeights] = []

    def weights(*args: object, **kwargs: object) -> ShardedWeights:
        made.append(ShardedWeights(*args, **{**kwargs, "offload": offload}))  # type: ignore[arg-type]
        return made[-1]

    def gradients(*args: object) -> ShardedGradients:
        return ShardedGradients(*args[:-2], offload is not None, args[-1])  # type: ignore[arg-type]

    with patch.object(spread, "ShardedWeights", weights), patch.object(spread, "ShardedGradients", gradients):
        yield
    assert made
    assert all((unit.host_grad is not None) == (offload is not None) for one in made for unit in one.units)


def train(comm: Communicator, stage: int, dtype: str, offload: OffloadConfig | None) -> list[float]:
    """Losses."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3)]
    with moving(offload):
        engine = Engine(
            nn.Sequential(nn.Linear(5, 6), nn.Sequential(*blocks), nn.Linear(6, 2)),
            comm,
            EngineConfig(
                zero=ZeroConfig(stage=stage, bucket_elements=50, resident_elements=8),  # type: ignore[arg-type]
                precision=PrecisionConfig(dtype=dtype),  # type: ignore[arg-type]
                clip=0.1,
            ),
            lambda parameters: make_optimizer(parameters, OPTIMIZER),
            TorchSchedule(None),
        )
    dtype_of_model = torch.float32 if dtype == "fp32" else torch.bfloat16
    losses = []
    for step in range(4):
        inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(10 * step + comm.rank))
        engine.backward(engine(inputs.to(dtype_of_model)).float().square().mean(), 4)
        result = engine.step()
        assert result is not None
        losses.append(result.loss)
    if offload is not None:
        assert isinstance(engine.weights, ShardedWeights)
        assert all(unit.host_grad is not None for unit in engine.weights.units)
    return losses


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("stage", "parameters"), [(1, False), (2, False), (3, False), (3, True)])
def test_offloaded_training_is_the_same_bitwise(run_ranks: RunRanks, stage: int, parameters: bool, dtype: str) -> None:
    def work(rank: int) -> tuple[list[float], list[float]]:
        with Communicator.connect() as comm:
            offload = OffloadConfig(optimizer=True, parameters=parameters)
            return train(comm, stage, dtype, None), train(comm, stage, dtype, offload)

    for plain, offloaded in run_ranks(2, work):
        assert plain == offloaded


@pytest.mark.parametrize(
    ("schedule", "stage", "parameters"),
    [("1f1b", 1, False), ("1f1b", 2, False), ("zb_v", 3, False), ("1f1b", 3, True)],
)
def test_an_offloaded_pipeline_trains_as_one_process(
    run_ranks: RunRanks, schedule: str, stage: int, parameters: bool
) -> None:
    def work(rank: int) -> Any:
        with moving(OffloadConfig(optimizer=True, parameters=parameters)):
            return pipelined(schedule, 2, stage)(rank)

    assert_same(run_ranks(4, work), data=2)
