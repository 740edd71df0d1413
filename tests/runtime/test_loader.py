"""Batches made ahead: in order, not too many, with errors passed on, and ended."""

from __future__ import annotations

import threading
from collections import namedtuple
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import lab
from dstrain.runtime.data import loader as loader_module
from dstrain.runtime.data.loader import Loader
from dstrain.runtime.data.sampler import BatchLayout
from dstrain.runtime.data.samples import Batch

CPU = torch.device("cpu")
LAYOUT = BatchLayout(rank=1, ranks=2, micro=3, accumulation=2)


class Recorded:
    """Samples that are their own indices; notes what was made, and fails at one batch if told to."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.made, self.asked, self.too_far, self.fail_at = 0, 0, False, fail_at
        self.prefetch = 0

    def __len__(self) -> int:
        return 100

    def batch(self, samples: Sequence[int]) -> Tensor:
        if self.made == self.fail_at:
            raise ZeroDivisionError("of the user's")
        self.made += 1
        self.too_far |= self.made > self.asked + self.prefetch
        return torch.tensor(list(samples))


def thread_of(loader: Loader) -> threading.Thread:
    thread = loader._thread
    assert thread is not None
    return thread


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_micro_batches_come_in_the_order_of_the_steps(prefetch: int) -> None:
    with Loader(Recorded(), LAYOUT, 5, prefetch, CPU) as loader:
        found = [loader.next() for _ in range(6)]
    expected = [list(LAYOUT.samples(step, micro_batch)) for step in (5, 6, 7) for micro_batch in (0, 1)]
    assert [batch.tolist() for batch in found if isinstance(batch, Tensor)] == expected


@pytest.mark.parametrize("prefetch", [1, 3])
def test_so_many_are_made_ahead_and_no_more(prefetch: int) -> None:
    samples = Recorded()
    samples.prefetch = prefetch
    with Loader(samples, LAYOUT, 0, prefetch, CPU) as loader:
        for asked in range(20):
            lab.wait_for(lambda asked=asked: samples.made == asked + prefetch, "batches made ahead")
            samples.asked = asked + 1
            loader.next()
    assert not samples.too_far


def test_without_prefetch_nothing_is_made_ahead() -> None:
    samples = Recorded()
    with Loader(samples, LAYOUT, 0, 0, CPU) as loader:
        for asked in range(3):
            assert samples.made == asked
            loader.next()


@pytest.mark.parametrize("prefetch", [0, 2])
def test_an_error_comes_at_its_batch(prefetch: int) -> None:
    with Loader(Recorded(fail_at=2), LAYOUT, 0, prefetch, CPU) as loader:
        loader.next()
        loader.next()
        for _ in range(2):
            with pytest.raises(ZeroDivisionError, match="of the user's"):
                loader.next()


def test_closing_ends_a_thread_that_waits_for_room() -> None:
    samples = Recorded()
    loader = Loader(samples, LAYOUT, 0, 2, CPU)
    lab.wait_for(lambda: samples.made == 2, "batches made ahead")
    assert thread_of(loader).is_alive()
    loader.close()
    assert not thread_of(loader).is_alive()
    loader.close()


def test_closing_does_not_wait_for_ever_for_the_users_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_module, "CLOSE_TIMEOUT_S", 0.01)
    entered, release = threading.Event(), threading.Event()

    class Stuck(Recorded):
        def batch(self, samples: Sequence[int]) -> Tensor:
            entered.set()
            assert release.wait(30)
            return super().batch(samples)

    loader = Loader(Stuck(), LAYOUT, 0, 1, CPU)
    assert entered.wait(30)
    loader.close()
    assert thread_of(loader).daemon
    release.set()
    thread_of(loader).join(30)
    assert not thread_of(loader).is_alive()


def test_the_wait_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(loader_module, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    class Slow(Recorded):
        def batch(self, samples: Sequence[int]) -> Tensor:
            clock[0] += 1.5
            return super().batch(samples)

    with Loader(Slow(), LAYOUT, 0, 0, CPU) as loader:
        loader.next()
        loader.next()
        assert loader.take_wait_s() == 3.0
        assert loader.take_wait_s() == 0.0


def test_waiting_for_the_thread_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, release = [0.0], threading.Event()
    monkeypatch.setattr(loader_module, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    class Slow(Recorded):
        def batch(self, samples: Sequence[int]) -> Tensor:
            assert release.wait(30)
            clock[0] += 2.0
            return super().batch(samples)

    with Loader(Slow(), LAYOUT, 0, 1, CPU) as loader:
        asking = threading.Thread(target=loader.next)
        asking.start()
        # the first reading of the clock stands before the wait: once the thread sleeps, it has been taken
        lab.wait_for(lambda: loader._changed._waiters, "next() to wait")  # type: ignore[attr-defined]
        release.set()
        asking.join(30)
        assert loader.take_wait_s() >= 2.0


Pair = namedtuple("Pair", "input target")


def test_every_tensor_of_a_batch_is_moved_and_the_rest_stays() -> None:
    structure = {"a": torch.ones(2), "b": [torch.ones(1), (torch.ones(3), "text")], "c": Pair(torch.ones(1), 7)}

    class Structured(Recorded):
        def batch(self, samples: Sequence[int]) -> Batch:  # type: ignore[override] # other batches than numbers
            return structure

    with Loader(Structured(), LAYOUT, 0, 1, torch.device("meta")) as loader:
        moved: Any = loader.next()
    assert moved["b"][1][1] == "text"
    assert isinstance(moved["c"], Pair)
    assert moved["c"].target == 7
    tensors = [moved["a"], moved["b"][0], moved["b"][1][0], moved["c"].input]
    assert [(tensor.device.type, tensor.numel()) for tensor in tensors] == [("meta", n) for n in (2, 1, 3, 1)]
