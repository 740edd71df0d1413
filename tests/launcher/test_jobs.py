"""A job.yaml under the launcher: its options, saving, resuming, another attempt."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

import lab

pytestmark = pytest.mark.lab

YAML = """
name: tiny
model: {gpt: {layers: 1, width: 16, heads: 2, context: 16}}
data: {path: %s}
batch: {global: 8, micro: 2}
train: {steps: 100000, sample_bytes: 0, eval_samples: 4}
checkpoint: {every_steps: 20}
log: {every: 1}
"""


@pytest.fixture
def job(tmp_path: Path) -> Path:
    (tmp_path / "text").write_bytes(b"the quick brown fox jumps over the lazy dog\n" * 100)
    (tmp_path / "job.yaml").write_text(YAML % (tmp_path / "text"))
    return tmp_path / "job.yaml"


def events(run: Any, *kinds: str) -> list[dict[str, Any]]:
    lines = (run.directory / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] in kinds and event.get("rank") == 0]


def wait_for_step(run: Any, step: int) -> None:
    def reached() -> bool:
        return any(event["step"] >= step for event in events(run, "step"))

    lab.wait_for(lambda: run.directory and (run.directory / "events.jsonl").exists() and reached(), run.err, 60)


def test_ctrl_c_saves_and_resume_goes_on(start, job):
    run = start(job)
    wait_for_step(run, 3)
    os.kill(run.process.pid, signal.SIGINT)
    assert run.wait() == 130, run.err
    saved = events(run, "checkpoint")[-1]
    assert f"stopped behind step {saved['step']} of 100000 (SIGTERM): saved" in run.out
    steps = saved["step"] + 5
    again = start(job, "--resume", "auto", "--set", f"train.steps={steps}", "-n", "1", folder=run.folder)
    assert again.wait() == 0, again.err
    assert f"resumed from step {saved['step']}: checkpoints/tiny/step-{saved['step']}" in again.out
    assert (run.folder / "checkpoints" / "tiny" / f"step-{steps}" / "manifest.json").is_file()


def test_another_attempt_goes_on_from_the_newest_checkpoint(start, job):
    run = start("--max-restarts", "1", job)
    wait_for_step(run, 21)
    lab.wait_for(lambda: events(run, "checkpoint"), "the first checkpoint to stand", 60)  # some steps later
    os.kill(run.rank_pid(1), signal.SIGKILL)
    lab.wait_for(lambda: events(run, "resume"), "the second attempt", 60)
    os.kill(run.process.pid, signal.SIGINT)
    assert run.wait() == 130, run.err
    (resumed,) = events(run, "resume")
    assert resumed["attempt"] == 1
    assert resumed["step"] >= 20
    assert resumed["step"] % 20 == 0
    first = [event["step"] for event in events(run, "step") if event["attempt"] == 1]
    assert first[0] == resumed["step"] + 1
    ledger, last = run.report["ledger"], [event for event in events(run, "step") if event["attempt"] == 0][-1]
    assert ledger["repeated_steps"] == last["step"] - resumed["step"]
    assert ledger["checkpoint_stall_s"] > 0
    assert ledger["attempts"][0]["cause"] == "rank 1 on localhost died of SIGKILL"


def test_options_behind_a_job_are_ours(start, job):
    run = start(job, "--set", "train.steps=2", "-n", "1")
    assert run.wait() == 0, run.err
    assert "done: 2 steps" in run.out
    run = start(job, "more", folder=run.folder / "other")
    assert run.wait() == 2
    assert "expected nothing behind" in run.err


def test_resume_needs_a_job(start, script):
    run = start("--resume", "auto", script("pass"))
    assert run.wait() == 2
    assert run.err.startswith("dstrain: --resume: expected a job.yaml that says where checkpoints are, found target ")
