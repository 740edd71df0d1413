"""The agent's way to the head: frames on stdout, never blocking, in order. Standard library only."""

from __future__ import annotations

import os
from collections import deque

from dstrain.runtime.spec.frames import Heartbeat, Message, Stream, encode_chunk, encode_message, encode_output

HIGH_WATER_BYTES = 4 << 20  # above: the workers' pipes are left unread, so a slow link slows them, not our memory
LOW_WATER_BYTES = 1 << 20


class Outbox:
    """A queue of frames for one descriptor. `full` tells the agent to read no more output for a while."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        os.set_blocking(fd, False)
        self._frames: deque[bytes] = deque()
        self._rest = memoryview(b"")
        self._bytes = 0
        self.full = False

    @property
    def pending(self) -> bool:
        return bool(self._rest) or bool(self._frames)

    def message(self, message: Message) -> None:
        """Queue a message behind the output that came before it; a heartbeat overtakes what waits."""
        data = encode_message(message)
        if isinstance(message, Heartbeat):
            self._frames.appendleft(data)
            self._bytes += len(data)
        else:
            self._add(data)

    def output(self, rank: int, stream: Stream, data: bytes) -> None:
        """Queue what a worker wrote."""
        self._add(encode_output(rank, stream, data))

    def chunk(self, talk: int, data: bytes) -> None:
        """Queue a piece of a file."""
        self._add(encode_chunk(talk, data))

    def _add(self, data: bytes) -> None:
        self._frames.append(data)
        self._bytes += len(data)
        self.full = self.full or self._bytes > HIGH_WATER_BYTES

    def flush(self) -> None:
        """Write what the descriptor takes now. Raises OSError when the head has gone."""
        while self.pending:
            if not self._rest:
                self._rest = memoryview(self._frames.popleft())
            try:
                written = os.write(self.fd, self._rest)
            except BlockingIOError:
                return
            self._rest = self._rest[written:]
            self._bytes -= written
            if self._bytes < LOW_WATER_BYTES:
                self.full = False
