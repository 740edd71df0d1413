"""Pipeline schedules as data: built, read, proved, simulated and drawn without torch.

    make_schedule(name, …), read_csv(path, …)   a Schedule: for each rank its Actions in order; find_schedule: either
    check(schedule)                             each action once, in an order that ends
    simulate(schedule, costs)                   a Timeline: spans, makespan, bubble, activations in flight
    draw_text(timeline), draw_svg(timeline)

Standard library only.
"""

from dstrain.runtime.spec.schedule.action import Action, Kind
from dstrain.runtime.spec.schedule.catalog import SCHEDULE_NAMES, find_schedule, make_schedule, stages_of
from dstrain.runtime.spec.schedule.csv_file import read_csv, write_csv
from dstrain.runtime.spec.schedule.plan import Schedule, endings, hastened
from dstrain.runtime.spec.schedule.simulator import UNIT, Costs, Span, Timeline, Took, simulate
from dstrain.runtime.spec.schedule.svg_drawing import draw_svg
from dstrain.runtime.spec.schedule.text_drawing import draw_text
from dstrain.runtime.spec.schedule.validation import check

__all__ = [
    "SCHEDULE_NAMES",
    "UNIT",
    "Action",
    "Costs",
    "Kind",
    "Schedule",
    "Span",
    "Timeline",
    "Took",
    "check",
    "draw_svg",
    "draw_text",
    "endings",
    "find_schedule",
    "hastened",
    "make_schedule",
    "read_csv",
    "simulate",
    "stages_of",
    "write_csv",
]
