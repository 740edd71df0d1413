"""One file from one host to another, through the head. [Note: talks] in spec/file_frames.py.

Called in threads of their own: the head must go on to hear its hosts while one of them is slow.
"""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from dstrain.launcher.session import HostSession
from dstrain.runtime.spec import file_frames as files

AHEAD = 4  # chunks that are read before the target has taken them; on their way to it is never more than one
ANSWER_TIMEOUT_S = 300.0  # a disk that syncs gigabytes; a host that is silent is lost long before
POLL_S = 0.2


class TransferError(Exception):
    """A host could not do its part. host: its name."""

    def __init__(self, host: str, reason: str) -> None:
        super().__init__(f"{host}: {reason}")
        self.host = host


class TransferStopped(Exception):
    """The run is to end."""


class Talk:
    """One talk with a host; a context, at whose end the host forgets it."""

    def __init__(self, session: HostSession, stop: threading.Event) -> None:
        self.session, self._stop = session, stop
        self.number, self._answers = session.begin_talk()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.session.end_talk(self.number)
        self.session.send(files.Forget(self.number))

    def hear(self) -> files.FileAnswer | files.Chunk:
        """The next answer. Raises TransferError, TransferStopped."""
        deadline = time.monotonic() + ANSWER_TIMEOUT_S
        while not self._stop.is_set():
            try:
                return self._checked(self._answers.get(timeout=POLL_S))
            except queue.Empty:
                if time.monotonic() > deadline:
                    reason = f"no answer within {ANSWER_TIMEOUT_S:.0f} s"
                    raise TransferError(self.session.host.name, reason) from None
        raise TransferStopped

    def _checked(self, answer: files.FileAnswer | files.Chunk | None) -> files.FileAnswer | files.Chunk:
        if answer is None:
            raise TransferError(self.session.host.name, "the connection ended")
        if isinstance(answer, files.FileFailed):
            raise TransferError(self.session.host.name, answer.reason)
        return answer


def list_checkpoints(session: HostSession, folder: str, stop: threading.Event) -> dict[int, files.StepFiles]:
    """The checkpoints that lie in a folder on that host. Raises TransferError, TransferStopped."""
    with Talk(session, stop) as talk:
        session.send(files.ListCheckpoints(talk.number, folder))
        answer = talk.hear()
        assert isinstance(answer, files.Inventory)
        return dict(answer.steps)


@dataclass(frozen=True)
class Parcel:
    """A file of a checkpoint, `name` in step-N of `folder`, and the folder beside it where it is to arrive."""

    folder: str
    step: int
    name: str
    size: int
    staging: str


def carry(source: HostSession, target: HostSession, parcel: Parcel, stop: threading.Event) -> None:
    """Copy a file; it is whole and on the disk then. Raises TransferError, TransferStopped."""
    with Talk(source, stop) as giver, Talk(target, stop) as taker:
        target.send(files.TakeFile(taker.number, parcel.folder, parcel.staging, parcel.name, parcel.size))
        source.send(files.SendFile(giver.number, parcel.folder, f"step-{parcel.step}/{parcel.name}"))
        source.send(files.More(giver.number, AHEAD))
        while not isinstance(answer := giver.hear(), files.FileSent):
            assert isinstance(answer, files.Chunk)
            target.send_chunk(taker.number, answer.data)
            taker.hear()
            source.send(files.More(giver.number, 1))
        target.send(files.EndFile(taker.number, answer.sha256))
        taker.hear()


def keep(session: HostSession, parcel: Parcel, manifest: str, stop: threading.Event) -> None:
    """Make all that was staged with `parcel` a part of the checkpoint with that manifest.

    Raises TransferError, TransferStopped.
    """
    with Talk(session, stop) as talk:
        session.send(files.KeepFiles(talk.number, parcel.folder, parcel.staging, parcel.step, manifest))
        talk.hear()
