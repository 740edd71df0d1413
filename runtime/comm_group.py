"""All-gather and reduce-scatter of flat buffers within a group of ranks.

[Note: algorithms]
torch's Gloo emulates a reduce-scatter by an all-reduce and copies what it gathers, so on Gloo both are made here of
sends and receives that go on in the background. `pairwise`: every rank sends each other one its share, at once, and
receives in place; the best where a switch lets all pairs talk at full speed, and the only one that cuts between
tensors allow. `ring`: every rank talks to its neighbours only, in N - 1 rounds on a thread for all gathers, and one
for all reductions; with several ranks on
each host, only one of them sends to the next host, where pairwise sends each share there once for each rank.
`native`: the backend's own, as NCCL has them. All send (N - 1) / N of the buffer from each rank.

Sums are in a fixed order for each shard, so the same layout gives the same bits in every run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from typing import Any, Literal, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor

Algorithm = Literal["pairwise", "ring", "native"]

_COLLECT = 1 << 20
"""A tag above those of units."""

PROBE_ELEMENTS = 1 << 20
PROBE_ROUNDS = 3


class Pending(Protocol):
    """A collective under way."""

    def wait(self) -> object:
        """Return once the result may be used. RuntimeError when a rank has gone or the timeout is over."""


class _Pairwise:
    """Sends and receives under way; `finish` follows them."""

    def __init__(self, works: list[Any], finish: Callable[[], None] | None = None) -> None:
        self._works, self._finish = works, finish

    def wait(self) -> None:
        works, self._works = self._works, []
        for work in works:
            work.wait()
        finish, self._finish = self._finish, None
        if finish is not None:
            finish()


class _OnThread:
    def __init__(self, future: Future[None]) -> None:
        self._future = future

    def wait(self) -> None:
        self._future.result()


class _Then:
    """A native collective, and what follows it."""

    def __init__(self, work: Any, finish: Callable[[], None]) -> None:
        self._work, self._finish = work, finish

    def wait(self) -> None:
        self._work.wait()
        self._finish()


class _Done:
    def wait(self) -> None:
        return None


class CommGroup:
    """Some ranks of the job, of which this is one; without `group`, this rank alone.

    index: this rank's number in the group. size: ranks in it. Buffers are flat and contiguous, bounds as in `UnitPlan`.
    The ranks start gathers in the same order, and reductions in the same order; on `native` also the two together.
    """

    def __init__(
        self, group: dist.ProcessGroup | None, device: torch.device, count: Callable[[int], None], ranks: Sequence[int]
    ) -> None:
        """count: told the bytes that each collective sends from this rank. ranks: of the job, in the group's order."""
        self._group, self.device, self._count, self.ranks = group, device, count, list(ranks)
        self.size = len(self.ranks)
        self.index = self.ranks.index(dist.get_rank()) if self.size > 1 else 0
        self.algorithm: Algorithm = "native" if device.type == "cuda" else "pairwise"
        self._threads: dict[str, ThreadPoolExecutor] = {}

    def choose(self, wish: Literal["auto", "pairwise", "ring", "native"]) -> Algorithm:
        """Settle the algorithm; `auto` measures where there is a choice. All ranks of the group call it."""
        if wish != "auto":
            self.algorithm = wish
        elif self.device.type == "cpu" and self.size > 2:
            seconds = {algorithm: self._probe(algorithm) for algorithm in ("pairwise", "ring")}
            self.algorithm = "ring" if seconds["ring"] < seconds["pairwise"] else "pairwise"
        return self.algorithm

    def start_all_gather(self, flat: Tensor, bounds: Sequence[int], tag: int) -> Pending:
        """Start to fill `flat` from everyone's own interval of it, in place."""
        if self.size == 1:
            return _Done()
        own = flat[bounds[self.index] : bounds[self.index + 1]]
        self._count(own.nbytes * (self.size - 1))
        algorithm = self._algorithm_for(bounds)
        if algorithm == "native":
            return cast(Pending, _native("all_gather")(flat, own, group=self._group, async_op=True))
        if algorithm == "ring":
            return self._on_thread("gather", lambda: self._ring_gather(flat, bounds, tag))
        operations = []
        for distance in range(1, self.size):
            to, source = (self.index + distance) % self.size, (self.index - distance) % self.size
            operations += self._send(own, to, tag) + self._receive(
                flat[bounds[source] : bounds[source + 1]], source, tag
            )
        return _Pairwise(_started(operations))

    def start_reduce_scatter(
        self, flat: Tensor, bounds: Sequence[int], out: Tensor, tag: int, add: bool = False
    ) -> Pending:
        """Start to sum everyone's `flat` and put this rank's interval of it into `out`; add: to what is there.

        `flat` must not change before `wait`, and may be any numbers afterwards.
        """
        own = flat[bounds[self.index] : bounds[self.index + 1]]
        if self.size == 1:
            (out.add_ if add else out.copy_)(own)
            return _Done()
        self._count(flat.nbytes - own.nbytes)
        algorithm = self._algorithm_for(bounds)
        if algorithm == "native":
            return self._native_reduce_scatter(flat, own, out, add)
        if algorithm == "ring":
            return self._on_thread("reduce", lambda: self._ring_reduce_scatter(flat, bounds, out, tag, add))
        return self._pairwise_reduce_scatter(flat, bounds, out, tag, add)

    def start_all_reduce(self, tensor: Tensor) -> Pending:
        """Start to sum `tensor` over the group, in place."""
        if self.size == 1:
            return _Done()
        self._count(2 * tensor.nbytes * (self.size - 1) // self.size)
        return cast(Pending, dist.all_reduce(tensor, group=self._group, async_op=True))

    def collect(self, own: Tensor, sizes: Sequence[int]) -> Tensor | None:
        """Everyone's flat `own`, one behind the other, on the group's first rank; None on the others.

        sizes: elements of each rank's, known to all.
        """
        if self.index:
            for work in _started(self._send(own.contiguous(), 0, tag=_COLLECT)):
                work.wait()
            return None
        flat = torch.empty(sum(sizes), dtype=own.dtype, device=own.device)
        parts = list(torch.split(flat, list(sizes)))
        parts[0].copy_(own)
        operations = [self._receive(parts[index], index, _COLLECT) for index in range(1, self.size)]
        for work in _started([operation for one in operations for operation in one]):
            work.wait()
        return flat

    def close(self) -> None:
        """End the threads, if there are any."""
        for thread in self._threads.values():
            thread.shutdown()

    # --- how ---------------------------------------------------------------------------------------------------

    def _algorithm_for(self, bounds: Sequence[int]) -> Algorithm:
        is_even = len({stop - start for start, stop in pairwise(bounds)}) == 1
        return self.algorithm if is_even else "pairwise"

    def _send(self, tensor: Tensor, index: int, tag: int) -> list[Any]:
        return [dist.P2POp(dist.isend, tensor, self.ranks[index], self._group, tag)] if tensor.numel() else []

    def _receive(self, tensor: Tensor, index: int, tag: int) -> list[Any]:
        return [dist.P2POp(dist.irecv, tensor, self.ranks[index], self._group, tag)] if tensor.numel() else []

    def _pairwise_reduce_scatter(
        self, flat: Tensor, bounds: Sequence[int], out: Tensor, tag: int, add: bool
    ) -> Pending:
        own = flat[bounds[self.index] : bounds[self.index + 1]]
        received: list[Tensor] = []
        operations: list[Any] = []
        for distance in range(1, self.size):
            to, source = (self.index + distance) % self.size, (self.index - distance) % self.size
            space = out if distance == 1 and not add else torch.empty_like(own)
            received.append(space)
            operations += self._send(flat[bounds[to] : bounds[to + 1]], to, tag) + self._receive(space, source, tag)

        def finish() -> None:
            out.add_(own)
            for other in received if add else received[1:]:
                out.add_(other)

        return _Pairwise(_started(operations), finish)

    def _native_reduce_scatter(self, flat: Tensor, own: Tensor, out: Tensor, add: bool) -> Pending:
        space = torch.empty_like(own) if add else out
        work = _native("reduce_scatter")(space, flat, group=self._group, async_op=True)
        return _Then(work, lambda: cast(None, out.add_(space))) if add else cast(Pending, work)

    def _on_thread(self, kind: str, work: Callable[[], None]) -> Pending:
        """One thread for each kind: ranks whose gradients come in other orders start them in between other gathers."""
        if kind not in self._threads:
            self._threads[kind] = ThreadPoolExecutor(1, f"dstrain-ring-{kind}")
        return _OnThread(self._threads[kind].submit(work))

    def _ring_gather(self, flat: Tensor, bounds: Sequence[int], tag: int) -> None:
        after, before = (self.index + 1) % self.size, (self.index - 1) % self.size
        for number in range(self.size - 1):
            here, there = (self.index - number) % self.size, (self.index - number - 1) % self.size
            operations = self._send(flat[bounds[here] : bounds[here + 1]], after, tag)
            operations += self._receive(flat[bounds[there] : bounds[there + 1]], before, tag)
            for work in _started(operations):
                work.wait()

    def _ring_reduce_scatter(self, flat: Tensor, bounds: Sequence[int], out: Tensor, tag: int, add: bool) -> None:
        """A shard starts behind its owner, and comes round with everybody's share added to it."""
        after, before = (self.index + 1) % self.size, (self.index - 1) % self.size
        space = torch.empty_like(flat[: bounds[1]])
        for number in range(1, self.size):
            here, there = (self.index - number) % self.size, (self.index - number - 1) % self.size
            operations = self._send(flat[bounds[here] : bounds[here + 1]], after, tag) + self._receive(
                space, before, tag
            )
            for work in _started(operations):
                work.wait()
            flat[bounds[there] : bounds[there + 1]].add_(space)
        (out.add_ if add else out.copy_)(flat[bounds[self.index] : bounds[self.index + 1]])

    def _probe(self, algorithm: Algorithm) -> float:
        """Median seconds of a gather and a reduce-scatter, the same number on all ranks: that of the slowest."""
        self.algorithm = algorithm
        size = PROBE_ELEMENTS // self.size * self.size
        flat = torch.zeros(size, device=self.device)
        bounds = [size // self.size * rank for rank in range(self.size + 1)]
        out = torch.zeros_like(flat[: bounds[1]])
        seconds = []
        for _ in range(PROBE_ROUNDS):
            begun = time.perf_counter()
            self.start_all_gather(flat, bounds, tag=0).wait()
            self.start_reduce_scatter(flat, bounds, out, tag=1).wait()
            seconds.append(time.perf_counter() - begun)
        slowest = torch.tensor([statistics.median(seconds)], dtype=torch.float64)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=self._group)
        return float(slowest)


def _started(operations: list[Any]) -> list[Any]:
    return dist.batch_isend_irecv(operations) if operations else []


def _native(name: Literal["all_gather", "reduce_scatter"]) -> Callable[..., Any]:
    """torch 2.13 renames all_gather_into_tensor to all_gather_single and warns of the old name; 2.11 has only that."""
    old = {"all_gather": "all_gather_into_tensor", "reduce_scatter": "reduce_scatter_tensor"}[name]
    return cast(Callable[..., Any], getattr(dist, f"{name}_single", None) or getattr(dist, old))
