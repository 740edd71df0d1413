"""Schedules of a user: what is refused, at which cell, and how it is told; and CSV files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dstrain.runtime.spec.errors import ScheduleError, UsageError
from dstrain.runtime.spec.schedule import SCHEDULE_NAMES, Action, Schedule, check, make_schedule, read_csv, write_csv


def edited(name: str, rank: int, old: str, new: str) -> Schedule:
    """Of 4 ranks and 8 micro-batches; in the rank's row, as text, `old` becomes `new`."""
    schedule = make_schedule(name, 4, 8)
    ranks = list(schedule.ranks)
    text = " ".join(map(str, ranks[rank]))
    assert old in text
    ranks[rank] = tuple(map(Action.parse, text.replace(old, new).split()))
    return replace(schedule, ranks=tuple(ranks))


@pytest.mark.parametrize("name", SCHEDULE_NAMES)
def test_ours_pass(name: str) -> None:
    for ranks, micro_batches in ((1, 1), (2, 8), (4, 3), (5, 13), (8, 32)):
        check(make_schedule(name, ranks, micro_batches))


@pytest.mark.parametrize(
    ("schedule", "rank", "cell", "message"),
    [
        (edited("1f1b", 2, "2F3", "4F3"), 2, 5, "a stage from 0 to 3, found stage 4; correct its number"),
        (edited("1f1b", 2, "2F3", "2F8"), 2, 5, "a micro-batch from 0 to 7, found micro-batch 8"),
        (edited("1f1b", 2, "2F3", "1F3"), 2, 5, "an action of its stages (2), found 1F3, whose stage rank 1 holds"),
        (edited("zb_v", 1, "1F3", "5F3"), 1, 3, "an action of its stages (1, 6), found 5F3, whose stage rank 2 holds"),
        (edited("1f1b", 2, "2F3", "2F3 2F3"), 2, 6, "each action once, found 2F3 for the second time"),
        (edited("1f1b", 3, "3F1 3B1", "3B1 3F1"), 3, 2, "3F1 before 3B1, found none; put 3F1 before it, on this rank"),
        (edited("zb_h1", 0, "0I0 0W0", "0W0 0I0"), 0, 4, "0I0 before 0W0, found none"),
        (edited("zb_h1", 0, "0I0 0W0", "0W0"), 0, 4, "0I0 before 0W0, found none"),
        (edited("zb_h1", 3, "3I1", "3B1"), 3, 11, "either a B or an I and a W, found 3W1 after 3B1"),
        (edited("zb_h1", 0, "0I0 0W0", "0I0 0B0"), 0, 5, "either a B or an I and a W, found 0B0 after 0I0"),
        (edited("1f1b", 0, " 0B7", ""), 0, 15, "0B7 (or 0I7 and 0W7) somewhere in the row, found none; add it"),
        (edited("zb_h1", 0, " 0W7", ""), 0, 23, "0W7 somewhere in the row, found none"),
        (edited("1f1b", 3, "3F7 3B7", ""), 3, 14, "3F7 somewhere in the row, found none"),
        (edited("1f1b", 1, "1F1 1F2 1B0", "1B0 1F1 1F2"), 1, 1, "rows that come to their ends, found a deadlock"),
    ],
)
def test_a_fault_is_told_with_its_cell(schedule: Schedule, rank: int, cell: int, message: str) -> None:
    with pytest.raises(ScheduleError) as raised:
        check(schedule)
    assert (raised.value.rank, raised.value.cell) == (rank, cell)
    line, *grid = str(raised.value).splitlines()
    assert line.startswith(f"schedule {schedule.name}, rank {rank}, cell {cell}: expected {message}")
    row = schedule.ranks[rank]
    marked = f">{row[cell]}<" if cell < len(row) else "?<"
    assert grid[0].startswith("cell ")
    assert next(number for number, text in enumerate(grid[1:]) if marked in text) == rank


def test_the_grid_is_a_window_around_the_fault() -> None:
    schedule = make_schedule("1f1b", 24, 40)
    ranks = list(schedule.ranks)
    ranks[12] = (*ranks[12][:30], Action.parse("12F99"), *ranks[12][31:])
    with pytest.raises(ScheduleError) as raised:
        check(replace(schedule, ranks=tuple(ranks)))
    _, header, *lines = str(raised.value).splitlines()
    assert header.split() == ["cell", *map(str, range(25, 36))]
    assert [line.split()[1] if line != "…" else line for line in lines] == ["…", *map(str, range(7, 18)), "…"]
    assert len({len(line) for line in lines if line != "…"}) <= 2, "columns stand below one another"
    assert [">12F99<" in line for line in lines].index(True) == 6


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (Schedule("x", 1, 0, ((),), (0,)), "at least 1 stage and 1 micro-batch, found 1 stages, 0 micro-batches"),
        (Schedule("x", 2, 1, ((), ()), (0,)), "one rank below 2 for each of 2 stages, found rank_of (0,)"),
        (Schedule("x", 2, 1, ((), ()), (0, 2)), "one rank below 2 for each of 2 stages, found rank_of (0, 2)"),
        (Schedule("x", 2, 1, ((), ()), (0, 0)), "schedule x, rank 1: expected at least one stage, found none"),
    ],
)
def test_numbers_that_do_not_fit(schedule: Schedule, message: str) -> None:
    with pytest.raises(UsageError) as raised:
        check(schedule)
    assert message in str(raised.value)


@pytest.mark.parametrize("name", SCHEDULE_NAMES)
@pytest.mark.parametrize(("ranks", "micro_batches"), [(1, 1), (2, 8), (4, 7), (3, 12)])
def test_csv_written_and_read(tmp_path: Path, name: str, ranks: int, micro_batches: int) -> None:
    schedule, path = make_schedule(name, ranks, micro_batches), tmp_path / "mine.csv"
    write_csv(schedule, path)
    assert read_csv(path, ranks, micro_batches) == replace(schedule, name="mine.csv")


def test_csv_is_torchs(tmp_path: Path) -> None:
    """Cells in the columns of their starts, idle ones empty; quotes, spaces, a mark of Windows' editors do no harm."""
    path = tmp_path / "mine.csv"
    write_csv(make_schedule("1f1b", 2, 2), path)
    assert path.read_text() == "0F0,0F1,,,0B0,,,0B1\n,1F0,1B0,,1F1,1B1\n"
    path.write_bytes(b'\xef\xbb\xbf"0F0", 0F1,,0B0,,0B1\r\n,1F0,1B0,1F1,1B1,\r\n\r\n')
    assert read_csv(path, 2, 2).ranks == make_schedule("1f1b", 2, 2).ranks


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0,0B0\n", "mine.csv: expected 2 lines, found 1; one line for each pipeline rank"),
        (
            "0F0,0B0\n1F0,,1X0\n",
            "mine.csv:2, column 3: expected stage, one of F B I W, micro-batch, like 0F3, found '1X0'",
        ),
        ("0F0,0B0\n2F0,2B0\n", "mine.csv: expected stages from 0 on, none left out, found stages 0, 2; add stage 1"),
        (",\n,\n0F0", "mine.csv: expected 2 lines, found 3"),
        (
            "0F0,0B0\n0F0,1F0,1B0\n",
            "rank 1, cell 0: expected an action of its stages (1), found 0F0, whose stage rank 0",
        ),
        ("0F0,0B0,1F0,1B0\n,\n", "mine.csv: expected 2 lines, found 1"),
        ("\n0F0,0B0\n", "schedule mine.csv, rank 0: expected at least one stage, found none"),
        ("", "mine.csv: expected 2 lines, found 0"),
        ("0F0\n1F0,1B0\n", "schedule mine.csv, rank 0, cell 1: expected 0B0 (or 0I0 and 0W0) somewhere in the row"),
        ("0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1\n", "expected a micro-batch from 0 to 0, found micro-batch 1"),
        ('"0F0\n', "mine.csv: expected a schedule as CSV, found unexpected end of data"),
        ("\udcff", "mine.csv: expected a schedule as CSV, found 'utf-8' codec can't decode"),
    ],
)
def test_csv_that_cannot_be(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.csv"
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(UsageError) as raised:
        read_csv(path, 2, 1)
    assert message in str(raised.value)


def test_csv_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.csv: expected a schedule as CSV, found .*No such file"):
        read_csv(tmp_path / "none.csv", 2, 1)


def test_neighbours_take_micro_batches_in_one_order(tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text("0F0,0F1,0B0,0B1\n1F1,1F0,1B1,1B0\n")
    with pytest.raises(ScheduleError, match=r"expected 1F0, for 0F0 comes first from stage 0, found 1F1") as error:
        check(read_csv(tmp_path / "own.csv", 2, 2))
    assert (error.value.rank, error.value.cell) == (1, 0)
