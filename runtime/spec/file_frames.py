"""What head and agent say about files of checkpoints. Part of the protocol in frames.py. Standard library only.

[Note: talks]
Each message carries the number of a *talk*, which the head has chosen; the answer carries it too, so that several files
travel at once.

    ListCheckpoints  -> Inventory
    SendFile         -> chunks, as many as `More` has allowed, and FileSent behind the last
    TakeFile, chunks -> Taken for each chunk that was written; EndFile -> Done
    KeepFiles        -> Done
    DropFiles, Forget   no answer

A chunk goes out only when the one before has been written at the other end, so that nobody's memory fills up where one
disk or link is slower, and no heartbeat waits behind many. Instead of any answer FileFailed may come: then the talk is
over.

What arrives is written into a folder of its own beside the checkpoints, `step-N.tmp-…`, which is none. KeepFiles gives
whole files their places by renaming; DropFiles, or the agent's end, removes the folder.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

CHUNK_HEADER = struct.Struct(">I")
CHUNK_BYTES = 1 << 16  # little enough for a link's buffers to take: a heartbeat is written behind it


@dataclass(frozen=True)
class StepFiles:
    """One checkpoint as it lies on one host. manifest: its checksum, the same wherever it was copied. expected: name ->
    bytes of the files that the manifest lists; held: of those that are there, the manifest among them. saved_at:
    seconds since 1970, as the manifest says."""

    manifest: str
    expected: Mapping[str, int]
    held: Mapping[str, int]
    saved_at: float = 0.0


# --- head -> agent -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ListCheckpoints:
    """Say which checkpoints lie in a folder; relative to the job's working directory."""

    talk: int
    folder: str


@dataclass(frozen=True)
class SendFile:
    """Send a file of that folder."""

    talk: int
    folder: str
    name: str


@dataclass(frozen=True)
class More:
    """Send so many chunks more."""

    talk: int
    chunks: int


@dataclass(frozen=True)
class TakeFile:
    """A file of so many bytes follows in chunks. staging: the folder for it, inside `folder`."""

    talk: int
    folder: str
    staging: str
    name: str
    size: int


@dataclass(frozen=True)
class EndFile:
    """All of it has been sent."""

    talk: int
    sha256: str


@dataclass(frozen=True)
class KeepFiles:
    """Make what is staged a part of checkpoint `step`. manifest: its checksum; another one there stands aside."""

    talk: int
    folder: str
    staging: str
    step: int
    manifest: str


@dataclass(frozen=True)
class DropFiles:
    """Remove what is staged."""

    talk: int
    folder: str
    staging: str


@dataclass(frozen=True)
class Forget:
    """The talk is over; a file that is not whole goes."""

    talk: int


# --- agent -> head -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inventory:
    """The checkpoints of a folder, by step."""

    talk: int
    steps: Mapping[int, StepFiles]


@dataclass(frozen=True)
class Taken:
    """A chunk has been written."""

    talk: int


@dataclass(frozen=True)
class FileSent:
    """All of the file has been sent."""

    talk: int
    size: int
    sha256: str


@dataclass(frozen=True)
class Done:
    """What was asked for has been done, and is on the disk."""

    talk: int


@dataclass(frozen=True)
class FileFailed:
    """It could not be done; nothing of it is left."""

    talk: int
    reason: str


@dataclass(frozen=True)
class Chunk:
    """Bytes of a file, in order."""

    talk: int
    data: bytes


FileRequest = ListCheckpoints | SendFile | More | TakeFile | EndFile | KeepFiles | DropFiles | Forget
FileAnswer = Inventory | Taken | FileSent | Done | FileFailed
