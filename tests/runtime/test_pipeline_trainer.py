"""A job with a pipeline, from its YAML to its checkpoints, which any other layout goes on from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dstrain.runtime import trainer
from dstrain.runtime.checkpoint.load import load
from dstrain.runtime.checkpoint.model_file import save_model
from dstrain.runtime.checkpoint.save import save
from dstrain.runtime.comm import Communicator
from dstrain.runtime.spec.errors import UsageError
from dstrain.runtime.spec.parallel_dims import parallel_dims

from .test_checkpoint_reshard import canonical_hash
from .test_pipeline import STEPS, Training, engine_of, one_process
from .test_trainer import events_of, losses

RunRanks = Callable[..., list[Any]]

YAML = """
name: piped
model: {gpt: {layers: 4, width: 16, heads: 2, context: 16}}
data: {path: %s, validation_fraction: 0.1}
batch: {global: 8, micro: 1}
optimizer: {lr: 1e-2, no_decay: [1d]}
schedule: {warmup_steps: 2}
train: {steps: 6, eval_every: 4, eval_samples: 7, sample_bytes: 20, ema_decay: 0.9}
checkpoint: {dir: %s, every_steps: 3, keep_last: null}
log: {every: 2}
"""


@pytest.fixture
def job(tmp_path: Path) -> Path:
    (tmp_path / "text").write_bytes(b"the quick brown fox jumps over the lazy dog\n" * 100)
    (tmp_path / "job.yaml").write_text(YAML % (tmp_path / "text", tmp_path / "checkpoints"))
    return tmp_path / "job.yaml"


def trained(job: Path, events: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> list[dict[str, Any]]:
    with events.open("wb") as file:
        monkeypatch.setenv("DSTRAIN_EVENT_FD", str(file.fileno()))
        code = trainer.main([str(job), *words])
    assert code == 0
    return events_of(events)


def of(pipeline: int, stage: int, schedule: str) -> list[str]:
    values = {"parallel.pipeline": pipeline, "parallel.schedule": schedule, "zero.stage": stage}
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]


@pytest.mark.parametrize(("ranks", "pipeline", "stage", "schedule"), [(2, 2, 0, "1f1b"), (4, 2, 3, "zb_v")])
def test_a_job_trains_validates_and_goes_on_as_one_process(
    run_ranks: RunRanks,
    job: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    ranks: int,
    pipeline: int,
    stage: int,
    schedule: str,
) -> None:
    alone = trained(job, tmp_path / "alone", monkeypatch, "--set", f"checkpoint.dir={tmp_path / 'other'}")
    words = of(pipeline, stage, schedule)

    def work(rank: int) -> list[dict[str, Any]]:
        return trained(job, tmp_path / f"rank-{rank}", monkeypatch, *words)

    for events in run_ranks(ranks, work):
        for kind, field in (("step", "loss"), ("step", "grad_norm"), ("validation", "val_loss")):
            assert losses(events, kind, field) == pytest.approx(losses(alone, kind, field), abs=1e-4)
        assert not losses(events, "alive", "step"), "said now and then, not for each of many micro-batches"
    assert "--- sample" in capfd.readouterr().out
    # step 3 of the pipeline goes on in one process
    again = trained(job, tmp_path / "again", monkeypatch, "--resume", str(tmp_path / "checkpoints" / "step-3"))
    assert losses(again, "step", "loss") == pytest.approx(
        losses(alone, "step", "loss")[-len(losses(again, "step", "loss")) :], abs=1e-4
    )


def test_layers_are_timed_once_for_a_job_that_goes_on(
    run_ranks: RunRanks, job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [*of(2, 3, "1f1b"), "--set", "parallel.partition=time", "--set", "train.activation_checkpointing=all"]
    alone = trained(job, tmp_path / "alone", monkeypatch, "--set", f"checkpoint.dir={tmp_path / 'other'}")

    def work(rank: int) -> list[dict[str, Any]]:
        return trained(job, tmp_path / f"rank-{rank}", monkeypatch, *words)

    for events in run_ranks(2, work):
        assert losses(events, "step", "loss") == pytest.approx(losses(alone, "step", "loss"), abs=1e-4)
        assert events[0]["parameters"] == alone[0]["parameters"]
    kept = tmp_path / "checkpoints" / "layer-times.json"
    found = json.loads(kept.read_text())
    assert len(found["seconds"]) == 6
    assert all(seconds > 0 for seconds in found["seconds"])
    assert len(set(found["seconds"][1:5])) == 1, "blocks are alike"
    capfd.readouterr()
    kept.write_text(json.dumps({**found, "seconds": [1.0, 1.0, 1.0, 1.0, 1.0, 100.0]}))
    words += ["--resume", "3"]
    run_ranks(2, work)
    assert "5 + 1 layers, by 5000.0 + 100000.0 ms" in capfd.readouterr().out
    words += ["--set", "batch.micro=2"]  # another measurement
    run_ranks(2, work)
    assert "100000.0" not in capfd.readouterr().out


@pytest.mark.parametrize("samples", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_validation_where_one_stage_gathers_and_data_ranks_have_unequal_shares(
    run_ranks: RunRanks, job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, samples: int
) -> None:
    """Of two; the first stage has the embedding, which is small and stays whole. Each validation says that it lives."""
    monkeypatch.setattr(trainer, "ALIVE_S", -1.0)
    keys = ["model.gpt.width=32", "model.gpt.layers=2", f"train.eval_samples={samples}", "train.steps=1"]
    common = [word for key in (*keys, "train.sample_bytes=0", "checkpoint=null") for word in ("--set", key)]
    alone = trained(job, tmp_path / "alone", monkeypatch, *common)
    words = [*of(2, 3, "1f1b"), "--set", "parallel.partition=[1, 3]", "--set", "zero.resident_elements=10000"]

    def work(rank: int) -> list[dict[str, Any]]:
        return trained(job, tmp_path / f"rank-{rank}", monkeypatch, *common, *words)

    expected = losses(alone, "validation", "val_loss")
    for events in run_ranks(4, work, timeout_s=45.0):
        assert losses(events, "validation", "val_loss") == pytest.approx(expected, abs=1e-4)
        assert [event["step"] for event in events if event["kind"] == "alive"] == [1]


# --- checkpoints ---------------------------------------------------------------------------------------------

Layout = tuple[int, int, int, str]
"""World, pipeline, stage, schedule."""

QUICK: list[Layout] = [(1, 1, 0, ""), (2, 2, 0, "1f1b"), (4, 2, 3, "zb_v"), (4, 4, 1, "1f1b"), (2, 1, 2, "")]
ALL: list[Layout] = [(4, pipeline, stage, "1f1b") for pipeline in (1, 2, 4) for stage in (0, 1, 2, 3)]
CONFIG: dict[str, Any] = {"ema_decay": 0.9}


def engine_for(comm: Communicator, layout: Layout) -> Any:
    from dstrain.runtime.engine import Engine, EngineConfig, TorchSchedule
    from dstrain.runtime.optimizers import make_optimizer
    from dstrain.runtime.spec.training_config import ZeroConfig

    _, pipeline, stage, schedule = layout
    training = Training(config=CONFIG)
    if pipeline > 1:
        return engine_of(comm, training, schedule, pipeline, stage, None)
    zero = ZeroConfig(stage=stage, bucket_elements=3000, resident_elements=0 if stage == 3 else 1 << 17)
    config = EngineConfig(zero=zero, accumulation=4, clip=0.5, **CONFIG)
    make = training.optimizer
    return Engine(training.built(), comm, config, lambda p: make_optimizer(p, make), TorchSchedule(None))


def step_of(engine: Any) -> None:
    training = Training()
    task = training.task()
    if engine.pipeline is not None:
        engine.train_batch(task, training.batches(0, engine.data.rank))
        return
    for batch in training.batches(0, engine.data.rank):
        engine.backward(*task.loss(engine, batch))
        engine.step()


def hashes(run_ranks: RunRanks, folder: Path, layouts: list[Layout]) -> set[str]:
    """One state, saved by each layout, loaded by every other and saved again."""

    def begin(_: int) -> None:
        with Communicator.connect() as comm:
            engine = engine_for(comm, layouts[0])
            step_of(engine)
            save(engine, folder / "trained")

    run_ranks(layouts[0][0], begin)
    found = {canonical_hash(folder / "trained" / "step-1")}
    for source in layouts:

        def spread(_: int, source: Layout = source) -> None:
            with Communicator.connect() as comm:
                engine = engine_for(comm, source)
                load(engine, folder / "trained")
                save(engine, folder / str(source))

        run_ranks(source[0], spread)
        found.add(canonical_hash(folder / str(source) / "step-1"))
    for target in layouts:

        def again(_: int, target: Layout = target) -> None:
            with Communicator.connect() as comm:
                for source in layouts:
                    engine = engine_for(comm, target)
                    load(engine, folder / str(source))
                    save(engine, folder / "again" / str(target) / str(source))

        run_ranks(target[0], again, timeout_s=300.0)
        found |= {canonical_hash(folder / "again" / str(target) / str(source) / "step-1") for source in layouts}
    return found


@pytest.mark.parametrize("layouts", [QUICK[::2], pytest.param(QUICK, marks=pytest.mark.slow)], ids=len)
def test_layouts_with_and_without_a_pipeline_in_every_pair(
    run_ranks: RunRanks, tmp_path: Path, layouts: list[Layout]
) -> None:
    assert len(hashes(run_ranks, tmp_path, layouts)) == 1


@pytest.mark.slow
def test_every_pipeline_at_every_stage_in_every_pair(run_ranks: RunRanks, tmp_path: Path) -> None:
    assert len(hashes(run_ranks, tmp_path, ALL)) == 1


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_the_whole_model_in_one_file(run_ranks: RunRanks, tmp_path: Path, stage: int) -> None:
    from safetensors.torch import load_file

    training = Training()

    def work(_: int) -> None:
        with Communicator.connect() as comm:
            engine = engine_of(comm, training, "1f1b", 2, stage, None)
            for step in range(STEPS):
                engine.train_batch(training.task(), training.batches(step, engine.data.rank))
            save_model(engine, tmp_path)

    run_ranks(4, work)
    found, expected = load_file(tmp_path / "model.safetensors"), one_process(training, data=2)["model"]
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], atol=3e-5, rtol=0)


# --- what cannot be ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"pipeline": 3}, "parallel.pipeline: expected a divisor of 4 ranks, found 3"),
        ({"pipeline": 2, "data_shard": 4}, "data_shard × data_replicate = 4 ranks / pipeline 2 = 2"),
    ],
)
def test_arrangements_that_are_none(words: dict[str, int], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parallel_dims(4, 2, **words)


def test_a_users_schedule_that_never_ends_is_refused_before_the_start(
    job: Path, tmp_path: Path, run_ranks: RunRanks, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = [["0F0", "0B0", *(f"0F{m}" for m in range(1, 8)), *(f"0B{m}" for m in range(1, 8))]]
    rows += [[*(f"1F{m}" for m in range(8)), *(f"1B{m}" for m in range(8))]]
    (tmp_path / "own.csv").write_text("\n".join(",".join(row) for row in rows))

    def work(_: int) -> int:
        return trainer.main([str(job), *of(2, 0, str(tmp_path / "own.csv"))])

    assert run_ranks(2, work) == [2, 2]
    assert "a deadlock" in capfd.readouterr().err
