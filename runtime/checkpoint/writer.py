"""The process that writes a rank's share of a checkpoint while the rank trains on. Without torch.

It gets requests over a socket, one after the other, and the bytes through memory that it shares with the rank. It ends
with the rank: whatever it has not finished is no checkpoint. [Note: commit] in commit.py.

[Note: copies] With `checkpoint.replicas: 2` it also sends its file to the writer of a rank on the next host, over TCP,
and takes files of others. Who sends shows a token that the ranks have agreed on.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import mmap
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from dstrain.runtime.checkpoint import commit
from dstrain.runtime.checkpoint.parts import Part, write_file
from dstrain.runtime.spec.errors import CheckpointError
from dstrain.runtime.spec.linux import die_with_parent, set_title

CHUNK_BYTES = 1 << 20
COPY_TIMEOUT_S = 120.0
"""Without a byte from the other side."""


def main(control_fd: int, memory_fd: int, parent: int) -> None:
    """Serve until the rank closes its end or dies."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # a rank that is asked to end saves first
    die_with_parent(parent)
    set_title("dstrain checkpoint writer")
    control, writer = Connection(control_fd), _Writer(memory_fd)
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            request = json.loads(control.recv_bytes())
            is_awaited = request["do"] != "reserve"
            found = answer(partial(writer.do, request))
            if is_awaited:
                control.send_bytes(json.dumps(found).encode())


def answer(work: Callable[[], Any]) -> dict[str, Any]:
    """{"result": …}, or {"problem": …} in words."""
    try:
        return {"result": work()}
    except OSError as error:
        return {"problem": problem_of(error)}
    except CheckpointError as error:
        return {"problem": str(error)}
    except Exception as error:
        return {"problem": f"{type(error).__name__}: {error}"}


def problem_of(error: OSError) -> str:
    """In words, with the file if there is one."""
    return f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"


def write_share(folder: Path, file: str, parts: Sequence[Part], data: Any) -> dict[str, Any]:
    """Write a rank's file into a draft; returns what `Written` holds, as JSON. Raises OSError that names the file."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        written = write_file(folder / file, parts, data)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder / file)) from None
    rows = [[[p.start, p.stop, p.offset, p.size, p.sha256] for p in pieces] for pieces in written.pieces]
    return {"file": written.file, "size": written.size, "pieces": rows}


def commit_all(root: Path, step: int, token: str, manifest: str) -> None:
    """Commit, or leave nothing of the draft. Raises OSError."""
    try:
        commit.commit(root, step, token, manifest)
    except BaseException:
        commit.discard(root, step, token)
        raise


class _Writer:
    def __init__(self, memory_fd: int) -> None:
        self._memory_fd = memory_fd
        self._memory: mmap.mmap | None = None

    def do(self, request: dict[str, Any]) -> Any:
        what = request.pop("do")
        if "root" in request:
            request["root"] = Path(request["root"])
        return getattr(self, f"_{what}")(**request)

    def _reserve(self, size: int) -> None:
        """Have the shared memory's pages there before the rank copies into them."""
        os.posix_fallocate(self._memory_fd, 0, size)

    def _write(self, root: Path, step: int, token: str, file: str, parts: list[dict[str, Any]], offsets: list[int],
               copy_to: tuple[str, int, str] | None) -> dict[str, Any]:  # fmt: skip
        rows = [Part(**_tuples(part)) for part in parts]
        view = memoryview(self._map())
        data = (view[offset : offset + part.size] for part, offset in zip(rows, offsets, strict=True))
        folder = commit.draft_of(root, step, token)
        written = write_share(folder, file, rows, data)
        if copy_to is not None:
            send_copy(folder / file, step, token, *copy_to)
        return written

    def _commit(self, root: Path, step: int, token: str, manifest: str) -> None:
        commit_all(root, step, token, manifest)

    def _discard(self, root: Path, step: int, token: str) -> None:
        commit.discard(root, step, token)

    def _retire(self, root: Path, step: int, keep_last: int | None, keep_every: int | None) -> None:
        commit.retire(root, step, keep_last, keep_every)

    def _listen(self, root: Path, address: str, secret: str) -> int:
        """Take copies from now on; returns the port."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        server = socket.create_server((address, 0), family=family)
        threading.Thread(target=_serve, args=(server, root, secret), daemon=True).start()
        return int(server.getsockname()[1])

    def _map(self) -> mmap.mmap:
        size = os.fstat(self._memory_fd).st_size
        if self._memory is None or len(self._memory) != size:
            self._memory = mmap.mmap(self._memory_fd, size, access=mmap.ACCESS_READ)
        return self._memory


def _tuples(part: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in part.items()}


# --- copies --------------------------------------------------------------------------------------------------


def send_copy(path: Path, step: int, token: str, host: str, port: int, secret: str) -> None:
    """[Note: copies] Returns when the other disk holds the file. Raises OSError."""
    size, digest = path.stat().st_size, hashlib.sha256()
    try:
        with socket.create_connection((host, port), COPY_TIMEOUT_S) as link, path.open("rb") as file:
            said = {"secret": secret, "step": step, "token": token, "file": path.name, "size": size}
            link.sendall(json.dumps(said).encode() + b"\n")
            while data := file.read(CHUNK_BYTES):
                digest.update(data)
                link.sendall(data)
            link.sendall(digest.digest())
            reply = link.makefile("rb").readline().decode()
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror or error} while copying {path.name} to {host}:{port}") from None
    if reply != "ok\n":
        raise OSError(None, f"the copy of {path.name} on {host}: {reply.strip() or 'the connection ended'}")


def _serve(server: socket.socket, root: Path, secret: str) -> None:
    while True:
        link, _ = server.accept()
        threading.Thread(target=_take, args=(link, root, secret), daemon=True).start()


def _take(link: socket.socket, root: Path, secret: str) -> None:
    with link, contextlib.suppress(OSError):
        link.settimeout(COPY_TIMEOUT_S)
        with link.makefile("rb") as stream:
            said = json.loads(stream.readline(1 << 16))
            if not hmac.compare_digest(str(said.get("secret")), secret):
                return
            found = answer(lambda: _take_file(stream, root, said))
        link.sendall((found.get("problem", "ok").replace("\n", " ") + "\n").encode())


def _take_file(stream: Any, root: Path, said: dict[str, Any]) -> None:
    folder = commit.draft_of(root, int(said["step"]), str(said["token"]))
    path = folder / str(said["file"])
    if path.parent != folder or folder.parent != root:
        raise OSError(None, f"expected a file's name, found {said['file']!r}")
    folder.mkdir(parents=True, exist_ok=True)
    digest, left = hashlib.sha256(), int(said["size"])
    with path.open("xb") as file:
        while left:
            data = stream.read(min(left, CHUNK_BYTES))
            if not data:
                raise OSError(None, f"the connection ended {left} bytes too early")
            digest.update(data)
            file.write(data)
            left -= len(data)
        file.flush()
        os.fsync(file.fileno())
    if stream.read(digest.digest_size) != digest.digest():
        raise OSError(None, f"{path}: what came is not what was sent")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
