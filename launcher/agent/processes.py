"""What the agent needs of Linux's process table: who belongs to a job, what state it is in, and how to end it.

[Note: what is swept]
A process belongs to the job on this host if it descends from the warden or the agent (both are subreapers, so an
orphan stays their descendant), or if its environment carries both of this job's cookies: DSTRAIN_RUN_ID and
DSTRAIN_HOST. The second catches what escaped when one of the two was killed; the host's name in it keeps two
"hosts" that are one machine apart. Nothing is ever found by its name. Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class ProcessStat:
    """One line of /proc/<pid>/stat. state: R, S, D, Z, T (stopped), t (traced). cpu_ticks: user and system."""

    pid: int
    state: str
    parent: int
    cpu_ticks: int
    start: int


def read_proc(path: str) -> bytes:
    """A file of /proc, with the fewest system calls: the agent does this every second next to the training."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        pieces = []
        while piece := os.read(fd, 1 << 16):
            pieces.append(piece)
        return b"".join(pieces)
    finally:
        os.close(fd)


def read_stat(pid: int) -> ProcessStat | None:
    """None when the process is gone."""
    try:
        fields = read_proc(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    except OSError:
        return None
    return ProcessStat(pid, fields[0].decode(), int(fields[1]), int(fields[11]) + int(fields[12]), int(fields[19]))


def all_processes() -> dict[int, ProcessStat]:
    """Every process that we can see, by pid."""
    stats = (read_stat(int(name)) for name in os.listdir("/proc") if name.isdigit())
    return {stat.pid: stat for stat in stats if stat}


def descendants(table: dict[int, ProcessStat], roots: Iterable[int]) -> set[int]:
    """The processes below `roots`, without the roots."""
    children: dict[int, list[int]] = {}
    for stat in table.values():
        children.setdefault(stat.parent, []).append(stat.pid)
    found: set[int] = set()
    waiting = list(roots)
    while waiting:
        for pid in children.get(waiting.pop(), ()):
            if pid not in found:
                found.add(pid)
                waiting.append(pid)
    return found


def carries(pid: int, cookies: Iterable[bytes]) -> bool:
    """Does the environment that the process was started with hold all of these NAME=VALUE?"""
    try:
        environment = read_proc(f"/proc/{pid}/environ").split(b"\0")
    except OSError:
        return False
    return all(cookie in environment for cookie in cookies)


def members(cookies: Iterable[bytes], roots: Iterable[int]) -> set[int]:
    """Living processes of the job, by [Note: what is swept]; the roots themselves are not among them."""
    table = all_processes()
    roots = set(roots)
    found = descendants(table, roots)
    if cookies:
        found |= {pid for pid in table if pid not in found and carries(pid, cookies)}
    return {pid for pid in found - roots - {os.getpid()} if table[pid].state not in "ZX"}


def kill(pid: int, number: int) -> None:
    """Send a signal; a process that has gone is no error."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def reap() -> list[tuple[int, int]]:
    """(pid, wait status) of every child that has ended, strangers that we adopted included."""
    ended: list[tuple[int, int]] = []
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        ended.append((pid, status))


def sweep(
    cookies: Iterable[bytes], roots: Iterable[int], timeout_s: float = 5.0, spared: Callable[[], set[int]] = set
) -> set[int]:
    """SIGKILL every process of the job until none is left; return what would not die (D state) in time.

    Scans again until nothing is found, since a process may fork between the scan and its end. For the same reason
    `spared` is asked anew behind each scan: one that was forked before the scan is known by then.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        left = members(cookies, roots) - spared()
        if not left or time.monotonic() > deadline:
            return left
        for pid in left:
            kill(pid, signal.SIGKILL)
        time.sleep(0.01)
