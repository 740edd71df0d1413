"""Reductions of one micro-batch, and the gradients of the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dstrain.runtime import initialize

RunRanks = Callable[..., list[Any]]


def norms(rank: int, stage: int) -> list[float]:
    """Of three steps of three micro-batches, in a model of as few units as there are buffers."""
    import dstrain.runtime.initialization as module

    module._joined.clear()  # what the fork has inherited is not this rank's
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    config = {"batch": {"global": 12, "micro": 2}, "zero": {"stage": stage}, "optimizer": {"lr": 0.1, "name": "sgd"}}
    engine = initialize(model, config)
    draw = torch.Generator().manual_seed(rank)
    found = []
    for _ in range(9):
        x = torch.randn(2, 3, generator=draw)
        engine.backward(engine(x).square().mean())
        result = engine.step()
        found += [result.grad_norm] if result else []
    return found


@pytest.mark.parametrize("stage", [2, 3])
def test_a_bucket_is_filled_anew_only_behind_its_reduction(stage: int, run_ranks: RunRanks) -> None:
    expected = run_ranks(2, lambda rank: norms(rank, 0))
    found = run_ranks(2, lambda rank: norms(rank, stage))
    assert len(found[0]) == 3
    assert found[0] == found[1] == pytest.approx(expected[0], rel=1e-5)
