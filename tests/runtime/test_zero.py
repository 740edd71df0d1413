"""ZeRO stages 1 to 3 against stage 0, which test_engine.py holds against torch's DDP."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch import Tensor
from zero_oracle import (
    ADAM,
    LANGUAGE,
    LR,
    SGD,
    STAGES,
    RunRanks,
    compare,
    gpt,
    language,
    only,
)

from dstrain.runtime.engine import Engine
from dstrain.runtime.spec.training_config import (
    LossScaleConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_stage_equals_stage_zero(run_ranks: RunRanks, ranks: int) -> None:
    outcome = compare(run_ranks, ranks, LANGUAGE)[0]
    assert all(result.grad_norm > 0.2 for result in outcome.results)
    start = dict(gpt().named_parameters())
    assert all((value - start[name]).abs().max() > LR for name, value in outcome.parameters.items())


@pytest.mark.parametrize("optimizer", [SGD, ADAM])
def test_with_two_ranks_it_is_bitwise(run_ranks: RunRanks, optimizer: OptimizerConfig) -> None:
    """A sum of two has one order. The norm is added up in another, so it may not scale the gradients."""
    compare(run_ranks, 2, replace(LANGUAGE, clip=None, optimizer=optimizer), atol=0.0)


@pytest.mark.parametrize("accumulate", ["local", "sharded"])
def test_accumulation(run_ranks: RunRanks, accumulate: str) -> None:
    stages = {name: zero | {"accumulate": accumulate} for name, zero in STAGES.items()}
    compare(run_ranks, 3, replace(LANGUAGE, accumulation=3), stages)


@pytest.mark.parametrize("comm", ["direct", "pairwise", "ring", "native"])
def test_algorithms(run_ranks: RunRanks, comm: str) -> None:
    compare(run_ranks, 3, replace(LANGUAGE, accumulation=2), only("2", "3", comm=comm))


@pytest.mark.parametrize("comm", ["auto", "ring"])
def test_hybrid_sharding(run_ranks: RunRanks, comm: str) -> None:
    training = replace(LANGUAGE, parallel=ParallelConfig(data_shard=2), accumulation=2)
    compare(run_ranks, 4, training, only("1", "2", "3", comm=comm))


def test_groups_of_one_rank_shard_nothing(run_ranks: RunRanks) -> None:
    compare(run_ranks, 2, replace(LANGUAGE, parallel=ParallelConfig(data_shard=1, data_replicate=2)))


@pytest.mark.parametrize("accumulate", ["local", "sharded"])
def test_parameters_that_stay_to_the_end_of_the_step(run_ranks: RunRanks, accumulate: str) -> None:
    compare(run_ranks, 2, replace(LANGUAGE, accumulation=2), only("3", reshard="step", accumulate=accumulate))


@pytest.mark.parametrize(
    "precision",
    [
        PrecisionConfig(dtype="bf16"),
        PrecisionConfig(dtype="bf16", reduce_dtype="bf16"),
        PrecisionConfig(dtype="fp16", loss_scale=LossScaleConfig(initial_power=8)),
    ],
    ids=str,
)
def test_low_precision(run_ranks: RunRanks, precision: PrecisionConfig) -> None:
    """With two ranks: sums of gradients have the same bits, and so have the rounded parameters but for the norm."""
    compare(run_ranks, 2, replace(LANGUAGE, precision=precision, clip=None), atol=0.0)


def test_autocast(run_ranks: RunRanks) -> None:
    compare(run_ranks, 2, replace(LANGUAGE, precision=PrecisionConfig(dtype="bf16", autocast=True)), only("1", "2"))


def overflowing(engine: Engine, samples: Tensor) -> Tensor:
    """In the second step rank 1's gradients are infinite."""
    loss = language(engine, samples)
    if engine.global_step == 1 and engine.rank == 1:
        loss = loss + (loss - loss.detach()) * 1e30
    return loss


def test_an_overflow_on_one_rank_is_skipped_by_all(run_ranks: RunRanks) -> None:
    precision = PrecisionConfig(dtype="fp16", loss_scale=LossScaleConfig(initial_power=8, hysteresis=1))
    training = replace(LANGUAGE, forward=overflowing, precision=precision, accumulation=2)
    for outcome in compare(run_ranks, 2, training, atol=1e-3):
        assert [result.skipped for result in outcome.results] == [False, True, False, False]


def padded(engine: Engine, samples: Tensor) -> Tensor:
    """Rank 1's last micro-batch is padding alone, its loss no number."""
    loss = language(engine, samples)
    return loss * float("nan") if is_padding(engine) else loss


def is_padding(engine: Engine) -> bool:
    return engine.rank == 1 and engine.micro_step == engine.config.accumulation - 1


@pytest.mark.parametrize(
    ("comm", "accumulation"),
    [
        ("pairwise", 2),
        ("ring", 1),
        pytest.param("pairwise", 1, marks=pytest.mark.slow),
        pytest.param("ring", 2, marks=pytest.mark.slow),
    ],
)
def test_a_micro_batch_of_padding_alone_on_one_rank(run_ranks: RunRanks, accumulation: int, comm: str) -> None:
    training = replace(
        LANGUAGE,
        forward=padded,
        accumulation=accumulation,
        tokens=lambda engine, samples: 0 if is_padding(engine) else samples[:, 1:].numel(),
    )
    stages = only("1", "2", "3", comm=comm) | {"3, local": STAGES["3"] | {"accumulate": "local", "comm": comm}}
    outcome = compare(run_ranks, 2, training, stages)[0]
    assert outcome.results[0].tokens == (2 * accumulation - 1) * 16
