"""Clocks: what a moment is on a CPU and on a GPU, and by how much this rank's clock differs from rank 0's."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

from dstrain.runtime.comm import Communicator
from dstrain.runtime.spec.trace import Reading

Now = Callable[[], int]
"""Nanoseconds, by a clock that is never set: those of two hosts have nothing in common."""

ROUNDS = 16
"""The quickest of so many is the one that nothing held up."""


class Clock(Protocol):
    def moment(self) -> Any:
        """Now; costs microseconds at most and waits for nothing."""

    def settle(self) -> None:
        """Return once all moments have come."""

    def ns(self, moment: Any) -> int:
        """Its time; behind `settle`."""


class CPUClock:
    """A moment is its time."""

    def __init__(self, now: Now) -> None:
        self.moment = now

    def settle(self) -> None:
        return None

    def ns(self, moment: int) -> int:
        return moment


class CUDAClock:
    """A moment is where the GPU's stream stands: what is launched is not done, and nothing waits for it to be."""

    def __init__(self, now: Now) -> None:
        torch.cuda.synchronize()
        self._first = self.moment()
        torch.cuda.synchronize()
        self._first_ns = now()

    def moment(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call] # torch's
        event.record()
        return event

    def settle(self) -> None:
        torch.cuda.synchronize()

    def ns(self, moment: torch.cuda.Event) -> int:
        return self._first_ns + round(1e6 * float(self._first.elapsed_time(moment)))


def clock_of(device: torch.device, now: Now = time.perf_counter_ns) -> Clock:
    return CUDAClock(now) if device.type == "cuda" else CPUClock(now)


def read_against_first(comm: Communicator, now: Now) -> Reading | None:
    """This rank's clock beside rank 0's; None on rank 0. All ranks call it. (Cristian 1989)"""
    message = torch.zeros(1, dtype=torch.int64)
    if comm.rank == 0:
        for other in range(1, comm.world_size):
            for _ in range(ROUNDS):
                comm.pass_on(message, other, 0)
                message.fill_(now())
                comm.pass_on(message, 0, other)
        return None
    readings = []
    for _ in range(ROUNDS):
        asked = now()
        comm.pass_on(message, comm.rank, 0)
        comm.pass_on(message, 0, comm.rank)
        answered = now()
        middle = (asked + answered) // 2
        readings.append(Reading(middle, int(message) - middle, (answered - asked + 1) // 2))
    return min(readings, key=lambda reading: reading.uncertainty_ns)
