"""A batch that the model does not take: one line, and the user's own traceback."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from dstrain.runtime import trainer
from dstrain.runtime.comm import Communicator
from dstrain.runtime.first_batch import describe, explained

RunRanks = Callable[..., list[Any]]

YAML = """
name: wrong
model: {factory: "mine:Model"}
data: {factory: "mine:samples"}
batch: {global: 8, micro: 4}
train: {steps: 3, loss: "mine:loss"}
"""

PIXELS, CLASSES = torch.randn(40, 6), torch.arange(40) % 3


class Model(nn.Module):
    def __init__(self, inputs: int = 6, kind: str = "linear") -> None:
        super().__init__()
        self.layer: nn.Module = nn.Embedding(inputs, 3) if kind == "embedding" else nn.Linear(inputs, 3)
        self.calls, self.kind = 0, kind

    def forward(self, pixels: Tensor) -> Tensor:
        self.calls += 1
        if self.kind == "late" and self.calls == 3:
            raise ValueError("a bug of mine")
        if self.kind == "memory":
            raise torch.OutOfMemoryError("none left")
        made: Tensor = self.layer(pixels)
        return made


def samples(kind: str = "right") -> Any:
    """The data under test."""
    if kind == "other validation":
        return TensorDataset(PIXELS, CLASSES), TensorDataset(PIXELS[:, :5], CLASSES)
    ragged = [(torch.ones(1 + number % 2), 0) for number in range(40)]
    return {
        "right": lambda: TensorDataset(PIXELS, CLASSES),
        "more classes": lambda: TensorDataset(PIXELS, CLASSES + 3),
        "three": lambda: TensorDataset(PIXELS, PIXELS, CLASSES),
        "ragged": lambda: ragged,
        "objects": lambda: [object()] * 40,
    }[kind]()


def loss(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target)


def loss_of_each(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, reduction="none")


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "DSTRAIN_JOB", "DSTRAIN_EVENT_FD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "mine", sys.modules[__name__])
    (tmp_path / "job.yaml").write_text(YAML)
    return tmp_path / "job.yaml"


BATCH = "(float32 [4, 6], int64 [4])"


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("model.args={inputs: 5}", f"{BATCH}, and RuntimeError: mat1 and mat2 shapes cannot be multiplied (4x6"),
        ("model.args={kind: embedding}", f"{BATCH}, and RuntimeError: Expected tensor for argument #1 'indices'"),
        ("data.args={kind: more classes}", f"{BATCH}, and IndexError: Target 3 is out of bounds."),
        (
            "data.args={kind: three}",
            "(float32 [4, 6], float32 [4, 6], int64 [4]), and TypeError: Model.forward() takes 2 positional arguments "
            "but 3 were given",
        ),
    ],
)  # fmt: skip
def test_it_is_one_line_and_the_traceback_from_the_models_code_on(
    job: Path, capfd: pytest.CaptureFixture[str], override: str, found: str
) -> None:
    assert trainer.main([str(job), "--set", override, "--set", "data.shuffle=false"]) == 2
    line, *trace = capfd.readouterr().err.splitlines()
    assert line.startswith(f"dstrain: the first batch: expected what model and loss take, found {found}")
    assert trace[0] == "Traceback (most recent call last):"
    assert trace[-1].startswith(re.findall(r"and (\w+: [\w ]+)", line)[0])
    if "takes 2 positional" not in line:  # no code of the model's has run
        assert re.match(rf'  File "{re.escape(__file__)}", line \d+, in (forward|loss)$', trace[1]), trace[1]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "train.loss='mine:loss_of_each'",
            "train.loss: expected a scalar tensor, the mean over the samples, found shape [4]",
        ),
        (
            "train.eval_every=2",
            "train.eval_every: expected data to validate on, found none; let data.factory return a pair (training, "
            "validation), or leave the key out",
        ),
        (
            "data.args={kind: objects}",
            "data.factory: expected samples of tensors, arrays or numbers, of one shape, that torch's default_collate "
            "puts together, found TypeError: default_collate: batch must contain tensors, numpy arrays, numbers, dicts "
            "or lists; found <class 'object'>",
        ),
    ],
)
def test_what_fits_nothing_is_one_line(job: Path, capfd: pytest.CaptureFixture[str], override: str, line: str) -> None:
    assert trainer.main([str(job), "--set", override]) == 2
    assert capfd.readouterr().err == f"dstrain: {line}\n"


def test_samples_of_several_shapes(job: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert trainer.main([str(job), "--set", "data.args={kind: ragged}", "--set", "model.args={inputs: 1}"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "puts together, found RuntimeError: stack expects each tensor to be equal size" in line


def test_a_batch_of_validation_is_one_line_too(job: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert trainer.main([str(job), "--set", "data.args={kind: other validation}"]) == 2
    line = next(line for line in capfd.readouterr().err.splitlines() if line.startswith("dstrain: "))
    expected = "the first batch of validation: expected what model and loss take"
    assert line.startswith(f"dstrain: {expected}, found (float32 [4, 5], int64 [4]), and RuntimeError: mat1 and mat2")


def test_all_ranks_say_it_once(run_ranks: RunRanks, job: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = [str(job), "--set", "model.args={inputs: 5}"]
    assert run_ranks(2, lambda rank: trainer.main(arguments)) == [2, 2]
    assert capfd.readouterr().err.count("dstrain: the first batch:") == 1


def test_a_bug_that_shows_later_is_the_users_own(job: Path) -> None:
    with pytest.raises(ValueError, match="a bug of mine"):
        trainer.main([str(job), "--set", "model.args={kind: late}"])


def test_want_of_memory_is_no_matter_of_the_batch(job: Path) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        trainer.main([str(job), "--set", "model.args={kind: memory}"])


def test_a_peer_that_has_gone_is_no_matter_of_the_batch(run_ranks: RunRanks) -> None:
    def work(rank: int) -> tuple[str, str] | None:
        try:
            with Communicator.connect(meet=False) as comm:
                comm.barrier()
                if rank == 0:
                    with explained(PIXELS, comm.device):
                        comm.barrier()
        except Exception as error:
            return type(error).__name__, str(error)
        return None

    lost, left = run_ranks(2, work)
    assert left is None
    assert lost[0] == "RuntimeError"
    assert "gloo" in lost[1]


def test_any_batch_can_be_described() -> None:
    batch = {"ids": torch.zeros(2, 3, dtype=torch.int64), "more": [torch.zeros(2), "text"]}
    assert describe(batch) == "{ids: int64 [2, 3], more: (float32 [2], str)}"
    assert len(describe([torch.zeros(1)] * 1000)) == 301
