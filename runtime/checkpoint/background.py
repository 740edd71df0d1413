"""A rank's side of its writer: the process, and the memory that both see."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import socket
import subprocess
import sys
import weakref
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dstrain.runtime.pages import prefer_large_pages

ALIGNMENT = 64
_START = "import sys; sys.path.insert(0, {!r}); from dstrain.runtime.checkpoint import writer; writer.main({}, {}, {})"


class Writer:
    """One request at a time; `is_ready` says whether its answer can be taken. A writer that dies answers so."""

    def __init__(self) -> None:
        """Raises OSError."""
        self._memory_fd = os.memfd_create("dstrain checkpoint", os.MFD_CLOEXEC)
        ours, theirs = socket.socketpair()
        package = str(Path(__file__).parents[3])
        code = _START.format(package, theirs.fileno(), self._memory_fd, os.getpid())
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", code],
                pass_fds=[theirs.fileno(), self._memory_fd],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        self._control = Connection(ours.detach())
        self._memory: Tensor | None = None
        self._close = weakref.finalize(self, _end, self._process, self._control, self._memory_fd)

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, what: str, **request: Any) -> None:
        """Send a request; take the answer of the one before first. What fails here is the answer."""
        with contextlib.suppress(OSError):
            self._control.send_bytes(json.dumps({"do": what, **request}, default=os.fspath).encode())

    def is_ready(self, timeout_s: float = 0.0) -> bool:
        """Whether `take` returns at once."""
        try:
            return self._control.poll(timeout_s)
        except OSError:
            return True

    def take(self) -> dict[str, Any]:
        """{"result": …} or {"problem": …}; waits for it."""
        try:
            answer: dict[str, Any] = json.loads(self._control.recv_bytes())
        except (EOFError, OSError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=5)
            status = self._process.poll() or 0
            how = f"signal {-status}" if status < 0 else f"exit code {status}"
            return {"problem": f"the writer process has ended ({how})", "died": True}
        return answer

    def copy(self, tensors: Sequence[Tensor]) -> list[int]:
        """Copy flat tensors into the shared memory; returns where each begins. Raises OSError."""
        offsets, end = [], 0
        for tensor in tensors:
            offsets.append(end)
            end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        memory = self.reserve(end)
        with torch.no_grad():
            for tensor, offset in zip(tensors, offsets, strict=True):
                if tensor.nbytes:
                    memory[offset : offset + tensor.nbytes].view(tensor.dtype).copy_(tensor, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return offsets

    def reserve(self, size: int) -> Tensor:
        """The shared memory, of at least so many bytes; nobody may be reading it. Raises OSError."""
        if self._memory is None or self._memory.numel() < size:
            self._memory = None
            size = max(size, mmap.PAGESIZE)
            os.ftruncate(self._memory_fd, size)
            shared = mmap.mmap(self._memory_fd, size)
            self._memory = prefer_large_pages(torch.frombuffer(shared, dtype=torch.uint8))
        return self._memory

    def foresee(self, size: int) -> None:
        """Have the writer make the shared memory's pages, before a save copies into them. Raises OSError."""
        self.reserve(size)
        self.ask("reserve", size=size)

    def close(self) -> None:
        """End it; what it has not finished is lost."""
        self._memory = None
        self._close()


def _end(process: subprocess.Popen[bytes], control: Connection, memory_fd: int) -> None:
    process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):  # it waits for a disk that does not answer
        process.wait(timeout=5)
    control.close()
    os.close(memory_fd)
