"""Pipeline schedules as data: built and simulated without torch.

make_schedule(name, …)                      a Schedule: for each rank its Actions in order
check(schedule)                             each action once, in an order that ends
simulate(schedule, costs)                   a Timeline: spans, makespan, bubble, activations in flight
draw_text(timeline), draw_svg(timeline)
"""

from dstrain.runtime.spec.schedule.action import Action, Kind
from dstrain.runtime.spec.schedule.catalog import NAMES, make_schedule
from dstrain.runtime.spec.schedule.plan import Schedule
from dstrain.runtime.spec.schedule.simulator import UNIT, Costs, Span, Timeline, simulate

__all__ = [
    "NAMES",
    "UNIT",
    "Action",
    "Costs",
    "Kind",
    "Schedule",
    "Span",
    "Timeline",
    "make_schedule",
    "simulate",
]
