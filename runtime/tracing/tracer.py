"""Which steps are traced, and where what was recorded goes."""

from __future__ import annotations

import contextlib
import socket
import time
from pathlib import Path

from dstrain.runtime.comm import Communicator
from dstrain.runtime.spec.event import EventWriter
from dstrain.runtime.spec.trace import RankTrace, Span, trace_events, write_trace
from dstrain.runtime.tracing.clocks import Clock, Now, clock_of, read_against_first
from dstrain.runtime.tracing.recorder import Recorder

ALONE = Path("trace.json")
"""The file of a job that no launcher listens to."""


class Tracer:
    """Of one rank: on from the first step to the last, counted from 1 since the process began. Then its spans are
    events, which the launcher makes one file of; where there is none, rank 0 does.

    The ranks meet before the first step and behind the last one, to compare their clocks. [Note: one clock]
    """

    def __init__(
        self,
        recorder: Recorder,
        comm: Communicator,
        steps: tuple[int, int],
        events: EventWriter,
        place: str = "",
        now: Now = time.perf_counter_ns,
    ) -> None:
        """steps: the first and the last. place: this rank's part of the model, for people."""
        self._recorder, self._comm, self._events, self._now = recorder, comm, events, now
        self._first, self._last = steps
        self._trace = RankTrace(comm.rank, socket.gethostname(), place)
        self._clock: Clock | None = None
        self._entered: int | None = None
        self._count = 0
        self._is_over = False

    def enter(self, step: int) -> None:
        """Before whatever belongs to `step`, any number of times. All ranks go through the same steps."""
        if step == self._entered:
            return
        self._entered = step
        self._count += 1
        if self._count > self._last:
            self.finish()
        elif self._count == self._first:
            self._read_clocks()
            self._clock = clock_of(self._comm.device, self._now)
            self._recorder.start(self._clock.moment)
        self._recorder.step = step

    def finish(self) -> None:
        """Behind the last step, on all ranks: compare the clocks again, and let the trace go. Once."""
        if self._is_over:
            return
        if self._recorder.is_on:
            self._recorder.stop()
            self._read_clocks()
        self._let_go()
        if not self._events.is_heard:
            traces = self._comm.gather_object(self._trace)
            if traces is not None and any(trace.spans for trace in traces):
                write_trace(ALONE, traces)

    def close(self) -> None:
        """At the process's end, also behind an error of this rank alone: what there is goes to the launcher."""
        with contextlib.suppress(RuntimeError):  # of a GPU that has failed, which is the error to be seen
            if self._comm.world_size == 1:
                self.finish()
            elif not self._is_over:
                self._recorder.stop()
                self._let_go()

    def _let_go(self) -> None:
        self._is_over = True
        if self._clock is None:
            return
        self._clock.settle()
        ns = self._clock.ns
        for step, category, name, begin, end, peer in self._recorder.spans:
            self._trace.spans.append(Span(step, category, str(name), ns(begin), ns(end), peer))
        self._recorder.spans.clear()
        self._trace.spans.sort(key=lambda span: span.begin_ns)
        for fields in trace_events(self._trace):
            self._events.emit("trace", **fields)

    def _read_clocks(self) -> None:
        reading = read_against_first(self._comm, self._now)
        if reading is not None:
            self._trace.clock.append(reading)
