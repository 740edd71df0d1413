"""Which hosts and slots a run uses, and how each is reached."""

from __future__ import annotations

import getpass
import os
import signal
import sys

import pytest

import lab

pytestmark = pytest.mark.lab

SHOW = "import os; print(os.environ['LOCAL_RANK'], os.environ.get('CUDA_VISIBLE_DEVICES'))"


def lines(run):
    assert run.wait() == 0, run.err
    return sorted(run.out.splitlines())


@pytest.mark.slow
def test_include_and_exclude(light, start, script, tmp_path):
    path, hostfile = script(SHOW), light.hostfile(slots=2, names=["h1", "h2", "h3"])
    run = start("-H", hostfile, "--include", "h1:1@h3", path, env=light.env)
    assert lines(run) == ["[h1:0] 0 1", "[h3:1] 0 None", "[h3:2] 1 None"]
    run = start("-H", hostfile, "--exclude", "h[1-2]@h3:0", path, env=light.env, folder=tmp_path / "second")
    assert lines(run) == ["[h3:0] 0 1"]


@pytest.mark.slow
def test_one_rank_per_gpu_where_nobody_says_how_many(light, start, script, tmp_path):
    """GPUs are what CUDA_VISIBLE_DEVICES shows; here, and on hosts without slots=."""
    path, three = script(SHOW), "CUDA_VISIBLE_DEVICES=0,1,2"
    assert len(lines(start("--env", three, path))) == 3
    words = ["--hosts", "h1,h2", "--env", three]
    assert len(lines(start(*words, path, env=light.env, folder=tmp_path / "second"))) == 6
    run = start(*words, "--exclude", "h2:1", path, env=light.env, folder=tmp_path / "third")
    assert lines(run)[3:] == ["[h2:3] 0 0,2", "[h2:4] 1 0,2"]
    run = start("--hosts", "h1:4", "--env", three, path, env=light.env, folder=tmp_path / "fourth")
    assert run.wait() == 202
    assert "4 ranks were asked for, it has 3 GPUs" in run.err


def test_default_hostfile(light, start, script):
    path = script(SHOW)
    (path.parent / "hostfile").write_text("h2 slots=1\n")
    assert lines(start(path, env=light.env)) == ["[h2:0] 0 None"]


@pytest.mark.parametrize("ssh", ["paramiko", "openssh"])
def test_user_port_key_python_and_address_of_the_hostfile(light, start, script, tmp_path, ssh):
    """With an ssh_config that says nothing but where the known hosts are."""
    config = tmp_path / "config"
    config.write_text(f"Host *\n  UserKnownHostsFile {light.known_hosts}\n  IdentityFile none\n")
    port = next(line.split()[1] for line in light.config.read_text().splitlines() if "Port" in line)
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.symlink_to(sys.executable)
    (tmp_path / "pyvenv.cfg").write_text((lab.VENV / "pyvenv.cfg").read_text())
    (tmp_path / "lib").symlink_to(lab.VENV / "lib")
    hostfile = tmp_path / "hosts"
    key = light.folder / "user_key"
    user = getpass.getuser()
    hostfile.write_text(f"box slots=1 addr=127.0.0.3 port={port} user={user} key={key} python={python}\n")
    path = script("import sys, os; print(sys.executable, os.environ['SSH_CONNECTION'].split()[2:])")
    run = start("-H", hostfile, "--ssh", ssh, path, env={"DSTRAIN_SSH_CONFIG": str(config)})
    assert lines(run) == [f"[box:0] {python} ['127.0.0.3', '{port}']"]


@pytest.mark.slow
def test_one_connection_per_host(light, start, script):
    def logins() -> int:
        return (light.folder / "sshd.log").read_text(errors="replace").count("Accepted publickey")

    before = logins()
    assert start("-H", light.hostfile(), script("print(1)"), env=light.env).wait() == 0
    assert logins() - before == 4


def test_local_and_ssh_hosts_in_one_file(light, start, script, tmp_path):
    hostfile = tmp_path / "hosts"
    hostfile.write_text("localhost slots=1\nh1 slots=1\n")
    text = "import torch.distributed as d; d.init_process_group('gloo'); d.barrier(); print(d.get_rank())"
    run = start("-H", hostfile, "--master-addr", "127.0.0.1", script(text), env=light.env)
    assert lines(run) == ["[h1:1] 1", "[localhost:0] 0"]


@pytest.mark.slow
def test_stopped_program_of_any_kind_is_named(start):
    run = start("--no-python", "sh", "-c", "touch $RANK.ready; while :; do sleep 0.1; done")
    run.wait_ready(2)
    pid = next(pid for pid in run.workers() if lab.is_words(pid, "sh") and lab.environment(pid)["RANK"] == "1")
    os.kill(pid, signal.SIGSTOP)
    assert run.wait(30) == 203
    assert "rank 1 on localhost" in run.report["cause"]["headline"]


@pytest.mark.slow
def test_a_program_gets_a_store_when_it_asks_for_one(light, start, script):
    """--no-python imports no torch of ours, but a torch script behind a shell finds its rendezvous."""
    path = script("import torch.distributed as d; d.init_process_group('gloo'); d.barrier(); print(d.get_world_size())")
    words = ["--no-python", "sh", "-c", f"exec {sys.executable} {path}"]
    run = start("--hosts", "h1:1,h2:1", *words, env=light.env)
    assert lines(run) == ["[h1:0] 2", "[h2:1] 2"]
