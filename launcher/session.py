"""One host of a run, seen from the head: a thread that connects, sends the package, and then reads frames.

Output goes straight to the log files; everything else is posted to the supervisor's inbox. Reading never waits for
anything but the disk, so no worker is ever slowed by a console.
"""

from __future__ import annotations

import contextlib
import queue
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

from dstrain.launcher.bundle import Bundle, bootstrap_source
from dstrain.launcher.hostfile import Host
from dstrain.launcher.logs import LogFiles
from dstrain.launcher.transport import Connection, ConnectOptions, connect, start_command
from dstrain.runtime.spec.errors import DstrainError, HostError, UnreachableError
from dstrain.runtime.spec.file_frames import Chunk, FileAnswer
from dstrain.runtime.spec.frames import (
    FrameReader,
    Message,
    Output,
    ProtocolError,
    Stream,
    encode_chunk,
    encode_message,
)

MARKER_LIMIT_BYTES = 1 << 20  # a login shell that prints more than this before our marker is not one
MINIMUM_PYTHON = (3, 11)


@dataclass(frozen=True)
class Connected:
    """The agent's process runs and has our package."""


@dataclass(frozen=True)
class Failed:
    """The host cannot be used."""

    error: DstrainError


@dataclass(frozen=True)
class Gone:
    """The connection ended. complaint: what the far side's stderr said last.

    program_ended: our program there ended while the way to it still worked; else the way broke.
    """

    complaint: str
    program_ended: bool


@dataclass(frozen=True)
class Events:
    """Bytes of a rank's event descriptor."""

    rank: int
    data: bytes


Post = Callable[[int, "Message | Connected | Failed | Gone | Events"], None]


class Liveness(Enum):
    """CONNECTING -> ALIVE -> GONE, or CONNECTING -> GONE."""

    CONNECTING = auto()
    ALIVE = auto()
    GONE = auto()


class HostSession:
    """`index`: the host's place in the run. `attempt` is set by the supervisor before it starts one."""

    def __init__(self, index: int, host: Host, bundle: Bundle, pythons: list[str], logs: LogFiles, post: Post) -> None:
        self.index, self.host = index, host
        self.liveness = Liveness.CONNECTING
        self.attempt = 0
        self.heard_at = time.monotonic()
        self.began_at: float | None = None  # when its turn to connect came
        self._reading = False
        self._bundle, self._pythons, self._logs, self._post = bundle, pythons, logs, post
        self._connection: Connection | None = None
        self._closed = threading.Event()
        self._talks: dict[int, queue.SimpleQueue[FileAnswer | Chunk | None]] = {}
        self._last_talk = 0
        self._talking = threading.Lock()

    def start(self, options: ConnectOptions, slot: threading.Semaphore) -> None:
        """Connect in a thread of its own; `slot` bounds how many do so at once."""
        threading.Thread(target=self._run, args=(options, slot), name=f"host-{self.host.name}", daemon=True).start()

    def send(self, message: Message) -> None:
        """Send a message; a host that has gone is no error here, `Gone` says it."""
        if self._connection is not None and self.liveness is Liveness.ALIVE:
            with contextlib.suppress(OSError):
                self._connection.write(encode_message(message))

    def send_chunk(self, talk: int, data: bytes) -> None:
        """Send a piece of a file; as `send`."""
        if self._connection is not None and self.liveness is Liveness.ALIVE:
            with contextlib.suppress(OSError):
                self._connection.write(encode_chunk(talk, data))

    def begin_talk(self) -> tuple[int, queue.SimpleQueue[FileAnswer | Chunk | None]]:
        """Its number, and where its answers come, in any thread; None: the host has gone. [Note: talks]"""
        with self._talking:
            self._last_talk += 1
            answers = self._talks[self._last_talk] = queue.SimpleQueue()
            if self.liveness is Liveness.GONE:
                answers.put(None)
            return self._last_talk, answers

    def end_talk(self, talk: int) -> None:
        """Later answers are nobody's."""
        with self._talking:
            self._talks.pop(talk, None)

    def close(self) -> None:
        """Drop the connection: the far side's stdin ends, and so does the job there."""
        self._closed.set()
        if self._connection is not None:
            self._connection.close()

    def silent_s(self) -> float:
        """For how long we have waited for bytes; time that we spent on our own disk is not the host's silence."""
        return time.monotonic() - self.heard_at if self._reading else 0.0

    def _run(self, options: ConnectOptions, slot: threading.Semaphore) -> None:
        try:
            with slot:
                self.began_at = time.monotonic()
                self._connection = connect(self.host, start_command(self._pythons), options)
                if self._closed.is_set():
                    self._end_talks()
                    self._connection.close()
                    return
                rest = self._bootstrap(self._connection)
        except Exception as error:
            self._end_talks()
            self._post(self.index, Failed(self._explain(error)))
            return
        self.heard_at = time.monotonic()
        self.liveness = Liveness.ALIVE
        self._post(self.index, Connected())
        try:
            self._read_frames(self._connection, rest)
            complaint = self._connection.complaint()
        except ProtocolError as error:
            complaint = str(error)
        self._end_talks()
        self._post(self.index, Gone(complaint, self._connection.program_ended()))

    def _end_talks(self) -> None:
        """The host has gone: whoever waits for its answer is told so."""
        with self._talking:
            self.liveness = Liveness.GONE
            for answers in self._talks.values():
                answers.put(None)

    def _explain(self, error: Exception) -> DstrainError:
        if isinstance(error, DstrainError):
            return error
        return UnreachableError(self.host.name, f"{type(error).__name__}: {error}", "please report this")

    def _bootstrap(self, connection: Connection) -> bytes:
        """Start our code there: marker, python version, package. Returns the first bytes behind the dialogue."""
        marker = f"dstrain-{secrets.token_hex(8)}"
        source = bootstrap_source(marker)
        head = f"{self._bundle.digest} {len(self._bundle.archive)}\n".encode()
        with contextlib.suppress(OSError):  # it has ended already: what it said explains why
            connection.write(b"%d\n" % len(source) + source + head)
        lines = _Lines(connection)
        greeting = self._await_marker(lines, marker, connection)
        version = greeting.removeprefix(f"{marker} python ")
        if tuple(int(part) for part in version.split(".")[:2]) < MINIMUM_PYTHON:
            fix = "give python=PATH in the hostfile, or --python"
            raise HostError(self.host.name, f"its python is {version}, ours needs 3.11 or newer", fix)
        answer = lines.next()
        if answer == "need":
            connection.write(self._bundle.archive)
            answer = lines.next()
        if answer not in ("have", "installed"):
            raise HostError(
                self.host.name, (answer or "it broke off").removeprefix("error "), "look at the home folder there"
            )
        return lines.rest

    def _await_marker(self, lines: _Lines, marker: str, connection: Connection) -> str:
        """Skip what a login shell printed; explain it when the marker never comes."""
        seen: list[str] = []
        while (line := lines.next()) is not None:
            if line.endswith("dstrain-no-python"):
                tried = ", ".join(self._pythons)
                raise HostError(self.host.name, f"no python there (tried {tried})", "give python=PATH in the hostfile")
            if marker in line:
                return line[line.index(marker) :]
            seen.append(line)
        from dstrain.launcher.transport.openssh import OpensshConnection

        if isinstance(connection, OpensshConnection):
            connection.process.wait(10)
            raise connection.failure()
        said = " / ".join([*seen[-2:], connection.complaint()]).strip(" /") or "nothing"
        fix = f"try: ssh {self.host.name} python3 --version"
        raise HostError(self.host.name, f"python did not start there; it said: {said}", fix)

    def _read_frames(self, connection: Connection, data: bytes) -> None:
        reader, name = FrameReader(), self.host.name
        while True:
            for frame in reader.feed(data):
                if isinstance(frame, FileAnswer | Chunk):
                    self._hand_over(frame)
                elif not isinstance(frame, Output):
                    self._post(self.index, frame)
                elif frame.stream is Stream.EVENTS:
                    self._post(self.index, Events(frame.rank, frame.data))
                else:
                    self._logs.append(self.attempt, name, frame.rank, frame.stream, frame.data)
            self.heard_at, self._reading = time.monotonic(), True
            data = connection.read()
            self._reading = False
            if not data:
                return

    def _hand_over(self, answer: FileAnswer | Chunk) -> None:
        with self._talking:
            if answer.talk in self._talks:
                self._talks[answer.talk].put(answer)


class _Lines:
    """Lines of the dialogue before the frames; `rest` is what came behind the last one taken."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.rest = b""
        self._seen = 0

    def next(self) -> str | None:
        while b"\n" not in self.rest:
            data = self._connection.read()
            self._seen += len(data)
            if not data or self._seen > MARKER_LIMIT_BYTES:
                return None
            self.rest += data
        line, _, self.rest = self.rest.partition(b"\n")
        return line.decode(errors="replace").rstrip("\r")
