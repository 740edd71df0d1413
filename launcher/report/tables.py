"""Runs to tables: what came of them, and how they were configured. Rows are facts, columns are runs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dstrain.launcher.report import series
from dstrain.launcher.report.charts import GIB, attempts_of
from dstrain.launcher.report.costs_table import bubble
from dstrain.launcher.report.read import Run, number

FINAL_STEPS = 10
"""A loss at the end is the mean of this many steps, for one step's loss says little."""


class Row(NamedTuple):
    """`cells`: one text for each run; empty where the run does not say."""

    name: str
    cells: tuple[str, ...]

    @property
    def differs(self) -> bool:
        return len(set(self.cells)) > 1


def summary(runs: Sequence[Run]) -> list[Row]:
    """How each run went; facts that no run has are left out."""
    rows = [Row(name, tuple(fact(run) for run in runs)) for name, fact in _FACTS.items()]
    return [row for row in rows if any(row.cells)]


def configuration(runs: Sequence[Run]) -> list[Row]:
    """Every key of the runs' jobs (`section.key`), and of the command line as `run.…`."""
    flat = [dict(_settings(run)) for run in runs]
    keys = sorted({key for settings in flat for key in settings})
    return [Row(key, tuple(settings.get(key, "") for settings in flat)) for key in keys]


def outcome(run: Run) -> str:
    """In a word or two."""
    if not run.report:
        return "no report.json: it still runs, or the launcher was killed"
    code = run.report.get("exit_code")
    return "succeeded" if code == 0 else f"exit code {code} ({run.report.get('origin', 'unknown')})"


# --- configuration -------------------------------------------------------------------------------------------


def _settings(run: Run) -> Iterator[tuple[str, str]]:
    job = run.job.get("job")
    yield from _leaves(job if isinstance(job, dict) else {}, "")
    yield from _leaves({key: value for key, value in run.job.items() if key not in ("job", "target")}, "run.")
    if title := run.report.get("target"):
        yield "run.target", str(title)


def _leaves(section: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for key, value in section.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        elif value not in (None, {}, []):
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)


# --- summary -------------------------------------------------------------------------------------------------


def _started(run: Run) -> str:
    at = number(run.report.get("started"))
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at)) if 0 <= at < 1e11 else ""


def _wall_time(run: Run) -> str:
    seconds = number(run.report.get("ended")) - number(run.report.get("started"))
    return clock(seconds if np.isfinite(seconds) else run.seconds)


def _hosts(run: Run) -> str:
    hosts = run.report.get("hosts")
    return ", ".join(map(str, hosts)) if isinstance(hosts, list) else ""


def _ranks(run: Run) -> str:
    size = run.report.get("world_size") or run.start.get("world_size")
    device = run.start.get("device")
    return "" if size is None else f"{size} on {str(device).partition(':')[0]}" if device else str(size)


def _attempts(run: Run) -> str:
    attempts = run.report.get("attempts")
    return str(len(attempts)) if isinstance(attempts, list) else ""


def _goodput(run: Run) -> str:
    goodput = run.ledger.goodput
    return "" if goodput is None else f"{goodput:.1%} of the time trained"


def _parameters(run: Run) -> str:
    return amount(number(run.start.get("parameters")))


def _steps(run: Run) -> str:
    last = max((curve.step[-1] for curve in run.attempts(0, "step_s")), default=None)
    planned = dict(_settings(run)).get("train.steps")
    if last is None:
        return ""
    return f"{last:,.0f}" + (f" of {int(planned):,}" if planned and planned.isdecimal() else "")


def _tokens(run: Run) -> str:
    """Of the steps that count: throughput × time of each."""
    said = number(run.end.get("tokens"))
    if np.isfinite(said):
        return amount(said)
    rate = series.joined(series.resumed(run.attempts(0, "tokens_per_s")).counted)
    time_s = series.joined(series.resumed(run.attempts(0, "step_s")).counted)
    if len(rate.step) != len(time_s.step) or not len(rate.step):
        return ""
    return amount(float(np.nansum(rate.value * time_s.value)))


def _training_loss(run: Run) -> str:
    counted = series.finite(series.joined(series.resumed(run.attempts(0, "loss")).counted)).value
    return f"{counted[-FINAL_STEPS:].mean():.4f}" if len(counted) else ""


def _validation_loss(run: Run) -> str:
    return f"{run.validations[-1].loss:.4f}" if run.validations else ""


def _best_validation(run: Run) -> str:
    best = min(run.validations, key=lambda validation: validation.loss, default=None)
    return f"{best.loss:.4f} at step {best.step:,}" if best else ""


def _throughput(run: Run) -> str:
    median = _median(run, "tokens_per_s")
    return f"{amount(median)} tokens/s" if np.isfinite(median) else ""


def _step_time(run: Run) -> str:
    median = _median(run, "step_s")
    return f"{median:.4g} s" if np.isfinite(median) else ""


def _utilization(run: Run) -> str:
    median = _median(run, "mfu")
    return f"{median:.1%}" if np.isfinite(median) else ""


def _data_wait(run: Run) -> str:
    """Share of the time that rank 0 waits for its batches."""
    waits = [series.finite(curve).value.sum() for curve in run.attempts(0, "data_wait_s")]
    times = [series.finite(curve).value.sum() for curve in run.attempts(0, "step_s")]
    return f"{sum(waits) / sum(times):.1%} of the time" if waits and sum(times) > 0 else ""


def _memory(run: Run) -> str:
    peaks = [curve.value.max() for curve in attempts_of(run, "memory_bytes") if len(curve.value)]
    return f"{max(peaks) / GIB:.2f} GiB" if peaks else ""


def _notes(run: Run) -> str:
    notes = run.report.get("notes")
    return "; ".join(map(str, notes)) if isinstance(notes, list) else ""


def _median(run: Run, name: str) -> float:
    values = [series.finite(curve).value for curve in run.attempts(0, name)]
    together = np.concatenate(values) if values else np.empty(0)
    return float(np.median(together)) if len(together) else np.nan


_FACTS: dict[str, Callable[[Run], str]] = {
    "Outcome": outcome,
    "Started": _started,
    "Wall time": _wall_time,
    "Target": lambda run: str(run.report.get("target", "")),
    "Hosts": _hosts,
    "Ranks": _ranks,
    "Attempts": _attempts,
    "Goodput": _goodput,
    "Parameters": _parameters,
    "Steps": _steps,
    "Tokens": _tokens,
    f"Training loss (mean of the last {FINAL_STEPS})": _training_loss,
    "Validation loss": _validation_loss,
    "Best validation loss": _best_validation,
    "Throughput (median)": _throughput,
    "Step time (median)": _step_time,
    "Model FLOPs utilization (median)": _utilization,
    "Pipeline's bubble (median)": lambda run: bubble(run.trace),
    "Waiting for data (rank 0)": _data_wait,
    "Peak memory of a rank": _memory,
    "Notes": _notes,
    "Could not be read": lambda run: "; ".join(run.problems),
}


# --- numbers as text -----------------------------------------------------------------------------------------


def amount(value: float) -> str:
    """Three digits and a power of a thousand: 1.24 M."""
    if not np.isfinite(value):
        return ""
    for power, sign in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * power:  # what would be rounded to 1000 of the smaller
            return f"{value / power:.3g} {sign}"
    return f"{value:.3g}"


def clock(seconds: float) -> str:
    """1:02:03, 2:03 or 4.2 s."""
    if seconds <= 0:
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
