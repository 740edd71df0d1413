"""How head, agent and zygote talk: frames on a byte stream.

A frame is a header (kind, length) and that many bytes. Three kinds exist:

    MESSAGE   JSON of one of the dataclasses below, with its class name under "message"
    OUTPUT    rank, stream, then the bytes that the worker wrote, as they are
    CHUNK     the number of a talk, then bytes of a file: [Note: talks] in file_frames.py

Strings that are not UTF-8 (argv and environment may hold any byte) travel as the lone surrogates that
`os.fsdecode` makes of them; JSON escapes those, so they arrive byte-identical. Standard library only.
"""

from __future__ import annotations

import json
import signal
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from enum import IntEnum
from typing import Any

from dstrain.runtime.spec.file_frames import CHUNK_HEADER, Chunk, FileAnswer, FileRequest, Inventory, StepFiles

HEADER = struct.Struct(">BI")
OUTPUT_HEADER = struct.Struct(">IB")
MAX_FRAME_BYTES = 1 << 28  # far above any configuration; a length beyond it means that the stream is not ours


class FrameKind(IntEnum):
    MESSAGE = 1
    OUTPUT = 2
    CHUNK = 3


class Stream(IntEnum):
    """Which of a worker's descriptors wrote the bytes."""

    STDOUT = 1
    STDERR = 2
    EVENTS = 3


class ProtocolError(Exception):
    """The bytes are not frames of ours."""


# --- messages: head -> agent ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepare:
    """The first message: who you are in this run, and what to make ready."""

    run_id: str
    host: str
    python: list[str]  # interpreters to try for the workers, best first
    python_named: bool  # by the user; else one that the prologue brings comes before all
    cwd: str
    kind: str  # script | module | program
    target: str
    arguments: list[str]
    environment: dict[str, str]  # on top of the login environment and the prologue
    pass_environment: dict[str, str]  # under `environment`
    prologue: str | None
    slots: int | None  # None: count the GPUs
    gpus: list[int] | None  # the GPUs to use, by index
    fallback_slots: int  # where slots is None and there is no GPU
    excluded_slots: list[int]  # where slots is None: GPUs to leave out
    preload: bool
    requirements: list[str]  # modules that the target needs besides torch
    job: str | None  # the resolved job, JSON


@dataclass(frozen=True)
class Listen:
    """To rank 0's host: open a listening socket for the store on each candidate, and say which opened."""

    candidates: list[str]
    port: int  # 0: any free one
    token: str  # what a caller must read back


@dataclass(frozen=True)
class Dial:
    """To every other host: try these addresses and say which answer with the token."""

    addresses: list[tuple[str, int]]
    token: str
    timeout_s: float


@dataclass(frozen=True)
class ProcessSpec:
    """One rank: `environment` holds what differs between ranks."""

    rank: int
    local_rank: int
    environment: dict[str, str]


@dataclass(frozen=True)
class Start:
    """Start the ranks of one attempt. `serve_store`: this host holds the store."""

    attempt: int
    processes: list[ProcessSpec]
    environment: dict[str, str]  # common to all ranks of this host in this attempt
    master_address: str
    master_port: int
    serve_store: bool
    job: str | None = None  # in place of that of Prepare: fewer ranks ask for other numbers


@dataclass(frozen=True)
class Stop:
    """End all ranks: SIGTERM now, SIGKILL after `grace_s` (0: at once)."""

    grace_s: float


@dataclass(frozen=True)
class Heartbeat:
    """Both directions, every HEARTBEAT_S. The lease: who hears nothing for long enough ends the job."""


@dataclass(frozen=True)
class Close:
    """The run is over: sweep, clean up, leave."""


@dataclass(frozen=True)
class DumpStacks:
    """Say where each running rank is, in Python. all_threads: of ranks that are to end; it may crash them."""

    all_threads: bool = False


# --- messages: agent -> head ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class HostFacts:
    """What the agent found on its host, for preflight and plan."""

    hostname: str
    cores: int
    slots: int
    gpus: int
    addresses: list[str]  # candidates for rank 0's address, best first
    clock_ns: int
    cwd: str | None  # None: does not exist, or we may not enter it
    target_sha256: str | None  # of a script or program file; None: not found
    target_path: str | None
    python: str | None  # the workers' interpreter; None: none of the candidates exists
    prologue_error: str | None


@dataclass(frozen=True)
class PreloadFacts:
    """What the workers' interpreter can import. `error`: the zygote's own words when it could not start."""

    python_version: str | None
    torch_version: str | None
    missing: list[str] = field(default_factory=list)
    error: str | None = None


@dataclass(frozen=True)
class Listening:
    """(address, port) and interface of every socket that opened, and why the others did not."""

    addresses: list[tuple[str, int]]
    interfaces: dict[str, str]
    errors: dict[str, str]


@dataclass(frozen=True)
class Dialled:
    """Per address: the local interface that reaches it, or why it could not be reached."""

    interfaces: dict[str, str]
    errors: dict[str, str]


@dataclass(frozen=True)
class Started:
    pids: dict[str, int]  # by rank


@dataclass(frozen=True)
class StartFailed:
    """A rank could not be started at all (exec error, zygote gone)."""

    rank: int
    reason: str


@dataclass(frozen=True)
class Exited:
    """A rank ended; status as in subprocess: -N means signal N.

    out_of_memory: the kernel killed it. swept: the agent did, with whatever else was left of the attempt.
    """

    rank: int
    status: int
    clock_ns: int
    out_of_memory: bool = False
    swept: bool = False


@dataclass(frozen=True)
class Paused:
    """Ranks in process state T (SIGSTOP), and for how long; empty when they run again."""

    seconds: dict[str, float]


@dataclass(frozen=True)
class Quiet:
    """Seconds for which each running rank has used no CPU, written nothing and read nothing."""

    seconds: dict[str, float]


@dataclass(frozen=True)
class Stacks:
    """Where each running rank is: faulthandler's text, no entry where it cannot be had.

    states: of their processes, as in /proc: a letter, and what a sleeping one sleeps in.
    """

    frames: dict[str, str]
    states: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class AllEnded:
    """No process of this attempt is left on the host."""

    attempt: int


@dataclass(frozen=True)
class AgentFailed:
    """The agent cannot go on; it has swept the job."""

    reason: str


# --- messages: agent <-> zygote ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fork:
    """Fork one rank. Four descriptors come with it: stdout, stderr, events, stacks."""

    rank: int
    environment: dict[str, str]
    kind: str
    target: str
    arguments: list[str]
    attempt: int


@dataclass(frozen=True)
class HoldStore:
    """Fork the process that holds the TCPStore. One descriptor comes with it: the listening socket."""

    address: str
    port: int
    attempt: int


@dataclass(frozen=True)
class Forked:
    """`attempt`: that of the request; it may have ended while the request lay in the socket."""

    rank: int  # STORE_RANK: the store's process
    pid: int
    attempt: int


@dataclass(frozen=True)
class Ended:
    rank: int
    pid: int
    status: int


STORE_RANK = -1
STACK_SIGNAL = signal.SIGRTMIN + 3  # "say where you are"; the real-time signals are nobody's by default
ALL_STACKS_SIGNAL = signal.SIGRTMIN + 4  # the same of all threads

Message = (
    Prepare
    | Listen
    | Dial
    | Start
    | Stop
    | Heartbeat
    | Close
    | HostFacts
    | PreloadFacts
    | Listening
    | Dialled
    | Started
    | StartFailed
    | Exited
    | Paused
    | Quiet
    | AllEnded
    | AgentFailed
    | DumpStacks
    | Stacks
    | Fork
    | HoldStore
    | Forked
    | Ended
    | FileRequest
    | FileAnswer
)
_MESSAGES: dict[str, Any] = {cls.__name__: cls for cls in Message.__args__}


@dataclass(frozen=True)
class Output:
    """Bytes that a worker wrote, exactly."""

    rank: int
    stream: Stream
    data: bytes


def encode_message(message: Message) -> bytes:
    """One MESSAGE frame."""
    body = json.dumps({"message": type(message).__name__, **asdict(message)}, separators=(",", ":")).encode()
    return HEADER.pack(FrameKind.MESSAGE, len(body)) + body


def encode_output(rank: int, stream: Stream, data: bytes) -> bytes:
    """One OUTPUT frame."""
    header = HEADER.pack(FrameKind.OUTPUT, OUTPUT_HEADER.size + len(data))
    return b"".join((header, OUTPUT_HEADER.pack(rank, stream), data))


def encode_chunk(talk: int, data: bytes) -> bytes:
    """One CHUNK frame."""
    return b"".join((HEADER.pack(FrameKind.CHUNK, CHUNK_HEADER.size + len(data)), CHUNK_HEADER.pack(talk), data))


def decode_message(body: bytes) -> Message:
    """The dataclass that `encode_message` wrote. Raises ProtocolError for anything else."""
    try:
        fields = json.loads(body)
        cls = _MESSAGES[fields.pop("message")]
        if cls is Start:
            fields["processes"] = [ProcessSpec(**spec) for spec in fields["processes"]]
        if cls is Inventory:
            fields["steps"] = {int(step): StepFiles(**held) for step, held in fields["steps"].items()}
        if "addresses" in fields and cls is not HostFacts:
            fields["addresses"] = [(address, port) for address, port in fields["addresses"]]
        message: Message = cls(**fields)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ProtocolError(f"not a message of ours: {body[:80]!r} ({error})") from None
    return message


class FrameReader:
    """Cuts a byte stream into messages, output and chunks. Feed it whatever arrived."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Message | Output | Chunk]:
        """Yield what `data` completes; an incomplete frame waits for the next call."""
        self._buffer += data
        position = 0
        try:
            while True:
                frame, position = self._next(position)
                if frame is None:
                    break
                yield frame
        finally:
            del self._buffer[:position]

    def _next(self, start: int) -> tuple[Message | Output | Chunk | None, int]:
        body = start + HEADER.size
        if len(self._buffer) < body:
            return None, start
        kind, length = HEADER.unpack_from(self._buffer, start)
        if kind not in FrameKind.__members__.values() or length > MAX_FRAME_BYTES:
            raise ProtocolError(f"expected a frame, found {bytes(self._buffer[start : start + 60])!r}")
        end = body + length
        if len(self._buffer) < end:
            return None, start
        if kind == FrameKind.OUTPUT:
            rank, stream = OUTPUT_HEADER.unpack_from(self._buffer, body)
            return Output(rank, Stream(stream), bytes(self._buffer[body + OUTPUT_HEADER.size : end])), end
        if kind == FrameKind.CHUNK:
            (talk,) = CHUNK_HEADER.unpack_from(self._buffer, body)
            return Chunk(talk, bytes(self._buffer[body + CHUNK_HEADER.size : end])), end
        return decode_message(bytes(self._buffer[body:end])), end
