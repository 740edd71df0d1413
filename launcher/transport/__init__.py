"""Transports: start one command on a host and speak with it over its stdin and stdout.

Three exist behind one protocol: a local process, paramiko, and the `ssh` program. Whatever goes wrong in any of
them becomes a HostError with the host, the cause and the remedy; nothing above this seam sees a third-party error.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Literal, Protocol

from dstrain.launcher.hostfile import Host

SshProgram = Literal["paramiko", "openssh"]

# Stage 0: read the length of the bootstrap and the bootstrap itself from stdin, and run it. It has neither single
# quotes nor an exclamation mark, so that it stands in single quotes in any login shell (sh, bash, zsh, fish, csh).
_STAGE_0 = (
    'import sys;f=open(0,"rb",buffering=0,closefd=False);n=int(f.readline());b=[];'
    'exec("while n:\\n p=f.read(n) or sys.exit(1)\\n b.append(p)\\n n-=len(p)");exec(b"".join(b))'
)
_FIND_PYTHON = (  # ~/ is the host's home, which quoting has hidden from its shell
    'for p do case "$p" in "~/"*) p="$HOME/${p#??}";; esac; '
    'command -v "$p" >/dev/null 2>&1 && exec "$p" -I -S -u -c "$DSTRAIN_STAGE_0"; done; '
    "echo dstrain-no-python; exit 127"
)


@dataclass(frozen=True)
class ConnectOptions:
    """timeout_s: for each of dialling, banner, login and opening the channel. attempts: dials before giving up."""

    ssh: SshProgram = "paramiko"
    timeout_s: float = 10.0
    attempts: int = 3


class Connection(Protocol):
    """One command running on a host. `read` is called from one thread, `write` from any."""

    def read(self) -> bytes:
        """Wait for bytes of its stdout; b"" at the end."""

    def write(self, data: bytes) -> None:
        """Send all of `data` to its stdin. Raises OSError when it has gone."""

    def close(self) -> None:
        """End its stdin, which ends the job on that host; never waits long. May be called twice, from any thread."""

    def program_ended(self) -> bool:
        """After the end of `read`: did the command itself end, or did the way to the host break?"""

    def complaint(self) -> str:
        """The end of what came on its stderr: for the message when something went wrong."""


def start_command(pythons: list[str]) -> str:
    """The one place where words meet a shell: run stage 0 under the first of `pythons` that exists there."""
    words = ["exec", "env", f"DSTRAIN_STAGE_0={_STAGE_0}", "sh", "-c", _FIND_PYTHON, "sh", *pythons]
    return " ".join(shlex.quote(word) for word in words)


def connect(host: Host, command: str, options: ConnectOptions) -> Connection:
    """Start `command` on the host. Raises HostError. Imports only the transport that is needed."""
    if host.transport == "local":
        from dstrain.launcher.transport.local import LocalConnection

        return LocalConnection(host, command)
    if options.ssh == "openssh":
        from dstrain.launcher.transport.openssh import connect_openssh

        return connect_openssh(host, command, options)
    from dstrain.launcher.transport.ssh import connect_paramiko

    return connect_paramiko(host, command, options)
