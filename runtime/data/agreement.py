"""Ranks that open data for themselves, and yet agree."""

from __future__ import annotations

import platform
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from dstrain.runtime.comm import Communicator
from dstrain.runtime.spec.errors import UsageError

T = TypeVar("T")

POLL_S = 20.0
"""Between two questions whether all ranks are ready: far below the timeout of a collective."""


def together(work: Callable[[], T], comm: Communicator) -> T:
    """`work()` of each rank, however long some take: no collective waits for it until it times out.

    The work runs in a thread and issues no collectives. Where it fails on any rank, all ranks raise: that rank its own
    error, the others a UsageError that names it. Two small collectives, and one more for every `POLL_S`.
    """
    task = _Task(work)
    thread = threading.Thread(target=task.run, name="dstrain open data", daemon=True)
    thread.start()
    while True:
        thread.join(POLL_S)
        done = not thread.is_alive()
        if all(comm.all_gather_object(done)):
            break
    said = f"{type(task.error).__name__}: {task.error}" if not isinstance(task.error, UsageError) else str(task.error)
    errors = comm.all_gather_object((platform.node(), said if task.error else None))
    if task.error is not None:
        raise task.error
    for rank, (host, error) in enumerate(errors):
        if error is not None:
            raise UsageError(f"rank {rank} ({host}): {error}")
    assert task.result is not None
    return task.result


def check_same_on_all_ranks(key: str, identity: str, comm: Communicator, remedy: str) -> None:
    """Refuse ranks that would train on different data: UsageError on all ranks. One small collective.

    identity: what must be the same, in words for people.
    """
    everyone = comm.all_gather_object((platform.node(), identity))
    first_host, first = everyone[0]
    for rank, (host, other) in enumerate(everyone):
        if other != first:
            raise UsageError(
                f"{key}: expected the same data on all ranks, found {first} on rank 0 ({first_host}) and "
                f"{other} on rank {rank} ({host}); {remedy}"
            )


class _Task(Generic[T]):
    """One call in a thread, and what came of it."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self.result: T | None = None
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self.result = self._work()
        except Exception as error:
            self.error = error
