"""events.jsonl: what the runtime of the ranks reports, and what the launcher does, one JSON object a line."""

from __future__ import annotations

import contextlib
import json
import os
import time
from typing import Any

from dstrain.launcher.run_dir import RunDir


class EventLog:
    """Appends whole lines only; a rank's half line waits for its rest."""

    def __init__(self, run: RunDir, run_id: str) -> None:
        self._fd = os.open(run.events, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._run_id = run_id
        self._rest: dict[int, bytes] = {}

    def begin_attempt(self) -> None:
        """Half a line of a rank that was killed has no rest to come."""
        self._rest.clear()

    def append(self, rank: int, data: bytes) -> bytes:
        """Bytes of a rank's event descriptor, as they are. Returns the lines that are now whole."""
        whole, newline, rest = (self._rest.pop(rank, b"") + data).rpartition(b"\n")
        if rest:
            self._rest[rank] = rest
        if newline:
            self._write(whole + newline)
        return whole + newline

    def write(self, attempt: int, kind: str, **fields: Any) -> None:
        """An event of the launcher's own; its rank is null."""
        event = {"ts": time.time_ns(), "run_id": self._run_id, "attempt": attempt, "rank": None, "kind": kind}
        self._write((json.dumps({**event, **fields}) + "\n").encode())

    def _write(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # a full disk: the logs' own error is told, and the run goes on
            os.write(self._fd, data)
