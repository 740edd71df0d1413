"""One root cause out of many failures: pure.

Failures are ordered by weight, then by time (corrected by each host's clock offset). An exception, a signal, memory
or a non-finite loss outranks "connection closed by peer" and collective time-outs; what we ended ourselves is no
failure at all. Works on what a worker left behind (status, end of stderr), without any decorator in its script.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Any, Literal

from dstrain.runtime.spec.exit_codes import ExitCode, of_status

TRACEBACK_LINES = 40
_VICTIM = re.compile(
    r"closed by peer|reset by peer|Broken pipe|Connection refused|[Ss]ocket [Tt]imeout|"
    r"Timed out waiting|[Tt]imed out after \d+ ?(ms|seconds)|collective operation timeout|"
    r"failed to recv, got 0 bytes|ncclRemoteError|remote process exited|DistNetworkError|DistStoreError|"
    r"Connection was likely closed|pair closure|unhandled system error",
)
_COLLECTIVE = re.compile(r"torch/|gloo|[Nn][Cc][Cc][Ll]|Dist(Network|Store)Error")  # else it lost a peer of its own
_TRACEBACK = "Traceback (most recent call last):"


class Weight(IntEnum):
    """Lower explains more."""

    OWN = 0  # its own doing: exception, signal, memory
    VICTIM = 1  # a peer had gone, or did not come


@dataclass(frozen=True)
class Failure:
    """A rank that ended badly. at_ns: on the head's clock. stderr: the end of it."""

    rank: int
    host: str
    status: int
    at_ns: int
    stderr: str
    out_of_memory: bool = False
    start_error: str | None = None

    @property
    def weight(self) -> Weight:
        by_abort = self.status in (-signal.SIGABRT, -signal.SIGTERM)
        in_collective = not traceback_of(self.stderr) or _COLLECTIVE.search(self.stderr)
        if (self.status > 0 or by_abort) and in_collective and _VICTIM.search(self._last_words()):
            return Weight.VICTIM
        return Weight.OWN

    def _last_words(self) -> str:
        """The message of the last exception; without one, the last lines."""
        lines = traceback_of(self.stderr) or self.stderr.strip().splitlines()[-5:]
        message = [index for index, line in enumerate(lines) if re.match(r"[\w.]+(Error|Exception|Timeout)\b", line)]
        return "\n".join(lines[message[-1] :] if message else lines[-5:])


@dataclass(frozen=True)
class Cause:
    """The one block that is shown. `headline` says who and what; `detail` is a traceback or last words."""

    code: int
    origin: Literal["worker", "launcher"]
    headline: str
    detail: str = ""
    remedy: str = ""
    host: str | None = None
    rank: int | None = None
    victims: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def root_cause(failures: Sequence[Failure], left_early: Sequence[tuple[int, str]] = (), running: int = 0) -> Cause:
    """The cause of a failed attempt. left_early: (rank, host) of ranks that had ended with 0 before. running: ranks
    that have not ended yet."""
    first = min(failures, key=lambda failure: (failure.weight, failure.at_ns, failure.rank))
    if first.weight is Weight.VICTIM and left_early:
        rank, host = left_early[0]
        return Cause(
            ExitCode.LEFT_EARLY,
            "launcher",
            f"rank {rank} on {host} left early with exit code 0, and the others lost it",
            "\n".join(traceback_of(first.stderr)),
            "every rank must take part in every collective: look for an early return or a shorter data loader",
            host,
            rank,
            len(failures) + running,
        )
    if first.status > 0 and not first.stderr.strip():  # of ranks that fail alike only one speaks
        alike = [other for other in failures if other.status == first.status and other.stderr.strip()]
        first = min(alike, key=lambda failure: (failure.weight, failure.at_ns, failure.rank), default=first)
    victims = len(failures) - 1 + running
    code = 127 if first.start_error else of_status(first.status)
    lines = traceback_of(first.stderr) or first.stderr.strip().splitlines()[-8:]
    if (line := _said_before_traceback(first.stderr)).startswith("dstrain: "):  # our own words for it
        lines = [line, *lines]
    detail = first.start_error or "\n".join(lines)
    headline = f"rank {first.rank} on {first.host} {_what_happened(first)}"
    return Cause(code, "worker", headline, detail, _remedy(first), first.host, first.rank, victims)


def _what_happened(failure: Failure) -> str:
    if failure.start_error:
        return "could not be started"
    if failure.out_of_memory:
        return "was killed by the kernel: out of memory"
    if failure.status < 0:
        try:
            name = signal.Signals(-failure.status).name
        except ValueError:
            name = f"signal {-failure.status}"
        return f"died of {name}"
    if failure.status == ExitCode.NON_FINITE:
        return f"stopped: loss or gradient is not finite (exit code {failure.status})"
    if failure.status == ExitCode.REPLICAS_DIFFER:
        return f"stopped: ranks no longer hold the same parameters (exit code {failure.status})"
    return f"failed with exit code {failure.status}"


def _remedy(failure: Failure) -> str:
    if failure.out_of_memory:
        return "less memory per rank: a smaller micro-batch or model, fewer ranks per host"
    if failure.status == -signal.SIGKILL:
        return "somebody or something killed it; `dmesg` on that host knows of an out-of-memory kill"
    if failure.status in (-signal.SIGSEGV, -signal.SIGBUS):
        return "native code crashed; PYTHONFAULTHANDLER=1 shows where (--env PYTHONFAULTHANDLER=1)"
    return ""


def traceback_of(stderr: str) -> list[str]:
    """The last traceback, with the exceptions that it was raised from, shortened in the middle."""
    start = _traceback_start(stderr)
    if start < 0:
        return []
    lines = stderr[start:].strip().splitlines()
    if len(lines) > TRACEBACK_LINES:
        half = TRACEBACK_LINES // 2
        lines = [*lines[:half], f"  … {len(lines) - 2 * half} lines …", *lines[-half:]]
    return lines


def _said_before_traceback(stderr: str) -> str:
    """The line above the last traceback."""
    start = _traceback_start(stderr)
    return stderr[:start].rstrip("\n").rpartition("\n")[2] if start > 0 else ""


def _traceback_start(stderr: str) -> int:
    """Where the last traceback begins, with what it was raised from; -1: there is none."""
    start = stderr.rfind(_TRACEBACK)
    chained = re.compile(r"(The above exception was the direct cause|During handling of the above exception)")
    while (before := stderr.rfind(_TRACEBACK, 0, start)) >= 0 and chained.search(stderr[before:start]):
        start = before
    return start
