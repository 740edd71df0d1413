"""What a pipeline cannot train is one line; a rank that has gone is no user's error of those that wait for it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from dstrain.runtime import trainer
from dstrain.runtime.comm import Communicator
from dstrain.runtime.pipeline.cuts import chain_of
from dstrain.runtime.pipeline.part import ModelPart
from dstrain.runtime.pipeline.partition import bounds
from dstrain.runtime.spec.errors import UsageError
from dstrain.runtime.spec.schedule import find_schedule
from dstrain.runtime.task import SampleTask

from .test_pipeline import MICRO_BATCHES, MODELS, Training, engine_of, pairs

RunRanks = Callable[..., list[Any]]

GONE = "another rank has gone"


def said_by(work: Callable[[], object]) -> str:
    """What a rank's own error says; torch's, where its neighbour has failed."""
    try:
        work()
    except UsageError as error:
        return str(error)
    except RuntimeError as error:
        return GONE if "onnection" in str(error) else repr(error)
    return "nothing"


def refused(run_ranks: RunRanks, training: Training, batches: int = MICRO_BATCHES) -> list[str]:
    """By both stages of a pipeline, in its first step."""

    def work() -> None:
        with Communicator.connect() as comm:
            engine = engine_of(comm, training, "1f1b", 2, 0, None)
            engine.train_batch(training.task(), training.batches(0, 0)[:batches])

    return run_ranks(2, lambda _: said_by(work), timeout_s=30.0)


def alike(_: int, generator: torch.Generator) -> Any:
    return pairs(0, generator)


class Tuples(nn.Module):
    """A linear layer of the sum of what it is given. gives: how many tensors, in the first forward and in others.
    sees_all: in the first, too."""

    def __init__(self, *gives: int, sees_all: bool = True) -> None:
        super().__init__()
        self.linear, self.gives, self.sees_all = nn.Linear(4, 4), list(gives), sees_all

    def forward(self, given: Any) -> tuple[Tensor, ...]:
        tensors = (given,) if isinstance(given, Tensor) else given
        made = self.linear(sum(tensors) if self.sees_all else tensors[0])
        self.sees_all = True
        return (made,) * (self.gives.pop(0) if len(self.gives) > 1 else self.gives[0])


class Sum(nn.Module):
    def forward(self, given: Any) -> Tensor:
        return torch.stack(given).sum(0)[:, :3]


BETWEEN = "parallel.pipeline: between stages 0 and 1: expected"
FOLLOW = "shapes between stages must follow from those of the batch"


@pytest.mark.parametrize(
    ("gives", "line"),
    [
        ((1,), "parallel.pipeline: stage 0: expected a tensor or a tuple of several tensors between two stages, found "
            "tuple of 1"),
        ((17,), f"{BETWEEN} at most 16 tensors, found 17; {FOLLOW}"),
        ((2, 3), f"{BETWEEN} 2 tensors, as in the first micro-batch of these shapes, found 3; {FOLLOW}"),
    ],
)  # fmt: skip
def test_numbers_of_tensors_between_stages(run_ranks: RunRanks, gives: tuple[int, ...], line: str) -> None:
    training = Training(
        model=lambda: nn.Sequential(*(Tuples(*gives) for _ in range(4)), Sum()),
        task=lambda: SampleTask("pipeline_lab:difference"),
        batch=alike,
    )
    assert refused(run_ranks, training) == [line, GONE]


def test_a_gradient_that_was_not_there_at_first(run_ranks: RunRanks) -> None:
    training = Training(
        model=lambda: nn.Sequential(*(Tuples(2, sees_all=False) for _ in range(4)), Sum()),
        task=lambda: SampleTask("pipeline_lab:difference"),
        batch=alike,
    )
    expected = "parallel.pipeline: gradients between stages 0 and 1: expected no gradient, as in the first micro-batch"
    assert refused(run_ranks, training) == [GONE, f"{expected} of these shapes, found one of shape (2, 4); {FOLLOW}"]


def test_another_number_of_micro_batches(run_ranks: RunRanks) -> None:
    assert refused(run_ranks, Training(), batches=3) == ["engine.train_batch: expected 4 micro-batches, found 3"] * 2


def test_an_embedding_that_runs_twice_in_a_models_own_forward() -> None:
    """GPT-2's of kinds of tokens is that of tokens: a later stage would add what it has received to itself."""
    model, schedule = MODELS["gpt2"](), find_schedule("1f1b", 2, MICRO_BATCHES)
    chain = chain_of(model)
    part = ModelPart(model, chain, bounds([2, len(chain.layers) - 2]), schedule, pipeline_rank=1)
    batch = {"input_ids": torch.arange(8)[None], "labels": torch.arange(8)[None]}
    received = torch.randn(1, 8, 16)
    assert part.run(model, 1, (received,), ((), batch)).loss.isfinite()
    with pytest.raises(UsageError) as refused:
        part.run(model, 1, (received,), ((), {**batch, "token_type_ids": torch.zeros(1, 8, dtype=torch.int64)}))
    assert str(refused.value) == (
        "parallel.pipeline: expected a model whose embedding runs once in a forward, found it runs twice; leave out "
        "token_type_ids"
    )


# --- in a job ------------------------------------------------------------------------------------------------

YAML = """
name: wrong
model: {factory: "mine:layers"}
data: {factory: "mine:samples", shuffle: false}
batch: {global: 4, micro: 1}
optimizer: {name: sgd}
parallel: {pipeline: 2, partition: [2, 2]}
train: {steps: 1, loss: "pipeline_lab:difference"}
"""


class Breaks(nn.Module):
    """In the n-th forward or backward."""

    def __init__(self, forward: int = 0, backward: int = 0) -> None:
        super().__init__()
        self.linear, self.left = nn.Linear(4, 4), {"forward": forward, "backward": backward}

    def forward(self, x: Tensor) -> Tensor:
        self._count("forward")
        made: Tensor = self.linear(x)
        if made.requires_grad:
            made.register_hook(lambda _: self._count("backward"))
        return made

    def _count(self, what: str) -> None:
        self.left[what] -= 1
        if not self.left[what]:
            raise ValueError("a bug of mine")


def layers(**breaks: int) -> list[nn.Module]:
    """Four, the last with the first one's weight."""
    found = [nn.Linear(4, 4), Breaks(**breaks), nn.Linear(4, 4), nn.Linear(4, 4)]
    found[-1].weight = found[0].weight
    return found


def samples(kind: str = "right") -> Any:
    """The data under test."""
    numbers = torch.arange(80.0).reshape(20, 4)
    if kind == "other validation":
        return TensorDataset(numbers, numbers), TensorDataset(numbers[:, :3], numbers)
    drawn = numbers + int(os.environ["RANK"]) if kind == "of each rank" else numbers
    return TensorDataset(drawn, numbers)


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(sys.modules, "mine", sys.modules[__name__])
    (tmp_path / "job.yaml").write_text(YAML)
    return tmp_path / "job.yaml"


def ended(job: Path, *overrides: str) -> int | str:
    """A rank's exit code; or that its neighbour has gone, as a script dies of it."""
    codes: list[int] = []
    words = [word for override in overrides for word in ("--set", override)]
    return GONE if said_by(lambda: codes.append(trainer.main([str(job), *words]))) == GONE else codes[0]


def test_samples_that_each_rank_draws_for_itself(
    run_ranks: RunRanks, job: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_ranks(2, lambda _: ended(job, "data.args={kind: of each rank}")) == [2, 2]
    assert capfd.readouterr().err == (
        "dstrain: data with parallel.pipeline: expected the same samples on all ranks of a pipeline, found others; "
        "draw what is random by the sample's number\n"
    )


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("model.args={forward: 1}", "the first batch: expected what model and loss take, found (float32 [1, 4], "),
        ("model.args={forward: 3}", "the first batch: expected what model and loss take, found (float32 [1, 4], "),
        ("model.args={backward: 4}", "the first batch: expected what model and loss take, found (float32 [1, 4], "),
        (
            "data.args={kind: other validation}",
            "the first batch of validation: expected what model and loss take, found (float32 [1, 3], ",
        ),
    ],
)
def test_who_waits_for_a_rank_that_fails_is_not_to_blame(
    run_ranks: RunRanks, job: Path, capfd: pytest.CaptureFixture[str], override: str, line: str
) -> None:
    """Wherever in its first step, or in its first validation, another one waits."""
    assert run_ranks(2, lambda _: ended(job, override)) == [2, GONE]
    errors = capfd.readouterr().err
    assert f"dstrain: {line}" in errors
    assert errors.count("dstrain: ") == 1
