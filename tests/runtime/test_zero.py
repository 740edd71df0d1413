"""ZeRO stages 1 to 3 against stage 0, which test_engine.py holds against torch's DDP."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dstrain.runtime.activation_checkpointing import checkpoint_activations
from dstrain.runtime.comm import Communicator
from dstrain.runtime.engine import Engine, EngineConfig, StepResult, TorchSchedule
from dstrain.runtime.models.gpt import GPT, next_token_loss
from dstrain.runtime.models.language import generate
from dstrain.runtime.optimizers import make_optimizer
from dstrain.runtime.spec.errors import UsageError
from dstrain.runtime.spec.model_config import GPTConfig
from dstrain.runtime.spec.training_config import (
    GroupConfig,
    LossScaleConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    ZeroConfig,
)
from dstrain.runtime.zero.gatherer import SLOTS
from dstrain.runtime.zero.unit import UnitState
from dstrain.runtime.zero.spread import needs_whole_tensors
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
    between: Callable[[Engine], None] = lambda engine: None
    checkpointing: Any = None
    clip: float | None = 0.2  # below the norms of these models: every step clips
    precision: PrecisionConfig = PrecisionConfig()  # noqa: RUF009 # frozen
    parallel: ParallelConfig = ParallelConfig()  # noqa: RUF009
    ema_decay: float | None = None


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
        ),
        optimizer,
        schedule,
    )


def train_step(engine: Engine, training: Training) -> StepResult:
    result = None
    while result is None:
        samples = samples_of(engine, training.rows)
        engine.backward(training.forward(engine, samples), samples[:, 1:].numel())
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


@pytest.mark.parametrize("comm", ["pairwise", "ring", "native"])
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


# --- models ----------------------------------------------------------------------------------------------------


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


class Twice(Odd):
    """The blocks are run through twice."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in [*self.blocks, *self.blocks]:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits


class SeveralTypes(Odd):
    """Parameters of three dtypes, one of them within a block."""

    def __init__(self) -> None:
        super().__init__()
        self.position.double()
        self.blocks[1].linear.bfloat16()

    def embed(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.token(tokens) + self.position.weight[: tokens.shape[1]].float()
        return x

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + torch.tanh(block.linear(block.norm(x).to(block.linear.weight.dtype)).float())
        logits: Tensor = self.head(x)
        return logits


class Frozen(Odd):
    """A frozen embedding, a frozen block, and frozen parts of the others."""

    def __init__(self) -> None:
        super().__init__()
        self.token.requires_grad_(False)
        self.blocks[1].requires_grad_(False)
        for block in self.blocks:
            block.norm.requires_grad_(False)


class TwoWeightsInOneOperation(Odd):
    """The product of weights of two modules: the backward needs both at once."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(11, 11, bias=False)
        self.second = nn.Linear(11, 11, bias=False)

    def embed(self, tokens: Tensor) -> Tensor:
        return super().embed(tokens) @ (self.first.weight @ self.second.weight)


class Giving(nn.Module):
    """Its forward gives its own parameter, as learnt queries do."""

    def __init__(self) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.randn(MODEL.context, 11))

    def forward(self) -> Tensor:
        return self.values


class GivenWeights(Odd):
    """What a module gave is used when its forward is long over."""

    def __init__(self) -> None:
        super().__init__()
        self.giving = Giving()

    def forward(self, tokens: Tensor) -> Tensor:
        x, queries = self.embed(tokens), self.giving()
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x * queries[: tokens.shape[1]])
        return logits


class Recurrent(Odd):
    """A module with eight parameters of its own, outside of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.LSTM(11, 11, num_layers=2, batch_first=True)

    def embed(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.memory(super().embed(tokens))[0]
        return x


class Empty(Odd):
    """Parameters of no elements, of no dimensions, and of a single one."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.nothing = nn.Parameter(torch.zeros(0, 3))
        self.one = nn.Parameter(torch.ones(1))

    def embed(self, tokens: Tensor) -> Tensor:
        return super().embed(tokens) * self.scale * self.one + self.nothing.sum()


class Shared(Odd):
    """One block stands in two places, and the head is the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks.append(self.blocks[0])
        self.head.weight = self.token.weight


@pytest.mark.parametrize(
    "model",
    [Odd, Twice, SeveralTypes, Frozen, TwoWeightsInOneOperation, GivenWeights, Recurrent, Empty, Shared],
)
def test_models(run_ranks: RunRanks, model: Callable[[], nn.Module]) -> None:
    compare(run_ranks, 3, replace(ODD, model=model, accumulation=2))


@pytest.mark.parametrize("model", [Odd, Twice, Frozen, Shared, gpt])
@pytest.mark.parametrize("checkpointing", ["all", 2])
def test_activation_checkpointing(run_ranks: RunRanks, model: Callable[[], nn.Module], checkpointing: Any) -> None:
    training = replace(ODD, model=model, checkpointing=checkpointing, accumulation=2)
    compare(run_ranks, 2, training)
    compare(run_ranks, 2, training, only("3", accumulate="local"))


class Branches(Odd):
    """Each step and rank leaves out another block."""

    left_out = 0

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for number, block in enumerate(self.blocks):
            if number != self.left_out:
                x = block(x)
        logits: Tensor = self.head(x)
        return logits


def branching(engine: Engine, samples: Tensor, same: bool = False) -> Tensor:
    engine.module.left_out = (engine.global_step + engine.micro_step + (0 if same else engine.rank)) % 3
    return language(engine, samples)


def branching_alike(engine: Engine, samples: Tensor) -> Tensor:
    return branching(engine, samples, same=True)


@pytest.mark.parametrize("comm", ["pairwise", "ring"])
def test_ranks_that_use_other_parameters(run_ranks: RunRanks, comm: str) -> None:
    training = replace(ODD, model=Branches, forward=branching, accumulation=2)
    compare(run_ranks, 3, training, only("1", "2", comm=comm))
    compare(run_ranks, 2, replace(training, forward=branching_alike), only("1", "2", "3", comm=comm))


def tied_head(engine: Engine, samples: Tensor) -> Tensor:
    """The head is the embedding, used in the loss."""
    hidden = engine(samples[:, :-1])
    return next_token_loss(F.linear(hidden, engine.module.token.weight), samples)


def head_outside(engine: Engine, samples: Tensor) -> Tensor:
    """The head's forward is called in the loss, and then another module's."""
    hidden = engine(samples[:, :-1])
    logits = engine.module.head(hidden)
    scale = engine.module.blocks[0](hidden).square().mean()
    return next_token_loss(logits, samples) + scale


class Headless(Odd):
    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("forward", [tied_head, head_outside])
@pytest.mark.parametrize("checkpointing", [None, "all"])
def test_weights_used_in_the_loss(run_ranks: RunRanks, forward: Forward, checkpointing: Any) -> None:
    compare(run_ranks, 2, replace(ODD, model=Headless, forward=forward, accumulation=2, checkpointing=checkpointing))


def around_the_engine(engine: Engine, samples: Tensor) -> Tensor:
    """The model itself is called, not the engine."""
    return next_token_loss(engine.module(samples[:, :-1]), samples)


@pytest.mark.parametrize("checkpointing", [None, "all"])
def test_a_model_that_is_called_itself(run_ranks: RunRanks, checkpointing: Any) -> None:
    compare(run_ranks, 2, replace(LANGUAGE, forward=around_the_engine, checkpointing=checkpointing))


# --- between steps ---------------------------------------------------------------------------------------------


def evaluate(engine: Engine) -> None:
    """Validation with the averages, text, and a forward whose result is thrown away."""
    samples = samples_of(engine, rows=3)
    engine.module.eval()
    with torch.no_grad(), engine.averaged():
        losses = [language(engine, samples).item() for _ in range(2)]
        assert losses[0] == losses[1] == around_the_engine(engine, samples).item()
    generator = torch.Generator().manual_seed(0)
    generate(engine.module, samples[0, :2], 3, temperature=1.0, generator=generator, context=MODEL.context)
    engine.module.train()
    language(engine, samples)


@pytest.mark.parametrize("ema_decay", [None, 0.5])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_evaluation_between_steps(run_ranks: RunRanks, ema_decay: float | None, dtype: Any) -> None:
    training = replace(
        LANGUAGE, between=evaluate, ema_decay=ema_decay, precision=PrecisionConfig(dtype=dtype), clip=None
    )
    compare(run_ranks, 2, training, atol=0.0)


def evaluated_within(engine: Engine, samples: Tensor) -> Tensor:
    """An evaluation between two micro-batches."""
    evaluate(engine)
    return language(engine, samples)


def test_evaluation_between_micro_batches(run_ranks: RunRanks) -> None:
    compare(run_ranks, 2, replace(LANGUAGE, forward=evaluated_within, accumulation=2))


def test_every_way_to_read_parameters_behind_a_step_shows_the_new_ones(run_ranks: RunRanks) -> None:
    def work(rank: int) -> None:
        with Communicator.connect() as comm:
            for stage in (1, 2):
                engine = engine_of(replace(LANGUAGE, clip=None), comm, STAGES[str(stage)])
                expected = trained(comm, replace(LANGUAGE, clip=None, steps=1), {"stage": 0}).parameters
                for read in (by_state_dict, by_parameters, by_attributes):
                    engine = engine_of(replace(LANGUAGE, clip=None), comm, STAGES[str(stage)])
                    train_step(engine, LANGUAGE)
                    for name, value in read(engine.module).items():
                        assert torch.equal(value, expected[name]), (read, stage, name)

    run_ranks(2, work)


def by_state_dict(model: nn.Module) -> dict[str, Tensor]:
    values = {name: value.clone() for name, value in model.state_dict().items()}
    values.pop("head.weight")
    return values


def by_parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def by_attributes(model: nn.Module) -> dict[str, Tensor]:
    assert isinstance(model, GPT)
    return {
        "blocks.2.mlp.2.weight": model.blocks[2].mlp[2].weight.detach().clone(),
        "token.weight": model.token.weight.detach().clone(),
    }


# --- optimizers ------------------------------------------------------------------------------------------------


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
