"""Where the bytes of the workers go: appended as they are to one file per rank and stream, and counted.

The console never gets the bytes from here: it is told how long each file has become and reads the file itself. So
what waits for a slow or stopped terminal is a few numbers, and nothing is lost.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from dstrain.launcher.run_dir import RunDir
from dstrain.runtime.spec.frames import Stream


@dataclass
class LogFile:
    """One log. `index` names it towards the console; `length` is in bytes; `fd`: None while nobody writes."""

    index: int
    attempt: int
    host: str
    rank: int
    stream: Stream
    path: str
    fd: int | None = None
    length: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def append(self, data: bytes) -> None:
        """Write the bytes. Raises OSError with as much written as went."""
        rest = memoryview(data)
        with self.lock:
            if self.fd is None:
                self.fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            while rest:
                written = os.write(self.fd, rest)
                rest = rest[written:]
                self.length += written

    def close(self) -> None:
        """Until somebody writes again: a process that was ended late may still have said something."""
        with self.lock:
            if self.fd is not None:
                os.close(self.fd)
                self.fd = None


class LogFiles:
    """All logs of a run. `append` is called by the reader thread of each host, `take_grown` by the supervisor."""

    def __init__(self, run: RunDir, on_growth: Callable[[], None], on_error: Callable[[str], None]) -> None:
        self._run, self._on_growth, self._on_error = run, on_growth, on_error
        self._files: dict[tuple[int, int, Stream], LogFile] = {}
        self._lock = threading.Lock()
        self._grown: set[int] = set()
        self._by_index: list[LogFile] = []
        self._broken = False

    def append(self, attempt: int, host: str, rank: int, stream: Stream, data: bytes) -> None:
        """Write the bytes; a full disk is told loudly, once, and the training goes on."""
        log = self._files.get((attempt, rank, stream))
        try:
            log = log or self._open(attempt, host, rank, stream)
            log.append(data)
        except OSError as error:
            if not self._broken:
                self._broken = True
                path = self._run.log(attempt, host, rank, stream)
                self._on_error(f"logs cannot be written ({error.strerror}): {path}; output is being lost")
        if log is None or not log.length:
            return
        with self._lock:
            first = not self._grown
            self._grown.add(log.index)
        if first:
            self._on_growth()

    def _open(self, attempt: int, host: str, rank: int, stream: Stream) -> LogFile:
        path = self._run.log(attempt, host, rank, stream)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._lock:
            log = LogFile(len(self._by_index), attempt, host, rank, stream, str(path))
            self._by_index.append(log)
            self._files[attempt, rank, stream] = log
        return log

    def take_grown(self) -> list[LogFile]:
        """The files that have grown since the last call."""
        with self._lock:
            grown, self._grown = self._grown, set()
        return [self._by_index[index] for index in sorted(grown)]

    def tail(self, attempt: int, rank: int, stream: Stream, size: int = 1 << 16) -> str:
        """The end of one log, for the root cause."""
        log = self._files.get((attempt, rank, stream))
        if log is None:
            return ""
        try:
            with open(log.path, "rb") as file:  # noqa: PTH123 - the fd is write-only
                file.seek(max(0, log.length - size))
                return file.read(size).decode(errors="replace")
        except OSError:
            return ""

    def write_stack(self, attempt: int, host: str, rank: int, text: str) -> None:
        """Add to the file that says where a rank was; a full disk has its own error."""
        path = self._run.stacks(attempt, host, rank)
        with contextlib.suppress(OSError):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%H:%M:%S')} {text}\n")

    def stacks_of(self, attempt: int) -> str:
        """A pattern of those files, for people."""
        return str(self._run.path / "logs" / f"attempt-{attempt}" / "*" / "*.stacks")

    def close_attempt(self, attempt: int) -> None:
        """Close the files of an attempt that is over."""
        for key, log in list(self._files.items()):
            if key[0] == attempt:
                log.close()
