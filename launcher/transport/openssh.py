"""The second SSH transport: the `ssh` program itself, for what paramiko cannot do (host certificates, FIDO keys,
Kerberos, an existing ControlMaster with two factors behind it). Chosen by `--ssh openssh`.
"""

from __future__ import annotations

import re
import shutil
import subprocess

from dstrain.launcher.hostfile import Host
from dstrain.launcher.transport import ConnectOptions
from dstrain.launcher.transport.local import PipeConnection
from dstrain.launcher.transport.ssh_config import config_arguments, host_arguments
from dstrain.runtime.spec.errors import AuthenticationError, HostError, HostKeyError, UnreachableError

# (what ssh says, our error, cause, remedy); the first that matches wins.
_MEANINGS: tuple[tuple[str, type[HostError], str, str], ...] = (
    (
        r"REMOTE HOST IDENTIFICATION HAS CHANGED",
        HostKeyError,
        "its host key has CHANGED",
        "another machine may be answering; if the host was set up anew: ssh-keygen -R {name}",
    ),
    (r"revoked", HostKeyError, "its host key is revoked in known_hosts", "find out who answers there"),
    (
        r"Host key verification failed|No \S+ host key is known",
        HostKeyError,
        "its host key is unknown",
        "compare the fingerprint with the host's own, then: dstrain hosts trust {name}",
    ),
    (
        r"Permission denied|Too many authentication failures",
        AuthenticationError,
        "it did not let us in",
        "copy your key there (ssh-copy-id {name}), or give user= / key= in the hostfile",
    ),
    (
        r"Could not resolve hostname",
        UnreachableError,
        "the name is unknown",
        "check the name, or give addr=IP in the hostfile",
    ),
    (
        r"Connection refused",
        UnreachableError,
        "it refused the connection",
        "start sshd there, or give port=N in the hostfile",
    ),
    (
        r"timed out|No route to host|unreachable|Connection closed|Connection reset",
        UnreachableError,
        "no connection",
        "is the host up, and does the way to it work (ping, firewall)?",
    ),
)


class OpensshConnection(PipeConnection):
    """The ssh program with our command behind it. `failure` explains an early end."""

    def __init__(self, host: Host, argv: list[str]) -> None:
        super().__init__(argv)
        self._host = host

    def program_ended(self) -> bool:
        """ssh's own 255 says that the connection broke."""
        try:
            return self.process.wait(2.0) != 255
        except subprocess.TimeoutExpired:
            return False

    def failure(self) -> HostError:
        """Why ssh gave up, as one of our errors; call after its output has ended."""
        said = self.complaint()
        for pattern, kind, cause, fix in _MEANINGS:
            if re.search(pattern, said):
                last = said.splitlines()[-1].strip()
                return kind(self._host.name, f"{cause} ({last})", fix.format(name=self._host.name))
        last = (said.splitlines() or ["ssh gave no reason"])[-1]
        return UnreachableError(self._host.name, f"ssh ended: {last}", f"try: ssh {self._host.name}")


def connect_openssh(host: Host, command: str, options: ConnectOptions) -> OpensshConnection:
    """Start ssh; what it cannot do shows when its output ends before our marker."""
    if not shutil.which("ssh"):
        fix = "install openssh-client, or use --ssh paramiko"
        raise UnreachableError(host.name, "there is no ssh program here", fix)
    argv = ["ssh", "-T", "-x", "-a", *config_arguments(), *host_arguments(host)]
    for option in (
        "BatchMode=yes",
        "StrictHostKeyChecking=yes",
        f"ConnectTimeout={options.timeout_s:.0f}",
        f"ConnectionAttempts={options.attempts}",
        "ServerAliveInterval=5",
        "ServerAliveCountMax=3",
        "ClearAllForwardings=yes",
        "RequestTTY=no",
        "LogLevel=ERROR",
    ):
        argv += ["-o", option]
    return OpensshConnection(host, [*argv, "--", host.name, command])
