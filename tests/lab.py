"""Hosts on one machine, for tests: an OpenSSH server reached under many addresses, and hosts in namespaces.

Light hosts share this machine: 127.0.0.2, 127.0.0.3, … lead to one sshd. Hosts in namespaces have their own network,
hostname, process list and home; ending a namespace's first process ends all of the host.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DSTRAIN = str(Path(sys.executable).parent / "dstrain")


def wait_for(condition: Callable[[], Any], what: str, timeout_s: float = 20.0) -> Any:
    """Poll until the condition is true and return its value; fail by name otherwise."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout_s:.0f} s for {what}")
        time.sleep(0.02)


def missing_reason() -> str | None:
    """Why the lab cannot run here; None when it can."""
    if os.geteuid() != 0:
        return "the lab needs root (an sshd and network namespaces)"
    for program, package in (("sshd", "openssh-server"), ("ssh", "openssh-client"), ("ip", "iproute2")):
        if not shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin"):
            return f"the lab needs {program}: apt-get install {package}"
    return None


SSHD = shutil.which("sshd", path="/usr/sbin:/sbin:" + os.environ["PATH"]) or "/usr/sbin/sshd"


def free_port(address: str = "127.0.0.1") -> int:
    """A port that was free a moment ago: good enough for a server that fails loudly if it is not."""
    with socket.socket() as sock:
        sock.bind((address, 0))
        return int(sock.getsockname()[1])


def make_key(path: Path) -> str:
    """An Ed25519 key without a passphrase; returns the public half."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f", str(path)], check=True)
    return path.with_suffix(".pub").read_text().strip()


@dataclass
class Lab:
    """Names, keys and an ssh_config for some hosts. `env` is what `dstrain` needs to reach them."""

    folder: Path
    names: list[str]
    known_hosts: Path
    config: Path
    host_key: str
    env: dict[str, str] = field(default_factory=dict)

    def hostfile(self, slots: int = 2, names: list[str] | None = None, extra: str = "") -> Path:
        path = self.folder / f"hostfile-{time.monotonic_ns()}"
        path.write_text("".join(f"{name} slots={slots}{extra}\n" for name in names or self.names))
        return path


def sshd_options(folder: Path) -> list[str]:
    options = {
        "HostKey": folder / "host_key",
        "AuthorizedKeysFile": folder / "authorized_keys",
        "StrictModes": "no",
        "UsePAM": "no",
        "PidFile": "none",
        "PasswordAuthentication": "no",
        "KbdInteractiveAuthentication": "no",
        "PermitRootLogin": "yes",
        "MaxStartups": "200:30:400",
        "PrintMotd": "no",
    }
    return [word for name, value in options.items() for word in ("-o", f"{name}={value}")]


def prepare(folder: Path) -> tuple[Path, str]:
    """Keys for a lab: (the user's private key, the host's public key)."""
    Path("/run/sshd").mkdir(exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    host_key = " ".join(make_key(folder / "host_key").split()[:2])
    (folder / "authorized_keys").write_text(make_key(folder / "user_key") + "\n")
    return folder / "user_key", host_key


def write_config(folder: Path, hosts: dict[str, tuple[str, int]], host_key: str) -> Lab:
    known_hosts, config = folder / "known_hosts", folder / "ssh_config"
    known_hosts.write_text("".join(f"[{address}]:{port} {host_key}\n" for address, port in hosts.values()))
    config.write_text(
        "".join(f"Host {name}\n  HostName {address}\n  Port {port}\n" for name, (address, port) in hosts.items())
        + f"Host *\n  User root\n  IdentityFile {folder}/user_key\n  IdentitiesOnly yes\n"
        f"  UserKnownHostsFile {known_hosts}\n  GlobalKnownHostsFile /dev/null\n"
    )
    lab = Lab(folder, list(hosts), known_hosts, config, host_key)
    lab.env = {"DSTRAIN_SSH_CONFIG": str(config)}
    return lab


@contextlib.contextmanager
def light_hosts(folder: Path, count: int) -> Iterator[Lab]:
    """`count` hosts h1, h2, … that are this machine, behind one sshd."""
    prepare_result = prepare(folder)
    port = free_port()
    log = (folder / "sshd.log").open("wb")
    server = subprocess.Popen(
        [SSHD, "-D", "-e", "-f", "/dev/null", "-p", str(port), "-o", "ListenAddress=0.0.0.0", *sshd_options(folder)],
        stdout=log,
        stderr=log,
    )
    try:
        wait_for(lambda: answers("127.0.0.1", port), "sshd")
        hosts = {f"h{index + 1}": (f"127.0.0.{index + 2}", port) for index in range(count)}
        yield write_config(folder, hosts, prepare_result[1])
    finally:
        server.terminate()
        server.wait(10)
        log.close()


def answers(address: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=1) as connection:
        return connection.recv(4) == b"SSH-"
    return False


@dataclass
class Namespace:
    """One host in namespaces. `pid`: its first process; its end is the end of everything there."""

    name: str
    address: str
    pid: int
    interface: str

    def run(self, *command: str) -> str:
        """Run a command there and return what it printed."""
        words = ["nsenter", "-t", str(self.pid), "-m", "-u", "-n", "-p", "--", *command]
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout

    def link(self, state: str) -> None:
        """Pull the cable (`down`) or plug it in (`up`): the bridge's end of it."""
        subprocess.run(["ip", "link", "set", f"{self.interface}-b", state], check=True)


def processes_with(cookie: str, also: bytes, word: str) -> list[int]:
    """Pids, as seen from here, of living processes with both texts in their environment, or the word in their argv."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        name = path.name
        if int(name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            environment = Path(f"/proc/{name}/environ").read_bytes()
            mine = cookie.encode() in environment and also in environment
            if not mine and word.encode() not in Path(f"/proc/{name}/cmdline").read_bytes():
                continue
            if stat(int(name))[0] not in "ZX":
                found.append(int(name))
    return found


def stat(pid: int) -> tuple[str, int]:
    """(state, parent) of a process."""
    fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    return fields[0].decode(), int(fields[1])


def parent(pid: int) -> int:
    return stat(pid)[1]


@dataclass
class NetLab(Lab):
    """Hosts in namespaces, by name."""

    hosts: dict[str, Namespace] = field(default_factory=dict)


@contextlib.contextmanager
def net_hosts(folder: Path, count: int, private_tmp: bool = False) -> Iterator[NetLab]:
    """`count` hosts na, nb, … on a bridge of their own, an sshd in each."""
    tag = f"{os.getpid() % 10000:x}{time.monotonic_ns() % 256:02x}"
    net = f"10.{os.getpid() % 200 + 20}.{time.monotonic_ns() % 250}"
    prepare_result = prepare(folder)
    bridge = f"br{tag}"
    spaces: dict[str, Namespace] = {}
    with contextlib.ExitStack() as stack:
        sh("ip", "link", "add", bridge, "type", "bridge")
        stack.callback(sh, "ip", "link", "del", bridge)
        sh("ip", "addr", "add", f"{net}.254/24", "dev", bridge)
        sh("ip", "link", "set", bridge, "up")
        for index in range(count):
            name = f"n{chr(ord('a') + index)}"
            spaces[name] = stack.enter_context(_namespace(folder, name, f"{net}.{index + 1}", bridge, tag, private_tmp))
        for space in spaces.values():
            wait_for(lambda space=space: answers(space.address, 22), f"sshd of {space.name}")
        lab = write_config(folder, {name: (space.address, 22) for name, space in spaces.items()}, prepare_result[1])
        lab.known_hosts.write_text("".join(f"{s.address} {lab.host_key}\n" for s in spaces.values()))
        yield NetLab(**vars(lab), hosts=spaces)


def sh(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@contextlib.contextmanager
def _namespace(folder: Path, name: str, address: str, bridge: str, tag: str, private_tmp: bool) -> Iterator[Namespace]:
    space, interface = f"{tag}{name}", f"v{tag}{name}"
    sh("ip", "netns", "add", space)
    try:
        sh("ip", "link", "add", f"{interface}-b", "type", "veth", "peer", "name", interface)
        sh("ip", "link", "set", interface, "mtu", "65535", "netns", space)
        sh("ip", "link", "set", f"{interface}-b", "mtu", "65535", "master", bridge, "up")
        inside = ["ip", "netns", "exec", space]
        sh(*inside, "ip", "addr", "add", f"{address}/24", "dev", interface)
        sh(*inside, "ip", "link", "set", interface, "up")
        sh(*inside, "ip", "link", "set", "lo", "up")
        mounts = "mount -t tmpfs tmp /root"
        base = Path(sys.base_prefix).resolve()
        if base.is_relative_to("/root"):  # this very python must stay visible
            mounts = f"mount --bind {base} /mnt; {mounts}; mkdir -p {base}; mount --move /mnt {base}"
        keys = f"/run/{space}"
        shutil.rmtree(keys, ignore_errors=True)
        shutil.copytree(folder, keys)  # where a private /tmp does not hide them
        if private_tmp:
            mounts += "; mount -t tmpfs tmp /tmp"
        command = f"hostname {name}; {mounts}; exec {SSHD} -D -e -f /dev/null " + " ".join(sshd_options(Path(keys)))
        log = (folder / f"{name}.log").open("wb")
        server = subprocess.Popen(
            [
                *inside,
                *["unshare", "--mount", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child", "sh", "-c"],
                command,
            ],
            stdout=log,
            stderr=log,
        )
        try:
            first = wait_for(lambda: _only_child(server.pid), f"the first process of {name}")
            yield Namespace(name, address, first, interface)
        finally:
            server.send_signal(signal.SIGKILL)
            server.wait(10)
            log.close()
    finally:
        shutil.rmtree(f"/run/{space}", ignore_errors=True)
        subprocess.run(["ip", "link", "del", f"{interface}-b"], capture_output=True, check=False)
        sh("ip", "netns", "del", space)


def _only_child(pid: int) -> int:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(text[0]) if text else 0


VENV = Path(sys.executable).parent.parent


def environment(pid: int) -> dict[str, str]:
    """What the process was started with."""
    pairs = (item.partition("=") for item in Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0"))
    return {name: value for name, _, value in pairs}


def is_words(pid: int, first: str) -> bool:
    """Is this the process's argv[0]?"""
    return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")[0].endswith(first)
