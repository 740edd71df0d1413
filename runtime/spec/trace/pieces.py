"""A rank's trace on its way to the head: events of kind `trace`, each a few spans, beside all its other events."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dstrain.runtime.spec.trace.span import Category, RankTrace, Reading, Span

KIND = "trace"
SPANS = 200
"""Of one event: a line of some 12 KiB, no longer than others may be."""


def trace_events(trace: RankTrace) -> Iterator[dict[str, Any]]:
    """The fields of each event. Of times only the first of a line is whole; the others follow on the one before."""
    clock = [list(reading) for reading in trace.clock]
    for first in range(0, max(1, len(trace.spans)), SPANS):
        rows, before = [], 0
        for span in trace.spans[first : first + SPANS]:
            rows.append([span.step, span.category, span.name, span.begin_ns - before, span.end_ns - span.begin_ns])
            if span.peer is not None:
                rows[-1].append(span.peer)
            before = span.begin_ns
        yield {"host": trace.host, "place": trace.place, "clock": clock, "spans": rows}


class Collected:
    """Traces of the newest attempt that has any. Trusts nothing: what is no trace is left out."""

    def __init__(self) -> None:
        self._attempt = -1
        self._traces: dict[int, RankTrace] = {}

    @property
    def traces(self) -> list[RankTrace]:
        """By rank."""
        return [self._traces[rank] for rank in sorted(self._traces)]

    def take(self, event: Mapping[str, Any]) -> None:
        """An event of any kind."""
        if event.get("kind") != KIND:
            return
        try:
            attempt, rank = int(event["attempt"]), int(event["rank"])
            clock = [Reading(*map(int, row)) for row in event["clock"]]
            spans = list(_spans(event["spans"]))
            host, place = str(event["host"]), str(event["place"])
        except (KeyError, TypeError, ValueError):
            return
        if attempt > self._attempt:
            self._attempt, self._traces = attempt, {}
        if attempt == self._attempt:
            self._traces.setdefault(rank, RankTrace(rank, host, place, clock)).spans.extend(spans)


def _spans(rows: Any) -> Iterator[Span]:
    begin = 0
    for step, category, name, later, took, *peer in rows:
        begin += int(later)
        yield Span(int(step), Category(category), str(name), begin, begin + int(took), int(peer[0]) if peer else None)
