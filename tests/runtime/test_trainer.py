"""The trainer from end to end, with a small model on a small text."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dstrain.runtime import trainer
from dstrain.runtime.spec.load import load_job

RunRanks = Callable[..., list[Any]]

YAML = """
name: tiny
model: {gpt: {layers: 1, width: 16, heads: 2, context: 16}}
data: {path: %s, validation_fraction: 0.1}
batch: {global: 12, micro: 2}
optimizer: {lr: 1e-2}
schedule: {warmup_steps: 2}
train: {steps: 6, eval_every: 4, eval_samples: 7, sample_bytes: 20}
log: {every: 2}
"""


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A job.yaml beside its text."""
    (tmp_path / "text").write_bytes(b"the quick brown fox jumps over the lazy dog\n" * 100)
    (tmp_path / "job.yaml").write_text(YAML % (tmp_path / "text"))
    return tmp_path / "job.yaml"


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "DSTRAIN_JOB", "DSTRAIN_EVENT_FD"):
        monkeypatch.delenv(name, raising=False)


def events_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(events: list[dict[str, Any]], kind: str, field: str) -> list[float]:
    return [event[field] for event in events if event["kind"] == kind]


def train_with_events(job: Path, events: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Train in this process, where an event descriptor is open."""
    with events.open("wb") as file:
        monkeypatch.setenv("DSTRAIN_EVENT_FD", str(file.fileno()))
        assert trainer.main([str(job)]) == 0
    return events_of(events)


def test_one_process_and_ranks_train_alike(
    run_ranks: RunRanks, job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = train_with_events(job, tmp_path / "alone", monkeypatch)

    def work(rank: int) -> list[dict[str, Any]]:
        return train_with_events(job, tmp_path / f"rank-{rank}", monkeypatch)

    for rank, events in enumerate(run_ranks(3, work)):
        assert {event["rank"] for event in events} == {rank}
        for kind, field in (("step", "loss"), ("step", "grad_norm"), ("validation", "val_loss")):
            assert losses(events, kind, field) == pytest.approx(losses(alone, kind, field), abs=1e-4)
        assert losses(events, "step", "lr") == losses(alone, "step", "lr")


def test_a_long_validation_says_that_it_lives(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """7 samples in batches of 2."""
    monkeypatch.setattr(trainer, "ALIVE_S", -1.0)
    events = train_with_events(job, tmp_path / "events", monkeypatch)
    kinds = [(event["kind"], event["step"]) for event in events if event["kind"] in ("alive", "validation")]
    assert kinds == [*[("alive", 4)] * 4, ("validation", 4), *[("alive", 6)] * 4, ("validation", 6)]


@pytest.mark.parametrize("samples", [5, 1])
def test_ranks_validate_on_unequal_shares_where_parameters_are_gathered(
    run_ranks: RunRanks, job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, samples: int
) -> None:
    """Two batches against one, and one against none."""
    zero = "zero: {stage: 3, resident_elements: 0, comm: pairwise}\n"  # direct would read an absent peer
    text = job.read_text().replace("eval_samples: 7", f"eval_samples: {samples}")
    job.write_text(text)
    alone = train_with_events(job, tmp_path / "alone", monkeypatch)
    job.write_text(text + zero)

    def work(rank: int) -> list[dict[str, Any]]:
        return train_with_events(job, tmp_path / f"rank-{rank}", monkeypatch)

    for events in run_ranks(2, work):
        for kind, field in (("step", "loss"), ("validation", "val_loss")):
            assert losses(events, kind, field) == pytest.approx(losses(alone, kind, field), abs=1e-4)


@pytest.mark.slow  # torch's compiler takes minutes on busy cores
def test_compiled_and_recomputed_it_trains_alike(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the compiler's own backend, in a process of its own; validation and averaged weights among it."""
    job.write_text(job.read_text().replace("train: {", "train: {ema_decay: 0.5, "))
    plain = train_with_events(job, tmp_path / "plain", monkeypatch)
    both = ["--set", "train.compile=true", "--set", "train.activation_checkpointing=all"]
    with (tmp_path / "compiled").open("wb") as file:
        done = subprocess.run(
            [sys.executable, "-m", "dstrain.runtime.trainer", str(job), *both],
            env=os.environ | {"OMP_NUM_THREADS": "1", "DSTRAIN_EVENT_FD": str(file.fileno())},
            pass_fds=[file.fileno()],
            capture_output=True,
            text=True,
            timeout=240,
        )
    assert done.returncode == 0, done.stderr
    compiled = events_of(tmp_path / "compiled")
    for kind, field in (("step", "loss"), ("step", "grad_norm"), ("validation", "val_loss")):
        assert losses(compiled, kind, field) == pytest.approx(losses(plain, kind, field), abs=1e-4)


@pytest.mark.slow
def test_under_torchrun(job: Path, tmp_path: Path) -> None:
    """Two ranks by torchrun; each opens its event descriptor itself, which torchrun would close."""
    events = tmp_path / "events"
    shell = f'exec 9>>"{events}.$RANK"; DSTRAIN_EVENT_FD=9 exec "$0" "$@"'
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node=2"]
    program = [sys.executable, "-m", "dstrain.runtime.trainer", str(job), "--set", "train.steps=5"]
    result = subprocess.run(
        [*torchrun, "--no-python", "sh", "-c", shell, *program],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    number = r"\d+\.\d+"
    assert re.fullmatch(
        r"tiny: 0\.01 M parameters, 0\.0 MB of text, 2 ranks × 3 × 2 samples of 16 tokens on cpu, fp32",
        lines[0],
    )
    progress = [line for line in lines if "tok/s" in line and line.startswith("step ")]
    assert [line.split()[1] for line in progress] == ["1/5", "2/5", "4/5", "5/5"]
    assert re.fullmatch(
        rf"step 5/5 loss {number} lr {number}e-\d\d grad {number} [\d.]+k? tok/s 0\.\dG 0:0\d( left)?", progress[-1]
    )
    assert [line.split()[1] for line in lines if "validation loss" in line][:2] == ["4/5", "5/5"]
    assert "--- sample" in lines
    assert re.fullmatch(
        rf"done: 5 steps, 960 tokens in {number} s \([\d.]+k? tokens/s\), "
        rf"validation loss {number} nats per byte",
        lines[-1],
    )
    for rank in range(2):
        seen = events_of(Path(f"{events}.{rank}"))
        assert [e["kind"] for e in seen] == ["start", *["step"] * 4, "validation", "step", "validation", "end"]
        step = next(e for e in seen if e["kind"] == "step")
        fields = {"ts", "run_id", "attempt", "rank", "kind", "step", "loss", "lr", "grad_norm"}
        assert step.keys() == fields | {"tokens_per_s", "step_s", "memory_bytes", "data_wait_s"}
        assert step["memory_bytes"] > 50e6
        assert seen[0]["world_size"] == 2
        assert seen[-1]["tokens"] == 5 * 12 * 16


def test_it_learns(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with job.open("a") as file:
        file.write("run: {}\n")
    text = job.read_text().replace("steps: 6", "steps: 60").replace("eval_every: 4", "eval_every: 30")
    job.write_text(text)
    events = train_with_events(job, tmp_path / "events", monkeypatch)
    early, late = losses(events, "validation", "val_loss")
    assert losses(events, "step", "loss")[0] > 5.3
    assert late < early < 3.0


def test_the_launchers_job_is_read_from_the_environment(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    resolved = tmp_path / "job.json"
    resolved.write_text(load_job(job, ["name=resolved", "train.steps=1"]).model_dump_json(by_alias=True))
    monkeypatch.setenv("DSTRAIN_JOB", str(resolved))
    assert trainer.main([]) == 0
    assert capfd.readouterr().out.startswith("resolved: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "data.path=nowhere"], "data.path: cannot read nowhere: No such file or directory"),
        (["--set", "train.stepz=3"], "--set train.stepz=3: train.stepz: expected one of "),
        (["--resume", ""], "--resume: expected auto, a step or a path, found nothing"),
        (
            ["--set", "batch.global=13", "--set", "batch.micro=13", "--set", "data.validation_fraction=0.005"],
            "data.path: expected at least 32 tokens (twice sequence_length), found 22; ",
        ),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_2(
    job: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert trainer.main([str(job), *arguments]) == 2
    error = capfd.readouterr().err
    assert error.startswith(f"dstrain: {message}")
    assert error.count("\n") == 1


def test_without_any_job(capfd: pytest.CaptureFixture[str]) -> None:
    assert trainer.main([]) == 2
    assert "expected a job.yaml as the argument, or its resolved form in DSTRAIN_JOB" in capfd.readouterr().err


def test_a_batch_that_does_not_divide_names_every_factor(
    run_ranks: RunRanks, job: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_ranks(4, lambda rank: trainer.main([str(job)])) == [2, 2, 2, 2]
    wanted = "expected a multiple of batch.micro × data ranks = 2 × 4 = 8, found 12; the nearest is 16"
    assert capfd.readouterr().err.splitlines() == [f"dstrain: batch.global: {wanted}"], "said once"


def test_an_error_before_the_ranks_have_met_is_said_once(
    run_ranks: RunRanks, job: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_ranks(3, lambda rank: trainer.main([str(job), "--set", "train.stepz=3"])) == [2, 2, 2]
    assert capfd.readouterr().err.count("train.stepz: expected one of") == 1


@pytest.mark.parametrize("wrong", [{1: "zero.stage=9"}, {0: "zero.stage=8", 1: "zero.stage=9", 2: "zero.stage=9"}])
def test_what_only_one_rank_has_to_say_is_never_lost(
    run_ranks: RunRanks, job: Path, capfd: pytest.CaptureFixture[str], wrong: dict[int, str]
) -> None:
    run_ranks(3, lambda rank: rank in wrong and trainer.main([str(job), "--set", wrong[rank]]))
    said = [line.partition(" zero.stage:")[0] for line in capfd.readouterr().err.splitlines()]
    assert sorted(said) == sorted(f"dstrain: --set {override}:" for override in wrong.values())


def test_a_fixed_loss_scale_that_is_too_high_stops_all_ranks(
    run_ranks: RunRanks, job: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(job), "--set", "precision={dtype: fp16, loss_scale: {value: 1e30}}", "--set", "train.steps=50"]
    assert run_ranks(2, lambda rank: trainer.main(arguments)) == [206, 206]
    said = capfd.readouterr()
    assert "precision.loss_scale.value: expected a scale at which gradients are finite, found 10 steps" in said.err
    assert "step  8/50" in said.out
    assert "step 10/50" not in said.out


def test_divergence_stops_all_ranks_with_206(run_ranks: RunRanks, job: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = [str(job), "--set", "optimizer.lr=1e38", "--set", "train.clip=null", "--set", "train.steps=50"]
    assert run_ranks(2, lambda rank: trainer.main(arguments)) == [206, 206]
    (said,) = capfd.readouterr().err.splitlines()
    assert re.match(r"dstrain: step \d+: expected a finite (loss|gradient), found ", said)
