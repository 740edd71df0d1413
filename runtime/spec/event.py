"""Events: one JSON object a line, from the runtime and the launcher (see docs/contracts.md).

A worker of ours writes them to the file descriptor in DSTRAIN_EVENT_FD, so that nothing ever parses a user's stdout.
Standard library only.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from typing import Any


class EventWriter:
    """Writes events of one process to a file descriptor; a writer without one discards them.

    Lines of up to PIPE_BUF bytes (4096) are written by one call and so never interleave with a child's.
    """

    def __init__(self, fd: int | None, run_id: str, attempt: int, rank: int) -> None:
        self._fd = fd
        self._base = {"run_id": run_id, "attempt": attempt, "rank": rank}

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> EventWriter:
        """The writer of a worker; under torchrun or alone, where nobody listens, one that discards."""
        fd = environ.get("DSTRAIN_EVENT_FD")
        return cls(
            int(fd) if fd else None,
            environ.get("DSTRAIN_RUN_ID", ""),
            int(environ.get("DSTRAIN_ATTEMPT", "0")),
            int(environ.get("RANK", "0")),
        )

    @property
    def is_heard(self) -> bool:
        """Whether a launcher listens, as far as is known."""
        return self._fd is not None

    def emit(self, kind: str, **fields: Any) -> None:
        """Write one event. A reader that has gone is no error: the training goes on."""
        if self._fd is None:
            return
        event = {"ts": time.time_ns(), **self._base, "kind": kind, **fields}
        line = memoryview((json.dumps(event, separators=(",", ":")) + "\n").encode())
        try:
            while line:
                line = line[os.write(self._fd, line) :]
        except OSError:
            self._fd = None
