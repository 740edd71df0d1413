"""From a run's directory to what it says: job, report, and the numbers of its steps.

Nothing here trusts the files: a line cut short, a missing file, a value of another type cost what they would have
said, never the whole.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dstrain.launcher.ledger import Ledger
from dstrain.runtime.spec.errors import UsageError
from dstrain.runtime.spec.trace import Measured, read_trace

Numbers = NDArray[np.float64]

SHARED_FIELDS = ("loss", "lr", "grad_norm", "tokens_per_s", "loss_scale", "mfu")
"""Numbers of a step that are the same on every rank: read of rank 0 alone."""

RANK_FIELDS = ("step_s", "memory_bytes", "data_wait_s")
"""Numbers of a step that each rank has of its own."""

_LAST_STEP = 1 << 53  # beyond, a float does not tell two steps apart


class Curve(NamedTuple):
    """`value` (NaN where it was not said) over `step`, which rises."""

    step: Numbers
    value: Numbers


class Validation(NamedTuple):
    attempt: int
    step: int
    loss: float


class Place(NamedTuple):
    """Who wrote step events."""

    attempt: int
    rank: int


@dataclass(frozen=True)
class Run:
    """All that one run's directory says; what it does not say is empty.

    job, report: the JSON files. start, end: the last such events of rank 0. steps: curves by writer and field.
    seconds: from the first event to the last. ledger: where they went. trace: what traced steps say of a pipeline.
    problems: what could not be read, a line each.
    """

    id: str
    job: Mapping[str, Any]
    report: Mapping[str, Any]
    start: Mapping[str, Any]
    end: Mapping[str, Any]
    steps: Mapping[Place, Mapping[str, Curve]]
    validations: tuple[Validation, ...]
    seconds: float
    ledger: Ledger
    trace: Measured | None
    problems: tuple[str, ...]

    @property
    def ranks(self) -> list[int]:
        """Ranks that reported steps."""
        return sorted({place.rank for place in self.steps})

    def attempts(self, rank: int, name: str) -> list[Curve]:
        """The curve `name` of a rank, of each attempt in their order; attempts without it are left out."""
        mine = sorted(place for place in self.steps if place.rank == rank)
        return [self.steps[place][name] for place in mine if name in self.steps[place]]


def read_run(path: Path) -> Run:
    """The run in the directory `path`."""
    problems: list[str] = []
    job, report = _json_file(path / "job.json", problems), _json_file(path / "report.json", problems)
    events = _Events()
    try:
        events.read(path / "events.jsonl")
    except OSError as error:
        problems.append(f"events.jsonl: {error.strerror}")
    if events.unreadable:
        problems.append(f"events.jsonl: {events.unreadable} lines are no events, and are left out")
    return Run(
        id=path.name,
        job=job,
        report=report,
        start=events.start,
        end=events.end,
        steps={place: columns.curves() for place, columns in events.columns.items()},
        validations=tuple(events.validations),
        seconds=max(0.0, (events.last_ns - events.first_ns) / 1e9) if events.last_ns else 0.0,
        ledger=events.ledger,
        trace=_trace(path / "trace.json", problems),
        problems=tuple(problems),
    )


def number(value: object) -> float:
    """A JSON value as a number: NaN where it is none."""
    if type(value) is float:
        return value
    if type(value) is int:
        return float(value) if abs(value) < 1 << 1023 else math.inf
    return math.nan


def _json_file(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except OSError as error:
        problems.append(f"{path.name}: {error.strerror}")
    except (ValueError, RecursionError) as error:
        problems.append(f"{path.name}: not JSON: {error}")
    else:
        if isinstance(value, dict):
            return value
        problems.append(f"{path.name}: no JSON object")
    return {}


def _trace(path: Path, problems: list[str]) -> Measured | None:
    try:
        return read_trace(path) if path.is_file() else None
    except UsageError:
        problems.append(f"{path.name}: no trace of ours")
        return None


class _Columns:
    """The growing table of one writer's steps: the step, then each field."""

    def __init__(self, fields: tuple[str, ...]) -> None:
        self.fields = fields
        self._rows = array("d")

    def add(self, row: Sequence[float]) -> None:
        self._rows.extend(row)

    def curves(self) -> dict[str, Curve]:
        """A curve for each field that was ever said. A step that was written twice counts as written last."""
        table = np.array(self._rows).reshape(-1, 1 + len(self.fields))
        if (np.diff(table[:, 0]) <= 0).any():
            table = table[np.argsort(table[:, 0], kind="stable")]
            table = table[np.append(np.diff(table[:, 0]) > 0, True)]
        columns = zip(self.fields, table[:, 1:].T, strict=True)
        return {name: Curve(table[:, 0], column) for name, column in columns if not np.isnan(column).all()}


@dataclass
class _Events:
    """What the lines of events.jsonl come to."""

    start: dict[str, Any] = field(default_factory=dict)
    end: dict[str, Any] = field(default_factory=dict)
    columns: dict[Place, _Columns] = field(default_factory=dict)
    validations: list[Validation] = field(default_factory=list)
    ledger: Ledger = field(default_factory=Ledger)
    first_ns: int = 0
    last_ns: int = 0
    unreadable: int = 0

    def read(self, path: Path) -> None:
        """Take all lines in."""
        with path.open("rb") as file:
            for line in file:
                try:
                    event, _ = _DECODE(line.decode().lstrip())  # a third faster than json.loads, and there are millions
                except (ValueError, RecursionError):
                    event = None
                if type(event) is dict:
                    self._take(event)
                elif line.endswith(b"\n"):  # else the run is writing it, or was killed there
                    self.unreadable += 1

    def _take(self, event: dict[str, Any]) -> None:
        get = event.get
        kind, attempt, rank, step, ts = get("kind"), get("attempt"), get("rank"), get("step"), get("ts")
        if type(ts) is int:
            self.first_ns = self.first_ns or ts
            self.last_ns = ts
        if not rank:  # the launcher, or rank 0
            self.ledger.take(event)
        if type(attempt) is not int or type(rank) is not int:
            return
        if kind == "step" and type(step) is int and 0 <= step < _LAST_STEP:
            columns = self._columns_of(Place(attempt, rank))
            columns.add([step, *[number(get(name)) for name in columns.fields]])
        elif rank == 0 and kind == "validation" and type(step) is int:
            if math.isfinite(loss := number(get("val_loss"))):
                self.validations.append(Validation(attempt, step, loss))
        elif rank == 0 and kind == "start":
            self.start = event
        elif rank == 0 and kind == "end":
            self.end = event

    def _columns_of(self, place: Place) -> _Columns:
        columns = self.columns.get(place)
        if columns is None:
            shared = SHARED_FIELDS if place.rank == 0 else ()
            columns = self.columns[place] = _Columns((*shared, *RANK_FIELDS))
        return columns


_DECODE = json.JSONDecoder().raw_decode
