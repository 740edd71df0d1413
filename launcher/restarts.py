"""What the attempts so far say about the next one: whether, when, and without whom. Pure but for the times it is told.

    no more                every restart is used, or the job failed twice alike without progress
    delay                  none for the first restart, and behind progress; else 1, 2, 4 … 60 s
    a host is suspected    its ranks were the root cause twice in a row

Progress is a step or a checkpoint beyond all before, as rank 0's events tell. Of a script that reports none, an attempt
that ran for LONG_S got somewhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dstrain.launcher.root_cause import Cause
from dstrain.runtime.spec.exit_codes import ExitCode

FIRST_DELAY_S = 1.0
MAX_DELAY_S = 60.0
LONG_S = 300.0
LOST = (ExitCode.HOST_UNREACHABLE, ExitCode.AGENT_LOST)
_REACHED = re.compile(rb'"kind":\s*"(step|checkpoint)"[^\n]*?"step":\s*(\d+)')
_VARIES = re.compile(r"0x[0-9a-fA-F]+|\b[0-9a-f]{8,}\b|\d+(?:[.:]\d+)*")


@dataclass
class Furthest:
    """How far rank 0 says that the training has come; -1: it has not said."""

    step: int = -1
    checkpoint: int = -1

    def take(self, lines: bytes) -> None:
        """Take in whole lines of rank 0's events."""
        for kind, number in _REACHED.findall(lines):
            if kind == b"step":
                self.step = max(self.step, int(number))
            else:
                self.checkpoint = max(self.checkpoint, int(number))

    @property
    def silent(self) -> bool:
        return max(self.step, self.checkpoint) < 0


@dataclass
class AttemptRecord:
    """One attempt as `report.json` has it. Times are seconds since 1970.

    restart: why it was started; None: it is the first. set_aside: host -> why, of those that no later attempt has.
    """

    number: int
    hosts: list[str]
    world_size: int
    plan: str  # the file in the run's directory
    started: float
    restart: str | None = None
    ended: float | None = None
    cause: Cause | None = None
    progress: bool = False
    set_aside: dict[str, str] = field(default_factory=dict)


class History:
    """All attempts of a run, the last one perhaps still running."""

    def __init__(self, max_restarts: int) -> None:
        self.max_restarts = max_restarts
        self.attempts: list[AttemptRecord] = []
        self.furthest = Furthest()
        self._before = Furthest()

    def begin(self, record: AttemptRecord) -> None:
        self.attempts.append(record)
        self._before = Furthest(self.furthest.step, self.furthest.checkpoint)

    def end(self, cause: Cause | None, now: float) -> None:
        """The last attempt is over; cause: None if all is well."""
        last, now_at = self.attempts[-1], self.furthest
        last.ended, last.cause = now, cause
        last.progress = now_at.step > self._before.step or now_at.checkpoint > self._before.checkpoint
        if now_at.silent and now - last.started >= LONG_S:
            last.progress = True

    def take_aside(self, aside: Mapping[str, str]) -> dict[str, str]:
        """Of all hosts that were set aside, those that were so in or behind the last attempt; it keeps them."""
        earlier = {host for record in self.attempts[:-1] for host in record.set_aside}
        last = self.attempts[-1]
        last.set_aside = {host: why for host, why in aside.items() if host not in earlier}
        return last.set_aside

    def close(self, cause: Cause | None, aside: Mapping[str, str], now: float) -> list[dict[str, Any]]:
        """All attempts for the report; one that still runs ends here, with the run."""
        if self.attempts:
            if self.attempts[-1].ended is None:
                self.end(cause, now)
            self.take_aside(aside)
        return [asdict(record) for record in self.attempts]

    @property
    def left(self) -> int:
        """Restarts that are left."""
        return self.max_restarts + 1 - len(self.attempts)

    def suspect(self) -> str | None:
        """The host whose ranks were the root cause of the last two attempts."""
        blamed = [cause.host if cause.rank is not None else None for cause in self._last_causes()]
        return blamed[0] if len(blamed) == 2 and blamed[0] == blamed[1] else None

    def same_again(self) -> str | None:
        """What the last two attempts failed of, if it was the same and the last one made no progress."""
        kinds = [kind_of(cause) for cause in self._last_causes()]
        alike = len(kinds) == 2 and kinds[0] == kinds[1] and not self.attempts[-1].progress
        return _what(self._last_causes()[-1]) if alike else None

    def delay_s(self) -> float:
        """Seconds to wait before the next attempt."""
        return delay_s([record.progress for record in self.attempts])

    def _last_causes(self) -> list[Cause]:
        return [record.cause for record in self.attempts[-2:] if record.cause is not None]


def delay_s(progress: Sequence[bool]) -> float:
    """progress: of each attempt so far. The first failure of a row without progress is retried at once."""
    in_vain = next((count for count, made in enumerate(reversed(progress)) if made), len(progress))
    return 0.0 if in_vain < 2 else min(MAX_DELAY_S, FIRST_DELAY_S * 2.0 ** min(in_vain - 2, 30))


def kind_of(cause: Cause) -> tuple[int, str]:
    """What is the same in two failures that are alike: the code, what happened and what was raised.

    Not who it was, and no numbers or addresses. A host that was lost is like no other: it is named.
    """
    if cause.origin == "launcher" and cause.code in LOST:
        return cause.code, cause.headline
    return cause.code, _VARIES.sub("#", _what(cause))


def _what(cause: Cause) -> str:
    what = cause.headline.removeprefix(f"rank {cause.rank} on {cause.host} ")
    by_signal = what.startswith(("died of", "was killed"))  # its last words are about something else
    line = "" if by_signal else exception_line(cause.detail)
    return f"{what}: {line}" if line else what


def exception_line(detail: str) -> str:
    """The line of the last traceback that says what was raised; without a traceback, the last line."""
    _, traceback, after = detail.rpartition("Traceback (most recent call last):\n")
    lines = [line for line in after.splitlines() if line.strip()]
    if not traceback:
        return lines[-1].strip() if lines else ""
    return next((line for line in lines if not line[0].isspace()), "")
