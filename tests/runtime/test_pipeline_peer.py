"""Beside torch.distributed.pipelining: the same losses, gradients, and parameters after ten steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import pipelining
from torch.nn import functional as F

from dstrain.runtime.comm import Communicator
from dstrain.runtime.engine import Engine, EngineConfig, TorchSchedule
from dstrain.runtime.optimizers import make_optimizer
from dstrain.runtime.pipeline.pipeline import Pipeline
from dstrain.runtime.spec.parallel_dims import parallel_dims
from dstrain.runtime.spec.schedule import find_schedule
from dstrain.runtime.spec.training_config import OptimizerConfig, ParallelConfig, ZeroConfig
from dstrain.runtime.task import LanguageTask

RunRanks = Callable[..., list[Any]]

VOCABULARY, WIDTH, CONTEXT = 37, 20, 8
MICRO_BATCHES, ROWS, STEPS = 4, 2, 10
ADAM = OptimizerConfig(lr=1e-3, eps=1e-6, betas=(0.9, 0.95), weight_decay=0.1)
PLAIN = OptimizerConfig(name="sgd", lr=1.0, momentum=0.0, weight_decay=0.0)  # moves by the gradient itself


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.wide, self.narrow = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 50), nn.Linear(50, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        narrow: Tensor = self.narrow(F.gelu(self.wide(self.norm(x).cumsum(1))))
        return x + narrow


def sequence() -> nn.Sequential:
    """Eight layers."""
    torch.manual_seed(0)
    blocks = [Block() for _ in range(6)]
    return nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), *blocks, nn.Linear(WIDTH, VOCABULARY))


def micro_batches(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    shape = ROWS, CONTEXT + 1
    return [torch.randint(VOCABULARY, shape, generator=generator) for _ in range(MICRO_BATCHES)]


def ours(schedule: str, stage: int, optimizer: OptimizerConfig, steps: int) -> dict[str, Any]:
    with Communicator.connect() as comm:
        model, plan = sequence(), find_schedule(schedule, comm.world_size, MICRO_BATCHES)
        sizes = [len(model) // plan.stages] * plan.stages
        pipe = Pipeline(model, comm, parallel_dims(comm.world_size, stage, comm.world_size), plan, sizes)
        config = EngineConfig(
            zero=ZeroConfig(stage=stage),
            parallel=ParallelConfig(pipeline=comm.world_size),
            accumulation=MICRO_BATCHES,
        )
        engine = Engine(model, comm, config, lambda p: make_optimizer(p, optimizer), TorchSchedule(None), pipeline=pipe)
        losses = [engine.train_batch(LanguageTask(), micro_batches(step)).loss for step in range(steps)]
        with engine.whole(model.parameters()):
            return {"losses": losses, "model": {n: p.detach().clone() for n, p in model.named_parameters()}}


def torchs(schedule: str, optimizer: OptimizerConfig, steps: int) -> dict[str, Any]:
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = sequence()
    each = len(model) // ranks
    own = nn.Sequential(*list(model)[rank * each : (rank + 1) * each])
    stage = pipelining.PipelineStage(own, rank, ranks, torch.device("cpu"))

    def loss_of(output: Tensor, tokens: Tensor) -> Tensor:
        return F.cross_entropy(output.flatten(0, 1), tokens[:, 1:].flatten())

    pipe = getattr(pipelining, schedule)(stage, MICRO_BATCHES, loss_fn=loss_of)
    moves = make_optimizer(list(own.named_parameters()), optimizer)
    losses = []
    for step in range(steps):
        tokens, found = torch.cat(micro_batches(step)), []
        if rank == 0:
            pipe.step(tokens[:, :-1])
        else:
            pipe.step(target=tokens, losses=found)
        moves.step()
        moves.zero_grad()
        losses.append(sum(loss.item() for loss in found) / MICRO_BATCHES)
    parameters = dict(own.named_parameters())
    dist.destroy_process_group()
    return {
        "losses": losses,
        "model": {
            f"{rank * each + int(n.split('.')[0])}.{n.split('.', 1)[1]}": p.detach() for n, p in parameters.items()
        },
    }


def both(run_ranks: RunRanks, schedule: str, stage: int, optimizer: OptimizerConfig, steps: int) -> tuple[Any, Any]:
    def work(_: int) -> dict[str, Any]:
        return ours(schedule, stage, optimizer, steps)

    def peers(_: int) -> dict[str, Any]:
        return torchs("ScheduleGPipe" if schedule == "gpipe" else "Schedule1F1B", optimizer, steps)

    return run_ranks(2, work), run_ranks(2, peers)


def merged(found: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {name: tensor for rank in found for name, tensor in rank["model"].items()}


@pytest.mark.parametrize(("schedule", "stage"), [("gpipe", 0), ("1f1b", 1), ("interleaved_1f1b", 3), ("zb_v", 2)])
def test_ten_steps_as_torchs_pipeline(run_ranks: RunRanks, schedule: str, stage: int) -> None:
    own, peers = both(run_ranks, schedule, stage, ADAM, STEPS)
    assert own[0]["losses"] == pytest.approx(peers[1]["losses"], rel=1e-5)
    expected, found = merged(peers), merged(own)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], atol=3e-5, rtol=0, msg=name)


@pytest.mark.parametrize(("schedule", "stage"), [("1f1b", 0), ("zb_h1", 3)])
def test_gradients_are_those_of_torchs_pipeline(run_ranks: RunRanks, schedule: str, stage: int) -> None:
    before = dict(sequence().named_parameters())
    own, peers = both(run_ranks, schedule, stage, PLAIN, 1)
    expected, found = merged(peers), merged(own)
    for name, tensor in found.items():
        gradient = before[name] - tensor
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, before[name] - expected[name], atol=1e-6, rtol=1e-5, msg=name)
