"""A user's own schedule: torch.distributed.pipelining's CSV of computations (`_load_csv`'s format compute_only).

One line per pipeline rank, one cell per action, like 0F3; empty cells are idle time and mean nothing.
"""

from __future__ import annotations

import csv
from pathlib import Path

from dstrain.runtime.spec.errors import UsageError
from dstrain.runtime.spec.schedule.action import Action
from dstrain.runtime.spec.schedule.plan import Schedule
from dstrain.runtime.spec.schedule.simulator import simulate
from dstrain.runtime.spec.schedule.validation import check


def read_csv(path: Path, ranks: int, micro_batches: int) -> Schedule:
    """The file's schedule, checked. A stage belongs to the rank in whose line it stands.

    Raises UsageError with file:line, or ScheduleError with the part of the grid that is wrong.
    """
    rows = [_row(path, line, cells) for line, cells in enumerate(_lines(path), start=1)]
    if len(rows) != ranks:
        fix = "one line for each pipeline rank"
        raise UsageError.mismatch(str(path), f"{ranks} lines", f"{len(rows)}", fix)
    holders: dict[int, int] = {}
    for rank, row in enumerate(rows):
        for action in row:
            holders.setdefault(action.stage, rank)
    absent = next(stage for stage in range(len(holders) + 1) if stage not in holders)
    if absent < len(holders) or not holders:
        found = f"stages {', '.join(map(str, sorted(holders))) or 'none'}"
        raise UsageError.mismatch(str(path), "stages from 0 on, none left out", found, f"add stage {absent}")
    rank_of = tuple(holders[stage] for stage in range(len(holders)))
    schedule = Schedule(path.name, len(rank_of), micro_batches, tuple(rows), rank_of)
    check(schedule)
    return schedule


def write_csv(schedule: Schedule, path: Path) -> None:
    """Cells stand in the column of their start where F, I and W take one column each and B two."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        for spans in simulate(schedule).spans:
            starts = {round(span.start_s): str(span.action) for span in spans}
            writer.writerow([starts.get(column, "") for column in range(max(starts) + 1)])


def _lines(path: Path) -> list[list[str]]:
    """The cells of each line; empty lines at the end do not count."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = [[cell.strip() for cell in line] for line in csv.reader(file, strict=True)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError.mismatch(str(path), "a schedule as CSV", str(error)) from error
    while lines and not any(lines[-1]):
        lines.pop()
    return lines


def _row(path: Path, line: int, cells: list[str]) -> tuple[Action, ...]:
    where = f"{path}:{line}"
    return tuple(Action.parse(cell, f"{where}, column {column}") for column, cell in enumerate(cells, start=1) if cell)
