"""One of two ranks that save 512 MB of sharded state in turn: with ours, torch.save, and torch's DCP.

Started by checkpoint.py; prints the seconds of each, by name, as JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from dstrain.runtime.checkpoint.save import Saver
from dstrain.runtime.comm import Communicator
from dstrain.runtime.engine import Engine, EngineConfig, TorchSchedule
from dstrain.runtime.spec.training_config import ZeroConfig

TENSORS, ROWS, COLUMNS = 25, 512, 10_000
TINY_COLUMNS = 10


def main(root: Path, rounds: int, columns: int) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    with Communicator.connect() as comm:
        found = _measure(comm, root, rounds, columns)
    if comm.rank == 0:
        print(json.dumps(found))


def _measure(comm: Communicator, root: Path, rounds: int, columns: int) -> dict[str, list[float]]:
    mesh = init_device_mesh("cpu", (comm.world_size,))
    background = dist.new_group()
    shards = {f"t{i}": torch.randn(ROWS // comm.world_size, columns) for i in range(TENSORS)}
    state = {name: DTensor.from_local(tensor, mesh, [Shard(0)]) for name, tensor in shards.items()}
    engine = _engine(comm, columns)
    at_once = Saver(engine, root / "ours", keep_last=1)
    beside = Saver(engine, root / "ours-async", keep_last=1, asynchronous=True)
    beside.reserve()
    copies = {name: tensor.clone() for name, tensor in shards.items()}
    seconds: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        comm.barrier()
        begun = time.perf_counter()
        result = work()
        comm.barrier()
        seconds.setdefault(name, []).append(time.perf_counter() - begun)
        return result

    def settle() -> None:
        comm.barrier()
        if comm.rank == 0:
            os.sync()
        comm.barrier()

    def torch_save() -> None:
        torch.save(shards, root / f"torch-{comm.rank}.pt")

    def ours() -> None:
        at_once.begin()
        at_once.finish()
        at_once.raise_problems()

    def ours_async() -> None:
        timed("ours async, stall", beside.begin)
        timed("ours async, behind it", beside.finish)
        beside.raise_problems()

    def dcp_async() -> None:
        future = timed(
            "DCP async, stall",
            lambda: dcp.async_save(state, checkpoint_id=root / "dcp-async", process_group=background),
        )
        timed("DCP async, behind it", future.result)

    contenders: list[Callable[[], object]] = [
        lambda: timed("ours", ours),
        ours_async,
        lambda: timed("torch.save, not synced", torch_save),
        lambda: timed("DCP", lambda: dcp.save(state, checkpoint_id=root / "dcp")),
        dcp_async,
        lambda: timed("memory copy", lambda: [copies[name].copy_(tensor) for name, tensor in shards.items()]),
    ]
    for number in range(rounds + 1):
        for contender in contenders if number % 2 == 0 else reversed(contenders):
            settle()
            contender()
            engine.global_step += 1
        if comm.rank == 0:
            for folder in ("dcp", "dcp-async"):
                shutil.rmtree(root / folder)
    return {name: values[1:] for name, values in seconds.items()}  # the first round warms up


def _engine(comm: Communicator, columns: int) -> Engine:
    module = nn.ParameterDict({f"t{i}": nn.Parameter(torch.randn(ROWS, columns)) for i in range(TENSORS)})
    zero = ZeroConfig(stage=2)
    return Engine(
        module, comm, EngineConfig(zero=zero), lambda trained: torch.optim.SGD([p for _, p in trained]),
        TorchSchedule(None),
    )  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), TINY_COLUMNS if "--tiny" in sys.argv else COLUMNS)
