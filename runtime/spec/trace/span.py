"""What a rank has recorded: spans by its own clock, and how that clock compares with rank 0's.

[Note: one clock]
Clocks of hosts differ by seconds and drift by some microseconds a second. Each rank's is read against rank 0's before
the first traced step and behind the last one; in between its offset is on a line through both readings. A reading is
uncertain by half its round trip (Cristian 1989), and so is whatever is compared across ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from dstrain.runtime.spec.schedule import Kind


class Category(StrEnum):
    """What a span is."""

    FORWARD = "forward"
    BACKWARD = "backward"
    INPUT_GRADIENT = "input_gradient"
    WEIGHT_GRADIENT = "weight_gradient"
    DATA = "data"
    UPDATE = "update"
    """Clipping, the optimizer, its rounding into the model, the average."""
    CHECKPOINT = "checkpoint"
    """Its begin: what goes on beside the training is not in it."""
    VALIDATION = "validation"
    SEND = "send"
    """The begin of a message; it goes on beside the next action."""
    WAIT = "wait"

    @property
    def is_action(self) -> bool:
        """Whether it is in a schedule."""
        return self in _KINDS

    @property
    def is_communication(self) -> bool:
        """It may lie within another span of its rank; the others follow one another."""
        return self in (Category.SEND, Category.WAIT)

    @classmethod
    def of(cls, kind: Kind) -> Category:
        """That of an action."""
        return _OF_KIND[kind]


_OF_KIND = {
    Kind.FORWARD: Category.FORWARD,
    Kind.BACKWARD: Category.BACKWARD,
    Kind.INPUT_GRADIENT: Category.INPUT_GRADIENT,
    Kind.WEIGHT_GRADIENT: Category.WEIGHT_GRADIENT,
}
_KINDS = frozenset(_OF_KIND.values())


class Span(NamedTuple):
    """name: an action's text, or words; of a message, the action that made it. peer: the rank at its other end."""

    step: int
    category: Category
    name: str
    begin_ns: int
    end_ns: int
    peer: int | None = None


class Reading(NamedTuple):
    """At `at_ns` of this rank's clock, rank 0's was ahead by `offset_ns`, give or take `uncertainty_ns`."""

    at_ns: int
    offset_ns: int
    uncertainty_ns: int


@dataclass
class RankTrace:
    """place: its part of the model, for people. clock: one reading or two; none if the clock is rank 0's."""

    rank: int
    host: str = ""
    place: str = ""
    clock: list[Reading] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)

    @property
    def uncertainty_ns(self) -> int:
        return max((reading.uncertainty_ns for reading in self.clock), default=0)

    def aligned(self) -> list[Span]:
        """The spans by rank 0's clock. [Note: one clock]"""
        return [
            span._replace(begin_ns=self._aligned(span.begin_ns), end_ns=self._aligned(span.end_ns))
            for span in self.spans
        ]

    def _aligned(self, time_ns: int) -> int:
        if not self.clock:
            return time_ns
        first, last = self.clock[0], self.clock[-1]
        apart = last.at_ns - first.at_ns
        drift = (last.offset_ns - first.offset_ns) * (time_ns - first.at_ns) // apart if apart > 0 else 0
        return time_ns + first.offset_ns + drift
