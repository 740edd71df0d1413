"""Whatever a model does with its parameters, every stage of ZeRO equals stage 0."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from zero_oracle import (
    LANGUAGE,
    MODEL,
    ODD,
    STAGES,
    Forward,
    Frozen,
    Odd,
    Residual,
    RunRanks,
    compare,
    engine_of,
    gpt,
    language,
    only,
    samples_of,
    train_step,
    trained,
)

from dstrain.runtime.comm import Communicator
from dstrain.runtime.engine import Engine
from dstrain.runtime.models.gpt import GPT, next_token_loss
from dstrain.runtime.models.language import generate
from dstrain.runtime.spec.errors import ConfigError
from dstrain.runtime.spec.load import job_of
from dstrain.runtime.spec.training_config import (
    PrecisionConfig,
)


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


class Product(nn.Module):
    """The product of weights of two units: one operation of the backward needs both at once."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(11, 11, bias=False)
        self.second = nn.Linear(11, 11, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.first.weight @ self.second.weight)


class TwoWeightsInOneOperation(Odd):
    def __init__(self) -> None:
        super().__init__()
        self.product = Product()

    def embed(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.product(self.token(tokens))
        return x


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


def same_without_gradients(engine: Engine) -> None:
    """Nothing is kept for a backward then, which would keep it in place."""
    samples = samples_of(engine, rows=2)
    with torch.no_grad():
        loss = language(engine, samples)
    torch.testing.assert_close(loss, language(engine, samples).detach())


@pytest.mark.parametrize(
    "model",
    [Odd, Twice, SeveralTypes, Frozen, TwoWeightsInOneOperation, GivenWeights, Recurrent, Empty, Shared],
)
def test_models(run_ranks: RunRanks, model: Callable[[], nn.Module]) -> None:
    compare(run_ranks, 3, replace(ODD, model=model, accumulation=2, between=same_without_gradients))


@pytest.mark.parametrize(
    ("model", "checkpointing"),
    [
        *((model, "all") for model in (Odd, Twice, Frozen, Shared, gpt)),
        (gpt, 2),
        *(pytest.param(model, 2, marks=pytest.mark.slow) for model in (Odd, Twice, Frozen, Shared)),
    ],
)
def test_activation_checkpointing(run_ranks: RunRanks, model: Callable[[], nn.Module], checkpointing: Any) -> None:
    training = replace(ODD, model=model, checkpointing=checkpointing, accumulation=2)
    compare(run_ranks, 2, training, only("2", "3") | {"3, local": STAGES["3"] | {"accumulate": "local"}})


class OwnCheckpointing(Odd):
    """It calls torch's checkpointing itself, over two blocks at once."""

    def __init__(self, use_reentrant: bool, frozen: bool) -> None:
        super().__init__(layers=6)
        self.use_reentrant = use_reentrant
        for block in self.blocks[2:4]:
            block.requires_grad_(not frozen)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for first in range(0, 6, 2):
            x = checkpoint(self.two, first, x, use_reentrant=self.use_reentrant)
        logits: Tensor = self.head(x)
        return logits

    def two(self, first: int, x: Tensor) -> Tensor:
        x = self.blocks[first](x)
        y: Tensor = self.blocks[first + 1](x)
        return y


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_models_own_checkpointing(run_ranks: RunRanks, use_reentrant: bool, frozen: bool) -> None:
    training = replace(ODD, model=lambda: OwnCheckpointing(use_reentrant, frozen), accumulation=2)
    compare(run_ranks, 2, training, only("2", "3"))


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


class Scaled(Residual):
    """Its scale is a part of its unit that may be left out."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, scales: bool = True) -> Tensor:
        x = super().forward(x)
        return x * self.scale if scales else x


class PartOfUnit(Odd):
    """Each rank leaves out another part of a block: all gather it, but its gradients are complete at other times."""

    left_out = 0

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Scaled(11) for _ in range(3))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for number, block in enumerate(self.blocks):
            x = block(x, scales=number != self.left_out)
        logits: Tensor = self.head(x)
        return logits


@pytest.mark.parametrize("comm", ["pairwise", "ring"])
def test_ranks_that_use_other_parts_of_units(run_ranks: RunRanks, comm: str) -> None:
    training = replace(ODD, model=PartOfUnit, forward=branching, accumulation=2)
    compare(run_ranks, 3, training, only("2", "3", comm=comm))


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


EVALUATED = [(0.5, "bf16"), *(pytest.param(decay, "fp32", marks=pytest.mark.slow) for decay in (None, 0.5))]


@pytest.mark.parametrize(("ema_decay", "dtype"), EVALUATED)
def test_evaluation_between_steps(run_ranks: RunRanks, ema_decay: float | None, dtype: Any) -> None:
    training = replace(
        LANGUAGE, between=evaluate, ema_decay=ema_decay, precision=PrecisionConfig(dtype=dtype), clip=None
    )
    compare(run_ranks, 2, training, only("1", "3"), atol=0.0)


def evaluated_within(engine: Engine, samples: Tensor) -> Tensor:
    """An evaluation between two micro-batches."""
    evaluate(engine)
    return language(engine, samples)


def test_evaluation_between_micro_batches(run_ranks: RunRanks) -> None:
    compare(run_ranks, 2, replace(LANGUAGE, forward=evaluated_within, accumulation=2), only("2", "3"))


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


@pytest.mark.slow
def test_compiled(run_ranks: RunRanks, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the backend that traces forward and backward, but leaves out the slow generation of code: no hook of ours
    breaks the graph, and no step is compiled anew."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True))
    training = replace(ODD, compile=True, checkpointing="all", between=compiled_once)
    compare(run_ranks, 2, training, only("2"))


def compiled_once(engine: Engine) -> None:
    torch._dynamo.config.error_on_recompile = True


def test_at_stage_3_nothing_is_compiled() -> None:
    with pytest.raises(ConfigError, match=r"train.compile: expected false at stage 3 \(.*\), or stage 2, found true"):
        job_of({"zero": {"stage": 3}, "train": {"compile": True}})
