"""Ranks that part ways: an error within seconds that names them at stage 3, nothing at all below."""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dstrain.runtime import initialize
from dstrain.runtime.comm import Communicator
from dstrain.runtime.spec.errors import UsageError
from dstrain.runtime.spec.exit_codes import ExitCode
from dstrain.runtime.zero.divergence import Trail, difference

from .conftest import RunRanks

STEPS, ODD_STEP = 6, 4


class Model(nn.Module):
    """One rank takes another branch (`other`), or one more (`more`)."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way = way
        self.first, self.left, self.right, self.last = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor, branch: bool) -> Tensor:
        x = self.first(x)
        if branch:
            x = self.left(x)
        elif self.way == "other":
            x = self.right(x)
        return self.last(x)


def train(stage: int, way: str, algorithm: str = "auto") -> float:
    with Communicator.connect() as comm:
        zero = {"stage": stage, "resident_elements": 0, "bucket_elements": 100, "comm": algorithm}
        engine = initialize(Model(way), {"zero": zero, "train": {"steps": STEPS}})
        loss = 0.0
        for step in range(STEPS):
            engine.backward(engine(torch.ones(2, 8), branch=step >= ODD_STEP and comm.rank == 1).sum())
            result = engine.step()
            assert result is not None
            loss = result.loss
        return loss


@pytest.mark.parametrize("way", ["other", "more"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_below_stage_3_ranks_may_part_ways(run_ranks: RunRanks, stage: int, way: str) -> None:
    assert len(set(run_ranks(3, lambda rank: train(stage, way)))) == 1


@pytest.mark.parametrize("comm", ["direct", "pairwise", "ring", "native"])
@pytest.mark.parametrize(("way", "taken"), [("other", "last"), ("more", "the backward")])
def test_at_stage_3_it_is_an_error_that_names_units_and_ranks(tmp_path: Path, way: str, taken: str, comm: str) -> None:
    """Found by those who wait for each other, or at the end of the step."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]

    def be(rank: int) -> None:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "RANK": str(rank)}
        os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "WORLD_SIZE": "3"}
        with (tmp_path / str(rank)).open("w") as sys.stderr:
            try:
                train(3, way, comm)
            except UsageError as error:
                sys.stderr.write(f"{error}\n")
                sys.exit(ExitCode.USAGE)

    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=be, args=(rank,)) for rank in range(3)]
    try:
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(120)
    finally:
        for rank in ranks:
            rank.kill()
    said = [(tmp_path / str(rank)).read_text() for rank in range(3)]
    assert [rank.exitcode for rank in ranks] == [2, 2, 2], said
    for line in said:
        assert f"found {taken} on ranks 0, 2 and left on rank 1 at the same place" in line
        assert line.count("\n") == 1


def test_difference() -> None:
    assert difference({0: Trail(0, ["a", "b"]), 1: Trail(0, ["a"])}) is None
    assert difference({0: Trail(0, ["a", "b"]), 1: Trail(1, ["c"]), 2: Trail(0, ["a"])}) == {"b": [0], "c": [1]}
    assert difference({0: Trail(5, ["a"]), 1: Trail(0, ["b"])}) is None
