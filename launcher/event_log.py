"""events.jsonl: what the runtime of the ranks reports, and what the launcher does, one JSON object a line."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from dstrain.launcher.run_dir import RunDir

Event = Mapping[str, Any]


class EventLog:
    """Appends whole lines only; a rank's half line waits for its rest. on_event: is given each event behind it."""

    def __init__(self, run: RunDir, run_id: str, on_event: Callable[[Event], None] = lambda event: None) -> None:
        self._fd = os.open(run.events, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._run_id, self._on_event = run_id, on_event
        self._rest: dict[int, bytes] = {}

    def begin_attempt(self) -> None:
        """Half a line of a rank that was killed has no rest to come."""
        self._rest.clear()

    def append(self, rank: int, data: bytes) -> bytes:
        """Bytes of a rank's event descriptor, as they are. Returns the lines that are now whole."""
        whole, newline, rest = (self._rest.pop(rank, b"") + data).rpartition(b"\n")
        if rest:
            self._rest[rank] = rest
        if not newline:
            return b""
        self._write(whole + newline)
        for line in whole.split(b"\n"):
            with contextlib.suppress(ValueError, RecursionError):  # a script may write anything
                event = json.loads(line)
                if isinstance(event, dict):
                    self._on_event(event | {"rank": rank})
        return whole + newline

    def write(self, attempt: int, kind: str, **fields: Any) -> None:
        """An event of the launcher's own; its rank is null."""
        event = {"ts": time.time_ns(), "run_id": self._run_id, "attempt": attempt, "rank": None, "kind": kind, **fields}
        self._write((json.dumps(event) + "\n").encode())
        self._on_event(event)

    def _write(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # a full disk: the logs' own error is told, and the run goes on
            os.write(self._fd, data)
