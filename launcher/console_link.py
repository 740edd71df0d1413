"""Between supervisor and console: JSON lines over a socket pair, in which the supervisor never waits.

Messages are few (one per thing that happens). How far the logs have grown is sent when the socket takes it, and only
the newest lengths; so a console that is stopped for an hour costs the supervisor a few numbers.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from typing import Any

from dstrain.launcher.logs import LogFile


class ConsoleLink:
    """The supervisor's end. `gone` once the console has died or closed."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.socket = sock
        self.gone = False
        self._out = bytearray()
        self._in = bytearray()
        self._grown: dict[int, LogFile] = {}
        self._told: set[int] = set()

    @property
    def wants_to_write(self) -> bool:
        return not self.gone and bool(self._out or self._grown)

    def send(self, kind: str, **fields: Any) -> None:
        """Queue one message."""
        self._out += json.dumps({"kind": kind, **fields}, separators=(",", ":")).encode() + b"\n"

    def grown(self, files: list[LogFile]) -> None:
        """Remember that these logs have become longer."""
        self._grown.update((log.index, log) for log in files)

    def flush(self) -> None:
        """Send what the socket takes now."""
        if not self._out and self._grown:
            self._queue_grown()
        while self._out and not self.gone:
            try:
                sent = self.socket.send(self._out)
            except BlockingIOError:
                return
            except OSError:
                self.gone = True
                return
            del self._out[:sent]
            if not self._out and self._grown:
                self._queue_grown()

    def _queue_grown(self) -> None:
        for log in self._grown.values():
            if log.index not in self._told:
                self._told.add(log.index)
                self.send(
                    "file", index=log.index, attempt=log.attempt, host=log.host, rank=log.rank,
                    stream=int(log.stream), path=log.path,
                )  # fmt: skip
        self.send("grown", lengths=[[log.index, log.length] for log in self._grown.values()])
        self._grown = {}

    def receive(self) -> list[str]:
        """What the console asks: "interrupt", "terminate", "hangup"; sets `gone` at its end."""
        try:
            data = self.socket.recv(4096)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        if not data:
            self.gone = True
            return []
        self._in += data
        *lines, rest = bytes(self._in).split(b"\n")
        self._in = bytearray(rest)
        return [line.decode() for line in lines]


def parse(line: bytes) -> Mapping[str, Any]:
    """One message, at the console's end."""
    message: Mapping[str, Any] = json.loads(line)
    return message
