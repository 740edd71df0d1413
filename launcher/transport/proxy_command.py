"""ProxyCommand of ssh_config: a program whose stdin and stdout are the way to a host.

A real socket pair, so that the program's end is the end of the stream; paramiko's own ProxyCommand loops for ever
on a program that has ended.
"""

from __future__ import annotations

import re
import shlex
import socket
import subprocess
import tempfile
import threading

from dstrain.launcher.hostfile import Host
from dstrain.launcher.transport.local import end_of
from dstrain.launcher.transport.ssh_config import SshTarget
from dstrain.runtime.spec.errors import UnreachableError

END_S = 0.5  # from SIGTERM to SIGKILL; its stream has ended too, so that few programs need either


class ProgramStream(socket.socket):
    """Our end of the way. Closing it ends the program."""

    def __init__(self, argv: list[str]) -> None:
        ours, theirs = socket.socketpair()
        theirs_fd = theirs.fileno()
        super().__init__(fileno=ours.detach())
        self._lock = threading.Lock()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the stream
        self._said = ""
        try:
            with theirs:
                self._process = subprocess.Popen(argv, stdin=theirs_fd, stdout=theirs_fd, stderr=self._errors)
        except BaseException:
            super().close()
            self._errors.close()
            raise

    def close(self) -> None:
        """May be called twice, and from any thread."""
        super().close()
        with self._lock:
            self._process.terminate()
            try:
                self._process.wait(END_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            if not self._errors.closed:
                self._said = end_of(self._errors)
                self._errors.close()

    def complaint(self) -> str:
        """The last two lines of what the program printed on its stderr."""
        with self._lock:
            said = self._said if self._errors.closed else end_of(self._errors)
        return " / ".join(line.strip() for line in said.splitlines()[-2:])


def open_program(host: Host, target: SshTarget, command: str) -> ProgramStream:
    """Start the host's ProxyCommand, without a shell. Raises UnreachableError."""
    tokens = {"%h": target.hostname, "%p": str(target.port), "%r": target.user, "%%": "%"}
    try:
        words = [re.sub("%[hpr%]", lambda token: tokens[token[0]], word) for word in shlex.split(command)]
        return ProgramStream(words)
    except (OSError, ValueError) as error:
        cause = f"its ProxyCommand cannot be started: {error}"
        raise UnreachableError(host.name, cause, f"mend it in ssh_config: {command}") from None
