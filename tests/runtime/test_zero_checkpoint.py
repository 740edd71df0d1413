"""Checkpoints of sharded engines: one format for all stages, so any layout goes on from any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dstrain.runtime.checkpoint.load import read_newest
from dstrain.runtime.comm import Communicator
from dstrain.runtime.engine import Engine, EngineConfig, TorchSchedule
from dstrain.runtime.optimizers import make_optimizer
from dstrain.runtime.precision import DTYPES
from dstrain.runtime.spec.errors import CheckpointError
from dstrain.runtime.spec.training_config import OptimizerConfig, ParallelConfig, PrecisionConfig, ZeroConfig

from .conftest import RunRanks

STEPS = 3


class Block(nn.Module):
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(6), nn.Linear(6, 6)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + self.linear(self.norm(x)).tanh()


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.ModuleDict({"all": nn.Sequential(*(Block() for _ in range(3)))})["all"],
                         nn.Linear(6, 3))  # fmt: skip


def engine_of(comm: Communicator, stage: int, optimizer: str = "adamw", **config: Any) -> Engine:
    zero = ZeroConfig(stage=stage, bucket_elements=40, resident_elements=10)  # type: ignore[arg-type]
    settings = OptimizerConfig(name=optimizer, lr=0.01)  # type: ignore[arg-type]
    return Engine(
        model(),
        comm,
        EngineConfig(zero=zero, **config),
        lambda parameters: make_optimizer(parameters, settings),
        TorchSchedule(None),
    )


def train(engine: Engine, first: int, steps: int = STEPS) -> list[float]:
    """Losses; the same global batch in every layout."""
    losses = []
    for step in range(first, first + steps):
        inputs = torch.randn(12, 5, generator=torch.Generator().manual_seed(step))
        mine = inputs[engine.rank :: engine.world_size].to(DTYPES[engine.config.precision.dtype])
        engine.backward(engine(mine).float().square().mean(), len(mine))
        result = engine.step()
        assert result is not None
        losses.append(result.loss)
    return losses


@pytest.mark.parametrize(
    ("optimizer", "precision", "worlds"),
    [
        ("adamw", "fp32", [3]),
        pytest.param("adamw", "fp32", [2, 1], marks=pytest.mark.slow),
        pytest.param("adafactor", "fp32", [2, 1, 3], marks=pytest.mark.slow),
        pytest.param("muon", "fp32", [2, 1, 3], marks=pytest.mark.slow),
        pytest.param("adamw", "bf16", [2, 1, 3], marks=pytest.mark.slow),
    ],
)
def test_every_stage_goes_on_from_every_other(
    run_ranks: RunRanks, tmp_path: Path, optimizer: str, precision: str, worlds: list[int]
) -> None:
    config: dict[str, Any] = {"precision": PrecisionConfig(dtype=precision), "ema_decay": 0.9}  # type: ignore[arg-type]

    def save(rank: int) -> list[float]:
        with Communicator.connect() as comm:
            for stage in range(4):
                engine = engine_of(comm, stage, optimizer, **config)
                train(engine, 0)
                engine.save_checkpoint(tmp_path / f"stage-{stage}")
            return train(engine, STEPS)

    def go_on(rank: int) -> dict[tuple[int, int], list[float]]:
        with Communicator.connect() as comm:
            found = {}
            for stage in range(4):
                for other in range(4):
                    engine = engine_of(comm, stage, optimizer, **config)
                    assert engine.load_checkpoint(tmp_path / f"stage-{other}") == STEPS
                    found[stage, other] = train(engine, STEPS)
            return found

    straight = run_ranks(2, save)[0]
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    for ranks in worlds:
        for pair, losses in run_ranks(ranks, go_on)[0].items():
            assert losses == pytest.approx(straight, rel=tolerance), (ranks, pair)


def test_the_same_layout_goes_on_bitwise(run_ranks: RunRanks, tmp_path: Path) -> None:
    def work(rank: int) -> list[tuple[list[float], list[float]]]:
        with Communicator.connect() as comm:
            found = []
            for stage in (1, 2, 3):
                engine = engine_of(comm, stage, precision=PrecisionConfig(dtype="fp16"))
                train(engine, 0)
                engine.save_checkpoint(tmp_path / str(stage))
                straight = train(engine, STEPS)
                resumed = engine_of(comm, stage, precision=PrecisionConfig(dtype="fp16"))
                resumed.load_checkpoint(tmp_path / str(stage))
                found.append((straight, train(resumed, STEPS)))
            return found

    for straight, resumed in run_ranks(3, work)[0]:
        assert straight == resumed


def test_files_are_the_same_whatever_the_layout(run_ranks: RunRanks, tmp_path: Path) -> None:
    def work(rank: int) -> None:
        with Communicator.connect() as comm:
            for stage in range(4):
                engine_of(comm, stage).save_checkpoint(tmp_path / str(stage))
            replicated = engine_of(comm, 3, parallel=ParallelConfig(data_shard=2))
            replicated.save_checkpoint(tmp_path / "hybrid")

    run_ranks(4, work)
    first = read_newest(tmp_path / "0")[1].tensors
    for other in ("1", "2", "3", "hybrid"):
        tensors = read_newest(tmp_path / other)[1].tensors
        assert tensors.keys() == first.keys()
        assert all(torch.equal(tensors[name], first[name]) for name in first)


def test_the_model_alone_is_written_as_safetensors(run_ranks: RunRanks, tmp_path: Path) -> None:
    def work(rank: int) -> None:
        with Communicator.connect() as comm:
            for stage in range(4):
                engine = engine_of(comm, stage)
                train(engine, 0)
                engine.save_model(tmp_path / str(stage))

    run_ranks(2, work)
    first = load_file(tmp_path / "0" / "model.safetensors")
    assert first.keys() == model().state_dict().keys()
    for stage in (1, 2, 3):
        other = load_file(tmp_path / str(stage) / "model.safetensors")
        for name, tensor in first.items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-5, atol=1e-7)


def test_a_disk_that_cannot_be_written_is_one_error_on_all_ranks(run_ranks: RunRanks, tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    def work(rank: int) -> list[str]:
        with Communicator.connect() as comm:
            engine = engine_of(comm, 3)
            said = []
            for save in (engine.save_checkpoint, engine.save_model):
                with pytest.raises(CheckpointError) as error:
                    save(tmp_path / "file" / "below")
                said.append(str(error.value))
            train(engine, 0)  # all are still in step
            return said

    for said in run_ranks(2, work):
        assert "Not a directory" in said[0]
        assert "Not a directory" in said[1]
