"""A process of this machine, spoken to over pipes; the `ssh` program is one too (openssh.py)."""

from __future__ import annotations

import os
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from typing import IO

from dstrain.launcher.hostfile import Host
from dstrain.runtime.spec.errors import UnreachableError

CLOSE_WAIT_S = 6.0
COMPLAINT_BYTES = 4096


class PipeConnection:
    """A child process in a session of its own (a terminal's Ctrl-C does not reach it)."""

    def __init__(self, argv: Sequence[str], environment: dict[str, str] | None = None) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the connection
        self.process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,
            bufsize=0,
            env=environment,
        )
        self._lock = threading.Lock()

    def read(self) -> bytes:
        assert self.process.stdout is not None
        try:
            return os.read(self.process.stdout.fileno(), 1 << 18)
        except (OSError, ValueError):
            return b""

    def write(self, data: bytes) -> None:
        rest = memoryview(data)
        with self._lock:
            if self.process.stdin is None or self.process.stdin.closed:
                raise BrokenPipeError("the connection is closed")
            while rest:
                rest = rest[os.write(self.process.stdin.fileno(), rest) :]

    def close(self) -> None:
        assert self.process.stdin is not None
        with self._lock:
            self.process.stdin.close()
        try:
            self.process.wait(CLOSE_WAIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def program_ended(self) -> bool:
        return True

    def complaint(self) -> str:
        return end_of(self._errors)


def end_of(errors: IO[bytes]) -> str:
    """The last words in the file that is a program's stderr."""
    size = os.fstat(errors.fileno()).st_size
    last = os.pread(errors.fileno(), COMPLAINT_BYTES, max(0, size - COMPLAINT_BYTES))
    return last.decode(errors="replace").strip()


class LocalConnection(PipeConnection):
    """The warden of this machine."""

    def __init__(self, host: Host, command: str) -> None:
        try:
            super().__init__(["/bin/sh", "-c", command])
        except OSError as error:
            fix = "look at the limits (ulimit -u)"
            raise UnreachableError(host.name, f"cannot start a process: {error}", fix) from None
