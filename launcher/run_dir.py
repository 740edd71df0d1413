"""The layout of a run's directory, in one place.

runs/<run_id>/      0700; also listed under ${XDG_STATE_HOME:-~/.local/state}/dstrain/runs/
  job.json  plan.json  report.json  events.jsonl       secret values masked
  plan-attempt-<k>.json                                where attempt k has another plan than the one before
  trace.json                                           where steps were traced: for Perfetto
  logs/attempt-<k>/<host>/rank-<r>.out  rank-<r>.err   byte-exact
  logs/attempt-<k>/<host>/rank-<r>.stacks               where it was when steps did not come
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstrain.runtime.spec.errors import UsageError
from dstrain.runtime.spec.frames import Stream

_SUFFIX = {Stream.STDOUT: "out", Stream.STDERR: "err"}


def new_run_id(name: str | None) -> str:
    """Sortable by time, unique, and fit for a file name: 20261121-043000-a1b2c3[-name]."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return "-".join(part for part in (stamp, secrets.token_hex(3), name) if part)


@dataclass(frozen=True)
class RunDir:
    """`path`: the run's own directory."""

    path: Path

    @classmethod
    def create(cls, base: Path, run_id: str) -> RunDir:
        """Make the directory and list it among the user's runs. Raises UsageError when it cannot be written."""
        path = (base / run_id).absolute()
        try:
            path.mkdir(mode=0o700, parents=True)
        except OSError as error:
            found = f"{path}: {error.strerror}"
            raise UsageError.mismatch("run directory", "a folder that can be written", found, "use --run-dir") from None
        run = cls(path)
        run._list(run_id)
        return run

    def _list(self, run_id: str) -> None:
        state = _users_runs()
        try:
            state.mkdir(mode=0o700, parents=True, exist_ok=True)
            (state / run_id).symlink_to(self.path)
        except OSError:
            pass  # the list is a convenience; a read-only home must not stop a run

    @property
    def report(self) -> Path:
        return self.path / "report.json"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def trace(self) -> Path:
        return self.path / "trace.json"

    def log(self, attempt: int, host: str, rank: int, stream: Stream) -> Path:
        """The file with exactly the bytes that this rank wrote."""
        return self.path / "logs" / f"attempt-{attempt}" / host / f"rank-{rank}.{_SUFFIX[stream]}"

    def stacks(self, attempt: int, host: str, rank: int) -> Path:
        """Where this rank was whenever it was asked."""
        return self.path / "logs" / f"attempt-{attempt}" / host / f"rank-{rank}.stacks"

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write one of the JSON files: whole or not at all."""
        fresh = self.path / f".{name}.tmp"
        fresh.write_text(json.dumps(value, indent=2) + "\n")
        fresh.replace(self.path / name)


def find_run(name: str, base: Path = Path("runs")) -> Path:
    """The directory of the run `name`: a path, or an id in `base` or in the user's list. Raises UsageError."""
    for path in (Path(name), base / name, _users_runs() / name):
        if _is_run(path):
            return path.resolve()
    fix = f"the ids are in {base}/ and {_users_runs()}/"
    raise UsageError.mismatch("RUN", "a run's directory or id", ascii(name), fix)


def newest_run(base: Path = Path("runs")) -> Path:
    """The run in `base` that began last, by its id. Raises UsageError when there is none."""
    runs = [path for path in base.glob("*") if _is_run(path)]
    if not runs:
        raise UsageError.mismatch("RUN", f"a run in ./{base}", "none", "name its directory or its id")
    return max(runs, key=lambda path: path.name)


def _is_run(path: Path) -> bool:
    return (path / "job.json").is_file() or (path / "events.jsonl").is_file()


def _users_runs() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "dstrain" / "runs"
