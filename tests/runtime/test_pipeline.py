"""A pipeline's training is that of one process: every schedule, every ZeRO stage, every kind of model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dstrain.runtime.activation_checkpointing import checkpoint_activations
from dstrain.runtime.comm import Communicator
from dstrain.runtime.engine import Engine, EngineConfig, TorchSchedule
from dstrain.runtime.models.gpt import GPT
from dstrain.runtime.models.hf import build as build_hf
from dstrain.runtime.optimizers import make_optimizer
from dstrain.runtime.pipeline.cuts import chain_of
from dstrain.runtime.pipeline.making import parameters_of
from dstrain.runtime.pipeline.partition import balanced
from dstrain.runtime.pipeline.pipeline import Pipeline
from dstrain.runtime.spec.errors import UsageError
from dstrain.runtime.spec.model_config import GPTConfig, HFConfig
from dstrain.runtime.spec.parallel_dims import parallel_dims
from dstrain.runtime.spec.schedule import check, find_schedule
from dstrain.runtime.spec.training_config import OptimizerConfig, ParallelConfig, PrecisionConfig, ZeroConfig
from dstrain.runtime.task import LanguageTask, SampleTask, Task

RunRanks = Callable[..., list[Any]]

SIZES = GPTConfig(layers=6, width=20, heads=2, context=8, vocabulary=37)  # nothing divides by the ranks
MICRO_BATCHES, ROWS, STEPS = 4, 2, 10
ADAM = OptimizerConfig(lr=1e-3, eps=1e-6)

# As in zero_oracle.py: sums in another order, divided by Adam.
SAME_LOSS, SAME_NORM, SAME_PARAMETER = 1e-5, 1e-4, 3e-5


def tokens(micro: int, generator: torch.Generator) -> Tensor:
    """Other lengths are other shapes between stages; the last micro-batch is smaller."""
    rows = ROWS - 1 if micro == MICRO_BATCHES - 1 else ROWS
    return torch.randint(SIZES.vocabulary, (rows, SIZES.context - micro % 2 + 1), generator=generator)


@dataclass(frozen=True)
class Training:
    """What is trained, alike in a pipeline and by one process."""

    model: Callable[[], nn.Module] = lambda: GPT(SIZES)
    task: Callable[[], Task] = LanguageTask
    batch: Callable[[int, torch.Generator], Any] = tokens
    config: dict[str, Any] = field(default_factory=dict)
    recompute: bool = False
    optimizer: OptimizerConfig = ADAM

    def batches(self, step: int, data_rank: int) -> list[Any]:
        seeds = [1000 * step + 10 * micro + data_rank for micro in range(MICRO_BATCHES)]
        return [self.batch(micro, torch.Generator().manual_seed(seed)) for micro, seed in enumerate(seeds)]

    def built(self) -> nn.Module:
        torch.manual_seed(0)
        model = self.model()
        if self.recompute:
            checkpoint_activations(model, "all")
        return model


def one_process(training: Training, data: int) -> dict[str, Any]:
    """The same global batches, on one rank."""
    comm = Communicator(0, 1, 0, torch.device("cpu"))
    model = training.built()
    config = EngineConfig(clip=0.5, accumulation=MICRO_BATCHES * data, **training.config)
    engine = Engine(model, comm, config, lambda p: make_optimizer(p, training.optimizer), TorchSchedule(None))
    task, results = training.task(), []
    for step in range(STEPS):
        for rank in range(data):
            for batch in training.batches(step, rank):
                loss, count = task.loss(engine, batch)
                engine.backward(loss, count)
                result = engine.step()
        assert result is not None
        results.append((result.loss, result.grad_norm))
    return {"results": results, "model": {name: p.detach().clone() for name, p in model.named_parameters()}}


def engine_of(
    comm: Communicator,
    training: Training,
    schedule: str,
    pipeline: int,
    stage: int,
    shard: int | None,
    micro_batches: int = MICRO_BATCHES,
    **zero: Any,
) -> Engine:
    dims = parallel_dims(comm.world_size, stage, pipeline, data_shard=shard)
    model = training.built()
    plan = find_schedule(schedule, pipeline, micro_batches)
    check(plan)
    pipe = Pipeline(model, comm, dims, plan, balanced(parameters_of(model, chain_of(model)), plan.stages))
    config = EngineConfig(
        zero=ZeroConfig(stage=stage, bucket_elements=3000, resident_elements=0 if stage == 3 else 1 << 17, **zero),
        parallel=ParallelConfig(pipeline=pipeline, data_shard=shard),
        clip=0.5,
        accumulation=micro_batches,
        **training.config,
    )
    return Engine(
        model, comm, config, lambda p: make_optimizer(p, training.optimizer), TorchSchedule(None), pipeline=pipe
    )


def pipelined(
    schedule: str, pipeline: int, stage: int, training: Training | None = None, shard: int | None = None, **zero: Any
) -> Callable[[int], Any]:
    training = training or Training()

    def work(_: int) -> Any:
        with Communicator.connect() as comm:
            engine = engine_of(comm, training, schedule, pipeline, stage, shard, **zero)
            results = []
            for step in range(STEPS):
                result = engine.train_batch(training.task(), training.batches(step, engine.data.rank))
                results.append((result.loss, result.grad_norm))
            with engine.whole(engine.module.parameters()):
                found = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
            return {"results": results, "model": found}

    return work


def assert_same(ranks: list[Any], training: Training | None = None, data: int = 1, looser: float = 1.0) -> None:
    expected = one_process(training or Training(), data)
    seen: dict[str, Tensor] = {}
    for found in ranks:
        assert found["results"] == ranks[0]["results"]
        for (loss, norm), (own_loss, own_norm) in zip(expected["results"], found["results"], strict=True):
            assert own_loss == pytest.approx(loss, rel=SAME_LOSS * looser)
            assert own_norm == pytest.approx(norm, rel=SAME_NORM * looser)
        for name, tensor in found["model"].items():
            torch.testing.assert_close(tensor, expected["model"][name], atol=SAME_PARAMETER * looser, rtol=0)
            assert torch.equal(seen.setdefault(name, tensor), tensor), f"{name} differs between ranks"
    assert seen.keys() == expected["model"].keys()


SCHEDULES = ["gpipe", "1f1b", "interleaved_1f1b", "zb_h1", "zb_v"]
CORNERS = [("gpipe", 1), ("1f1b", 3), ("interleaved_1f1b", 2), ("zb_v", 0)]
"""zb_h1 has two ranks for each stage below; `test_every_schedule_at_every_zero_stage` has them all."""


@pytest.mark.parametrize(("schedule", "stage"), CORNERS)
def test_two_stages(run_ranks: RunRanks, schedule: str, stage: int) -> None:
    assert_same(run_ranks(2, pipelined(schedule, 2, stage)))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("ranks", "pipeline"), [(2, 2), (4, 2), (4, 4)])
def test_every_schedule_at_every_zero_stage(
    run_ranks: RunRanks, ranks: int, pipeline: int, schedule: str, stage: int
) -> None:
    training = Training(model=lambda: GPT(SIZES.model_copy(update={"layers": 10})))
    assert_same(run_ranks(ranks, pipelined(schedule, pipeline, stage, training)), training, data=ranks // pipeline)


def test_two_stages_of_two_ranks_each(run_ranks: RunRanks) -> None:
    assert_same(run_ranks(4, pipelined("zb_h1", 2, 3)), data=2)


@pytest.mark.parametrize(
    ("stage", "zero"),
    [
        (2, {"accumulate": "local"}),
        pytest.param(1, {"accumulate": "sharded"}, marks=pytest.mark.slow),
        (3, {"reshard": "step"}),
    ],
)
def test_other_ways_to_add_up_and_to_gather(run_ranks: RunRanks, stage: int, zero: dict[str, Any]) -> None:
    assert_same(run_ranks(4, pipelined("1f1b", 2, stage, **zero)), data=2)


def test_replicas_of_sharded_stages(run_ranks: RunRanks) -> None:
    assert_same(run_ranks(4, pipelined("1f1b", 2, 3, shard=1)), data=2)


@pytest.mark.parametrize("schedule", [pytest.param("1f1b", marks=pytest.mark.slow), "zb_h1"])
def test_recomputed_activations(run_ranks: RunRanks, schedule: str) -> None:
    training = Training(recompute=True)
    assert_same(run_ranks(2, pipelined(schedule, 2, 3, training)), training)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_lower_precision(run_ranks: RunRanks, dtype: str) -> None:
    """Parameters to a unit in bf16's last place, which is less than ten steps move them."""
    training = Training(config={"precision": PrecisionConfig(dtype=dtype)})
    assert_same(
        run_ranks(2, pipelined("zb_h1", 2, 1, training)), training, looser=150.0
    )  # a unit in bf16's last place, and less than ten steps


# --- other models --------------------------------------------------------------------------------------------


def hf(**values: Any) -> Callable[[], nn.Module]:
    common = {"vocab_size": SIZES.vocabulary, "max_position_embeddings": 16}
    return lambda: build_hf(HFConfig(config={**common, **values}))


SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
MODELS = {
    "llama": hf(model_type="llama", **SMALL),
    "qwen2, tied": hf(model_type="qwen2", tie_word_embeddings=True, **SMALL),
    "gpt2": hf(
        model_type="gpt2",
        n_embd=16,
        n_layer=3,
        n_head=2,
        n_positions=16,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_models_of_transformers(run_ranks: RunRanks, kind: str) -> None:
    training = Training(model=MODELS[kind])
    assert_same(run_ranks(2, pipelined("zb_v", 2, 2, training)), training)


class Fork(nn.Module):
    """Two results; nobody uses the gradient of the second in every other micro-batch."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.left(x), self.right(x), torch.arange(len(x))


class Join(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(5, 3)

    def forward(self, both: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        left, right, numbers = both
        assert numbers.dtype is torch.int64
        return self.out(left if len(left) % 2 else left * right.tanh())


def sequence() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), Fork(), Join(), nn.Linear(3, 3))


def pairs(micro: int, generator: torch.Generator) -> Any:
    rows = 3 if micro % 2 else 2
    return torch.randn(rows, 4, generator=generator), torch.randn(rows, 3, generator=generator)


def test_several_tensors_and_gradients_that_are_not_there(run_ranks: RunRanks) -> None:
    training = Training(model=sequence, task=lambda: SampleTask("pipeline_lab:difference"), batch=pairs)
    assert_same(run_ranks(2, pipelined("1f1b", 2, 1, training)), training)


def test_blocks_of_a_stage_are_units_of_their_own(run_ranks: RunRanks) -> None:
    """What lies elsewhere does not hide that the rest are blocks, which stage 3 gathers one by one."""

    def work(_: int) -> list[list[str]]:
        with Communicator.connect() as comm:
            engine = engine_of(comm, Training(), "1f1b", 2, 3, None)
            return [[entry.name for entry in unit.plan.entries] for unit in engine.weights.units]

    for units in run_ranks(2, work):
        places = {}
        for number, unit in enumerate(units):
            for name in unit:
                places.setdefault(".".join(name.split(".")[:2]), set()).add(number)
        blocks = {name: numbers for name, numbers in places.items() if name.startswith("blocks.")}
        assert len(blocks) > 1
        assert all(len(numbers) == 1 for numbers in blocks.values()), blocks
        assert len(set().union(*blocks.values())) == len(blocks)


HALF = 1 / 2
"""(N - 1) / N of two data ranks."""


SENT: list[tuple[int, dict[str, Any], int, int]] = [
    (0, {}, 2, 2),
    (1, {}, 2, 2),
    (2, {}, MICRO_BATCHES + 1, MICRO_BATCHES + 1),
    (2, {"accumulate": "local"}, 2, 2),
    (3, {"reshard": "step"}, MICRO_BATCHES + 1, MICRO_BATCHES + 1),
    (3, {"reshard": "step", "accumulate": "local"}, 2, 2),
    (3, {"accumulate": "local"}, MICRO_BATCHES + 1, 2 * MICRO_BATCHES + 1),
    (3, {}, 2 * MICRO_BATCHES, 3 * MICRO_BATCHES),
]
"""Stage, keys of `zero`, and how often the least and the most is sent."""


def test_bytes_on_the_wire(run_ranks: RunRanks) -> None:
    """In Ψ / p · (N − 1) / N elements, besides messages: a gather and a reduction send one of these. What a backward
    finds still gathered by its forward, at reshard: micro_batch, is saved."""

    def sent_and_size(comm: Communicator, stage: int, zero: dict[str, Any]) -> tuple[int, int]:
        engine = engine_of(comm, Training(), "1f1b", 2, stage, None, **zero)
        for step in range(3):
            comm.take_traffic()
            engine.train_batch(LanguageTask(), Training().batches(step, engine.data.rank))
        sizes = [unit.plan.size for unit in engine.weights.units] if stage else []
        return comm.take_traffic(), sum(sizes) or sum(p.numel() for p in engine.module.parameters())

    def work(_: int) -> list[tuple[int, int]]:
        with Communicator.connect() as comm:
            return [sent_and_size(comm, stage, zero) for stage, zero, _, _ in SENT]

    messages = sum(batch[:, 1:].numel() for batch in Training().batches(0, 0)) * SIZES.width
    tied, totals = SIZES.vocabulary * SIZES.width, 50
    for found in run_ranks(4, work):
        for (sent, size), (stage, zero, least, most) in zip(found, SENT, strict=True):
            share, beside = HALF * size, sent / 4 - messages
            assert least * share <= beside <= most * share + tied + totals, (stage, zero, beside / share)


class Twice(nn.Module):
    """A linear layer that is used several times, the first in vain; and one whose gradient somebody looks at."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.watched = nn.Linear(4, 4), nn.Linear(4, 4)
        self.watched.weight.register_hook(lambda gradient: 2 * gradient)

    def forward(self, x: Tensor) -> Tensor:
        self.linear(x + 1)
        doubled: Tensor = self.linear(self.linear(x).tanh())
        return x + self.watched(doubled.tanh())


@pytest.mark.parametrize(("schedule", "stage"), [("1f1b", 0), ("gpipe", 2), ("1f1b", 3), ("zb_h1", 0)])
def test_layers_that_are_used_again_and_watched(run_ranks: RunRanks, schedule: str, stage: int) -> None:
    def model() -> nn.Module:
        return nn.Sequential(*(Twice() for _ in range(4)), nn.Linear(4, 3))

    training = Training(model=model, task=lambda: SampleTask("pipeline_lab:difference"), batch=pairs)
    assert_same(run_ranks(2, pipelined(schedule, 2, stage, training)), training)


def test_modules_and_parameters_that_are_there_twice(run_ranks: RunRanks) -> None:
    """One activation between all layers, and a head with a bias of its own that is tied to the first layer."""

    def model() -> nn.Module:
        act, first, last = nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 4)
        last.weight = first.weight
        return nn.Sequential(first, act, nn.Linear(4, 4), act, nn.Linear(4, 4), act, last, nn.Linear(4, 3))

    for schedule in ("1f1b", "zb_v"):
        training = Training(model=model, task=lambda: SampleTask("pipeline_lab:difference"), batch=pairs)
        assert_same(run_ranks(2, pipelined(schedule, 2, 1, training)), training)


def labelled(micro: int, generator: torch.Generator) -> Any:
    found = tokens(0, generator)
    return {"input_ids": found, "labels": found}


def test_a_model_that_is_told_its_targets(run_ranks: RunRanks) -> None:
    training = Training(model=MODELS["llama"], task=lambda: SampleTask(None), batch=labelled)
    assert_same(run_ranks(2, pipelined("1f1b", 2, 0, training)), training)


def test_micro_batches_that_count_nothing(run_ranks: RunRanks) -> None:
    """The mean over nothing is no number, and no part of the step; also where the loss is on the embedding's rank."""

    def batch(micro: int, generator: torch.Generator) -> Tensor:
        return tokens(0, generator)[:, : 1 if micro % 2 else None]

    class Some(LanguageTask):
        def arguments(self, batch: Any) -> Any:
            return (batch[:, : max(1, batch.shape[1] - 1)],), {}

        def loss_of(self, output: Any, batch: Any) -> Tensor:
            return super().loss_of(output[:, : batch.shape[1] - 1], batch)

    training = Training(task=Some, batch=batch)
    for schedule in ("1f1b", "zb_v"):
        assert_same(run_ranks(2, pipelined(schedule, 2, 0, training)), training)


@pytest.mark.parametrize(
    ("model", "found"),
    [(lambda: hf(model_type="granite", **SMALL)(), "GraniteForCausalLM"), (lambda: nn.Linear(2, 2), "Linear")],
)
def test_models_that_are_no_chain(model: Callable[[], nn.Module], found: str) -> None:
    """granite multiplies activations between its modules: on each stage again."""
    with pytest.raises(UsageError, match=f"transformers' Llama, Qwen2 or GPT-2, found {found}"):
        chain_of(model())
