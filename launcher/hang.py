"""Do the steps go on? Pure: events, times and stacks to a finding.

[Note: when a step is too late]
Only ranks that report steps are watched, from their `start` event to their `end`; any event shows that a rank lives.
How long one may be silent:

    | the rank that is behind …                                  | others wait for it          | nobody does  |
    |------------------------------------------------------------|-----------------------------|--------------|
    | has done steps                                             | 60 s or 10 median steps     | half an hour |
    | is at its first steps, validates, saves, loads or compiles | 9 minutes                   | half an hour |
    | cannot be asked (a program, --no-preload)                  | 9 minutes                   |              |

Where several are behind, in different places, half an hour is 9 minutes: one may wait for the other where none sees it.
With `hang_s` the first row is hang_s, in both columns, from the first step on; the others are no shorter than it, nor
than 10 median steps. 9 minutes: below the 10 after which the others' collective would fail, and name a wrong rank.
Half an hour: it may be just slow, and nobody is kept waiting. A note comes at half of each time. While a rank is in a
debugger there is no end.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dstrain.launcher import stacks
from dstrain.launcher.blame import Blame, Standing, blame
from dstrain.launcher.root_cause import Cause
from dstrain.runtime.spec.exit_codes import ExitCode

USUAL_S = 60.0
USUAL_STEPS = 10
LONG_S = 540.0
ALONE_S = 1800.0
INTERVALS = 5  # with fewer, the pace of a run is not known
REMEMBERED_INTERVALS = 100
GAP_S = 5.0  # nobody has looked for so long: this machine slept, or its disk did
LIMIT = 1 << 63  # of numbers in an event: a script may write any


class Progress:
    """What the events of one attempt's ranks say. `now` is the head's monotonic clock.

    steps: the last step of each rank that reports any, 0 before its first.
    """

    def __init__(self) -> None:
        self.steps: dict[int, int] = {}
        self._heard: dict[int, float] = {}
        self._ended: set[int] = set()
        self._stepped_ns: dict[int, int] = {}
        self._intervals: deque[float] = deque(maxlen=REMEMBERED_INTERVALS)
        self._looked_at: float | None = None

    def take(self, rank: int, event: Mapping[str, Any], now: float) -> None:
        """Take in an event of a rank."""
        kind, step = event.get("kind"), event.get("step")
        if kind == "end":
            self._ended.add(rank)
            self._heard.pop(rank, None)
        elif kind == "start":
            self.steps.setdefault(rank, 0)
        elif kind == "step" and type(step) is int and 0 <= step < LIMIT:
            self._measure(rank, step, event.get("ts"))
            self.steps[rank] = step
        if rank in self.steps and rank not in self._ended:
            self._heard[rank] = now

    def _measure(self, rank: int, step: int, ts: object) -> None:
        ns = ts if type(ts) is int and 0 <= ts < LIMIT else 0
        before_ns, steps = self._stepped_ns.get(rank), step - self.steps.get(rank, 0)
        if before_ns and steps > 0 and ns > before_ns:
            self._intervals.append((ns - before_ns) / 1e9 / steps)
        self._stepped_ns[rank] = ns

    def look(self, now: float) -> None:
        """Call it about once a second: what went by while nobody looked is no silence of the ranks."""
        gap = now - (self._looked_at or now)
        if gap > GAP_S:
            self._heard = {rank: heard + gap for rank, heard in self._heard.items()}
        self._looked_at = now

    @property
    def median_s(self) -> float | None:
        """Of a step; None: too few are known."""
        return statistics.median(self._intervals) if len(self._intervals) >= INTERVALS else None

    def most_silent(self, running: Collection[int], now: float) -> tuple[float, bool]:
        """The longest silence, in seconds, of a rank that is watched and runs, and whether it has done a step."""
        rank = min((rank for rank in self._heard if rank in running), key=lambda rank: self._heard[rank], default=None)
        return (0.0, False) if rank is None else (now - self._heard[rank], rank in self._stepped_ns)


def bound_s(
    hang_s: float | None, median_s: float | None, has_pace: bool, others_wait: bool, are_apart: bool = False
) -> float:
    """How long a rank may be silent. [Note: when a step is too late]

    has_pace: it has done steps, and is nowhere where it may take long. others_wait, are_apart: see Blame. Infinity: for
    ever.
    """
    if hang_s == 0:
        return math.inf
    by_pace = USUAL_STEPS * (median_s or 0.0)
    if has_pace and hang_s is not None:
        return hang_s
    if has_pace and others_wait and median_s is not None:
        return max(USUAL_S, by_pace)
    return max(hang_s or 0.0, by_pace, LONG_S if others_wait or are_apart else ALONE_S)


@dataclass(frozen=True)
class Finding:
    """For how long no step has come, how long that may be, and for whom the others wait."""

    silent_s: float
    bound_s: float
    blame: Blame

    @property
    def is_hang(self) -> bool:
        return self.silent_s >= self.bound_s

    @property
    def is_late(self) -> bool:
        return self.silent_s >= self.bound_s / 2

    def note(self) -> str:
        """What is said before it is too late."""
        limit = f"at {self.bound_s:.0f} s it counts as a hang (--hang-timeout)"
        return f"no step for {self.silent_s:.0f} s: {self.blame.words('is')}; {limit}"

    def cause(self, text: str, logs: str) -> Cause:
        """The root cause. text: the stack of the first that is behind, of all threads. logs: where all stacks are."""
        first, found = self.blame.behind[0], self.blame
        headline = f"{found.words('hangs', text)}: no step for {self.silent_s:.0f} s"
        remedy = f"the stacks of all ranks: {logs}; if a step may take so long, say it by --hang-timeout"
        detail = stacks.shown(text or first.text)
        return Cause(ExitCode.HANG, "launcher", headline, detail, remedy, first.host, first.rank, len(found.waiting))


class HangWatch:
    """When to ask the ranks of one attempt where they are, and what their answers mean. hang_s: see bound_s."""

    def __init__(self, hang_s: float | None) -> None:
        self.progress = Progress()
        self._hang_s = hang_s
        self._ask_at_s: float | None = None  # of silence; None: nobody has been asked in this one
        self._is_noted = False

    def should_ask(self, running: Collection[int], now: float) -> bool:
        """Call it about once a second."""
        self.progress.look(now)
        silent_s, has_stepped = self.progress.most_silent(running, now)
        first_s = bound_s(self._hang_s, self.progress.median_s, has_stepped, True) / 2
        if silent_s < first_s:
            self._ask_at_s, self._is_noted = None, False
            return False
        return silent_s >= (self._ask_at_s or first_s)

    def judge(self, ranks: Sequence[Standing], running: Collection[int], now: float) -> Finding | None:
        """None: nobody is late, or it has been said. ranks: those that run, on hosts that have answered."""
        silent_s, has_stepped = self.progress.most_silent(running, now)
        median_s = self.progress.median_s
        first_s = bound_s(self._hang_s, median_s, has_stepped, True) / 2
        if not ranks or silent_s < first_s:
            return None
        self._ask_at_s = silent_s + first_s
        if any(one.in_debugger for one in ranks):
            return None
        found = blame(ranks)
        has_pace = has_stepped and not found.takes_long
        bound = bound_s(self._hang_s, median_s, has_pace, found.others_wait, found.are_apart)
        finding = Finding(silent_s, bound, found)
        self._ask_at_s = min(self._ask_at_s, bound if finding.is_late else bound / 2)
        was_noted, self._is_noted = self._is_noted, self._is_noted or finding.is_late
        return finding if finding.is_hang or (finding.is_late and not was_noted) else None
