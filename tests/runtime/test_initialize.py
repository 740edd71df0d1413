"""`initialize`: a user's model, optimizer, scheduler and data under the engine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from dstrain.runtime import initialize, load_job
from dstrain.runtime.engine import Engine
from dstrain.runtime.spec.errors import ConfigError, UsageError

RunRanks = Callable[..., list[Any]]
SCRIPT = Path(__file__).parents[2] / "examples" / "script.py"


@pytest.fixture(autouse=True)
def _no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "DSTRAIN_JOB", "DSTRAIN_ATTEMPT"):
        monkeypatch.delenv(name, raising=False)


def model_of(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))


def dataset(size: int = 32) -> TensorDataset:
    x = torch.randn(size, 3, generator=torch.Generator().manual_seed(5))
    return TensorDataset(x, x.sum(1, keepdim=True))


def one_epoch(engine: Engine) -> list[Tensor]:
    seen = []
    for x, y in engine.dataloader:
        seen.append(x)
        engine.backward(nn.functional.mse_loss(engine(x), y), len(x))
        engine.step()
    return seen


def test_a_plain_loop_with_torchs_own_parts_gives_the_same() -> None:
    """The user's optimizer instance and scheduler, against torch alone."""
    ours, theirs = model_of(), model_of()
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
    config = {"batch": {"global": 8, "micro": 8}, "data": {"shuffle": False}, "train": {"clip": 0.5}}
    engine = initialize(ours, config, optimizer, scheduler, dataset())
    rates = []
    for x, y in engine.dataloader:
        loss = nn.functional.mse_loss(engine(x), y)
        engine.backward(loss)
        engine.step()
        rates.append(engine.learning_rate)

    plain = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    decay = torch.optim.lr_scheduler.StepLR(plain, step_size=2, gamma=0.5)
    for x, y in torch.utils.data.DataLoader(dataset(), batch_size=8):
        nn.functional.mse_loss(theirs(x), y).backward()
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        plain.step()
        plain.zero_grad()
        decay.step()
    assert rates == [0.1, 0.1, 0.05, 0.05]
    assert engine.global_step == 4
    assert engine.grad_norm == pytest.approx(norm.item(), rel=1e-5)
    for found, wanted in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)
    assert (engine.rank, engine.world_size, engine.device) == (0, 1, torch.device("cpu"))


def test_factories_see_the_masters_and_the_optimizer() -> None:
    made: list[torch.optim.Optimizer] = []

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        made.append(torch.optim.Adam(parameters, lr=0.01))
        return made[0]

    engine = initialize(
        model_of(),
        {"precision": {"dtype": "bf16"}},
        optimizer,
        lambda given: torch.optim.lr_scheduler.LinearLR(given),
    )
    assert engine.optimizer is made[0]
    assert {p.dtype for group in made[0].param_groups for p in group["params"]} == {torch.float32}
    assert {p.dtype for p in engine.module.parameters()} == {torch.bfloat16}


def test_an_optimizer_made_for_the_model_moves_the_masters() -> None:
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = initialize(model, {"precision": {"dtype": "bf16"}}, optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    engine.backward(engine(torch.ones(2, 3).bfloat16()).float().sum())
    engine.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_factory_that_makes_an_optimizer_of_the_model_moves_the_masters(stage: int) -> None:
    model = model_of()
    config = {"precision": {"dtype": "bf16"}, "zero": {"stage": stage}}
    engine = initialize(model, config, lambda _: torch.optim.SGD(model.parameters(), lr=0.1))
    before = [p.detach().clone() for _, p in engine.trained]
    engine.backward(engine(torch.ones(2, 3).bfloat16()).float().sum())
    engine.step()
    assert any(not torch.equal(a, b) for a, (_, b) in zip(before, engine.trained, strict=True))


def test_micro_batches_accumulate_and_only_the_last_steps() -> None:
    config = {"batch": {"global": 8, "micro": 2}, "optimizer": {"lr": 0.01}, "train": {"steps": 3}}
    engine = initialize(model_of(), config, training_data=dataset())
    results = []
    assert len(engine.dataloader) == 12  # type: ignore[arg-type]
    for x, y in engine.dataloader:
        assert len(x) == 2
        engine.backward(nn.functional.mse_loss(engine(x), y), len(x))
        results.append(engine.step())
    assert [result is not None for result in results] == [False, False, False, True] * 3
    assert engine.global_step == 3


def test_the_loader_goes_on_where_a_checkpoint_was_in_another_world(run_ranks: RunRanks, tmp_path: Path) -> None:
    """Rank 0 alone does one step of four; two ranks go on: together they see just the rest, in the same order."""
    config = {"batch": {"global": 8, "micro": 4}, "optimizer": {"lr": 0.01}}
    alone = initialize(model_of(), config, training_data=dataset())
    batches = one_epoch(alone)
    assert torch.cat(batches).unique(dim=0).shape[0] == 32

    first = initialize(model_of(), config, training_data=dataset())
    for (x, y), _ in zip(first.dataloader, range(2), strict=False):
        first.backward(nn.functional.mse_loss(first(x), y), len(x))
        first.step()
    first.save_checkpoint(tmp_path)

    def work(rank: int) -> tuple[int, list[Tensor]]:
        import dstrain.runtime.initialization as module

        module._joined.clear()  # what the fork has inherited is not this rank's
        resuming = config | {"checkpoint": {"dir": str(tmp_path), "resume": "auto"}}
        engine = initialize(model_of(seed=rank), resuming, training_data=dataset())
        return engine.global_step, one_epoch(engine)

    replies = run_ranks(2, work)
    assert [step for step, _ in replies] == [1, 1]
    for turn in range(3):
        together = torch.cat([replies[rank][1][turn] for rank in range(2)])
        assert torch.equal(together, torch.cat(batches[2 * turn + 2 : 2 * turn + 4]))


def test_a_job_file_and_the_launched_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "job.yaml").write_text(
        "optimizer: {lr: 0.25}\ntrain: {clip: 3.0, steps: 4}\nschedule: {name: constant}\n"
    )
    engine = initialize(model_of(), tmp_path / "job.yaml")
    assert engine.config.clip == 3.0
    engine.backward(engine(torch.ones(1, 3)).sum())
    engine.step()
    assert engine.learning_rate == 0.25
    job = load_job(tmp_path / "job.yaml", ["train.clip=7.0"], for_trainer=False)
    (tmp_path / "job.json").write_text(job.model_dump_json(by_alias=True))
    monkeypatch.setenv("DSTRAIN_JOB", str(tmp_path / "job.json"))
    assert initialize(model_of()).config.clip == 7.0


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"config": {"trian": {}}}, ConfigError, "config: trian: expected one of .*; did you mean train?"),
        ({"config": {"train": {"clip": -1}}}, ConfigError, "config: train.clip: expected more than 0, found -1"),
        ({"training_data": dataset()}, UsageError, "config: expected batch.global and batch.micro for training_data"),
        (
            {"training_data": dataset(4), "config": {"batch": {"global": 8, "micro": 8}}},
            UsageError,
            "training_data: expected at least batch.global = 8 samples, found 4",
        ),
        ({"config": "nowhere.yaml"}, ConfigError, "nowhere.yaml: expected a readable job file"),
        (
            {"optimizer": torch.optim.SGD(model_of().parameters(), lr=0.1)},
            UsageError,
            r"optimizer: expected parameters of the model, found \d+ that are not its own",
        ),
    ],
)
def test_mistakes(arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        initialize(model_of(), **arguments)


@pytest.mark.slow
@pytest.mark.parametrize("command", [["python"], ["torchrun", "--standalone", "--nproc-per-node=2"]])
def test_the_example_script(command: list[str], tmp_path: Path) -> None:
    words = [str(Path(sys.executable).with_name(command[0])), *command[1:], str(SCRIPT)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    *steps, last = done.stdout.splitlines()
    found = [float(re.search(r"loss (\d+\.\d+)", line)[1]) for line in steps if line.startswith("step ")]  # type: ignore[index]
    assert found[-1] < 0.1 < found[0]
    assert last.startswith(f"done: 200 steps on {1 if command == ['python'] else 2} × cpu")
