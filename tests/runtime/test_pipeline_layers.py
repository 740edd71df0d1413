"""Layers that are not what they seem: made of other parameters, or there several times, on one rank or on two."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, weight_norm

from dstrain.runtime.pipeline.cuts import chain_of
from dstrain.runtime.pipeline.making import parameters_of
from dstrain.runtime.pipeline.partition import balanced, bounds
from dstrain.runtime.spec.schedule import find_schedule
from dstrain.runtime.task import SampleTask

from .test_pipeline import MICRO_BATCHES, SIZES, Training, assert_same, pairs, pipelined

RunRanks = Callable[..., list[Any]]


def on_samples(model: Callable[[], nn.Module]) -> Training:
    return Training(model=model, task=lambda: SampleTask("pipeline_lab:difference"), batch=pairs)


def ranks_of(model: nn.Module, schedule: str, place: int) -> set[int]:
    """Of two, which have a layer of the model."""
    plan = find_schedule(schedule, 2, MICRO_BATCHES)
    counts = balanced(parameters_of(model, chain_of(model)), plan.stages)
    return {plan.rank_of[stage] for stage, layers in enumerate(bounds(counts)) if place in layers}


# --- made of others ------------------------------------------------------------------------------------------


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def made_of_others() -> nn.Module:
    """Linear layers whose weight is no parameter: torch's parametrizations make a class of its own, the older hooks do
    not."""
    layers = [nn.Linear(4, 4) for _ in range(6)]
    parametrizations.weight_norm(layers[0])
    parametrize.register_parametrization(layers[3], "weight", Doubled())
    parametrize.register_parametrization(layers[4], "bias", Doubled())
    with warnings.catch_warnings():  # of old age, but many a model has it
        warnings.simplefilter("ignore", FutureWarning)
        weight_norm(layers[1])
        weight_norm(layers[5], dim=None)
    return nn.Sequential(*(nn.Sequential(layer, nn.Tanh()) for layer in layers), nn.Linear(4, 3))


@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1"])
def test_weights_that_are_made_of_other_parameters(run_ranks: RunRanks, schedule: str) -> None:
    training = on_samples(made_of_others)
    assert_same(run_ranks(2, pipelined(schedule, 2, 0, training)), training)


# --- there several times -------------------------------------------------------------------------------------


def one_layer_twice(again: int) -> nn.Module:
    """The first layer is there again at that place; two others, of one stage or of two, have one weight."""
    layers: list[nn.Module] = [nn.Linear(4, 4) for _ in range(7)]
    layers[again] = layers[0]
    layers[5 if again == 6 else 6].weight = layers[1].weight
    return nn.Sequential(*layers, nn.Linear(4, 3))


@pytest.mark.parametrize(("schedule", "again", "stage"), [("zb_v", 6, 0), ("zb_v", 6, 3), ("interleaved_1f1b", 4, 0)])
def test_a_linear_layer_of_two_stages_of_one_rank(run_ranks: RunRanks, schedule: str, again: int, stage: int) -> None:
    training = on_samples(lambda: one_layer_twice(again))
    assert ranks_of(training.built(), schedule, 0) == ranks_of(training.built(), schedule, again) == {0}
    assert_same(run_ranks(2, pipelined(schedule, 2, stage, training)), training)


class Both(nn.Module):
    """Looks up tokens twice, and hands them on for others who do."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.embedding, self.out = embedding, nn.Linear(SIZES.width, SIZES.width)

    def forward(self, given: Any) -> tuple[Tensor, Tensor]:
        x, tokens = (0, given) if isinstance(given, Tensor) else given
        mixed: Tensor = self.out(self.embedding(tokens) + x + self.embedding(tokens.flip(0)))
        return mixed, tokens


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(SIZES.width, SIZES.vocabulary)

    def forward(self, given: tuple[Tensor, Tensor]) -> Tensor:
        logits: Tensor = self.out(given[0])
        return logits


@pytest.mark.parametrize(("schedule", "stage"), [("1f1b", 1), ("zb_v", 2)])
def test_an_embedding_that_runs_twice_on_each_stage(run_ranks: RunRanks, schedule: str, stage: int) -> None:
    def model() -> nn.Module:
        embedding = nn.Embedding(SIZES.vocabulary, SIZES.width)
        return nn.Sequential(*(Both(embedding) for _ in range(4)), Head())

    training = Training(model=model)
    assert_same(run_ranks(2, pipelined(schedule, 2, stage, training)), training)
