"""Which parameters form a unit, where they lie in its flat buffer, and which interval each rank owns. Pure layout.

[Note: units]
A unit is what is gathered, reduced and freed together: parameters of one dtype, all trained or all frozen. They lie
in one flat buffer, each at a multiple of `ALIGNMENT` elements. The buffer is cut into one shard for each rank of the
shard group. An elementwise optimizer (Adam) does not mind where: cuts are even, the buffer is padded to a multiple of
the ranks. One that looks at whole tensors (Muon, Adafactor) gets cuts between parameters, as even as those allow.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

ALIGNMENT = 16
"""Elements; 64 bytes of fp32, a cache line and the widest vector."""


@dataclass(frozen=True)
class Entry:
    """One parameter: flattened, it is [start, start + its elements) of the unit's buffer."""

    name: str
    shape: tuple[int, ...]
    start: int

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def stop(self) -> int:
        return self.start + self.numel


@dataclass(frozen=True)
class Piece:
    """What one rank owns of a parameter: [start, stop) of it flattened, at `offset` of the rank's shard."""

    entry: Entry
    start: int
    stop: int
    offset: int

    @property
    def numel(self) -> int:
        return self.stop - self.start

    @property
    def is_whole(self) -> bool:
        return self.numel == self.entry.numel


@dataclass(frozen=True)
class UnitPlan:
    """[Note: units] bounds: shard r is [bounds[r], bounds[r + 1]); the last is the buffer's size."""

    name: str
    entries: tuple[Entry, ...]
    bounds: tuple[int, ...]

    @property
    def size(self) -> int:
        """Elements of the flat buffer, padding included."""
        return self.bounds[-1]

    def interval(self, shard: int) -> tuple[int, int]:
        """[start, stop) of a shard."""
        return self.bounds[shard], self.bounds[shard + 1]

    def pieces(self, shard: int) -> Iterator[Piece]:
        """The parts of parameters that lie in a shard."""
        low, _ = self.interval(shard)
        for entry in self.entries:
            start, stop = entry_overlap(self, shard, entry)
            if start < stop:
                yield Piece(entry, start, stop, entry.start + start - low)

    def gaps(self) -> Iterator[tuple[int, int]]:
        """What belongs to no parameter: [start, stop) of the buffer."""
        end = 0
        for entry in self.entries:
            if entry.start > end:
                yield end, entry.start
            end = entry.stop
        if end < self.size:
            yield end, self.size

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.size:,} elements, cut at {', '.join(f'{bound:,}' for bound in self.bounds)}"]
        lines += [f"  {entry.start:>12,}  {entry.name} {list(entry.shape)}" for entry in self.entries]
        return "\n".join(lines)


def entry_overlap(plan: UnitPlan, shard: int, entry: Entry) -> tuple[int, int]:
    """What a shard has of a parameter: [start, stop) of it flattened; (0, 0) for nothing."""
    low, high = plan.interval(shard)
    start, stop = max(low, entry.start) - entry.start, min(high, entry.stop) - entry.start
    return (start, stop) if start < stop else (0, 0)


def plan_unit(
    name: str, parameters: Sequence[tuple[str, tuple[int, ...]]], shards: int, whole_tensors: bool = False
) -> UnitPlan:
    """Lay out parameters (names and shapes) for `shards` ranks; whole_tensors: cut only between them."""
    alignment = ALIGNMENT if shards > 1 else 1  # nobody computes on a bucket that is only reduced
    entries, end = [], 0
    for parameter, shape in parameters:
        entries.append(Entry(parameter, shape, end))
        end = _aligned(end + prod(shape), alignment)
    if whole_tensors:
        return UnitPlan(name, tuple(entries), _between_tensors([entry.start for entry in entries], end, shards))
    size = _aligned(end, shards * alignment)
    return UnitPlan(name, tuple(entries), tuple(size // shards * shard for shard in range(shards + 1)))


def _between_tensors(starts: list[int], size: int, shards: int) -> tuple[int, ...]:
    """For each even cut the nearest beginning of a parameter."""
    borders = [*starts, size]
    bounds = [0]
    for shard in range(1, shards):
        ideal = size * shard // shards
        above = bisect_left(borders, ideal)
        nearest = min(borders[max(0, above - 1) : above + 1], key=lambda border: abs(border - ideal))
        bounds.append(max(nearest, bounds[-1]))
    return (*bounds, size)


def _aligned(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
