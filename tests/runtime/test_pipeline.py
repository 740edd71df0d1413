"""A pipeline's training is that of one process: every schedule, every ZeRO stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dstrain.runtime.comm import Communicator
from dstrain.runtime.engine import Engine, EngineConfig, JobSchedule, TorchSchedule
from dstrain.runtime.models.gpt import GPT
from dstrain.runtime.optimizers import make_optimizer
from dstrain.runtime.pipeline.cuts import chain_of
from dstrain.runtime.pipeline.making import parameters_of
from dstrain.runtime.pipeline.partition import balanced
from dstrain.runtime.pipeline.pipeline import Pipeline
from dstrain.runtime.spec.model_config import GPTConfig
from dstrain.runtime.spec.parallel_dims import parallel_dims
from dstrain.runtime.spec.schedule import check, make_schedule
from dstrain.runtime.spec.training_config import OptimizerConfig, ParallelConfig, ZeroConfig
from dstrain.runtime.task import LanguageTask

RunRanks = Callable[..., list[Any]]

MODEL = GPTConfig(layers=6, width=20, heads=2, context=8, vocabulary=37)  # nothing divides by the ranks
MICRO_BATCHES, ROWS, STEPS = 4, 2, 3
ADAM = OptimizerConfig(lr=1e-3, eps=1e-6)


def samples(step: int, micro: int, data_rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + 10 * micro + data_rank)
    length = MODEL.context - (micro % 2)  # other lengths are other shapes between stages
    return torch.randint(MODEL.vocabulary, (ROWS, length + 1), generator=generator)


def one_process(data: int) -> dict[str, Any]:
    """The same global batches, on one rank."""
    comm = Communicator(0, 1, 0, torch.device("cpu"))
    torch.manual_seed(0)
    model = GPT(MODEL)
    config = EngineConfig(clip=0.5, accumulation=MICRO_BATCHES * data)
    engine = Engine(model, comm, config, lambda p: make_optimizer(p, ADAM), TorchSchedule(None))
    task, results = LanguageTask(), []
    for step in range(STEPS):
        for micro in range(MICRO_BATCHES):
            for rank in range(data):
                loss, count = task.loss(engine, samples(step, micro, rank))
                engine.backward(loss, count)
                result = engine.step()
        assert result is not None
        results.append((result.loss, result.grad_norm))
    return {"results": results, "model": {name: p.detach().clone() for name, p in model.named_parameters()}}


def pipelined(schedule_name: str, pipeline: int, stage: int, shard: int | None = None, **zero: Any) -> Callable[[int], Any]:
    def work(_: int) -> Any:
        with Communicator.connect() as comm:
            dims = parallel_dims(comm.world_size, stage, pipeline, data_shard=shard)
            torch.manual_seed(0)
            model = GPT(MODEL)
            schedule = make_schedule(schedule_name, pipeline, MICRO_BATCHES)
            check(schedule)
            chain = chain_of(model)
            counts = balanced(parameters_of(model, chain), schedule.stages)
            pipe = Pipeline(model, comm, dims, schedule, counts)
            config = EngineConfig(
                zero=ZeroConfig(stage=stage, bucket_elements=3000, resident_elements=0 if stage == 3 else 1 << 17, **zero),
                parallel=ParallelConfig(pipeline=pipeline, data_shard=shard),
                clip=0.5,
                accumulation=MICRO_BATCHES,
            )
            engine = Engine(model, comm, config, lambda p: make_optimizer(p, ADAM), TorchSchedule(None), pipeline=pipe)
            results = []
            for step in range(STEPS):
                batches = [samples(step, micro, dims.data_rank(comm.rank)) for micro in range(MICRO_BATCHES)]
                result = engine.train_batch(LanguageTask(), batches)
                results.append((result.loss, result.grad_norm))
            own = list(model.parameters())
            with engine.whole(own):
                found = {name: p.detach().clone() for name, p in model.named_parameters()}
            return {"results": results, "model": found}

    return work


def assert_same(ranks: list[Any], data: int) -> None:
    expected = one_process(data)
    seen = set()
    for found in ranks:
        for (loss, norm), (own_loss, own_norm) in zip(expected["results"], found["results"], strict=True):
            assert own_loss == pytest.approx(loss, rel=1e-5)
            assert own_norm == pytest.approx(norm, rel=1e-4)
        for name, tensor in found["model"].items():
            torch.testing.assert_close(tensor, expected["model"][name], atol=3e-5, rtol=0)
            seen.add(name)
    assert seen == set(expected["model"])


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved_1f1b", "zb_h1", "zb_v"])
def test_two_stages(run_ranks: RunRanks, schedule: str, stage: int) -> None:
    assert_same(run_ranks(2, pipelined(schedule, 2, stage)), data=1)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1", "zb_v"])
def test_two_stages_and_two_replicas(run_ranks: RunRanks, schedule: str, stage: int) -> None:
    assert_same(run_ranks(4, pipelined(schedule, 2, stage)), data=2)
