"""Whole parameters in a script's hands, copies of the model, and words about gradients, at every stage."""

from __future__ import annotations

import copy
import io
import re
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zero_oracle import LANGUAGE, ODD, STAGES, Odd, RunRanks, engine_of, samples_of, train_step, whole

from dstrain.runtime.comm import Communicator
from dstrain.runtime.compat import deepspeed
from dstrain.runtime.spec.errors import NonFiniteError
from dstrain.runtime.spec.training_config import PrecisionConfig
from dstrain.runtime.zero.gradients import POOL, ShardedGradients

EVERY = {"0": {"stage": 0}, **STAGES}
BF16 = replace(ODD, precision=PrecisionConfig(dtype="bf16"))


@pytest.mark.parametrize("training", [ODD, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stage", EVERY)
def test_what_one_rank_writes_to_whole_parameters_is_everyones(run_ranks: RunRanks, stage: str, training: Any) -> None:
    def work(rank: int) -> list[bool]:
        with Communicator.connect() as comm:
            engine = engine_of(training, comm, EVERY[stage])
            train_step(engine, training)
            before = whole(engine)
            module = engine.module
            assert isinstance(module, Odd)
            chosen = [module.blocks[1].linear.weight, module.head.weight]
            with engine.whole(chosen, changed_on=1):
                same = [torch.equal(p, before[name]) for name, p in module.named_parameters() if p in set(chosen)]
                if rank == 1:
                    for parameter in chosen:
                        parameter.fill_(3.0)
            engine.optimizer.param_groups[0]["lr"] = 0.0  # a step rounds masters into the model
            train_step(engine, training)
            after = whole(engine)
            names = {name for name, parameter in module.named_parameters() if parameter in set(chosen)}
            written = [bool((after[name] == 3.0).all()) for name in names]
            return [*same, *written, *(torch.equal(after[n], before[n]) for n in after if n not in names)]

    for found in run_ranks(3, work):
        assert all(found)


@pytest.mark.parametrize("stage", ["0", "1", "2"])
def test_loaded_weights_are_trained_on(run_ranks: RunRanks, stage: str) -> None:
    """Also the fp32 masters of bf16 follow."""

    def work(rank: int) -> bool:
        with Communicator.connect() as comm:
            engine = engine_of(BF16, comm, EVERY[stage])
            train_step(engine, BF16)
            state = {name: torch.full_like(value, 2.0) for name, value in engine.module.state_dict().items()}
            engine.module.load_state_dict(state)
            engine.optimizer.param_groups[0]["lr"] = 0.0
            train_step(engine, BF16)
            return all(bool((value == 2.0).all()) for value in whole(engine).values())

    assert all(run_ranks(2, work))


def test_at_stage_3_a_state_dict_is_refused_with_what_to_do(run_ranks: RunRanks) -> None:
    def work(rank: int) -> None:
        with Communicator.connect() as comm:
            module = engine_of(ODD, comm, STAGES["3"]).module
            with pytest.raises(TypeError, match=r"expected engine\.save_model.* found state_dict\(\)"):
                module.state_dict()
            with pytest.raises(TypeError, match=r"before initialize.* found load_state_dict\(\)"):
                module.load_state_dict(Odd().state_dict())
            with pytest.raises(TypeError, match="cannot be copied"):
                copy.deepcopy(module)

    run_ranks(2, work)


@pytest.mark.parametrize("stage", ["0", "1", "2"])
def test_copies_of_the_model_are_plain_models(run_ranks: RunRanks, stage: str) -> None:
    def work(rank: int) -> bool:
        with Communicator.connect() as comm:
            engine = engine_of(ODD, comm, EVERY[stage])
            train_step(engine, ODD)
            file = io.BytesIO()
            torch.save(engine.module, file)
            file.seek(0)
            copies: list[nn.Module] = [copy.deepcopy(engine.module), torch.load(file, weights_only=False)]
            tokens = samples_of(engine, 2)[:, :-1]
            expected = engine(tokens)
            train_step(engine, ODD)
            return all(torch.equal(made(tokens), expected) for made in copies)

    assert all(run_ranks(2, work))


SPOILT = list(product(["head.bias", "blocks.0.linear.weight"], [1, 2]))
"""A parameter, and the micro-batches of a step."""


@pytest.mark.parametrize("stage", EVERY)
def test_a_gradient_that_is_not_finite_is_named_with_its_step_and_rank(run_ranks: RunRanks, stage: str) -> None:
    def error_of(comm: Communicator, name: str, accumulation: int) -> str:
        training = replace(ODD, accumulation=accumulation)
        engine = engine_of(training, comm, EVERY[stage])
        train_step(engine, training)

        def spoil(gradient: Tensor) -> Tensor:
            is_first = engine.micro_step == 0
            return gradient / 0 if comm.rank == 1 and is_first else gradient

        dict(engine.module.named_parameters())[name].register_hook(spoil)
        with pytest.raises(NonFiniteError) as caught:
            train_step(engine, training)
        return str(caught.value)

    def work(_: int) -> list[str]:
        with Communicator.connect() as comm:
            return [error_of(comm, *case) for case in SPOILT]

    for errors in run_ranks(3, work):
        for said, (name, _) in zip(errors, SPOILT, strict=True):
            assert said.startswith("step 2: expected a finite gradient, found norm "), said
            assert f"(in {name}) on rank 1; " in said, said


class LeavesOut(Odd):
    """The last block is there, and not used."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks[:-1]:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits


@pytest.mark.parametrize("stage", ["2", "3"])
def test_what_nothing_uses_holds_no_other_gradients_up(run_ranks: RunRanks, stage: str) -> None:
    training = replace(ODD, model=lambda: LeavesOut(layers=6))

    def work(rank: int) -> int:
        with Communicator.connect() as comm:
            engine = engine_of(training, comm, STAGES[stage] | {"bucket_elements": 100})
            train_step(engine, training)
            gradients = engine.gradients
            assert isinstance(gradients, ShardedGradients)
            most = 0

            def count(_: Tensor) -> None:
                nonlocal most
                most = max(most, sum(bucket.flat is not None for bucket in gradients.buckets))

            for parameter in engine.module.parameters():
                parameter.register_post_accumulate_grad_hook(count)  # type: ignore[no-untyped-call] # torch's
            train_step(engine, training)
            return most

    for most in run_ranks(2, work):
        assert most <= POOL + 1


@pytest.mark.parametrize("ranks", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_the_choice_of_an_algorithm_changes_no_bit(run_ranks: RunRanks, ranks: int) -> None:
    training = replace(LANGUAGE, accumulation=2)

    def work(rank: int) -> tuple[bool, list[str]]:
        with Communicator.connect() as comm:
            said, outcomes = [], []
            for wish in ("pairwise", "ring", "direct", "auto"):
                engine = engine_of(training, comm, STAGES["3"] | {"comm": wish})
                for _ in range(3):
                    train_step(engine, training)
                outcomes.append(whole(engine))
                said.append(engine.weights.describe())
            same = all(torch.equal(outcomes[0][n], other[n]) for other in outcomes[1:] for n in other)
            return same, said

    found = run_ranks(ranks, work)
    assert all(same for same, _ in found)
    *named, auto = found[0][1]
    assert [said.split("comm ")[1] for said in named] == ["pairwise", "ring", "direct"]
    measured = r"comm (pairwise|ring|direct) \(pairwise [\d.]+ ms, ring [\d.]+ ms, direct [\d.]+ ms\)$"
    assert re.search(measured, auto)
    assert len({said[-1] for _, said in found}) == 1, "all ranks choose alike"


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_deepspeeds_gathered_parameters(run_ranks: RunRanks, stage: int) -> None:
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-30, "weight_decay": 0.0}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }

    def work(rank: int) -> bool:
        with Communicator.connect():
            model = Odd()
            weight = model.blocks[0].linear.weight
            with deepspeed.zero.GatheredParameters(weight):
                assert weight.shape == (11, 11)
            engine, *_ = deepspeed.initialize(model=model, config=config)
            with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
                assert weight.isfinite().all()
                if rank == 0:
                    nn.init.constant_(weight, 5.0)
            tokens = torch.ones(2, 8, dtype=torch.long)
            engine.backward(engine(tokens).sum())
            engine.step()
            with deepspeed.zero.GatheredParameters(weight):
                return bool((weight == 5.0).all())

    assert all(run_ranks(2, work))
