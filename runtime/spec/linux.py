"""A few calls of Linux that Python does not offer, for agent and zygote. Standard library only."""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_NAME, _PR_SET_CHILD_SUBREAPER = 1, 15, 36
_libc = ctypes.CDLL(None, use_errno=True)


def become_subreaper() -> None:
    """Orphaned descendants become our children instead of init's."""
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def die_with_parent(parent: int) -> None:
    """SIGKILL for us when `parent` dies; we leave at once when it already has."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def set_title(title: str) -> None:
    """What `ps` and top show: the thread's name (15 bytes), and our argv overwritten in place, cut to its room."""
    _libc.prctl(_PR_SET_NAME, os.fsencode(title)[:15], 0, 0, 0)
    try:
        fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
        start, end = int(fields[45]), int(fields[46])  # arg_start and arg_end: proc(5), fields 48 and 49
    except (OSError, IndexError, ValueError):
        return
    if end > start:
        ctypes.memmove(start, os.fsencode(title)[: end - start - 1].ljust(end - start, b"\0"), end - start)
