"""Batches that are ready when the model asks for them."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dstrain.runtime.data.sampler import BatchLayout
from dstrain.runtime.data.samples import Batch, Samples

CLOSE_TIMEOUT_S = 5.0
"""How long `close` waits for a thread that is in the user's code."""


class Loader:
    """The micro-batches of one rank, in the order of the steps, made ahead by a thread.

    [Note: prefetch]
    The thread makes at most `prefetch` micro-batches more than were asked for (pinned, where they go to a GPU), and
    then sleeps; what it raises is raised by `next`. It is the only one that touches the samples. Since samples follow
    from their index alone, what was made and not asked for is just dropped.

    A context manager; ends by `close`.
    """

    def __init__(self, samples: Samples, layout: BatchLayout, step: int, prefetch: int, device: torch.device) -> None:
        """step: steps that are done. prefetch: 0 makes each micro-batch when it is asked for, without a thread."""
        self._samples, self._prefetch, self._device = samples, prefetch, device
        self._turns = _turns(layout, step)
        self._made: deque[Batch] = deque()
        self._error: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._wait_s = 0.0
        self._thread: threading.Thread | None = None
        if prefetch:
            self._thread = threading.Thread(target=self._work, name="dstrain data", daemon=True)
            self._thread.start()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def next(self) -> Batch:
        """The next micro-batch, on the device. Raises what the samples raised."""
        begun = time.perf_counter()
        batch = self._take() if self._thread else self._make()
        self._wait_s += time.perf_counter() - begun
        moved: Batch = _map_tensors(batch, lambda tensor: tensor.to(self._device, non_blocking=True))
        return moved

    def take_wait_s(self) -> float:
        """Seconds that `next` has waited for data since this was last asked."""
        taken, self._wait_s = self._wait_s, 0.0
        return taken

    def close(self) -> None:
        """End the thread. It is left behind, as a daemon, if the user's code keeps it for `CLOSE_TIMEOUT_S`."""
        with self._changed:
            self._closed = True
            self._made.clear()
            self._changed.notify_all()
        if self._thread:
            self._thread.join(CLOSE_TIMEOUT_S)

    def _take(self) -> Batch:
        with self._changed:
            assert not self._closed
            self._changed.wait_for(lambda: self._made or self._error)
            if not self._made:
                assert self._error is not None
                raise self._error
            batch = self._made.popleft()
            self._changed.notify_all()
            return batch

    def _make(self) -> Batch:
        batch = self._samples.batch(next(self._turns))
        return _map_tensors(batch, Tensor.pin_memory) if self._device.type == "cuda" else batch

    def _work(self) -> None:
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)  # of this thread: pinning would else wake the first GPU
            while self._wait_for_room():
                batch = self._make()
                with self._changed:
                    self._made.append(batch)
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _wait_for_room(self) -> bool:
        """Wait until another micro-batch is wanted; false if none ever will be."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._made) < self._prefetch)
            return not self._closed


def to_device(batch: Batch, device: torch.device) -> Any:
    """The batch with its tensors there."""
    return _map_tensors(batch, lambda tensor: tensor.to(device, non_blocking=True))


def _turns(layout: BatchLayout, step: int) -> Iterator[range]:
    """The samples of this rank's micro-batches, from a step on."""
    while True:
        for micro_batch in range(layout.accumulation):
            yield layout.samples(step, micro_batch)
        step += 1


def _map_tensors(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same structure with other tensors; what is no tensor stays."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {key: _map_tensors(value, change) for key, value in batch.items()}
    if isinstance(batch, tuple) and type(batch) is not tuple:  # a named one
        return type(batch)(*(_map_tensors(value, change) for value in batch))
    if isinstance(batch, Sequence) and not isinstance(batch, str | bytes):
        return type(batch)(_map_tensors(value, change) for value in batch)  # type: ignore[call-arg] # tuple or list
    return batch
