"""`dstrain run` from end to end: what a script is given, what comes back, and which code it ends with."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

import lab

pytestmark = pytest.mark.lab

SHOW = """
import json, os, sys
names = [name for name in os.environ if name.split("_")[0] in
         ("RANK", "LOCAL", "WORLD", "GROUP", "NODE", "ROLE", "MASTER", "TORCHELASTIC", "OMP", "DSTRAIN", "GLOO")]
print(json.dumps({"argv": sys.argv, "cwd": os.getcwd(), "env": {name: os.environ[name] for name in names}}))
"""
ALL_REDUCE = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
value = torch.tensor([float(dist.get_rank() + 1)])
dist.all_reduce(value)
print("sum", value.item())
dist.destroy_process_group()
"""


@pytest.mark.parametrize("ssh", ["paramiko", "openssh"])
def test_two_hosts_with_two_ranks_each(light, start, script, ssh):
    run = start("-H", light.hostfile(names=["h1", "h2"]), "--ssh", ssh, script(ALL_REDUCE), env=light.env)
    assert run.wait() == 0, run.err
    assert sorted(run.out.splitlines()) == [f"[h{rank // 2 + 1}:{rank}] sum 10.0" for rank in range(4)]
    assert run.report["exit_code"] == 0
    assert run.log("h2", 3) == b"sum 10.0\n"


def test_hosts_that_share_nothing(net, start, script):
    run = start("-H", net.hostfile(), script(ALL_REDUCE), env=net.env)
    assert run.wait() == 0, run.err
    assert sorted(run.out.splitlines()) == [f"[n{'ab'[rank // 2]}:{rank}] sum 10.0" for rank in range(4)]


def test_environment_is_torchruns(light, start, script):
    run = start("-H", light.hostfile(names=["h1", "h2"]), script(SHOW), "x", env=light.env)
    assert run.wait() == 0, run.err
    shown = [json.loads(line.partition("] ")[2]) for line in run.out.splitlines()]
    shown.sort(key=lambda one: int(one["env"]["RANK"]))
    for rank, one in enumerate(shown):
        env = one["env"]
        assert env["LOCAL_RANK"] == str(rank % 2)
        assert env["GROUP_RANK"] == env["NODE_RANK"] == str(rank // 2)
        assert env["WORLD_SIZE"] == env["ROLE_WORLD_SIZE"] == "4"
        assert env["LOCAL_WORLD_SIZE"] == env["GROUP_WORLD_SIZE"] == "2"
        assert env["ROLE_RANK"] == str(rank)
        assert env["ROLE_NAME"] == "default"
        assert env["TORCHELASTIC_USE_AGENT_STORE"] == "True"
        assert env["TORCHELASTIC_RESTART_COUNT"] == env["TORCHELASTIC_MAX_RESTARTS"] == "0"
        assert env["TORCHELASTIC_RUN_ID"] == env["DSTRAIN_RUN_ID"] == run.directory.name
        assert env["MASTER_ADDR"] == "127.0.0.2"
        assert env["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 2))
        assert one["argv"] == [str(run.folder / "job.py"), "x"]
        assert one["cwd"] == str(run.folder)
    assert len({one["env"]["MASTER_PORT"] for one in shown}) == 1


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("raise SystemExit(3)", 3),
        ("raise SystemExit(255)", 255),
        ("raise ValueError('boom')", 1),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", 139),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 137),
    ],
)
def test_code_is_the_root_cause_workers_own(start, script, body, code):
    text = f"import os, time\nif os.environ['RANK'] == '1':\n    {body}\ntime.sleep(600)\n"
    run = start(script(text))
    assert run.wait() == code, run.err
    assert run.report["origin"] == "worker"
    assert run.report["cause"]["rank"] == 1
    assert "rank 1 on localhost" in run.err


def test_traceback_begins_in_the_users_script(start, script):
    run = start(script("def inner():\n    raise ValueError('the cause')\ninner()\n"))
    assert run.wait() == 1
    assert "job.py" in run.err
    assert "ValueError: the cause" in run.err
    assert "zygote" not in run.err
    assert "frozen" not in run.err


def test_no_python_and_module(start, tmp_path):
    run = start("--no-python", "sh", "-c", 'echo "$RANK" "$1"', "sh", "--x y")
    assert run.wait() == 0, run.err
    assert sorted(run.out.splitlines()) == ["[localhost:0] 0 --x y", "[localhost:1] 1 --x y"]
    package = tmp_path / "again" / "pkg"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "mod.py").write_text("import sys; print(__name__, sys.argv[1:])\n")
    run = start("-n", "1", "-m", "pkg.mod", "--lr", "3", "-H", "x", folder=tmp_path / "again")
    assert run.wait() == 0, run.err
    assert run.out == "[localhost:0] __main__ ['--lr', '3', '-H', 'x']\n"


def test_restart_gets_a_fresh_store(start, script):
    text = ALL_REDUCE + (
        "import os\n"
        "print('attempt', os.environ['TORCHELASTIC_RESTART_COUNT'], os.environ['MASTER_PORT'])\n"
        "if os.environ['TORCHELASTIC_RESTART_COUNT'] != '2' and os.environ['RANK'] == '1':\n"
        "    raise SystemExit(8 + int(os.environ['TORCHELASTIC_RESTART_COUNT']))  # two alike would end it\n"
    )
    run = start("--max-restarts", "2", script(text))
    assert run.wait() == 0, run.err
    lines = [run.log("localhost", 0, attempt=k).decode().splitlines() for k in range(3)]
    assert [line[0] for line in lines] == ["sum 3.0"] * 3
    ports = [line[1].split()[-1] for line in lines]
    assert len(set(ports)) == 3
    assert [one["cause"] and one["cause"]["code"] for one in run.report["attempts"]] == [8, 9, None]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["missing.py"], "no file missing.py"),
        (["ls"], "--no-python ls"),
        (["-H", "nowhere", "job.py"], "nowhere"),
        ([], "a target"),
        (["--set", "train.steps=1", "job.py"], "job.yaml"),
        (["--env", "RANK=1", "job.py"], "RANK"),
        (["--env", "NOT_THERE_AT_ALL", "job.py"], "NOT_THERE_AT_ALL"),
        (["--ssh", "rsh", "job.py"], "paramiko or openssh"),
        (["-n", "0", "job.py"], "1 to 4096"),
        (["--hosts", "a;b", "job.py"], "a;b"),
    ],
)
def test_bad_words_get_one_line_and_code_2(tmp_path, words, expected):
    (tmp_path / "job.py").touch()
    done = subprocess.run([lab.DSTRAIN, "run", *words], cwd=tmp_path, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert expected in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert not (tmp_path / "runs").exists()


def test_dry_run_is_the_plan_that_runs(light, start, script, tmp_path):
    hostfile = light.hostfile(names=["h1", "h2"])
    path = script(SHOW)
    words = [lab.DSTRAIN, "run", "-H", str(hostfile), "--env", "A_TOKEN=hush", "--env", "B=1"]
    env = {**os.environ, **light.env}
    done = subprocess.run(
        [*words, "--dry-run", "--json", str(path)], env=env, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    planned = json.loads(done.stdout)
    run = start("-H", hostfile, "--env", "A_TOKEN=hush", "--env", "B=1", path, env=light.env)
    assert run.wait() == 0, run.err
    executed = json.loads((run.directory / "plan.json").read_text())
    for plan in (planned, executed):
        del plan["run_id"]
    for name in ("TOKEN", "MARK"):
        del executed["environment"][name]  # the fixture's own
    assert planned == executed
    assert planned["environment"] == {"A_TOKEN": "***", "B": "1"}


@pytest.mark.parametrize(
    "text", ["import sys; sys.stdout.close()", "import os, sys\nwith open(os.devnull, 'w') as f: sys.stdout = f"]
)
def test_rank_that_closes_its_stdout_has_not_failed(start, script, text):
    run = start("-n", "1", script(text))
    assert run.wait() == 0, run.err


def test_full_disk_of_the_head_is_loud_and_changes_no_result(start, script, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], check=True)
    try:
        run = start("-n", "1", "--run-dir", small, script("print('x' * 300_000)\nraise SystemExit(7)"))
        assert run.wait() == 7, run.err
        assert "cannot be written" in run.err
        assert "Traceback" not in run.err
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_files_of_a_run_are_private(start, script):
    run = start(script("print(1)"))
    assert run.wait() == 0
    assert run.directory.stat().st_mode & 0o777 == 0o700
    names = {path.name for path in run.directory.iterdir()}
    assert {"job.json", "plan.json", "report.json", "events.jsonl", "logs"} <= names
    listed = Path(run.folder / "state" / "dstrain" / "runs" / run.directory.name)
    assert listed.resolve() == run.directory.resolve()
