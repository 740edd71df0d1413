"""The models and data of the examples."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from dstrain.runtime.data.digits import digits
from dstrain.runtime.data.interactions import Tastes, interactions
from dstrain.runtime.models.build import build_model
from dstrain.runtime.models.recommender import Recommender
from dstrain.runtime.models.resnet import ResNet
from dstrain.runtime.spec.config import what_a_trainer_lacks
from dstrain.runtime.spec.errors import UsageError
from dstrain.runtime.spec.load import load_job

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("name", ["gpt", "vision", "recommendation"])
def test_an_example_is_a_whole_job_of_30_lines(name: str) -> None:
    file = EXAMPLES / f"{name}.yaml"
    job = load_job(file, [])
    assert not list(what_a_trainer_lacks(job))
    assert len(file.read_text().splitlines()) <= 30
    assert job.model is not None
    assert isinstance(build_model(job.model), nn.Module)


def test_digits_are_real_images_and_each_is_on_one_side() -> None:
    training, validation = digits()
    assert (len(training), len(validation)) == (1438, 359)
    images, classes = training.tensors
    assert images.shape[1:] == (1, 8, 8)
    assert (float(images.min()), float(images.max())) == (-1.0, 1.0)
    assert (images.dtype, classes.dtype) == (torch.float32, torch.int64)
    everything = torch.cat([images, validation.tensors[0]]).flatten(1)
    assert len(everything.unique(dim=0)) == 1797
    assert torch.cat([classes, validation.tensors[1]]).bincount().tolist() == [
        178,
        182,
        177,
        183,
        181,
        182,
        181,
        179,
        174,
        180,
    ]
    again, other = digits()[1].tensors[0], digits(seed=1)[1].tensors[0]
    assert torch.equal(validation.tensors[0], again)
    assert not torch.equal(again, other)


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(UsageError, match=r"data\.factory: expected the package sklearn.*'dstrain\[examples\]'"):
        digits()


def test_resnet_halves_images_and_looks_at_each_alone() -> None:
    torch.manual_seed(0)
    model = ResNet(classes=7, image_channels=3, width=8, blocks_per_stage=2)
    images = torch.randn(4, 3, 8, 8)
    assert [tuple(model.blocks[:n](model.stem(images)).shape[1:]) for n in (2, 4, 6)] == [
        (8, 8, 8),
        (16, 4, 4),
        (32, 2, 2),
    ]
    logits = model(images)
    assert logits.shape == (4, 7)
    torch.testing.assert_close(model(images[1:2]), logits[1:2])


def test_interactions_repeat_with_their_seed_and_follow_tastes() -> None:
    training, validation = interactions(users=50, items=20, samples=20_000)
    pairs, likes = validation.tensors
    assert (len(training), len(validation)) == (19_000, 1_000)
    assert (pairs.dtype, likes.dtype, pairs.shape[1]) == (torch.int64, torch.float32, 2)
    for mine, again in zip(training.tensors, interactions(users=50, items=20, samples=20_000)[0].tensors, strict=True):
        assert torch.equal(mine, again)
    assert not torch.equal(pairs, interactions(users=50, items=20, samples=20_000, seed=1)[1].tensors[0])
    seen = training.tensors[0][:, 1].bincount(minlength=20)
    assert seen[0] > 10 * seen[19], "item 0 is seen 20 times as often as item 19"

    tastes = Tastes(50, 20, 4, torch.Generator().manual_seed(0))
    knowing_all = F.binary_cross_entropy_with_logits(tastes.logits(pairs), likes).item()
    share = training.tensors[1].mean()
    knowing_nothing = F.binary_cross_entropy(share.expand_as(likes), likes).item()
    assert knowing_all < 0.5 < 0.65 < knowing_nothing


def trained(model: nn.Module, data: TensorDataset, loss: object, steps: int, batch: int, lr: float) -> nn.Module:
    assert callable(loss)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)
    order = torch.cat([torch.randperm(len(data)) for _ in range(1 + steps * batch // len(data))])
    for chosen in order[: steps * batch].split(batch):
        inputs, targets = data[chosen]
        optimizer.zero_grad()
        loss(model(inputs), targets).backward()
        optimizer.step()
    return model.eval()


def test_resnet_learns_digits() -> None:
    training, validation = digits()
    torch.manual_seed(0)
    model = trained(ResNet(width=8), training, F.cross_entropy, steps=60, batch=64, lr=1e-2)
    images, classes = validation.tensors
    assert (model(images).argmax(-1) == classes).float().mean() > 0.85


def test_recommender_learns_tastes() -> None:
    training, validation = interactions(users=100, items=50, samples=40_000)
    torch.manual_seed(0)
    model = trained(Recommender(100, 50, width=8), training, F.binary_cross_entropy_with_logits, 200, 512, lr=2e-2)
    pairs, likes = validation.tensors
    assert F.binary_cross_entropy_with_logits(model(pairs), likes) < 0.56, "0.69 knowing nothing"


@pytest.mark.lab
@pytest.mark.parametrize(
    "name", ["vision", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt", "recommendation"))]
)
def test_an_example_runs_on_two_ranks(start: Callable[..., Any], name: str) -> None:
    """Shortened; the whole ones are for `make test-all`."""
    run = start("--set", "train.steps=4", "--set", "log.every=2", EXAMPLES / f"{name}.yaml")
    assert run.wait(120) == 0, run.err
    lines = [line.removeprefix("[localhost:0] ") for line in run.out.splitlines()]
    assert lines[0].startswith(f"{name}: ")
    assert " 2 ranks × 1 × " in lines[0]
    assert lines[-1].startswith("done: 4 steps, ")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "bound"), [("gpt", 1.8), ("vision", 0.15), ("recommendation", 0.49)])
@pytest.mark.alone
def test_an_example_learns_what_it_promises(start: Callable[..., Any], name: str, bound: float) -> None:
    run = start(EXAMPLES / f"{name}.yaml")
    assert run.wait(600) == 0, run.err
    assert float(run.out.split("validation loss ")[-1].split()[0]) < bound
