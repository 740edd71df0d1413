"""Ranks on one host that read each other's memory."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from zero_oracle import LANGUAGE, RunRanks, compare, engine_of, only, train_step

from dstrain.runtime import comm_direct
from dstrain.runtime.comm import Communicator
from dstrain.runtime.spec.errors import UsageError
from dstrain.runtime.spec.training_config import ParallelConfig

DIRECT = {"stage": 3, "comm": "direct"}


def test_direct_in_groups_and_replicas(run_ranks: RunRanks) -> None:
    training = replace(LANGUAGE, parallel=ParallelConfig(data_shard=2), accumulation=2)
    compare(run_ranks, 4, training, only("1", "2", "3", comm="direct"))


@pytest.mark.parametrize("numbers", [1, 5, 12, 1 << 19])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_an_all_reduce_of_any_size(run_ranks: RunRanks, numbers: int, dtype: torch.dtype) -> None:
    """Also of fewer numbers than ranks, and of more than are read at a time."""

    def work(rank: int) -> bool:
        with Communicator.connect() as comm:
            ranks = comm.everyone()
            ranks.choose("direct")
            tensor = torch.arange(numbers, dtype=torch.float64).remainder(7).to(dtype) * (rank + 1)
            ranks.start_all_reduce(tensor).wait()
            return torch.equal(tensor, torch.arange(numbers, dtype=torch.float64).remainder(7).to(dtype) * 6)

    assert all(run_ranks(3, work))


def test_ranks_on_other_hosts_are_not_read(run_ranks: RunRanks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comm_direct, "_host", lambda: ("host of", str(int(os.environ["RANK"]) // 2)))

    def work(rank: int) -> str:
        with Communicator.connect() as comm:
            engine = engine_of(LANGUAGE, comm, {"stage": 3})
            train_step(engine, LANGUAGE)
            with pytest.raises(UsageError, match=r"zero\.comm: expected .* on one host"):
                engine_of(LANGUAGE, comm, DIRECT)
            return engine.weights.describe()

    assert all("direct" not in said for said in run_ranks(3, work))


def test_where_sockets_do_not_reach_there_is_another_way(run_ranks: RunRanks, monkeypatch: pytest.MonkeyPatch) -> None:
    """As from another network namespace, whose abstract sockets are others."""
    assert len(comm_direct._host()) == 3
    monkeypatch.setattr(comm_direct, "_MEETING_S", 1.0)
    connect = comm_direct._connect

    def unreachable(index: int, *others: Any) -> None:
        if index == 1:
            raise ConnectionRefusedError
        connect(index, *others)

    monkeypatch.setattr(comm_direct, "_connect", unreachable)

    def work(rank: int) -> str:
        with Communicator.connect() as comm:
            engine = engine_of(LANGUAGE, comm, {"stage": 3})
            train_step(engine, LANGUAGE)
            return engine.weights.describe()

    assert all(said.endswith("comm pairwise") for said in run_ranks(2, work))


def test_a_system_that_forbids_reading_is_no_error(run_ranks: RunRanks, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbid(pid: int, address: int, into: torch.Tensor) -> None:
        raise RuntimeError("Operation not permitted")

    monkeypatch.setattr(comm_direct, "_read", forbid)

    def work(rank: int) -> str:
        with Communicator.connect() as comm:
            engine = engine_of(LANGUAGE, comm, {"stage": 2})
            train_step(engine, LANGUAGE)
            return engine.weights.describe()

    assert all(said.endswith("comm pairwise") for said in run_ranks(2, work))


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_rank_that_goes_is_noticed_at_once(run_ranks: RunRanks, stage: int) -> None:
    def work(rank: int) -> bool:
        with Communicator.connect(meet=False) as comm:
            engine = engine_of(LANGUAGE, comm, {"stage": stage, "comm": "direct"})
            train_step(engine, LANGUAGE)
            if rank == 1:
                os._exit(3)
            with pytest.raises(RuntimeError):
                train_step(engine, LANGUAGE)
            return True

    began = time.monotonic()
    with pytest.raises(pytest.fail.Exception, match="rank 1") as caught:
        run_ranks(2, work)
    assert "rank 0" not in str(caught.value)
    assert time.monotonic() - began < 30
