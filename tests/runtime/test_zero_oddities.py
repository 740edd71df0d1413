"""Parameters, views and optimizers that are not what a layer usually has, at every stage."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from zero_oracle import ADAM, ODD, STAGES, Odd, RunRanks, compare, engine_of, only, train_step, whole

from dstrain.runtime.comm import Communicator
from dstrain.runtime.spec.errors import UsageError

EVERY = {"0": {"stage": 0}, **STAGES}


class SharedReentrant(Odd):
    """One block twice, each time in a reentrant checkpoint: its gradients come twice in one backward."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for _ in range(2):
            x = checkpoint(self.blocks[0], x, use_reentrant=True)
        logits: Tensor = self.head(x)
        return logits


@pytest.mark.parametrize("stage", EVERY)
def test_a_gradient_that_comes_behind_its_reduction_is_refused_not_lost(run_ranks: RunRanks, stage: str) -> None:
    training = replace(ODD, model=lambda: SharedReentrant(layers=1))

    def work(rank: int) -> str:
        with Communicator.connect() as comm:
            engine = engine_of(training, comm, EVERY[stage] | {"bucket_elements": 50})
            with pytest.raises(UsageError) as caught:
                train_step(engine, training)
            return str(caught.value)

    for said in run_ranks(2, work):
        assert "its gradient once in a backward, found it again" in said
        assert "use_reentrant=False" in said


class Rotations(Odd):
    """Blocks whose weights are read as complex numbers."""

    def __init__(self) -> None:
        super().__init__(layers=5, width=12)
        for block in self.blocks:
            block.turn = nn.Parameter(torch.randn(6, 2))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], 6, 2).contiguous())
            x = torch.view_as_real(pairs * torch.view_as_complex(block.turn)).flatten(-2)
            x = block(x)
        logits: Tensor = self.head(x)
        return logits


def test_weights_that_are_viewed_in_another_dtype(run_ranks: RunRanks) -> None:
    compare(run_ranks, 2, replace(ODD, model=Rotations), only("2", "3"))


def test_views_that_a_script_keeps_stay_what_they_were(run_ranks: RunRanks) -> None:
    def work(rank: int) -> bool:
        with Communicator.connect() as comm:
            engine = engine_of(replace(ODD, model=lambda: Odd(layers=5)), comm, STAGES["3"])
            module = engine.module
            assert isinstance(module, Odd)
            expected = whole(engine)
            with torch.no_grad():
                kept = [block.linear.weight.detach() for block in module.blocks]
            return all(torch.equal(view, expected[f"blocks.{n}.linear.weight"]) for n, view in enumerate(kept))

    assert all(run_ranks(2, work))


class Small(nn.Module):
    """A sum over 2^25 and 1: fp32 loses the 1."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, dtype=dtype))

    def forward(self, factor: float) -> Tensor:
        total: Tensor = (self.weight * factor).abs().sum()
        return total


@pytest.mark.parametrize("stage", EVERY)
@pytest.mark.parametrize("ranks", [1, 2])
def test_gradients_of_fp64_are_summed_in_fp64(run_ranks: RunRanks, stage: str, ranks: int) -> None:
    training = replace(ODD, model=lambda: Small(torch.float64), clip=None, accumulation=2)

    def work(rank: int) -> float:
        with Communicator.connect() as comm:
            engine = engine_of(training, comm, EVERY[stage])
            engine.backward(engine(2.0**25))
            engine.step()
            engine.backward(engine(1.0))
            result = engine.step()
            assert result is not None
            return result.grad_norm

    for norm in run_ranks(ranks, work):
        assert norm == (2.0**25 + 1) / 2 * 2  # the mean of two, of four elements


@pytest.mark.parametrize("stage", EVERY)
def test_complex_parameters_are_refused_on_several_ranks_only(run_ranks: RunRanks, stage: str) -> None:
    training = replace(ODD, model=lambda: Small(torch.complex64))

    def work(rank: int) -> str:
        with Communicator.connect() as comm:
            with pytest.raises(UsageError) as caught:
                engine_of(training, comm, EVERY[stage])
            return str(caught.value)

    assert all("parameter weight: expected real numbers" in said for said in run_ranks(2, work))


class Prodigy(torch.optim.SGD):
    """Named as one whose step size depends on all parameters."""


@pytest.mark.parametrize("stage", STAGES)
def test_optimizers_with_one_step_size_for_all_are_refused(run_ranks: RunRanks, stage: str) -> None:
    training: Any = replace(ODD, optimizer=lambda model: (Prodigy(model.parameters(), ADAM.lr), None))

    def work(rank: int) -> str:
        with Communicator.connect() as comm:
            with pytest.raises(UsageError) as caught:
                engine_of(training, comm, STAGES[stage])
            return str(caught.value)

    assert all("0 with Prodigy" in said for said in run_ranks(2, work))
