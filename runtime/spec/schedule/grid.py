"""The part of a schedule around a cell, as text, and the error that shows it."""

from __future__ import annotations

from collections.abc import Mapping

from dstrain.runtime.spec.errors import ScheduleError, UsageError
from dstrain.runtime.spec.schedule.plan import Schedule

AROUND = 5
"""Cells shown before a marked one, and as many after; likewise ranks."""


def grid(schedule: Schedule, marks: Mapping[tuple[int, int], str]) -> str:
    """Rows are ranks, columns cells ([Note: compact rows]); marks: (rank, cell) -> text shown there as `>text<`.

    The window lies around the first mark; rows with another mark are shown too.
    """
    rank, cell = next(iter(marks))
    longest = max(cell + 1, *map(len, schedule.ranks))
    start = max(0, min(cell - AROUND, longest - 2 * AROUND - 1))
    columns = range(start, min(longest, start + 2 * AROUND + 1))
    near = {*range(rank - AROUND, rank + AROUND + 1), *(marked for marked, _ in marks)}
    rows = [number for number in range(len(schedule.ranks)) if number in near]
    texts = {(row, column): _cell(schedule, row, column, marks) for row in rows for column in columns}
    width = max(len(text) for text in texts.values()) + 1
    label = len(f"rank {rows[-1]}") + 1
    lines = ["cell".ljust(label) + "".join(f" {column} ".rjust(width) for column in columns)]
    for before, row in zip([-1, *rows], rows, strict=False):
        if row != before + 1:
            lines.append("…")
        lines.append(f"rank {row}".ljust(label) + "".join(texts[row, column].rjust(width) for column in columns))
    if rows[-1] + 1 < len(schedule.ranks):
        lines.append("…")
    return "\n".join(line.rstrip() for line in lines)


def _cell(schedule: Schedule, rank: int, cell: int, marks: Mapping[tuple[int, int], str]) -> str:
    if (rank, cell) in marks:
        return f">{marks[rank, cell]}<"
    row = schedule.ranks[rank]
    return f" {row[cell]} " if cell < len(row) else ""


def error_at(
    schedule: Schedule, marks: Mapping[tuple[int, int], str], expected: str, found: str, fix: str
) -> ScheduleError:
    """The one line on the first mark, and the grid."""
    rank, cell = next(iter(marks))
    where = f"schedule {schedule.name}, rank {rank}, cell {cell}"
    line = UsageError.mismatch(where, expected, found, fix)
    return ScheduleError(f"{line}\n{grid(schedule, marks)}", rank, cell)
