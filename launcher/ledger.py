"""Where a run's time went: pure, from its events. The supervisor takes them as they come, a report from the file.

[Note: whose time]
A run's time is a line, and each event of the launcher or of rank 0 is a mark on it. What lies between two marks is

    wait        from the run's begin, or the end of the attempt before, to `launch`: back-off, connecting, preflight
    startup     from there to the first step's begin: forking, rendezvous, model, data, loading a checkpoint
    trained     steps and validations; less what follows
    stall       of it, for which training stood still to save
    repeated    of it, steps that a later attempt did again (or the same, behind going back to a checkpoint)
    detection   from the last of these marks to the moment when the launcher knew of the failure
    teardown    from there to the end of the attempt's last process
    waited      from there to the run's end, where it was stopped while it waited for another attempt
    end         behind the last step: a sample, trackers, leaving

so that all of them together are the whole run. Events of rank 0 are on its host's clock; `launch` says how far that is
from the head's.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dstrain.runtime.spec.exit_codes import ExitCode

Event = Mapping[str, Any]
KINDS = ("wait", "startup", "trained", "stall", "repeated", "detection", "teardown", "waited", "end")
STOPPED = (ExitCode.INTERRUPTED, ExitCode.HANGUP, ExitCode.TERMINATED)
MAX_OFFSET_S = 1e9


@dataclass
class AttemptTimes:
    """Seconds of one attempt by kind, and the steps that it has done and that count."""

    attempt: int
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    repeated_steps: int = 0
    first_step: int | None = None
    last_step: int | None = None
    cause: str | None = None
    _steps: array[int] = field(default_factory=lambda: array("q"))
    _step_s: array[float] = field(default_factory=lambda: array("d"))

    @property
    def steps(self) -> int:
        return len(self._steps)

    @property
    def has_stepped(self) -> bool:
        return self.first_step is not None

    def do(self, step: int, seconds: float) -> None:
        """A step is done."""
        self.first_step, self.last_step = (step if self.first_step is None else self.first_step), step
        self._steps.append(step)
        self._step_s.append(seconds)
        self.seconds["trained"] += seconds

    def go_on(self, seconds: float) -> None:
        """What belongs to the last step: a validation, say."""
        if self._step_s:
            self._step_s[-1] += seconds
        self.seconds["trained"] += seconds

    def stand_still(self, seconds: float) -> None:
        """So much of the newest steps' time was no training."""
        place = len(self._step_s) - 1
        while seconds > 0 and place >= 0:
            part = min(seconds, self._step_s[place])
            self._step_s[place] -= part
            self.seconds["trained"] -= part
            self.seconds["stall"] += part
            seconds, place = seconds - part, place - 1

    def undo(self, step: int) -> None:
        """This step is done again, so it and those behind it were in vain."""
        while self._steps and self._steps[-1] >= step:
            self._steps.pop()
            seconds = self._step_s.pop()
            self.seconds["trained"] -= seconds
            self.seconds["repeated"] += seconds
            self.repeated_steps += 1

    def to_json(self) -> dict[str, Any]:
        """A row of the report's table."""
        numbers = {f"{kind}_s": round(max(0.0, seconds), 3) for kind, seconds in self.seconds.items()}
        steps = {"first_step": self.first_step, "last_step": self.last_step, "steps": self.steps}
        return {"attempt": self.attempt, **steps, "repeated_steps": self.repeated_steps, **numbers, "cause": self.cause}


class Ledger:
    """Take every event of rank 0 and of the launcher in their order, then ask. What is no such event is left out."""

    def __init__(self) -> None:
        self.attempts: list[AttemptTimes] = []
        self._began: float | None = None
        self._at = 0.0
        self._offset_s = 0.0  # rank 0's clock minus the head's
        self._failed = self._over = False  # the last attempt; and its processes have gone
        self._of_launcher: dict[str, Callable[[Event, float], None]] = {
            "run_start": lambda event, at: None,
            "launch": self._launch,
            "failure": self._failure,
            "ended": self._ended,
            "run_end": self._run_end,
        }
        self._of_rank: dict[str, Callable[[Event, float], None]] = {
            "start": lambda event, at: None,
            "step": self._step,
            "validation": self._validation,
            "checkpoint": self._checkpoint,
        }

    def take(self, event: Event) -> None:
        """Take in one event. Never raises, whatever it is."""
        rank, kind, at = event.get("rank", -1), event.get("kind"), _seconds(event.get("ts"))
        if at is None or not isinstance(kind, str):
            return
        if rank is None and kind in self._of_launcher:
            self._begin(at)
            self._of_launcher[kind](event, at)
        elif type(rank) is int and rank == 0 and kind in self._of_rank:
            at -= self._offset_s
            self._begin(at)
            if self._is_of_now(event, at):
                self._of_rank[kind](event, at)

    def _begin(self, at: float) -> None:
        if self._began is None:
            self._began = self._at = at

    def _pass(self, at: float) -> float:
        """Seconds since the mark before; a clock that goes back costs nothing."""
        passed = max(0.0, at - self._at)
        self._at = max(self._at, at)
        return passed

    def _spend(self, kind: str, at: float) -> None:
        if self.attempts:
            self.attempts[-1].seconds[kind] += self._pass(at)

    # --- marks -----------------------------------------------------------------------------------------------

    def _launch(self, event: Event, at: float) -> None:
        offset_s = _number(event.get("clock_offset_s"), 0.0)
        self._offset_s = offset_s if abs(offset_s) < MAX_OFFSET_S else 0.0
        number = event.get("attempt")
        self._open(number if type(number) is int else len(self.attempts), at)

    def _open(self, number: int, at: float) -> None:
        self.attempts.append(AttemptTimes(number))
        self._spend("wait", at)
        self._failed = self._over = False

    def _is_of_now(self, event: Event, at: float) -> bool:
        """Not of an attempt before; one whose launch is not written (by an older version, or torn) begins here."""
        number = event.get("attempt")
        known = self.attempts[-1].attempt if self.attempts else -1
        if not self.attempts or (type(number) is int and number > known):
            self._open(number if type(number) is int else 0, at)
            return True
        return type(number) is not int or number == known

    def _step(self, event: Event, at: float) -> None:
        step, current = event.get("step"), self.attempts[-1]
        if type(step) is not int or not 0 <= step < 1 << 62:
            return
        if not current.has_stepped:
            self._spend("startup", at - max(0.0, _number(event.get("step_s"), 0.0)))
        for attempt in self.attempts:
            attempt.undo(step)
        current.do(step, self._pass(at))

    def _validation(self, event: Event, at: float) -> None:
        if self.attempts[-1].has_stepped:
            self.attempts[-1].go_on(self._pass(at))

    def _checkpoint(self, event: Event, at: float) -> None:
        if self.attempts[-1].has_stepped:
            self.attempts[-1].go_on(self._pass(at))
            self.attempts[-1].stand_still(_number(event.get("stall_s"), _number(event.get("seconds"), 0.0)))

    def _failure(self, event: Event, at: float) -> None:
        if not self.attempts:
            return
        known_at = _seconds(event.get("detected_ts"))
        self._spend("detection" if self.attempts[-1].has_stepped else "startup", at if known_at is None else known_at)
        self.attempts[-1].cause, self._failed = str(event.get("headline", "")), True

    def _ended(self, event: Event, at: float) -> None:
        self._spend("teardown" if self._failed else "end", at)
        self._over = True

    def _run_end(self, event: Event, at: float) -> None:
        was_stopped = event.get("origin") == "launcher" and event.get("exit_code") in STOPPED
        if self._over and was_stopped:
            self._spend("waited", at)
        else:
            self._spend("teardown" if self._failed else "end", at)

    # --- what came of it -------------------------------------------------------------------------------------

    @property
    def total_s(self) -> float:
        return self._at - self._began if self._began is not None else 0.0

    @property
    def goodput(self) -> float | None:
        """The share of the time that went into training that counts, from 0 to 1; None where nobody reports steps."""
        if not any(attempt.has_stepped for attempt in self.attempts) or not self.total_s:
            return None
        return min(1.0, max(0.0, self._sum("trained") / self.total_s))

    def _sum(self, *kinds: str, first: int = 0, last: int | None = None) -> float:
        return sum(attempt.seconds[kind] for attempt in self.attempts[first:last] for kind in kinds)

    def to_json(self) -> dict[str, Any]:
        """As report.json has it."""
        sums = {
            "total_s": self.total_s,
            "trained_s": self._sum("trained"),
            "startup_s": self._sum("wait", "startup", last=1),
            "checkpoint_stall_s": self._sum("stall"),
            "repeated_s": self._sum("repeated"),
            "detection_s": self._sum("detection"),
            "teardown_s": self._sum("teardown"),
            "restart_s": self._sum("wait", "startup", first=1) + self._sum("waited"),
            "end_s": self._sum("end"),
        }
        counts = {
            "restarts": max(0, len(self.attempts) - 1),
            "steps": sum(attempt.steps for attempt in self.attempts),
            "repeated_steps": sum(attempt.repeated_steps for attempt in self.attempts),
        }
        rounded = {name: round(max(0.0, seconds), 3) for name, seconds in sums.items()}
        return {**rounded, **counts, "attempts": [attempt.to_json() for attempt in self.attempts]}


def _number(value: object, other: float) -> float:
    return float(value) if type(value) in (int, float) and abs(value) < 1e15 else other  # type: ignore[arg-type]


def _seconds(ns: object) -> float | None:
    """Of a time stamp in nanoseconds."""
    return ns / 1e9 if type(ns) is int and 0 <= ns < 1 << 63 else None


def summary_line(report: Mapping[str, Any]) -> str | None:
    """The line at the end of a run that has lost time; None where there is nothing to say."""
    ledger, goodput = report.get("ledger"), report.get("goodput")
    if not ledger or goodput is None:
        return None
    total, restarts, stall = ledger["total_s"], ledger["restarts"], ledger["checkpoint_stall_s"]
    if not restarts and stall < total / 100:
        return None
    line = f"goodput {100 * goodput:.1f} %: {_span(ledger['trained_s'])} of {_span(total)} trained"
    if restarts:
        lost = sum(ledger[f"{kind}_s"] for kind in ("detection", "teardown", "restart", "repeated"))
        steps = ledger["repeated_steps"]
        again = f" ({steps} {'step' if steps == 1 else 'steps'} again)" if steps else ""
        line += f", {_span(lost)} lost by {restarts} {'restart' if restarts == 1 else 'restarts'}{again}"
    if stall >= total / 100:
        line += f", {_span(stall)} stalled by checkpoints"
    return line


def _span(seconds: float) -> str:
    """9.2 s, 412 s, 27.5 min, 3.1 h."""
    for size, unit in ((3600.0, "h"), (60.0, "min")):
        if seconds >= 10 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s" if seconds < 99.95 else f"{seconds:.0f} s"
