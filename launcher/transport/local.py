"""A process of this machine, spoken to over pipes; the `ssh` program is one too (openssh.py)."""

from __future__ import annotations

import os
import select
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from typing import IO

from dstrain.launcher.hostfile import Host
from dstrain.runtime.spec.errors import UnreachableError

CLOSE_WAIT_S = 6.0
POLL_MS = 100  # in which a write that is stuck sees that the connection is to end
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
        assert self.process.stdin is not None
        os.set_blocking(self.process.stdin.fileno(), False)  # so that no write holds the lock for ever
        self._lock = threading.Lock()
        self._closing = threading.Event()

    def read(self) -> bytes:
        assert self.process.stdout is not None
        try:
            return os.read(self.process.stdout.fileno(), 1 << 18)
        except (OSError, ValueError):
            return b""

    def write(self, data: bytes) -> None:
        assert self.process.stdin is not None
        rest = memoryview(data)
        with self._lock:
            while rest:
                if self._closing.is_set():
                    raise BrokenPipeError("the connection is closed")
                rest = rest[_write_some(self.process.stdin.fileno(), rest) :]

    def close(self) -> None:
        assert self.process.stdin is not None
        self._closing.set()
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


def _write_some(fd: int, data: memoryview) -> int:
    """As much as the pipe takes; 0 if it takes nothing for POLL_MS. Raises OSError."""
    poll = select.poll()  # select.select cannot do descriptors beyond 1023
    poll.register(fd, select.POLLOUT)
    poll.poll(POLL_MS)
    try:
        return os.write(fd, data)
    except BlockingIOError:
        return 0


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
