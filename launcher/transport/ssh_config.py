"""How to reach a host: the user's ssh_config as the `ssh` program itself resolves it; the hostfile's words win."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dstrain.launcher.hostfile import Host
from dstrain.runtime.spec.errors import UnreachableError

DEFAULT_KEYS = ("~/.ssh/id_ed25519", "~/.ssh/id_ecdsa", "~/.ssh/id_rsa")
DEFAULT_KNOWN_HOSTS = "~/.ssh/known_hosts"
CONFIG_VARIABLE = "DSTRAIN_SSH_CONFIG"  # another file than ~/.ssh/config, as `ssh -F`


@dataclass(frozen=True)
class SshTarget:
    """One host as SSH sees it. `jumps`: bastions on the way, in order, each as the user wrote it."""

    hostname: str
    port: int
    user: str
    keys: tuple[str, ...]
    known_hosts: tuple[str, ...]
    key_alias: str | None
    jumps: tuple[str, ...]
    proxy_command: str | None
    identities_only: bool

    @property
    def key_name(self) -> str:
        """The name under which known_hosts has this host's key."""
        name = self.key_alias or self.hostname
        return name if self.port == 22 or self.key_alias else f"[{name}]:{self.port}"


def config_arguments() -> list[str]:
    """`-F FILE` for the ssh program, where the user names one."""
    named = os.environ.get(CONFIG_VARIABLE)
    return ["-F", named] if named else []


def host_arguments(host: Host) -> list[str]:
    """The hostfile's own words as options of the ssh program; they win over ssh_config."""
    options = []
    if host.addr:
        options += ["-o", f"HostName={host.addr}"]
    if host.port:
        options += ["-p", str(host.port)]
    if host.user:
        options += ["-l", host.user]
    if host.key:
        options += ["-i", str(Path(host.key).expanduser()), "-o", "IdentitiesOnly=yes"]
    return options


def resolve(host: Host) -> SshTarget:
    """Ask `ssh -G` (Include, Match, tokens and all); without that program, paramiko's own parser."""
    settings = _ask_ssh(host) if shutil.which("ssh") else _parse_config(host)
    known_hosts = [*settings.get("userknownhostsfile", []), *settings.get("globalknownhostsfile", [])]
    jump = settings.get("proxyjump", ["none"])[0]
    command = " ".join(settings.get("proxycommand", []))
    return SshTarget(
        hostname=settings["hostname"][0],
        port=int(settings["port"][0]),
        user=settings["user"][0],
        keys=tuple(str(Path(key).expanduser()) for key in settings["identityfile"]),
        known_hosts=tuple(str(Path(path).expanduser()) for path in known_hosts),
        key_alias=settings.get("hostkeyalias", [None])[0],
        jumps=() if jump == "none" else tuple(jump.split(",")),
        proxy_command=None if command in ("", "none") else command,
        identities_only=settings.get("identitiesonly", ["no"])[0] == "yes",
    )


def _ask_ssh(host: Host) -> dict[str, list[str]]:
    command = ["ssh", "-G", *config_arguments(), *host_arguments(host), "--", host.name]
    answer = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=20)
    if answer.returncode != 0:
        said = (answer.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UnreachableError(host.name, f"ssh_config cannot be read: {said}", "mend ~/.ssh/config")
    settings: dict[str, list[str]] = {}
    for line in answer.stdout.splitlines():
        key, _, value = line.partition(" ")
        if key == "identityfile":  # may appear many times, and a path may hold spaces
            settings.setdefault(key, []).append(value)
        else:
            settings.setdefault(key, value.split())
    return settings


def _parse_config(host: Host) -> dict[str, list[str]]:
    import getpass

    import paramiko

    path = Path(os.environ.get(CONFIG_VARIABLE, "~/.ssh/config")).expanduser()
    found: Mapping[str, object] = {}
    if path.is_file():
        found = paramiko.SSHConfig.from_path(str(path)).lookup(host.name)
    settings = {key: value if isinstance(value, list) else str(value).split() for key, value in found.items()}
    settings.setdefault("hostname", [host.name])
    settings.setdefault("port", ["22"])
    settings.setdefault("user", [getpass.getuser()])
    settings.setdefault("identityfile", list(DEFAULT_KEYS))
    settings.setdefault("userknownhostsfile", [DEFAULT_KNOWN_HOSTS])
    if host.addr:
        settings["hostname"] = [host.addr]
    if host.port:
        settings["port"] = [str(host.port)]
    if host.user:
        settings["user"] = [host.user]
    if host.key:
        settings["identityfile"], settings["identitiesonly"] = [host.key], ["yes"]
    return settings
