"""The connections that paramiko makes: straight, through a bastion, through a ProxyCommand."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

import lab
from dstrain.launcher.hostfile import Host
from dstrain.launcher.transport import ConnectOptions
from dstrain.launcher.transport.ssh import ParamikoConnection, connect_paramiko
from dstrain.runtime.spec.errors import UnreachableError

pytestmark = pytest.mark.lab

WAYS = {"straight": "", "bastion": "ProxyJump h1", "program": "ProxyCommand ssh -F {config} -W %h:%p h1"}


@pytest.fixture
def ways(light: lab.Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A host for each of WAYS, by its name: all of them are h2."""
    config = tmp_path / "ways"
    lines = [f"Host {name}\n  HostName 127.0.0.3\n  {way}\n" for name, way in WAYS.items()]
    port = next(line for line in light.config.read_text().splitlines() if "Port" in line)
    config.write_text("".join(lines).format(config=light.config) + light.config.read_text() + port + "\n")
    monkeypatch.setenv("DSTRAIN_SSH_CONFIG", str(config))
    return {"DSTRAIN_SSH_CONFIG": str(config)}


def programs() -> list[int]:
    """The programs that are ways to h2."""
    return lab.processes_with("", b"no such", "-W\x00127.0.0.3:")


def read_to_the_end(connection: ParamikoConnection) -> threading.Thread:
    reader = threading.Thread(target=connection.read)
    reader.start()
    return reader


def wakes() -> int:
    """How often the threads of this process have been woken, but for the one that asks."""
    tasks = [task for task in Path("/proc/self/task").iterdir() if int(task.name) != threading.get_native_id()]
    lines = [line for task in tasks for line in (task / "status").read_text().splitlines()]
    return sum(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches"))


@pytest.mark.parametrize("way", WAYS)
def test_an_idle_connection_sleeps_and_is_closed_at_once(ways, way):
    connection = connect_paramiko(Host(way), "sleep 600", ConnectOptions())
    reader = read_to_the_end(connection)
    time.sleep(0.5)  # for what the login left to do
    before = wakes()
    time.sleep(1.5)
    assert wakes() - before < 5  # each transport would by itself look up ten times a second
    at = time.monotonic()
    connection.close()
    reader.join(5)
    assert time.monotonic() - at < 1.0
    lab.wait_for(lambda: not programs(), "the program's end", 5)


def test_the_end_of_a_proxy_command_is_the_end_of_the_connection(ways):
    connection = connect_paramiko(Host("program"), "sleep 600", ConnectOptions())
    reader = read_to_the_end(connection)
    os.kill(programs()[0], signal.SIGKILL)
    reader.join(1)
    assert not reader.is_alive()
    assert not connection.program_ended()
    cpu_s = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - cpu_s < 0.1
    connection.close()


def test_a_killed_proxy_command_loses_its_host(ways, start, script):
    text = "import os, signal\nopen(os.environ['RANK'] + '.ready', 'w').close()\nsignal.pause()"
    run = start("--hosts", "program:1", script(text), env=ways)
    run.wait_ready(1)
    at = time.monotonic()
    os.kill(programs()[0], signal.SIGKILL)
    assert run.wait(15) == 200
    assert time.monotonic() - at < 4.0  # silence alone takes 8 s
    assert "host program was lost" in run.err


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ('sh -c "echo no way to %h >&2; exit 1"', "its ProxyCommand said: no way to far.example"),
        ("/no/such/program", "its ProxyCommand cannot be started: .*No such file"),
        (f'{sys.executable} -c "import os, time; os.close(1); os.close(0); time.sleep(600)"', "broke off the login"),
    ],
    ids=["it fails", "it is not there", "it closes its side"],
)
def test_a_proxy_command_that_fails_is_explained(tmp_path, monkeypatch, command, said):
    config = tmp_path / "config"
    config.write_text(f"Host *\n  HostName far.example\n  ProxyCommand {command}\n")
    monkeypatch.setenv("DSTRAIN_SSH_CONFIG", str(config))
    at = time.monotonic()
    with pytest.raises(UnreachableError, match=said):
        connect_paramiko(Host("x"), "true", ConnectOptions(attempts=1))
    assert time.monotonic() - at < 5.0
