"""What ranks did in traced steps: their actions, each with its own time, and the messages that they waited for.

[Note: own time]
An action's span begins with the wait for what it needs. Its own time is the span without such waits: what `simulate`
asks for. A message is begun within the own time of the action that made it, so its time is what it takes besides: from
that action's end to the wait's end. It is known where the receiver had begun to wait before it was sent; where nobody
ever waited, the shortest such time is an upper bound. A wait that begins later and yet lasts longer than a message
takes has had it late: it is known, too.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dstrain.runtime.spec.schedule import Action, Kind
from dstrain.runtime.spec.trace.span import Category, Span


class Done(NamedTuple):
    """An action that a rank has done. [Note: own time]

    wait: for another rank's message, if it needs one. others_s: in waits for anything else, such as parameters."""

    action: Action
    span: Span
    own_s: float
    wait: Span | None
    others_s: float


class Message(NamedTuple):
    """boundary: the stage before it. was_awaited: else `seconds` are an upper bound. waited_s: its receiver did.
    [Note: own time]"""

    boundary: int
    seconds: float
    was_awaited: bool
    waited_s: float


Taker = tuple[int, int, Action]
"""Step, rank, and its action that needs a message."""


def done_by(spans: Sequence[Span]) -> list[Done]:
    """A rank's actions. spans: in order of their begin."""
    waits = [span for span in spans if span.category is Category.WAIT]
    begins = [wait.begin_ns for wait in waits]
    found = []
    for span in spans:
        if span.category.is_action:
            inside = waits[bisect_left(begins, span.begin_ns) : bisect_left(begins, span.end_ns)]
            wait = next((wait for wait in inside if wait.peer is not None), None)
            waited_s = sum(min(each.end_ns, span.end_ns) - each.begin_ns for each in inside) / 1e9
            others_s = waited_s - (0.0 if wait is None else (wait.end_ns - wait.begin_ns) / 1e9)
            own_s = (span.end_ns - span.begin_ns) / 1e9 - waited_s
            found.append(Done(Action.parse(span.name), span, own_s, wait, others_s))
    return found


def messages(spans: Mapping[int, Sequence[Span]], done: Mapping[int, Sequence[Done]]) -> dict[Taker, Message]:
    """Those whose both ends are in the trace. spans, done: by rank."""
    sent = {
        (span.step, span.name, rank, span.peer): span.begin_ns
        for rank, mine in spans.items()
        for span in mine
        if span.category is Category.SEND and span.peer is not None
    }
    made = {(one.span.step, one.span.name, rank): one.span.end_ns for rank, mine in done.items() for one in mine}
    found = {}
    for rank, mine in done.items():
        for action, _, _, wait, _ in mine:
            if wait is None or wait.peer is None:
                continue
            sent_ns = sent.get((wait.step, wait.name, wait.peer, rank))
            made_ns = made.get((wait.step, wait.name, wait.peer))
            if sent_ns is None or made_ns is None:
                continue
            boundary = action.stage - 1 if action.kind is Kind.FORWARD else action.stage
            seconds = (wait.end_ns - made_ns) / 1e9
            waited_s = (wait.end_ns - wait.begin_ns) / 1e9
            found[wait.step, rank, action] = Message(boundary, seconds, wait.begin_ns <= sent_ns, waited_s)
    return found
