"""One training under several stages of ZeRO, for tests that compare them with stage 0."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dstrain.runtime.activation_checkpointing import checkpoint_activations
from dstrain.runtime.comm import Communicator
from dstrain.runtime.engine import Engine, EngineConfig, StepResult, TorchSchedule
from dstrain.runtime.models.gpt import GPT, next_token_loss
from dstrain.runtime.optimizers import make_optimizer
from dstrain.runtime.spec.model_config import GPTConfig
from dstrain.runtime.spec.training_config import (
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    ZeroConfig,
)
from dstrain.runtime.zero.weights import ShardedWeights

RunRanks = Callable[..., list[Any]]
Forward = Callable[[Engine, Tensor], Tensor]

MODEL = GPTConfig(layers=3, width=20, heads=2, context=8, vocabulary=37)  # nothing divides by the ranks
LR = 1e-3
STEPS = 4
ADAM = OptimizerConfig(lr=LR, eps=1e-6)
SGD = OptimizerConfig(name="sgd", lr=0.05)

# Two orders of one sum in fp32 differ by some 1e-7 of its parts. Adam divides a gradient by its size: a difference d
# shows as LR·d/eps at most, 1e-2·LR a step where the parts of a gradient are below 0.1 (see test_engine.py).
SAME_LOSS = 1e-5
SAME_NORM = 1e-4
SAME_PARAMETER = STEPS * LR * 1e-2

STAGES: dict[str, dict[str, Any]] = {
    "1": {"stage": 1, "bucket_elements": 3000},
    "2": {"stage": 2, "bucket_elements": 3000},
    "3": {"stage": 3, "resident_elements": 0},
    "3, small ones whole": {"stage": 3, "resident_elements": 3000},
}


@dataclass(frozen=True)
class Training:
    """What is trained, and how; the same at every stage. rows: of a rank's micro-batch."""

    model: Callable[[], nn.Module]
    forward: Forward
    optimizer: Any = ADAM
    steps: int = STEPS
    accumulation: int = 1
    rows: int = 2
    tokens: Callable[[Engine, Tensor], int] = lambda engine, samples: samples[:, 1:].numel()
    between: Callable[[Engine], None] = lambda engine: None
    checkpointing: Any = None
    clip: float | None = 0.2  # below the norms of these models: every step clips
    precision: PrecisionConfig = PrecisionConfig()  # noqa: RUF009 # frozen
    parallel: ParallelConfig = ParallelConfig()  # noqa: RUF009
    ema_decay: float | None = None
    compile: bool = False


@dataclass(frozen=True)
class Outcome:
    results: list[StepResult]
    parameters: dict[str, Tensor]


def gpt() -> GPT:
    torch.manual_seed(0)
    return GPT(MODEL)


def language(engine: Engine, samples: Tensor) -> Tensor:
    return next_token_loss(engine(samples[:, :-1]), samples)


LANGUAGE = Training(gpt, language)


def samples_of(engine: Engine, rows: int) -> Tensor:
    """This rank's next micro-batch."""
    place = (engine.global_step * 50 + engine.micro_step) * engine.world_size + engine.rank
    generator = torch.Generator().manual_seed(place)
    return torch.randint(MODEL.vocabulary, (rows, MODEL.context + 1), generator=generator)


def engine_of(training: Training, comm: Communicator, zero: Mapping[str, Any]) -> Engine:
    model = training.model()
    if training.checkpointing is not None:
        checkpoint_activations(model, training.checkpointing)
    optimizer, schedule = training.optimizer, TorchSchedule(None)
    if isinstance(optimizer, OptimizerConfig):
        config = optimizer
        optimizer = lambda parameters: make_optimizer(parameters, config)  # noqa: E731
    else:
        optimizer, schedule = optimizer(model)
    return Engine(
        model,
        comm,
        EngineConfig(
            zero=ZeroConfig(**zero),
            parallel=training.parallel if zero["stage"] else ParallelConfig(),
            clip=training.clip,
            accumulation=training.accumulation,
            precision=training.precision,
            ema_decay=training.ema_decay,
            compile=training.compile,
        ),
        optimizer,
        schedule,
    )


def train_step(engine: Engine, training: Training) -> StepResult:
    result = None
    while result is None:
        samples = samples_of(engine, training.rows)
        tokens = training.tokens(engine, samples)
        engine.backward(training.forward(engine, samples), tokens)
        result = engine.step()
    return result


def trained(comm: Communicator, training: Training, zero: Mapping[str, Any]) -> Outcome:
    engine = engine_of(training, comm, zero)
    results = []
    for _ in range(training.steps):
        results.append(train_step(engine, training))
        training.between(engine)
    with engine.averaged():
        return Outcome(results, whole(engine))


def whole(engine: Engine) -> dict[str, Tensor]:
    """All parameters, gathered unit by unit."""
    values = {}
    if isinstance(engine.weights, ShardedWeights):
        for unit in engine.weights.units:
            engine.weights.gatherer.demand(unit)
            for entry, parameter in zip(unit.plan.entries, unit.parameters, strict=True):
                values[entry.name] = parameter.detach().clone()
    return {
        name: values[name] if name in values else parameter.detach().clone()
        for name, parameter in engine.module.named_parameters()
    }


def assert_same(found: Outcome, expected: Outcome, atol: float = SAME_PARAMETER) -> None:
    for ours, theirs in zip(found.results, expected.results, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, abs=SAME_LOSS)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=SAME_NORM, nan_ok=ours.skipped)
        assert (ours.tokens, ours.skipped) == (theirs.tokens, theirs.skipped)
    assert found.parameters.keys() == expected.parameters.keys()
    for name, value in found.parameters.items():
        assert value.dtype == expected.parameters[name].dtype
        torch.testing.assert_close(
            value, expected.parameters[name], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def compare(
    run_ranks: RunRanks,
    ranks: int,
    training: Training,
    stages: Mapping[str, Mapping[str, Any]] = STAGES,
    atol: float = SAME_PARAMETER,
) -> list[Outcome]:
    """Train under stage 0 and under each of `stages`; returns what stage 0 gave on each rank."""

    def work(rank: int) -> Outcome:
        with Communicator.connect() as comm:
            expected = trained(comm, training, {"stage": 0})
            for name, zero in stages.items():
                try:
                    assert_same(trained(comm, training, zero), expected, atol)
                except Exception as error:
                    error.add_note(f"stage {name}")
                    raise
            return expected

    return run_ranks(ranks, work)


def only(*names: str, **more: Any) -> dict[str, dict[str, Any]]:
    return {name: STAGES[name] | more for name in names}


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(self.norm(x)))


class Odd(nn.Module):
    """Embedding, blocks, head; each test makes it odd in its own way."""

    def __init__(self, layers: int = 3, width: int = 11) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.token = nn.Embedding(MODEL.vocabulary, width)
        self.position = nn.Embedding(MODEL.context, width)
        self.blocks = nn.ModuleList(Residual(width) for _ in range(layers))
        self.head = nn.Linear(width, MODEL.vocabulary)

    def embed(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.token(tokens) + self.position.weight[: tokens.shape[1]]  # by attribute
        return x

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits


ODD = Training(Odd, language)


class Frozen(Odd):
    """A frozen embedding, a frozen block, and frozen parts of the others."""

    def __init__(self) -> None:
        super().__init__()
        self.token.requires_grad_(False)
        self.blocks[1].requires_grad_(False)
        for block in self.blocks:
            block.norm.requires_grad_(False)
