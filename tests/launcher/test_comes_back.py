"""A job that comes back by itself: on the same hosts, on spares, on fewer; and one that must not."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import lab

pytestmark = pytest.mark.lab

WAIT_AND_SAY = """
import json, os, signal
attempt, rank = os.environ["DSTRAIN_ATTEMPT"], os.environ["RANK"]
open(f"{attempt}-{rank}.ready", "w").close()
if attempt == "0":
    signal.pause()
names = ("DSTRAIN_HOST", "RANK", "WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "MASTER_ADDR")
print(*(os.environ[name] for name in names))
if "DSTRAIN_JOB" in os.environ:
    print(json.dumps(json.load(open(os.environ["DSTRAIN_JOB"]))["batch"]))
"""


def hostfile(folder: Path, *lines: str) -> Path:
    (folder / "hosts").write_text("".join(f"{line}\n" for line in lines))
    return folder / "hosts"


def wait_ready(run: Any, attempt: int, ranks: int, timeout_s: float = 40.0) -> None:
    names = [f"{attempt}-{rank}.ready" for rank in range(ranks)]
    lab.wait_for(lambda: all((run.folder / name).exists() for name in names), f"ranks\n{run.out}{run.err}", timeout_s)


def said(run: Any) -> list[list[str]]:
    """The words of each rank of the attempts behind the first."""
    return sorted(line.partition("] ")[2].split() for line in run.out.splitlines())


def events(run: Any, kind: str) -> list[dict[str, Any]]:
    lines = (run.directory / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == kind]


def plan_of(run: Any, attempt: int) -> dict[str, Any]:
    plan: dict[str, Any] = json.loads((run.directory / run.report["attempts"][attempt]["plan"]).read_text())
    return plan


# --- hosts that are lost -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("victim", "hosts"), [(2, ["h1", "h3"]), (0, ["h2", "h3"])])
def test_a_spare_takes_the_place_of_a_host_whose_agent_is_killed(light, start, script, tmp_path, victim, hosts):
    """Also of rank 0's: then the store is the next host's."""
    file = hostfile(tmp_path, "h1 slots=2", "h2 slots=2", "h3 slots=2 spare")
    run = start("-H", file, "--max-restarts", "1", script(WAIT_AND_SAY), env=light.env)
    wait_ready(run, 0, 4)
    os.kill(run.ancestor(victim, "dstrain-agent"), signal.SIGKILL)
    assert run.wait() == 0, run.err
    address = {"h1": "127.0.0.2", "h2": "127.0.0.3"}[hosts[0]]
    assert said(run) == [[hosts[rank // 2], str(rank), "4", str(rank // 2), "2", address] for rank in range(4)]
    gone = "h2" if victim else "h1"
    assert f"{gone} is set aside: its agent was lost" in run.err
    assert f"starting again on h[{hosts[0][1]},3] (1 of 1 left)" in run.err.replace("-", ",")
    first, second = run.report["attempts"]
    assert (first["hosts"], second["hosts"]) == (["h1", "h2"], hosts)
    assert first["cause"]["code"] == 207
    assert first["ended"] < second["started"] < second["ended"]
    assert (first["restart"], second["restart"]) == (None, first["cause"]["headline"])
    assert list(first["set_aside"]) == list(run.report["set_aside"]) == [gone]
    assert (second["cause"], second["world_size"], run.report["no_restart"]) == (None, 4, None)
    assert (first["plan"], second["plan"]) == ("plan.json", "plan-attempt-1.json")
    assert (plan_of(run, 0)["spares"], plan_of(run, 1)["spares"]) == (["h3"], [])
    assert [node["host"] for node in plan_of(run, 1)["nodes"]] == hosts
    assert run.log(hosts[0], 1, attempt=1)
    assert not (run.directory / "logs" / "attempt-0" / "h3").exists()


@pytest.mark.slow
def test_without_a_spare_the_lost_host_is_the_end(light, start, script, tmp_path):
    file = hostfile(tmp_path, "h1 slots=1", "h2 slots=1")
    run = start("-H", file, "--max-restarts", "3", script(WAIT_AND_SAY), env=light.env)
    wait_ready(run, 0, 2)
    os.kill(run.ancestor(1, "dstrain-agent"), signal.SIGKILL)
    assert run.wait() == 207, run.err
    why = "1 of 2 hosts left, 2 needed; a spare host or --min-nodes 1 would let it go on"
    assert f"dstrain: not started again: {why}\n" in run.err
    assert run.report["no_restart"] == why
    assert len(run.report["attempts"]) == 1
    assert "h2" in run.report["cause"]["headline"]


def test_on_fewer_hosts_the_job_keeps_its_global_batch(light, start, script, tmp_path):
    (tmp_path / "job.yaml").write_text("batch: {global: 12, micro: 4}\nzero: {stage: 1}\nparallel: {data_shard: 3}\n")
    file = hostfile(tmp_path, "h1 slots=1", "h2 slots=1", "h3 slots=1")
    words = ["-H", file, "--max-restarts", "1", "--min-nodes", "2", "-c", tmp_path / "job.yaml"]
    run = start(*words, script(WAIT_AND_SAY), env=light.env)
    wait_ready(run, 0, 3)
    os.kill(run.ancestor(1, "dstrain-agent"), signal.SIGKILL)
    assert run.wait() == 0, run.err
    assert run.out.count('{"global": 12, "micro": 3}') == 2, run.out
    assert [words[:5] for words in said(run) if words[0][0] == "h"] == [
        ["h1", "0", "2", "0", "2"],
        ["h3", "1", "2", "1", "2"],
    ]
    changes = plan_of(run, 1)["changes"]
    assert changes[0] == "batch.global stays 12: 2 ranks × 2 × 3 samples (batch.micro was 4)"
    assert all(f"dstrain: {line}\n" in run.err for line in changes)
    assert len(changes) == 2


PIPED = """
model: {gpt: {layers: 2, width: 16, heads: 2, context: 16}}
batch: {global: 4, micro: 1}
parallel: {pipeline: 2, schedule: own.csv}
train: {steps: 100000}
log: {every: 1}
"""


@pytest.mark.slow
def test_a_schedule_of_too_few_micro_batches_is_not_started_again(light, start, tmp_path):
    """Half the hosts have twice the micro-batches, which the user's file does not have."""
    (tmp_path / "job.yaml").write_text(PIPED)
    (tmp_path / "own.csv").write_text("0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n")
    words = ["-H", hostfile(tmp_path, "h1 slots=2", "h2 slots=2"), "--max-restarts", "3", "--min-nodes", "1"]
    run = start(*words, "job.yaml", env=light.env)
    lab.wait_for(lambda: " loss " in run.out, "the first steps", 60)
    os.kill(run.ancestor(3, "dstrain-agent"), signal.SIGKILL)
    assert run.wait() == 207, run.err
    assert "dstrain: not started again: schedule own.csv, rank 0, cell 4: expected 0F2" in run.err
    assert len(run.report["attempts"]) == 1


@pytest.mark.slow
def test_a_host_that_fails_twice_in_a_row_gives_its_place_to_a_spare(light, start, script, tmp_path):
    text = "import os\nif os.environ['DSTRAIN_HOST'] == 'h2':\n    raise OSError('this disk is broken')\nprint('well')"
    file = hostfile(tmp_path, "h1 slots=1", "h2 slots=1", "h3 slots=1 spare")
    run = start("-H", file, "--max-restarts", "5", script(text), env=light.env)
    assert run.wait() == 0, run.err
    assert [one["hosts"] for one in run.report["attempts"]] == [["h1", "h2"], ["h1", "h2"], ["h1", "h3"]]
    assert run.report["set_aside"] == {"h2": "its ranks were the root cause twice in a row"}
    assert [list(one["set_aside"]) for one in run.report["attempts"]] == [[], ["h2"], []]
    assert run.log("h3", 1, attempt=2) == b"well\n"


# --- spares --------------------------------------------------------------------------------------------------

WAIT_FOR_GO = "import os, time\nwhile not os.path.exists('go'): time.sleep(0.05)\n"


@pytest.mark.slow
def test_a_spare_that_is_down_does_not_stop_the_start(light, start, script, tmp_path):
    file = hostfile(tmp_path, "h1 slots=1", "down spare addr=127.0.0.1 port=1", "h2 slots=1 spare")
    run = start("-H", file, "--max-restarts", "1", script(WAIT_FOR_GO), env=light.env)
    lab.wait_for(lambda: "spare down is set aside: reachable: " in run.err, run.err)
    assert "spare: down,h2" in run.err
    (tmp_path / "go").touch()
    assert run.wait() == 0, run.err
    assert list(run.report["set_aside"]) == ["down"]
    assert run.report["hosts"] == ["h1"]
    assert run.err.count("set aside") == 1


@pytest.mark.slow
def test_a_spare_that_is_lost_while_it_waits_is_a_note(net, start, script, tmp_path):
    file = hostfile(tmp_path, "na slots=1", "nb slots=1 spare")
    run = start("-H", file, "--max-restarts", "1", script(WAIT_FOR_GO), env=net.env)
    run.rank_pid(0)
    time.sleep(3)  # for the spare to be ready; were it not, it would be lost all the same
    os.kill(net.hosts["nb"].pid, signal.SIGKILL)
    lab.wait_for(lambda: "spare nb is set aside: " in run.err, run.err)
    assert run.process.poll() is None
    (tmp_path / "go").touch()
    assert run.wait() == 0, run.err
    assert len(run.report["attempts"]) == 1


@pytest.mark.slow
def test_spares_are_left_alone_where_there_are_no_restarts(light, start, script, tmp_path):
    file = hostfile(tmp_path, "h1 slots=1", "down spare addr=127.0.0.1 port=1")
    run = start("-H", file, script("print(1)"), env=light.env)
    assert run.wait() == 0, run.err
    assert "spare:" not in run.err
    assert "set aside" not in run.err
    assert "dstrain: 1 spare host is not used: " in run.err
    run = start("-H", hostfile(tmp_path, "h1 spare"), script("print(1)"), folder=tmp_path / "second")
    assert run.wait() == 2
    assert "at least one host that is no spare" in run.err
    run = start("--min-nodes", "2", script("print(1)"), folder=tmp_path / "third")
    assert run.wait() == 2
    assert "--min-nodes, run.min_nodes: expected at most the number of hosts, 1, found 2" in run.err


# --- failures that repeat ------------------------------------------------------------------------------------


def test_two_failures_alike_stop_the_restarts(start, script):
    text = "import os\nraise ValueError(f'{os.getpid()} at {id(os):#x}, attempt ' + os.environ['DSTRAIN_ATTEMPT'])"
    run = start("-n", "1", "--max-restarts", "9", script(text))
    assert run.wait() == 1, run.err
    assert len(run.report["attempts"]) == 2
    assert "not started again: it has failed twice alike without progress (failed with exit code 1: ValueErr" in run.err
    assert "ValueError" in run.report["cause"]["detail"]


@pytest.mark.slow
def test_failures_with_progress_between_them_do_not(start, script):
    text = """
import json, os
step = {"kind": "step", "step": int(os.environ["DSTRAIN_ATTEMPT"]) + 1, "rank": 0}
os.write(int(os.environ["DSTRAIN_EVENT_FD"]), json.dumps(step).encode() + b"\\n")
raise ValueError("again")
"""
    run = start("-n", "1", "--max-restarts", "3", script(text))
    assert run.wait() == 1, run.err
    assert [one["progress"] for one in run.report["attempts"]] == [True] * 4
    assert "not started again: 3 of 3 restarts are used" in run.err


def test_a_fixed_port_is_had_again(start, script):
    """The store of the attempt before holds it until then: its host's ranks have all ended by themselves."""
    text = "import os\nprint(os.environ['MASTER_PORT'])\nraise SystemExit(os.environ['DSTRAIN_ATTEMPT'] == '0')"
    port = lab.free_port()
    run = start("--max-restarts", "1", "--master-port", port, script(text))
    assert run.wait() == 0, run.err
    assert run.log("localhost", 1, attempt=1) == b"%d\n" % port


def test_ctrl_c_ends_a_wait_between_attempts_at_once(start, script):
    """Errors that differ are tried again, behind waits of 0, 1, 2, 4 … s."""
    text = "import os\nraise type('Error' + 'ABCDEFGHI'[int(os.environ['DSTRAIN_ATTEMPT'])], (Exception,), {})"
    run = start("-n", "1", "--max-restarts", "8", script(text))
    lab.wait_for(lambda: "starting again in 4 s (5 of 8 left)" in run.err, run.err, 40)
    at = time.monotonic()
    run.process.send_signal(signal.SIGINT)
    assert run.wait(15) == 130
    assert time.monotonic() - at < 3
    assert [one["cause"]["code"] for one in run.report["attempts"]] == [1] * 4
    begun = [event["ts"] / 1e9 for event in events(run, "launch")]
    waits = [later - earlier for earlier, later in pairwise(begun)]
    assert waits[1] >= 1
    assert waits[2] >= 2


# --- links that are cut, in namespaces -----------------------------------------------------------------------


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[lab.NetLab]:
    """Hosts na, nb, nc, nd in namespaces of their own; they share this machine's disk."""
    with lab.net_hosts(tmp_path_factory.mktemp("net"), 4) as hosts:
        yield hosts


DRILLS = [
    pytest.param(["nd slots=1 spare"], [], ["na", "nc", "nd"], id="spare"),
    pytest.param([], ["--min-nodes", "2"], ["na", "nc"], id="fewer", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("more", "words", "hosts"), DRILLS)
def test_a_cut_link_costs_a_host_not_the_job(cluster, start, script, tmp_path, more, words, hosts):
    file = hostfile(tmp_path, "na slots=1", "nb slots=1", "nc slots=1", *more)
    run = start("-H", file, "--max-restarts", "1", *words, script(WAIT_AND_SAY), env=cluster.env)
    wait_ready(run, 0, 3)
    old = run.rank_pid(1)
    at, at_ns = time.monotonic(), time.time_ns()
    cluster.hosts["nb"].link("down")
    wait_ready(run, 1, len(hosts))
    assert not Path(f"/proc/{old}").exists(), "two attempts ran at once"
    assert run.wait() == 0, run.err
    assert time.monotonic() - at < 30
    assert [words[0] for words in said(run)] == hosts
    assert events(run, "host_lost")[0]["ts"] - at_ns <= 10e9
    assert "nb is set aside: it was lost: nothing heard from it" in run.err
    assert run.report["hosts"] == hosts


@pytest.mark.slow
def test_a_host_that_cannot_reach_the_store_any_more_is_set_aside(cluster, start, script, tmp_path):
    file = hostfile(tmp_path, "na slots=1", "nb slots=1", "nc slots=1", "nd slots=1 spare")
    run = start("-H", file, "--max-restarts", "1", script(WAIT_AND_SAY), env=cluster.env)
    wait_ready(run, 0, 3)
    cluster.hosts["nb"].run("ip", "route", "add", "blackhole", f"{cluster.hosts['na'].address}/32")
    os.kill(run.rank_pid(2), signal.SIGKILL)
    assert run.wait() == 0, run.err
    assert [words[0] for words in said(run)] == ["na", "nc", "nd"]
    assert run.report["set_aside"]["nb"].startswith("it cannot dial na (")
    assert run.report["attempts"][0]["cause"]["code"] == 137


JOB = """
name: drill
model: {gpt: {layers: 1, width: 32, heads: 2, context: 32}}
batch: {global: 12, micro: 2}
train: {steps: 80, sample_bytes: 0, eval_samples: 24}
checkpoint: {every_steps: 5}
log: {every: 100}
"""


def wait_for_checkpoint(run: Any) -> None:
    log = run.directory / "events.jsonl"
    lab.wait_for(lambda: log.exists() and events(run, "checkpoint"), "a checkpoint", 120)


@pytest.mark.slow
@pytest.mark.parametrize(("more", "words", "hosts"), DRILLS)
def test_the_drill(cluster, start, tmp_path, more, words, hosts):
    """A host's link is cut in mid-training: the loss at the end is that of a run that nobody disturbed."""
    three = ["na slots=1", "nb slots=1", "nc slots=1"]
    losses = []
    for folder, disturbed in ((tmp_path / "calm", False), (tmp_path / "cut", True)):
        folder.mkdir()
        (folder / "job.yaml").write_text(JOB)
        file = hostfile(folder, *three, *(more if disturbed else []))
        restart = ["--max-restarts", "1", *words] if disturbed else []
        run = start("-H", file, *restart, "job.yaml", env=cluster.env, folder=folder)
        if disturbed:
            wait_for_checkpoint(run)
            cluster.hosts["nb"].link("down")
        assert run.wait(400) == 0, run.err
        last = [event for event in events(run, "step") if event["rank"] == 0][-1]
        assert last["step"] == 80
        losses.append((last["loss"], events(run, "end")[-1]["val_loss"]))
    assert run.report["hosts"] == hosts
    assert [event["attempt"] for event in events(run, "resume") if event["rank"] == 0] == [1]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
