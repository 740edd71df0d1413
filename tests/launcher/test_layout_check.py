"""Layouts that cannot be are refused by the head, in the ranks' words, before any host is touched."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import lab
from dstrain.launcher.planning.layout_check import _has_schedule_here
from dstrain.runtime.spec.load import job_of

pytestmark = pytest.mark.lab

JOB = """
model: {gpt: {layers: 2, width: 16, heads: 2, context: 16}}
batch: {global: 8, micro: 1}
train: {steps: 1}
"""
NOWHERE = "no-such-host.invalid"
DEADLOCK = "0F0,0B0,0F1,0B1\n1F1,1B1,1F0,1B0\n"
OWN = ["parallel.pipeline=2", "parallel.schedule=own.csv"]
AS_RANKS = "import sys; from dstrain.runtime import trainer; sys.exit(trainer.main([]))"


@pytest.fixture
def job(tmp_path: Path) -> Path:
    (tmp_path / "own.csv").write_text(DEADLOCK)
    path = tmp_path / "job.yaml"
    path.write_text(JOB)
    return path


def settings(keys: list[str]) -> list[str]:
    return [word for key in keys for word in ("--set", key)]


CASES = [
    (["parallel.pipeline=3"], "parallel.pipeline: expected a divisor of 4 ranks, found 3 (pipeline 3 × "),
    ([*OWN, "batch.global=4"], "found a deadlock: rank 0 at cell 1 (0B0) waits"),
    (
        ["parallel.pipeline=2", "parallel.partition=[2, 1]"],
        "parallel.partition: expected all 4 layers of the model, found 2 + 1 = 3",
    ),
]
MORE = [
    (["zero.stage=2", "parallel.data_shard=3"], "parallel.data_shard: expected data_shard × data_replicate = 4 ranks"),
    (
        ["parallel.pipeline=2", "batch.global=9"],
        "batch.global: expected a multiple of batch.micro × data ranks = 1 × 2 = 2 (4 ranks / pipeline 2 = 2), found 9",
    ),
    (["batch.global=6"], "batch.global: expected a multiple of batch.micro × data ranks = 1 × 4 = 4, found 6"),
    (["parallel.pipeline=2", "parallel.schedule=1f1"], "parallel.schedule: expected one of gpipe, 1f1b"),
    ([*OWN, "batch.global=8"], "schedule own.csv, rank 0, cell 4: expected 0F2"),
    (["parallel.pipeline=4", *OWN[1:], "batch.global=2"], "own.csv: expected 4 lines, found 2"),
    (["parallel.pipeline=2", "parallel.partition=[1, 1, 2]"], "parallel.partition: expected 2 numbers, one for each"),
    (
        ["parallel.pipeline=4", "parallel.schedule=zb_v"],
        "parallel.pipeline: expected at most the 4 layers of the model, found 8 stages",
    ),
]


@pytest.mark.parametrize(
    ("keys", "said"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)],
    ids=lambda value: str(value)[:40],
)
def test_no_host_is_touched(job: Path, start, keys: list[str], said: str) -> None:
    """A host that does not exist would end with 200."""
    run = start("--hosts", f"{NOWHERE}:4", *settings(keys), job.name)
    assert run.wait() == 2, run.err
    assert run.err.startswith("dstrain: "), run.err
    assert said in run.err
    assert NOWHERE not in run.err
    assert not (run.folder / "runs").exists()


@pytest.mark.parametrize(
    "keys",
    [
        pytest.param(["parallel.pipeline=3"], id="pipeline", marks=pytest.mark.slow),
        pytest.param([*OWN, "batch.global=2"], id="schedule"),
    ],
)
def test_the_ranks_say_the_same(job: Path, start, script, tmp_path: Path, keys: list[str]) -> None:
    """Ranks of a script, whose layout is its own, so that the head says nothing of it."""
    head = start("-n", "2", *settings(keys), job.name)
    assert head.wait() == 2, head.err
    said = [line.removeprefix("dstrain: ") for line in head.err.splitlines()]
    assert said
    ranks = start("-n", "2", "-c", job.name, *settings(keys), script(AS_RANKS))
    assert ranks.wait() == 2, ranks.err
    assert ranks.report["origin"] == "worker"
    told = [line.partition("] ")[2].removeprefix("dstrain: ") for line in ranks.err.splitlines()]
    assert any(told[place : place + len(said)] == said for place in range(len(told))), ranks.err


def test_a_preview_is_refused_too(job: Path, start) -> None:
    run = start("--dry-run", "--hosts", f"{NOWHERE}:4", "--set", "parallel.pipeline=3", job.name)
    assert run.wait() == 2
    assert "expected a divisor of 4 ranks" in run.err


def test_a_directory_that_is_gone_has_no_schedule(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    config = job_of(yaml.safe_load(JOB) | {"parallel": {"pipeline": 2, "schedule": "own.csv"}})
    assert not _has_schedule_here(config, str(gone))


@pytest.mark.slow
def test_a_schedule_that_is_on_the_hosts_alone_is_theirs_to_read(job: Path, start, tmp_path: Path) -> None:
    (tmp_path / "own.csv").unlink()
    words = ["--hosts", f"{NOWHERE}:2", *settings([*OWN, "batch.global=2"])]
    assert start(*words, job.name).wait() == 2
    run = start(*words, "--cwd", "/elsewhere", job.name)
    assert run.wait() == 200, "it is looked for there"


@pytest.mark.slow
def test_gpus_that_only_the_hosts_can_count(light: lab.Lab, start, job: Path) -> None:
    """The ranks are known once the hosts have answered; none is started."""
    words = ["--hosts", "h1", "--env", "CUDA_VISIBLE_DEVICES=0,1,2", "--set", "parallel.pipeline=2"]
    run = start(*words, job.name, env=light.env)
    assert run.wait() == 2, run.err
    assert "parallel.pipeline: expected a divisor of 3 ranks, found 2" in run.err
    assert run.report["origin"] == "launcher"
    assert run.report["attempts"] == []
