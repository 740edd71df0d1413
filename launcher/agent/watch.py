"""What a running rank is doing, seen from outside and for any program: paused, quiet, and where it stands.

Quiet means: in one second it used no CPU worth the name, wrote nothing and read nothing, and is not asleep on
purpose or waiting for a disk. Ranks that wait for a peer that has left look like this. Standard library only.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from dstrain.launcher.agent import processes

QUIET_TICKS = 2  # of 100 a second
QUIET_IO_BYTES = 4096
LOOK_AT_CHILDREN_S = 3.0  # data-loading children may work for a quiet parent; a look at all of /proc costs more


@dataclass
class Sample:
    cpu_ticks: int = 0
    io_bytes: int = 0
    output_bytes: int = 0
    children_ticks: int | None = None


@dataclass
class Watch:
    """One rank's recent past. `paused_since`, `quiet_since`: since when, by the clock of the caller."""

    last: Sample = field(default_factory=Sample)
    paused_since: float | None = None
    quiet_since: float | None = None

    def look(self, pid: int, output_bytes: int, now: float) -> None:
        """Take a sample; call it about once a second."""
        stat = processes.read_stat(pid)
        if stat is None:
            return
        if stat.state == "T":
            self.paused_since = self.paused_since or now
        else:
            self.paused_since = None
        sample = Sample(stat.cpu_ticks, _io_bytes(pid), output_bytes)
        quiet_for = now - self.quiet_since if self.quiet_since else 0.0
        if quiet_for > LOOK_AT_CHILDREN_S:
            table = processes.all_processes()
            sample.children_ticks = sum(table[p].cpu_ticks for p in processes.descendants(table, [pid]))
        if self._is_quiet(pid, stat.state, sample):
            self.quiet_since = self.quiet_since or now
        else:
            self.quiet_since = None
        self.last = sample

    def _is_quiet(self, pid: int, state: str, sample: Sample) -> bool:
        last = self.last
        seen_children = sample.children_ticks is not None and last.children_ticks is not None
        children = (sample.children_ticks or 0) - (last.children_ticks or 0) if seen_children else 0
        return (
            state == "S"
            and children <= QUIET_TICKS
            and sample.cpu_ticks - last.cpu_ticks <= QUIET_TICKS
            and sample.io_bytes - last.io_bytes <= QUIET_IO_BYTES
            and sample.output_bytes == last.output_bytes
            and b"nanosleep" not in _wait_channel(pid)
        )


def _io_bytes(pid: int) -> int:
    try:
        lines = processes.read_proc(f"/proc/{pid}/io").split()
    except OSError:
        return 0
    return int(lines[1]) + int(lines[3])  # rchar and wchar


def _wait_channel(pid: int) -> bytes:
    try:
        return processes.read_proc(f"/proc/{pid}/wchan")
    except OSError:
        return b""


def state(pid: int) -> str:
    """A letter as in /proc, and what a sleeping process sleeps in: `R`, `S futex_wait_queue`; "" when it is gone."""
    stat = processes.read_stat(pid)
    if stat is None:
        return ""
    channel = _wait_channel(pid).decode(errors="replace") if stat.state in "SD" else ""
    return f"{stat.state} {channel}" if channel not in ("", "0") else stat.state


def clear_stack(memory_file: int) -> None:
    """Empty a rank's stack file; the descriptor's offset is shared with the rank, so it writes from the start."""
    os.ftruncate(memory_file, 0)
    os.lseek(memory_file, 0, os.SEEK_SET)


def read_stack(memory_file: int) -> str:
    """What faulthandler has written since `clear_stack`: "" when the rank has not answered."""
    return os.pread(memory_file, os.fstat(memory_file).st_size, 0).decode(errors="replace")
