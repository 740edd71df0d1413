"""Steps that do not come any more: who is named, when, and what is kept of it."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

import lab

pytestmark = pytest.mark.lab

STEPS = """
import os, sys, time
import torch, torch.distributed as dist
from dstrain.runtime.spec.event import EventWriter


def stuck():
    FAULT


dist.init_process_group("gloo")
rank, events = dist.get_rank(), EventWriter.from_environment()
events.emit("start", world_size=dist.get_world_size())
for step in range(1, 10_000):
    if step == 10 and rank == 1 and os.environ["DSTRAIN_ATTEMPT"] == "0":
        stuck()
    dist.all_reduce(torch.ones(1))
    if os.environ["DSTRAIN_ATTEMPT"] == "1" and step == 20:
        break
    time.sleep(0.02)
    events.emit("step", step=step, step_s=0.02)
events.emit("end")
"""
FAULT_LINE = 1 + next(number for number, line in enumerate(STEPS.splitlines()) if "FAULT" in line)


def steps(fault: str) -> str:
    return STEPS.replace("FAULT", fault)


def events(run: Any, *kinds: str) -> list[dict[str, Any]]:
    path = run.directory / "events.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [event for event in map(json.loads, lines) if event["kind"] in kinds]


def detection_s(run: Any) -> float:
    """From the last step of any rank to the moment when the launcher knew."""
    (failure,) = events(run, "failure")
    return float(failure["detected_ts"] - max(event["ts"] for event in events(run, "step"))) / 1e9


def stacks_of(run: Any, attempt: int = 0) -> dict[int, str]:
    found = (run.directory / "logs" / f"attempt-{attempt}").glob("*/rank-*.stacks")
    return {int(path.stem.removeprefix("rank-")): path.read_text() for path in found}


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        "while True: pass",
        pytest.param("time.sleep(600)", marks=pytest.mark.slow),
        pytest.param("os.read(os.pipe()[0], 1)", marks=pytest.mark.slow),
    ],
)
def test_the_rank_that_the_others_wait_for_is_named(light, start, script, fault):
    hostfile = light.hostfile(names=["h1", "h2"])
    run = start("-H", hostfile, "--hang-timeout", 4, "--grace", 1, script(steps(fault)), env=light.env)
    assert run.wait(60) == 203, run.err
    assert 4 <= detection_s(run) < 10
    cause = run.report["cause"]
    assert (run.report["origin"], cause["rank"], cause["host"]) == ("launcher", 1, "h1")
    place = rf"stuck \(job\.py:{FAULT_LINE}\)"
    assert re.search(rf"rank 1 on h1 hangs in {place}, ranks 0,2-3 wait for it: no step for \d+ s", run.err)
    assert f'File "{run.folder}/job.py", line {FAULT_LINE} in stuck' in cause["detail"]
    assert re.search(rf"dstrain: no step for \d+ s: rank 1 on h1 is in {place}, ranks 0,2-3 wait for it", run.err)
    kept = stacks_of(run)
    assert sorted(kept) == [0, 1, 2, 3]
    assert "in stuck" in kept[1]
    assert all("in all_reduce" in kept[rank] for rank in (0, 2, 3))
    run.wait_gone(5)


def test_a_restart_goes_on_and_the_ledger_says_what_it_cost(light, start, script):
    hostfile = light.hostfile(1, names=["h1", "h2"])
    words = ["--hang-timeout", 4, "--grace", 1, "--max-restarts", 1, script(steps("time.sleep(600)"))]
    run = start("-H", hostfile, *words, env=light.env)
    assert run.wait(90) == 0, run.err
    ledger = run.report["ledger"]
    assert (ledger["restarts"], ledger["repeated_steps"]) == (1, 9)
    assert 4 <= ledger["detection_s"] < 10
    assert 0 < run.report["goodput"] < 0.5
    parts = [value for name, value in ledger.items() if name.endswith("_s") and name != "total_s"]
    assert sum(parts) == pytest.approx(ledger["total_s"], abs=0.01)
    assert ledger["total_s"] == pytest.approx(run.report["ended"] - run.report["started"], abs=0.5)
    assert re.search(r"dstrain: goodput [\d.]+ %: .* lost by 1 restart \(9 steps again\)", run.err)


@pytest.mark.slow
def test_a_slow_step_is_spoken_of_and_left_alone(start, script):
    run = start("--hang-timeout", 8, script(steps("time.sleep(5.5)").replace("10_000", "30")))
    assert run.wait(60) == 0, run.err
    assert re.search(r"no step for \d s: rank 1 on localhost is in stuck \(job\.py", run.err)
    assert run.err.count("no step for") == 1
    assert "lost" not in run.err


@pytest.mark.slow
def test_a_script_that_reports_no_steps_is_not_watched(start, script):
    text = "import os, time, torch.distributed as d\nd.init_process_group('gloo')\n"
    text += "if os.environ['RANK'] == '1': time.sleep(6)\nd.barrier()\nd.destroy_process_group()\n"
    run = start("--hang-timeout", 2, script(text))
    assert run.wait(60) == 0, run.err
    assert "no step" not in run.err


@pytest.mark.slow
def test_it_can_be_switched_off(start, script):
    run = start("--hang-timeout", 0, script(steps("time.sleep(600)")))
    lab.wait_for(lambda: len(events(run, "step")) >= 18, "the steps before the fault", 40)
    with pytest.raises(AssertionError, match="still running"):
        run.wait(6)


def test_a_stopped_rank_is_named_and_the_stacks_of_the_others_are_kept(light, start, script):
    """With the usual times: max(30 s, 3 median steps) is promised."""
    run = start("-H", light.hostfile(names=["h1", "h2"]), script(steps("pass")), env=light.env)
    lab.wait_for(lambda: len(events(run, "step")) > 40, "some steps", 40)
    at = time.monotonic()
    os.kill(run.rank_pid(2), signal.SIGSTOP)
    assert run.wait(40) == 203, run.err
    (failure,) = events(run, "failure")
    assert failure["of"] == 2
    assert detection_s(run) < 15
    assert "rank 2 on h2 hangs: it is stopped (SIGSTOP)" in run.err
    kept = stacks_of(run)
    assert "in all_reduce" in kept[0]
    assert "process state T" in kept[2]
    assert "no answer" in kept[2]
    run.wait_gone(30, at)


DATA = """
import os, threading
import torch


class Digits(torch.utils.data.Dataset):
    calls = 0

    def __len__(self):
        return 1000

    def __getitem__(self, index):
        Digits.calls += 1
        if Digits.calls > 60 and os.environ.get("RANK") == "1":
            threading.Event().wait()  # STUCK
        return torch.full((4,), index / 1000), index % 2


class Model(torch.nn.Linear):
    def __init__(self):
        super().__init__(4, 2)
"""
JOB = """
name: stuck
run: {hang_s: 4, grace_s: 1.0}
model: {factory: "digits:Model"}
data: {factory: "digits:Digits", prefetch: PREFETCH}
batch: {global: 8, micro: 4}
train: {steps: 1000, loss: "torch.nn.functional:cross_entropy"}
"""


@pytest.mark.slow
@pytest.mark.parametrize("prefetch", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_data_set_that_blocks_is_named_also_in_its_thread(start, tmp_path: Path, prefetch):
    """The rank's main thread only waits for its loader; the line that is to blame is on another."""
    (tmp_path / "digits.py").write_text(DATA)
    (tmp_path / "job.yaml").write_text(JOB.replace("PREFETCH", str(prefetch)))
    line = 1 + next(number for number, text in enumerate(DATA.splitlines()) if "STUCK" in text)
    run = start("-n", 2, "job.yaml")
    assert run.wait(60) == 203, run.err + run.out
    cause = run.report["cause"]
    assert cause["rank"] == 1
    assert f"rank 1 on localhost hangs in __getitem__ (digits.py:{line}), rank 0 waits for it" in cause["headline"]
    assert f'digits.py", line {line} in __getitem__' in cause["detail"]


@pytest.mark.slow
def test_a_rank_that_cannot_answer_is_named_by_its_state(light, start, script):
    """Who waits for a child of vfork(2) sleeps uninterruptibly, as on a network disk that is gone."""
    fault = "os.mkfifo('pipe'); actions = [(os.POSIX_SPAWN_OPEN, 0, 'pipe', os.O_RDONLY, 0)]; "
    fault += "os.posix_spawn('/bin/true', ['true'], {}, file_actions=actions)"
    hostfile = light.hostfile(1, names=["h1", "h2"])
    run = start("-H", hostfile, "--hang-timeout", 7, "--grace", 1, script(steps(fault)), env=light.env)
    assert run.wait(60) == 203, run.err
    disk = "waits for a disk or a network file system"
    assert re.search(rf"no step for \d s: rank 1 on h2 {disk}", run.err)
    assert re.search(rf"rank 1 on h2 hangs in stuck \(job\.py:8\): it {disk}", run.err)
    assert re.search(r"process state D.*, step 9 done\nno answer", stacks_of(run)[1])  # of its main thread, first
    run.wait_gone(5)
