"""Traces of all ranks as one file in Chrome's trace event format (JSON), which Perfetto and chrome://tracing open.

A process is a rank, with three rows: its steps, what it does, and its messages and waits. Spans of a row never overlap.
Arrows lead from a message's begin to the end of the wait for it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from dstrain.runtime.spec.trace.span import Category, RankTrace, Span

STEPS, ACTIONS, MESSAGES = range(3)
"""Rows of a rank."""

_ROWS = {STEPS: "steps", ACTIONS: "actions", MESSAGES: "messages and waits"}


def write_trace(path: Path, traces: Sequence[RankTrace]) -> None:
    """Write the file: whole or not at all; one event a line."""
    aligned = {trace.rank: trace.aligned() for trace in traces}
    zero = min((span.begin_ns for spans in aligned.values() for span in spans), default=0)
    events = [event for trace in traces for event in _of_rank(trace, aligned[trace.rank], zero)]
    events += _arrows(aligned, zero)
    other = {"uncertainty_us": {str(trace.rank): _us(trace.uncertainty_ns) for trace in traces}}
    fresh = path.with_name(f".{path.name}.tmp")
    with fresh.open("w", encoding="utf-8") as file:
        file.write('{"displayTimeUnit": "ms", "otherData": ' + json.dumps(other) + ',\n"traceEvents": [\n')
        file.write(",\n".join(json.dumps(event, separators=(",", ":")) for event in events))
        file.write("\n]}\n")
    fresh.replace(path)


def _of_rank(trace: RankTrace, spans: Sequence[Span], zero: int) -> Iterator[dict[str, Any]]:
    rank = trace.rank
    words = ", ".join(part for part in (trace.place, trace.host) if part)
    yield _named("process_name", rank, 0, name=f"rank {rank}" + (f" ({words})" if words else ""))
    yield _named("process_sort_index", rank, 0, sort_index=rank)
    for row, name in _ROWS.items():
        yield _named("thread_name", rank, row, name=name)
        yield _named("thread_sort_index", rank, row, sort_index=row)
    for step, group in groupby(sorted(spans, key=lambda span: span.step), key=lambda span: span.step):
        inside = list(group)
        begin, end = min(span.begin_ns for span in inside), max(span.end_ns for span in inside)
        yield _complete(f"step {step}", "step", rank, STEPS, begin - zero, end - begin, step=step)
    for span in spans:
        row = MESSAGES if span.category.is_communication else ACTIONS
        more = {} if span.peer is None else {"peer": span.peer}
        begin, took = span.begin_ns - zero, span.end_ns - span.begin_ns
        yield _complete(span.name, span.category, rank, row, begin, took, step=span.step, **more)


def _arrows(aligned: dict[int, list[Span]], zero: int) -> Iterator[dict[str, Any]]:
    """An arrow begins and ends inside of a span, which it is bound to."""
    sent = {
        (span.step, span.name, rank, span.peer): span
        for rank, spans in aligned.items()
        for span in spans
        if span.category is Category.SEND
    }
    number = 0
    for rank, spans in aligned.items():
        for wait in spans:
            if wait.category is not Category.WAIT or wait.peer is None:
                continue
            send = sent.get((wait.step, wait.name, wait.peer, rank))
            if send is None:
                continue
            number += 1
            common = {"name": wait.name, "cat": "message", "id": number, "tid": MESSAGES}
            yield common | {"ph": "s", "pid": wait.peer, "ts": _us(send.begin_ns - zero)}
            yield common | {"ph": "f", "bp": "e", "pid": rank, "ts": _us(wait.end_ns - zero)}


def _named(kind: str, rank: int, row: int, **what: Any) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": rank, "tid": row, "args": what}


def _complete(name: str, category: str, rank: int, row: int, begin: int, took: int, **more: Any) -> dict[str, Any]:
    times = {"ts": _us(begin), "dur": _us(took)}
    return {"name": name, "cat": category, "ph": "X", "pid": rank, "tid": row, **times, "args": more}


def _us(time_ns: int) -> float:
    return round(time_ns / 1000, 3)
