"""Times of layers that were measured once are those of the same layers, batch, device and precision alone."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dstrain.runtime.activation_checkpointing import checkpoint_activations
from dstrain.runtime.comm import Communicator
from dstrain.runtime.models.build import build_model
from dstrain.runtime.pipeline.cuts import chain_of
from dstrain.runtime.pipeline.making import make_pipeline
from dstrain.runtime.pipeline.timing import FILE_NAME, LayerTimer
from dstrain.runtime.spec.config import JobConfig
from dstrain.runtime.spec.job_layout import dims_of
from dstrain.runtime.spec.load import load_job
from dstrain.runtime.task import SampleTask

RunRanks = Callable[..., list[Any]]

YAML = """
model: {gpt: {layers: 2, width: 16, heads: 2, context: 16}}
data: {path: text}
batch: {global: 8, micro: 2}
parallel: {pipeline: 2, partition: time}
train: {steps: 1, loss: "mine:loss"}
"""

SAME = [[], ["optimizer.lr=0.5"], ["batch.global=16"], ["zero.stage=2"], ["parallel.schedule=gpipe"]]
OTHERS = [
    ["model.gpt.layers=3"],
    ["model.gpt.width=24"],
    ["model.gpt.heads=4"],
    ["model.gpt.vocabulary=257"],
    ["batch.micro=4"],
    ["data.sequence_length=8"],
    ["precision.dtype=bf16"],
    ["precision.dtype=bf16", "precision.autocast=true"],
    ["train.activation_checkpointing=all"],
    ["train.loss='mine:other_loss'"],
]


def loss(output: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), targets.flatten())


def other_loss(output: Tensor, targets: Tensor) -> Tensor:
    return loss(output, targets) + output.square().mean()


def measured(job: JobConfig, comm: Communicator, folder: Path) -> bool:
    """Whether a pipeline of the job takes other times than those which the folder keeps."""
    assert job.model is not None
    assert job.batch is not None
    model = build_model(job.model)
    if job.train.activation_checkpointing is not None:
        checkpoint_activations(model, job.train.activation_checkpointing)
    tokens = torch.zeros(job.batch.micro, job.data.sequence_length or 16, dtype=torch.int64)
    pipeline = make_pipeline(job, model, comm, dims_of(job, comm.world_size), 4, lambda: [tokens, tokens], folder)
    return "100000.0 ms" not in pipeline.describe()


def test_what_was_measured_is_not_another_jobs(
    run_ranks: RunRanks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mine", sys.modules[__name__])
    (tmp_path / "job.yaml").write_text(YAML)
    kept = tmp_path / FILE_NAME

    def work(rank: int) -> list[list[str]]:
        found = []
        with Communicator.connect() as comm:
            assert measured(load_job(tmp_path / "job.yaml", []), comm, tmp_path)
            first = json.loads(kept.read_text())
            for overrides in SAME + OTHERS:
                comm.barrier()
                if rank == 0:
                    kept.write_text(json.dumps({**first, "seconds": [*first["seconds"][:-1], 100.0]}))
                if measured(load_job(tmp_path / "job.yaml", overrides), comm, tmp_path):
                    found.append(overrides)
        return found

    assert run_ranks(2, work) == [OTHERS, OTHERS]


def test_a_module_that_is_there_twice_is_measured_in_each_place() -> None:
    act = nn.Tanh()
    model = nn.Sequential(nn.Linear(4, 4), act, nn.Linear(4, 4), act, nn.Linear(4, 3))
    timer = LayerTimer(model, chain_of(model), torch.device("cpu"), torch.float32, contextlib.nullcontext)
    batch = [torch.ones(2, 4), torch.ones(2, 3)]
    found = timer.seconds(SampleTask("pipeline_lab:difference"), batch)
    assert found[1] == found[3] > 0
    assert [name for name, _ in timer.key(batch)["layers"]] == list("01234")
