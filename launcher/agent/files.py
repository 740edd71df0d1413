"""Files of checkpoints on this host: listed, sent, and taken. [Note: talks] in spec/file_frames.py.

All of it happens in a thread of its own, for a disk may stall, and the agent must go on to be heard. Standard library
only.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import queue
import shutil
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from dstrain.runtime.spec import file_frames as files

MANIFEST = "manifest.json"  # as runtime/checkpoint/manifest.py has these three
PREFIX = "step-"
_CHECKSUM = ',\n "checksum": '
NEWEST = 50  # checkpoints that are looked at: a manifest may be large
_CANNOT_RESERVE = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

Request = files.FileRequest | files.Chunk
Answer = files.FileAnswer | files.Chunk
REQUESTS: tuple[type, ...] = (*files.FileRequest.__args__, files.Chunk)


@dataclass
class _Outgoing:
    file: IO[bytes]
    sent: int = 0
    digest: Any = field(default_factory=hashlib.sha256)


@dataclass
class _Incoming:
    path: Path
    file: IO[bytes]
    size: int
    written: int = 0
    digest: Any = field(default_factory=hashlib.sha256)


class FileWorker:
    """`ask` and `answers` are the agent's; `fileno()` is readable when answers wait."""

    def __init__(self) -> None:
        self._asked: queue.SimpleQueue[tuple[Path, Request]] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._thread: threading.Thread | None = None
        self._outgoing: dict[int, _Outgoing] = {}
        self._incoming: dict[int, _Incoming] = {}
        self._staged: set[Path] = set()

    def fileno(self) -> int:
        return self._wake_read.fileno()

    def ask(self, cwd: Path, request: Request) -> None:
        """Have it done. cwd: what folders are relative to."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="files", daemon=True)
            self._thread.start()
        self._asked.put((cwd, request))

    def answers(self) -> Iterator[Answer]:
        """What there is to say."""
        with contextlib.suppress(BlockingIOError):
            self._wake_read.recv(4096)
        while True:
            try:
                yield self._answers.get_nowait()
            except queue.Empty:
                return

    def abandon(self) -> None:
        """The agent ends: nothing half is left behind."""
        for folder in list(self._staged):
            shutil.rmtree(folder, ignore_errors=True)

    # --- in the thread -----------------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            cwd, request = self._asked.get()
            try:
                self._do(cwd, request)
            except Exception as error:  # the thread must live: the next talk would wait for it in vain
                self._forget(request.talk)
                self._answer(files.FileFailed(request.talk, _reason(error)))

    def _answer(self, answer: Answer) -> None:
        self._answers.put(answer)
        with contextlib.suppress(BlockingIOError):
            self._wake_write.send(b"x")

    def _do(self, cwd: Path, request: Request) -> None:
        """Raises OSError, and whatever else a folder of somebody else's may lead to."""
        match request:
            case files.ListCheckpoints(talk, folder):
                self._answer(files.Inventory(talk, inventory(cwd / folder)))
            case files.SendFile(talk, folder, name):
                self._outgoing[talk] = _Outgoing((cwd / folder / name).open("rb"))
            case files.More(talk, chunks):
                for _ in range(chunks):
                    self._send_chunk(talk)
            case files.TakeFile(talk, folder, staging, name, size):
                self._staged.add(cwd / folder / staging)
                self._incoming[talk] = _open_incoming(cwd / folder / staging / _plain(name), size)
            case files.Chunk(talk, data):
                self._take_chunk(talk, data)
            case files.EndFile(talk, sha256):
                self._end_file(talk, sha256)
            case files.KeepFiles(talk, folder, staging, step, manifest):
                keep(cwd / folder, staging, step, manifest)
                self._staged.discard(cwd / folder / staging)
                self._answer(files.Done(talk))
            case files.DropFiles(_, folder, staging):
                shutil.rmtree(cwd / folder / staging, ignore_errors=True)
                self._staged.discard(cwd / folder / staging)
            case files.Forget(talk):
                self._forget(talk)

    def _send_chunk(self, talk: int) -> None:
        going = self._outgoing.get(talk)
        if going is None:
            return
        data = going.file.read(files.CHUNK_BYTES)
        if data:
            going.sent += len(data)
            going.digest.update(data)
            self._answer(files.Chunk(talk, data))
        else:
            self._forget(talk)
            self._answer(files.FileSent(talk, going.sent, going.digest.hexdigest()))

    def _take_chunk(self, talk: int, data: bytes) -> None:
        coming = self._incoming.get(talk)
        if coming is None:  # it has failed, and what was on its way still arrives
            return
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(coming.file.fileno(), rest) :]
        coming.digest.update(data)
        coming.written += len(data)
        self._answer(files.Taken(talk))

    def _end_file(self, talk: int, sha256: str) -> None:
        coming = self._incoming.get(talk)
        if coming is None:
            return
        if coming.written != coming.size:
            raise OSError(f"expected {coming.size} bytes of {coming.path.name}, found {coming.written}")
        if coming.digest.hexdigest() != sha256:
            raise OSError(f"expected {coming.path.name} with SHA-256 {sha256[:16]}…, another one arrived")
        os.fsync(coming.file.fileno())
        coming.file.close()
        del self._incoming[talk]
        self._answer(files.Done(talk))

    def _forget(self, talk: int) -> None:
        if going := self._outgoing.pop(talk, None):
            with contextlib.suppress(OSError):
                going.file.close()
        if coming := self._incoming.pop(talk, None):
            with contextlib.suppress(OSError):
                coming.file.close()
            with contextlib.suppress(OSError):
                coming.path.unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    if not isinstance(error, OSError):
        return f"{type(error).__name__}: {error}"
    return f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"


def inventory(root: Path) -> dict[int, files.StepFiles]:
    """The newest checkpoints below `root` that have a manifest. Raises OSError where the folder cannot be read."""
    if not root.is_dir():
        return {}
    names = [path.name.removeprefix(PREFIX) for path in root.glob(f"{PREFIX}*")]
    steps = sorted(int(name) for name in names if name.isdecimal() and str(int(name)) == name)
    found = {step: _step_files(root / f"{PREFIX}{step}") for step in steps[-NEWEST:]}
    return {step: held for step, held in found.items() if held is not None}


def _step_files(folder: Path) -> files.StepFiles | None:
    """None: there is no manifest, or none that is whole."""
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(text)
        expected = {_plain(name): int(size) for name, size in manifest["files"].items()}
        checksum, saved_at = str(manifest["checksum"]), float(manifest.get("saved_at", 0.0))
        sizes = {entry.name: entry.stat().st_size for entry in os.scandir(folder) if entry.is_file()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None
    if checksum != hashlib.sha256(text[: max(0, text.rfind(_CHECKSUM))].encode()).hexdigest():
        return None
    held = {name: size for name, size in sizes.items() if name == MANIFEST or name in expected}
    return files.StepFiles(checksum, expected, held, saved_at)


def _plain(name: str) -> str:
    """The name of a file in its folder. Raises OSError for any other."""
    if Path(name).name != name or name == "..":
        raise OSError(f"expected the name of a file in its folder, found {name!r}")
    return name


def _open_incoming(path: Path, size: int) -> _Incoming:
    """Room for all of it is reserved at once, where the file system can: a full disk shows before anything is sent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("xb", buffering=0)
    try:
        if size:
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if error.errno not in _CANNOT_RESERVE:
            file.close()
            path.unlink(missing_ok=True)
            raise OSError(error.errno, error.strerror, str(path)) from None
    return _Incoming(path, file, size)


def keep(root: Path, staging: str, step: int, manifest: str) -> None:
    """Give staged files their places in checkpoint `step`, each by a rename. Raises OSError.

    manifest: the checksum of theirs. A checkpoint with another one stands aside, as step-N.left-…
    """
    staged, target = root / staging, root / f"{PREFIX}{step}"
    held = _step_files(target)
    if held is not None and held.manifest == manifest:
        for path in staged.iterdir():
            path.replace(target / path.name)
        _sync(target)
        staged.rmdir()
    else:
        _sync(staged)
        if target.is_symlink() or target.exists():
            target.rename(target.with_name(f"{target.name}.left-{staging.rpartition('-')[2]}"))
        staged.rename(target)
    _sync(root)


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
