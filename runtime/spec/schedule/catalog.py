"""The schedules by their names in `parallel.schedule`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dstrain.runtime.spec.errors import UsageError
from dstrain.runtime.spec.schedule import orders, zero_bubble
from dstrain.runtime.spec.schedule.csv_file import read_csv
from dstrain.runtime.spec.schedule.plan import Schedule, hastened


@dataclass(frozen=True)
class _Builder:
    """make(ranks, micro_batches, stages_per_rank); default and range of the last."""

    make: Callable[[int, int, int], Schedule]
    default: int = 1
    most: int | None = 1
    """None: any number from the default on."""

    def allows(self, stages_per_rank: int) -> bool:
        return self.default <= stages_per_rank and (self.most is None or stages_per_rank <= self.most)

    def __str__(self) -> str:
        return f"{self.default} stages per rank" if self.most else f"at least {self.default} stages per rank"


_BUILDERS = {
    "gpipe": _Builder(lambda p, m, _: orders.gpipe(p, m)),
    "1f1b": _Builder(lambda p, m, _: orders.one_f_one_b(p, m)),
    "interleaved_1f1b": _Builder(orders.interleaved, default=2, most=None),
    "zb_h1": _Builder(lambda p, m, _: zero_bubble.zb_h1(p, m)),
    "zb_v": _Builder(lambda p, m, _: zero_bubble.zb_v(p, m), default=2, most=2),
}
SCHEDULE_NAMES = tuple(_BUILDERS)


def make_schedule(name: str, ranks: int, micro_batches: int, stages_per_rank: int | None = None) -> Schedule:
    """The named schedule; stages_per_rank None: 2 where the schedule has several, else 1. Raises UsageError."""
    builder, per_rank = _checked(name, ranks, micro_batches, stages_per_rank)
    return builder.make(ranks, micro_batches, per_rank)


def stages_of(wished: str | Path, ranks: int, micro_batches: int, stages_per_rank: int | None = None) -> int:
    """How many stages `find_schedule` would find, without making what has a name. Raises UsageError as that."""
    if isinstance(wished, Path):
        return find_schedule(wished, ranks, micro_batches).stages
    return ranks * _checked(wished, ranks, micro_batches, stages_per_rank)[1]


def _checked(name: str, ranks: int, micro_batches: int, stages_per_rank: int | None) -> tuple[_Builder, int]:
    """The builder of that name, and the stages on each rank. Raises UsageError with all factors."""
    if name not in _BUILDERS:
        raise UsageError.mismatch("schedule", f"one of {', '.join(SCHEDULE_NAMES)}", repr(name))
    builder = _BUILDERS[name]
    per_rank = builder.default if stages_per_rank is None else stages_per_rank
    factors = f"{ranks} ranks × {per_rank} stages per rank = {ranks * per_rank} stages, {micro_batches} micro-batches"
    where = f"schedule {name} ({factors})"
    for noun, value in (("ranks", ranks), ("micro-batches", micro_batches)):
        if value < 1:
            raise UsageError.mismatch(where, "at least 1", f"{value} {noun}")
    if not builder.allows(per_rank):
        fix = "interleaved_1f1b takes 2 or more, zb_v takes 2, the others 1"
        raise UsageError.mismatch(where, str(builder), str(per_rank), fix)
    return builder, per_rank


def find_schedule(wished: str | Path, ranks: int, micro_batches: int, stages_per_rank: int | None = None) -> Schedule:
    """What `parallel.schedule` says: a name (`hastened`), or a user's own file, which is checked. Raises UsageError."""
    if isinstance(wished, Path):
        if not wished.is_file():
            expected = f"one of {', '.join(SCHEDULE_NAMES)}, or a CSV file"
            raise UsageError.mismatch("parallel.schedule", expected, f"{wished} (no such file)")
        return read_csv(wished, ranks, micro_batches)
    return hastened(make_schedule(wished, ranks, micro_batches, stages_per_rank))
