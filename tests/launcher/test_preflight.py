"""What is found before any rank starts: every failure of every host in one go, with its remedy."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import lab

pytestmark = pytest.mark.lab

JOB = "import os; open(os.environ['RANK'] + '.started', 'w').close()"


def refused(run, code):
    assert run.wait(60) == code, run.err
    assert not list(run.folder.glob("*.started"))
    assert run.report["origin"] == "launcher"
    return run.err


def other_config(light, tmp_path, name, **changes):
    """The lab's ssh_config with some settings changed, which come first and so win."""
    path = tmp_path / f"{name}.config"
    lines = "".join(f"  {key} {value}\n" for key, value in changes.items())
    path.write_text(f"Host {name}\n{lines}\n{light.config.read_text()}")
    return {"DSTRAIN_SSH_CONFIG": str(path)}


@pytest.mark.parametrize("ssh", ["paramiko", "openssh"])
def test_host_key_login_and_reach(light, start, script, tmp_path, ssh):
    """One host each: unknown key, changed key, no login, refused, no such name. All in one table."""
    empty, wrong = tmp_path / "known-none", tmp_path / "known-wrong"
    empty.touch()
    other = lab.make_key(tmp_path / "other").rsplit(" ", 1)[0]
    wrong.write_text(re.sub(r"ssh-ed25519 \S+", other, light.known_hosts.read_text()))
    lab.make_key(tmp_path / "stranger")
    port = lab.free_port()
    config = tmp_path / "config"
    config.write_text(
        f"Host h1\n  UserKnownHostsFile {empty}\n"
        f"Host h2\n  UserKnownHostsFile {wrong}\n"
        f"Host h3\n  IdentityFile {tmp_path}/stranger\n"
        f"Host h4\n  Port {port}\n"
        + light.config.read_text().replace(f"  IdentityFile {light.folder}/user_key\n", "")
        + f"Match originalhost !h3,*\n  IdentityFile {light.folder}/user_key\n"
    )
    hosts = "h1:1,h2:1,h3:1,h4:1,no-such-host.invalid:1"
    run = start("--hosts", hosts, "--ssh", ssh, script(JOB), env={"DSTRAIN_SSH_CONFIG": str(config)})
    err = refused(run, 202)
    table = {line.split(": ")[1]: line for line in err.splitlines() if line.startswith("dstrain: ")}
    assert "key is unknown" in table["h1"]
    assert "dstrain hosts trust h1" in table["h1"]
    assert "CHANGED" in table["h2"]
    assert "did not let us in" in table["h3"]
    assert "ssh-copy-id" in table["h3"]
    assert "refused" in table["h4"]
    assert "no-such-host.invalid" in table


@pytest.mark.parametrize(
    ("host", "changes", "code"),
    [
        ("h1", {"UserKnownHostsFile": "/dev/null"}, 201),
        ("h1", {"Port": "1"}, 200),
    ],
)
def test_code_says_what_kind_it_was(light, start, script, tmp_path, host, changes, code):
    run = start("--hosts", f"{host}:1,h2:1", script(JOB), env=other_config(light, tmp_path, host, **changes))
    refused(run, code)


@pytest.mark.slow
def test_directory_script_and_python(net, start, tmp_path):
    """Hosts that have other files: no directory, another script, no interpreter."""
    folder = Path("/root/job")  # a home is a host's own in the lab
    here = tmp_path / "job.py"
    here.write_text(JOB)
    for name, text in (("na", JOB), ("nb", JOB + "\n# another version")):
        net.hosts[name].run("sh", "-c", f"mkdir -p {folder}; cat > {folder}/job.py <<'E'\n{text}\nE")
    run = start("-H", net.hostfile(), "--cwd", folder, "job.py", env=net.env)
    err = refused(run, 202)
    assert "dstrain: nb: script: job.py differs" in err
    assert "dstrain: na" not in err
    other = tmp_path / "second"
    run = start("-H", net.hostfile(), "--cwd", "/root/nowhere", "job.py", env=net.env, folder=other)
    assert err.count("differs") == 1
    assert refused(run, 202).count("/root/nowhere is not there") == 2
    third = tmp_path / "third"
    run = start("-H", net.hostfile(), "--cwd", folder, "absent.py", env=net.env, folder=third)
    assert refused(run, 202).count("absent.py is not there") == 2
    fourth = tmp_path / "fourth"
    hostfile = net.hostfile(extra=" python=/opt/none/python")
    run = start("-H", hostfile, "--cwd", folder, "job.py", env=net.env, folder=fourth)
    assert refused(run, 202).count("no such interpreter") == 2


@pytest.mark.slow
def test_torch_missing_or_of_another_version(light, start, script, tmp_path):
    """h2's interpreter has an older torch, h3's has none."""
    old, bare = tmp_path / "old", tmp_path / "bare"
    for folder in (old, bare):
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    torch = next((old / "lib").glob("python3*")) / "site-packages" / "torch"
    (torch / "distributed").mkdir(parents=True)
    (torch / "__init__.py").write_text("__version__ = '2.11.0'\n")
    (torch / "distributed" / "__init__.py").touch()
    hostfile = tmp_path / "hosts"
    hostfile.write_text(
        f"h1 slots=1\nh2 slots=1 python={old}/bin/python\nh3 slots=1 python={bare}/bin/python\nh4 slots=1\n"
    )
    run = start("-H", hostfile, script(JOB), env=light.env)
    err = refused(run, 202)
    assert "dstrain: h2: torch: version 2.11.0, the others have 2." in err
    assert "dstrain: h3: torch: " in err
    assert "has no torch" in err
    assert "dstrain: h1" not in err


@pytest.mark.slow
def test_prologue_that_fails_and_one_that_works(light, start, script, tmp_path):
    run = start("--hosts", "h1:1,h2:1", "--prologue", "echo no such module >&2; false", script(JOB), env=light.env)
    assert refused(run, 202).count("exit 1: no such module") == 2
    text = "import os; print(os.environ['FROM_PROLOGUE'])"
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "job.py").write_text(text)
    words = ["--hosts", "h1:1", "--prologue", "export FROM_PROLOGUE='a b'", "job.py"]
    run = start(*words, env=light.env, folder=tmp_path / "good")
    assert run.wait(30) == 0, run.err
    assert run.out == "[h1:0] a b\n"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").write_text(f'#!/bin/sh\nFROM_PROLOGUE=brought exec {sys.executable} "$@"\n')
    (tmp_path / "bin" / "python3").chmod(0o755)
    words[3] = f"PATH={tmp_path}/bin:$PATH"
    (tmp_path / "brought").mkdir()
    (tmp_path / "brought" / "job.py").write_text(text)
    run = start(*words, env=light.env, folder=tmp_path / "brought")
    assert run.wait(30) == 0, run.err
    assert run.out == "[h1:0] brought\n"


def test_fixed_port_that_is_taken(light, start, script):
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        run = start("--hosts", "h1:1,h2:1", "--master-port", port, script(JOB), env=light.env)
        err = refused(run, 205)
    assert "no socket for the store" in err
    assert "in use" in err


@pytest.mark.slow
def test_rank_0_address_that_others_cannot_dial(net, start, tmp_path):
    """na has one address that nb can reach and one that it cannot: the reachable one is found; a bad one refused."""
    net.hosts["na"].run("ip", "addr", "add", "10.254.1.1/32", "dev", "lo")
    folder = tmp_path / "job.py"
    folder.write_text("import os; print(os.environ['MASTER_ADDR'], os.environ['GLOO_SOCKET_IFNAME'])")
    run = start("-H", net.hostfile(slots=1), folder, env=net.env)
    assert run.wait(30) == 0, run.err
    addresses = {line.split()[1] for line in run.out.splitlines()}
    assert addresses == {net.hosts["na"].address}
    names = sorted(line.split()[2] for line in run.out.splitlines())
    assert names == sorted(host.interface for host in net.hosts.values())
    other = tmp_path / "other"
    run = start("-H", net.hostfile(slots=1), "--master-addr", "10.254.1.1", folder, env=net.env, folder=other)
    assert "cannot dial rank 0's host" in refused(run, 202)


@pytest.mark.slow
def test_trust_pins_on_purpose(light, start, script, tmp_path):
    known = tmp_path / "known"
    env = {**os.environ, **other_config(light, tmp_path, "*", UserKnownHostsFile=known)}
    command = [lab.DSTRAIN, "hosts", "trust", "h1"]
    asked = subprocess.run(command, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=30)
    assert asked.returncode == 2
    assert "SHA256:" in asked.stdout
    assert not known.exists()
    done = subprocess.run([*command, "--yes"], env=env, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    wanted = subprocess.run(
        ["ssh-keygen", "-lf", light.folder / "host_key.pub"], capture_output=True, text=True, check=True
    )
    assert wanted.stdout.split()[1] in done.stdout
    assert known.stat().st_mode & 0o777 == 0o600
    again = subprocess.run([*command, "--yes"], env=env, capture_output=True, text=True, timeout=30)
    assert "known already" in again.stdout
    assert len(known.read_text().splitlines()) == 1
    for ssh in ("paramiko", "openssh"):
        run = start("--hosts", "h1:1", "--ssh", ssh, script(JOB), env=env, folder=tmp_path / ssh)
        assert run.wait(30) == 0, run.err
    known.write_text(known.read_text().replace(light.host_key, lab.make_key(tmp_path / "k").rsplit(" ", 1)[0]))
    changed = subprocess.run([*command, "--yes"], env=env, capture_output=True, text=True, timeout=30)
    assert changed.returncode == 201
    assert "CHANGED" in changed.stderr


def test_revoked_key_is_refused(light, start, script, tmp_path):
    known = tmp_path / "known"
    known.write_text(light.known_hosts.read_text() + f"@revoked * {light.host_key}\n")
    env = other_config(light, tmp_path, "*", UserKnownHostsFile=known)
    run = start("--hosts", "h1:1", script(JOB), env=env)
    assert "revoked" in refused(run, 201)


def test_bastion_is_one_shared_connection(net, start, script, tmp_path):
    """nb is reached through na alone, twice under two names; na's sshd sees one login for the way."""
    config = tmp_path / "config"
    address = net.hosts["nb"].address
    way = f"  HostName {address}\n  HostKeyAlias {address}\n  ProxyJump na\n"
    aliases = "".join(f"Host {name}\n{way}" for name in ("x1", "x2"))
    config.write_text(aliases + net.config.read_text())
    run = start("--hosts", "x1:1,x2:1", script("print('in')"), env={"DSTRAIN_SSH_CONFIG": str(config)})
    assert run.wait(30) == 0, run.err
    assert sorted(run.out.splitlines()) == ["[x1:0] in", "[x2:1] in"]
    log = (net.folder / "na.log").read_text()
    assert log.count("Accepted publickey") == 1


@pytest.mark.slow
def test_a_proxy_command_is_the_way(net, start, script, tmp_path):
    """nb through `ssh -W` on na; the program that is the way ends with the run."""
    config, address = tmp_path / "config", net.hosts["nb"].address
    way = f"ssh -F {net.config} -o BatchMode=yes -W %h:%p na"
    config.write_text(f"Host x\n  HostName {address}\n  ProxyCommand {way}\n" + net.config.read_text())
    run = start("--hosts", "x:2", script("print('in')"), env={"DSTRAIN_SSH_CONFIG": str(config)})
    assert run.wait(30) == 0, run.err
    assert sorted(run.out.splitlines()) == ["[x:0] in", "[x:1] in"]
    assert (net.folder / "na.log").read_text().count("Accepted publickey") == 1
    lab.wait_for(lambda: not lab.processes_with("", b"no such", f"-W\0{address}:22"), "the way to end")


def test_package_is_sent_once_and_verified(net, start, script):
    home = "/root/.cache/dstrain"
    path = script("import dstrain.runtime as r; print(r.__file__)")
    first = start("--hosts", "na:1", path, env=net.env)
    assert first.wait(30) == 0, first.err
    where = Path(first.out.split()[1])
    digest = where.parents[2].name
    assert str(where).startswith(f"{home}/{digest}/")
    assert net.hosts["na"].run("stat", "-c", "%a", f"{home}/{digest}").strip() == "700"
    net.hosts["na"].run("sh", "-c", f"echo broken >> {where}")
    second = start("--hosts", "na:1", path, env=net.env, folder=first.folder / "again")
    assert second.wait(30) == 0, second.err
    assert "broken" not in net.hosts["na"].run("cat", str(where))


@pytest.mark.slow
def test_a_host_needs_no_dstrain_and_an_older_one_never_wins(net, start, script, tmp_path):
    """An old copy of the package on the host's path is not the one that ranks import."""
    old = "/root/old/dstrain/runtime"
    net.hosts["na"].run("sh", "-c", f"mkdir -p {old}; echo 'OLD = True' > {old}/__init__.py")
    text = "import dstrain.runtime as r; print(hasattr(r, 'OLD'))"
    for words in ([], ["--no-preload"]):
        run = start(
            "--hosts", "na:1", "--env", "PYTHONPATH=/root/old", *words, script(text), env=net.env,
            folder=tmp_path / ("plain" if words else "forked"),
        )  # fmt: skip
        assert run.wait(30) == 0, run.err
        assert run.out == "[na:0] False\n"
