"""Where the time of steps goes, rank by rank: spans, one file of all ranks, and what that says of a schedule.

    RankTrace, Span        what a rank has recorded, and the readings of its clock
    trace_events           the same as events, in pieces; Collected puts the pieces together
    write_trace            a file in Chrome's trace event format, which Perfetto opens
    read_trace             that file -> Measured: costs for `schedule.simulate`, the bubble of each step, their replay

Standard library only.
"""

from dstrain.runtime.spec.trace.chrome import write_trace
from dstrain.runtime.spec.trace.measured import Measured, read_trace
from dstrain.runtime.spec.trace.pieces import Collected, trace_events
from dstrain.runtime.spec.trace.replay import Executed, Replay
from dstrain.runtime.spec.trace.span import Category, RankTrace, Reading, Span

__all__ = [
    "Category",
    "Collected",
    "Executed",
    "Measured",
    "RankTrace",
    "Reading",
    "Replay",
    "Span",
    "read_trace",
    "trace_events",
    "write_trace",
]
