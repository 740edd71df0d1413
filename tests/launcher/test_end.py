"""Whatever is killed, cut off or stopped: the run ends within its bound, names the cause, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time

import pytest

import lab

pytestmark = [pytest.mark.lab]

TREE = """
import os, signal, subprocess
rank, mark = os.environ["RANK"], os.environ["MARK"]
subprocess.Popen(["sleep", mark])                                         # a child
subprocess.Popen(["setsid", "sh", "-c", f"sleep {mark} & sleep {mark}"])  # a daemon with a child
subprocess.Popen(["env", "-i", "setsid", "sleep", mark])                  # one without our environment
open(f"{rank}.ready", "w").close()
signal.pause()
"""
STUBBORN = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + TREE
KILLED_AFTER_S = 5.0  # workers are dead this long after the agent, the session or the head was killed


@pytest.fixture
def running(light, start, script):
    """A run on two light hosts with two ranks each, each rank with children of its own."""
    run = start("-H", light.hostfile(names=["h1", "h2"]), script(TREE), env=light.env)
    run.wait_ready(4)
    return run


def test_killed_worker_is_the_cause(running):
    at = time.monotonic()
    os.kill(running.rank_pid(3), signal.SIGKILL)
    assert running.wait(10) == 137
    running.wait_gone(5, at)
    cause = running.report["cause"]
    assert (cause["rank"], cause["host"]) == (3, "h2")
    assert "rank 3 on h2 died of SIGKILL" in running.err


@pytest.mark.parametrize(
    ("victim", "code"),
    [
        ("dstrain-agent", 207),
        ("sshd", 200),
        pytest.param("dstrain-warden", 207, marks=pytest.mark.slow),
        pytest.param("zygote", 207, marks=pytest.mark.slow),
    ],
)
def test_killed_part_of_a_host(running, victim, code):
    pid = lab.parent(running.rank_pid(2)) if victim == "zygote" else running.ancestor(2, victim)
    at = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    running.wait_gone(KILLED_AFTER_S, at)
    assert running.wait(15) == code, running.err
    assert "h2" in running.report["cause"]["headline"]
    assert running.report["origin"] == "launcher"


def test_killed_supervisor(running):
    at = time.monotonic()
    os.kill(running.supervisor, signal.SIGKILL)
    running.wait_gone(KILLED_AFTER_S, at)
    assert running.wait(5) == 137
    assert "supervisor" in running.report["cause"]["headline"]


def test_killed_console(running):
    at = time.monotonic()
    running.process.kill()
    running.wait_gone(KILLED_AFTER_S, at)
    lab.wait_for((running.directory / "report.json").exists, "the supervisor's report")
    assert running.report["exit_code"] == 129


def test_local_run_survives_nothing_either(start, script):
    run = start(script(TREE))
    run.wait_ready(2)
    at = time.monotonic()
    os.kill(run.supervisor, signal.SIGKILL)
    run.wait_gone(KILLED_AFTER_S, at)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGHUP, 129),  # Ctrl-C is below, SIGTERM what ends runs of other tests
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),
    ],
)
def test_signal_to_the_console_ends_the_run(running, number, code):
    at = time.monotonic()
    running.process.send_signal(number)
    assert running.wait(15) == code
    running.wait_gone(15, at)
    assert running.report["exit_code"] == code


def test_ctrl_c_once_lets_ranks_save(light, start, script):
    text = """
import os, signal, time
rank = os.environ["RANK"]
def save(*_):
    open(f"{rank}.saved", "w").close()
    raise SystemExit(0)
signal.signal(signal.SIGTERM, save)
open(f"{rank}.ready", "w").close()
time.sleep(600)
"""
    run = start("-H", light.hostfile(names=["h1", "h2"]), script(text), env=light.env)
    run.wait_ready(4)
    run.process.send_signal(signal.SIGINT)
    assert run.wait(15) == 130
    assert sorted(path.name for path in run.folder.glob("*.saved")) == [f"{rank}.saved" for rank in range(4)]


def test_ctrl_c_twice_kills_at_once(light, start, script):
    run = start("-H", light.hostfile(names=["h1", "h2"]), "--grace", "60", script(STUBBORN), env=light.env)
    run.wait_ready(4)
    run.process.send_signal(signal.SIGINT)
    lab.wait_for(lambda: "stopping" in run.err, "the first Ctrl-C to be heard")
    at = time.monotonic()
    run.process.send_signal(signal.SIGINT)
    run.wait_gone(3, at)
    assert run.wait(5) == 130


def test_stubborn_ranks_are_killed_after_the_grace(light, start, script):
    run = start("-H", light.hostfile(names=["h1"]), "--grace", "1", script(STUBBORN), env=light.env)
    run.wait_ready(2)
    at = time.monotonic()
    run.process.send_signal(signal.SIGINT)
    assert run.wait(15) == 130
    run.wait_gone(15, at)


@pytest.mark.slow  # test_hang.py has its twin
def test_stopped_rank_is_named(running):
    at = time.monotonic()
    os.kill(running.rank_pid(1), signal.SIGSTOP)
    assert running.wait(30) == 203
    assert "rank 1 on h1" in running.report["cause"]["headline"]
    running.wait_gone(40, at)


def test_stopped_agent_does_not_keep_its_ranks(running):
    """Its silence loses the host; its warden ends what it no longer can."""
    at = time.monotonic()
    agent = running.ancestor(2, "dstrain-agent")
    os.kill(agent, signal.SIGSTOP)
    assert running.wait(25) == 200
    running.wait_gone(20, at)


@pytest.mark.slow
def test_another_job_of_the_same_user_is_untouched(light, start, script, tmp_path):
    text = TREE.replace("signal.pause()", "import time\nwhile not os.path.exists('end'): time.sleep(0.05)")
    hostfile = light.hostfile(names=["h1", "h2"])
    neighbour = start("-H", hostfile, script(text), env=light.env, folder=tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "job.py").write_text(TREE)
    run = start("-H", hostfile, "job.py", env=light.env, folder=tmp_path / "other")
    neighbour.wait_ready(4)
    run.wait_ready(4)
    before = set(neighbour.workers())
    os.kill(run.ancestor(0, "dstrain-agent"), signal.SIGKILL)
    assert run.wait(20) == 207
    assert set(neighbour.workers()) == before
    (tmp_path / "end").touch()
    assert neighbour.wait(20) == 0


def test_leftovers_of_a_good_run_are_swept(light, start, script):
    text = TREE.replace("signal.pause()", "")
    run = start("-H", light.hostfile(names=["h1", "h2"]), script(text), env=light.env)
    assert run.wait(30) == 0, run.err
    run.wait_gone(1)


LEAVES_EARLY = """
import os, torch, torch.distributed as dist
dist.init_process_group("gloo")
dist.all_reduce(torch.ones(1))
if dist.get_rank() == 1:
    os._exit(0)
dist.all_reduce(torch.ones(1))
"""
NEVER_JOINS = """
import os, torch.distributed as dist
if os.environ["RANK"] == "1":
    raise SystemExit(0)
dist.init_process_group("gloo")
"""


@pytest.mark.slow
@pytest.mark.parametrize("text", [LEAVES_EARLY, NEVER_JOINS])
def test_rank_that_leaves_early_is_named(light, start, script, text):
    run = start("-H", light.hostfile(names=["h1", "h2"]), script(text), env=light.env)
    assert run.wait(30) == 208, run.err
    assert "rank 1 on h1 left early" in run.err
    run.wait_gone(10)


@pytest.mark.slow
def test_rank_that_ends_later_is_no_error(start, script):
    text = "import os, time\nif os.environ['RANK'] == '0': time.sleep(9)\nprint('saved')\n"
    run = start(script(text))
    assert run.wait(30) == 0, run.err


def test_one_cause_and_a_count_of_its_victims(light, start, script):
    text = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
dist.all_reduce(torch.ones(1))
if dist.get_rank() == 2:
    raise RuntimeError("this one")
dist.all_reduce(torch.ones(1))
"""
    run = start("-H", light.hostfile(names=["h1", "h2"]), script(text), env=light.env)
    assert run.wait(30) == 1
    cause = run.report["cause"]
    assert cause["rank"] == 2
    assert "RuntimeError: this one" in cause["detail"]
    assert cause["victims"] == 3
    assert "closed by peer" not in run.err.partition("rank 2 on h2 failed")[2]


@pytest.mark.slow
def test_store_outlives_the_host_that_holds_it(light, start, script):
    """Rank 0's host is done; the ranks of the other still meet in the store."""
    text = """
import os, torch.distributed as dist
dist.init_process_group("gloo")
store = dist.distributed_c10d._get_default_store()
store.add("in", 1)
while store.add("in", 0) < 3: pass
if dist.get_rank() == 0:
    os._exit(0)
while not os.path.exists("gone"): pass
store.add("met", 1)
while store.add("met", 0) < 2: pass
os._exit(0)
"""
    run = start("--hosts", "h1:1,h2:2", script(text), env=light.env)
    events = run.directory / "events.jsonl"
    lab.wait_for(lambda: events.exists() and '"of": 0' in events.read_text(), "rank 0 to leave")
    (run.folder / "gone").touch()
    assert run.wait(30) == 0, run.err


@pytest.mark.slow
def test_ctrl_c_keeps_its_grace_when_the_console_dies_of_it(start, script):
    """`dstrain run … | tee log`: Ctrl-C ends tee too, and the console then writes into nothing."""
    text = """
import os, signal, sys, time
def save(*_):
    for number in range(20):
        print("saving", number)
        time.sleep(0.05)
    open(os.environ["RANK"] + ".saved", "w").close()
    raise SystemExit(0)
signal.signal(signal.SIGTERM, save)
open(os.environ["RANK"] + ".ready", "w").close()
time.sleep(600)
"""
    read, write = os.pipe()
    run = start(script(text), stdout=write)
    os.close(write)
    run.wait_ready(2)
    run.process.send_signal(signal.SIGINT)
    os.close(read)
    run.wait(15)
    lab.wait_for(lambda: len(list(run.folder.glob("*.saved"))) == 2, "both ranks to save")


@pytest.mark.parametrize("after_s", [0.3, 0.6, 1.0, 1.5])
def test_ctrl_c_at_any_time_ends_cleanly(light, start, script, after_s):
    run = start("-H", light.hostfile(names=["h1", "h2"]), script(TREE), env=light.env)
    time.sleep(after_s)  # the moment itself is what is tested
    run.process.send_signal(signal.SIGINT)
    run.wait(20)
    run.wait_gone(15)


# --- links, in namespaces ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["down", "blackhole"])
def test_cut_off_host_is_noticed_and_ends_its_own_ranks(net, start, script, fault):
    run = start("-H", net.hostfile(), script(TREE), env=net.env)
    run.wait_ready(4)
    lost = net.hosts["nb"]
    at, at_ns = time.monotonic(), time.time_ns()
    if fault == "down":
        lost.link("down")
    else:
        subprocess.run(["ip", "route", "add", "blackhole", f"{lost.address}/32"], check=True)
    try:
        assert run.wait(30) == 200
        assert "host nb was lost" in run.err
        run.wait_gone(20, at)
    finally:
        if fault == "blackhole":
            subprocess.run(["ip", "route", "del", "blackhole", f"{lost.address}/32"], check=True)
    events = [json.loads(line) for line in (run.directory / "events.jsonl").read_text().splitlines()]
    noticed = next(event for event in events if event["kind"] == "host_lost")
    assert noticed["host"] == "nb"
    assert noticed["ts"] - at_ns <= 10e9
