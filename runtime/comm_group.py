"""All-gather and reduce-scatter of flat buffers within a group of ranks.

[Note: algorithms]
torch's Gloo emulates a reduce-scatter by an all-reduce and copies what it gathers, so on Gloo both are made here of
sends and receives that go on in the background. `pairwise`: every rank sends each other one its share, at once, and
receives in place; the best where a switch lets all pairs talk at full speed, and the only one that cuts between
tensors allow. `ring`: every rank talks to its neighbours only, in N - 1 rounds on a thread for all gathers, and one
for all reductions; with several ranks on each host, only one of them sends to the next host, where pairwise sends
each share there once for each rank. `direct`: ranks on one host tell each other where their buffers lie, and read
them there (`comm_direct.py`), on the same threads as the ring. `native`: the backend's own, as NCCL has them. All send
(N - 1) / N of the buffer from each rank, or have it read.

[Note: choice]
`auto` is native on GPUs. On CPUs it tries direct, pairwise and ring where they can be used and differ, once, on buffers
of the job's own size, and takes the fastest. All three sum a shard's parts in the ring's order, so the choice changes
no bit, and the same layout gives the same bits in every run. An all-reduce is direct where it can be, else the
backend's.

[Note: shared]
The source of a gather is a buffer that stays where it is, a rank's shard. `direct` reads the others' whenever it likes,
without their doing anything: ranks do not wait for each other from unit to unit. So whoever changes its buffers does it
behind a collective that shows that all have read them (the one that ends a step, or `settle`), and says behind it that
they have a new version (`announce`), for which the others wait. A process that ends takes its memory with it: it first
waits until the others have done as many gathers as it has begun, a number that it reads from them.
"""

from __future__ import annotations

import atexit
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from itertools import pairwise
from typing import Any, Literal, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor

from dstrain.runtime.comm_direct import Neighbours, meet
from dstrain.runtime.spec.errors import UsageError

Algorithm = Literal["pairwise", "ring", "direct", "native"]
Wish = Literal["auto", "pairwise", "ring", "direct", "native"]

_Works = queue.SimpleQueue[tuple[Callable[[], None], Future[None]]]

_COLLECT, _ALL_REDUCE, _VERSION, _READ = (1 << power for power in range(20, 24))
"""Tags above those of units. _READ: added to a collective's, for the word that its buffer has been read."""

SILENCE_S = 600.0
"""The longest wait for a neighbour, as for all others."""

LEAVE_S = 60.0
"""The longest that a rank whose script is over waits for others that still read its memory."""

_CHUNK = 1 << 18
"""Elements that are read and added at a time: they stay in a core's cache."""

TRIALS = 5
TRIAL_ELEMENTS = 1 << 20
"""The most that a trial of algorithms moves."""


class Pending(Protocol):
    """A collective or a message under way."""

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
    The ranks start gathers in the same order, and reductions in the same order.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        device: torch.device,
        count: Callable[[int], None],
        ranks: Sequence[int],
        reducing: dist.ProcessGroup | None = None,
    ) -> None:
        """count: told the bytes that each collective sends from this rank. ranks: of the job, in the group's order.
        reducing: connections of their own for native reductions, which run beside gathers in an order of their own."""
        self._group, self.device, self._count, self.ranks = group, device, count, list(ranks)
        self._reducing = reducing or group
        self.size = len(self.ranks)
        self.index = self.ranks.index(dist.get_rank()) if self.size > 1 else 0
        self.algorithm: Algorithm = "native" if device.type == "cuda" else "pairwise"
        self.trial_s: dict[Algorithm, float] = {}
        self._neighbours: Neighbours | None = None
        self._shared: list[list[int]] = []
        self._version, self._heard = 0, [0] * self.size
        self._started_gathers, self._finished_gathers = 0, torch.zeros(1, dtype=torch.int64)
        self._works: dict[str, _Works] = {}
        self._scratches: dict[tuple[str, torch.dtype], Tensor] = {}

    def choose(self, wish: Wish, elements: int = 0) -> None:
        """Settle the algorithm for buffers of up to so many elements, on all ranks alike; without elements, for
        all-reduces. [Note: choice] Raises UsageError where `direct` is not possible.

        trial_s: what `auto` has measured: seconds of one gather and one reduction, on the slowest rank.
        """
        if self.size > 1 and self.device.type == "cpu" and wish in ("auto", "direct"):
            self._neighbours = meet(self.index, self._everyone, SILENCE_S)
        if wish != "auto":
            if wish == "direct" and self.size > 1 and self._neighbours is None:
                expected = "all ranks of a shard group on one host, on CPUs, allowed to read each other's memory"
                raise UsageError.mismatch("zero.comm", f"{expected} for direct", f"ranks {self.ranks}", "write auto")
            self.algorithm = wish
        elif self.device.type == "cpu" and self.size > 1:
            names: list[Algorithm] = ["pairwise"] if self.size == 2 else ["pairwise", "ring"]
            names = [*names, "direct"] if self._neighbours is not None else names
            if elements and len(names) > 1:
                self.trial_s = self._try(names, min(elements, TRIAL_ELEMENTS))
                self.algorithm = min(self.trial_s, key=self.trial_s.__getitem__)
            elif not elements:
                self.algorithm = names[-1]

    def _everyone(self, item: Any) -> list[Any]:
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item, group=self._group)
        return items

    def _try(self, algorithms: Sequence[Algorithm], elements: int) -> dict[Algorithm, float]:
        share = -(-elements // self.size)
        bounds = [share * shard for shard in range(self.size + 1)]
        flat, out = torch.zeros(bounds[-1]), torch.zeros(share)
        self._shared = self._everyone([self._own(flat, bounds).data_ptr()])
        took = torch.zeros(len(algorithms), TRIALS + 1, dtype=torch.float64)
        for trial in range(TRIALS + 1):  # the first makes the connections
            for number, algorithm in enumerate(algorithms):
                dist.barrier(self._group)
                started = time.perf_counter()
                self._gather(algorithm, flat, bounds, tag=0).wait()
                self._reduce_scatter(algorithm, flat, bounds, out, tag=1, add=False).wait()
                took[number, trial] = time.perf_counter() - started
        dist.all_reduce(took, op=dist.ReduceOp.MAX, group=self._group)
        return dict(zip(algorithms, took[:, 1:].amin(1).tolist(), strict=True))

    def share(self, buffers: Sequence[Tensor]) -> None:
        """The sources of gathers, by their numbers; they have their numbers and stay where they are. [Note: shared]"""
        if self.size > 1 and self.algorithm == "direct":
            self._shared = self._everyone([buffer.data_ptr() for buffer in (*buffers, self._finished_gathers)])
            atexit.register(self._leave)

    def _leave(self) -> None:
        """Behind the script: let the others read what they still need."""
        assert self._neighbours is not None
        theirs, deadline = torch.zeros(1, dtype=torch.int64), time.monotonic() + LEAVE_S
        for other in range(self.size):
            while other != self.index and time.monotonic() < deadline:
                try:
                    self._neighbours.read(other, self._shared[other][-1], theirs)
                except RuntimeError:  # it has gone
                    break
                if int(theirs) >= self._started_gathers:
                    break
                time.sleep(0.01)

    def announce(self) -> None:
        """The shared buffers have a new version; every rank calls it. [Note: shared]"""
        if self.algorithm == "direct" and self._neighbours is not None:
            self._version += 1
            for other in range(self.size):
                if other != self.index:
                    self._neighbours.tell(other, "gather", _VERSION, self._version)

    def settle(self) -> None:
        """Return once no rank reads what this one has shared; every rank calls it. [Note: shared]"""
        if self.algorithm == "direct" and self.size > 1:
            dist.all_reduce(torch.zeros(1), group=self._group)

    def start_all_gather(self, flat: Tensor, bounds: Sequence[int], tag: int) -> Pending:
        """Start to fill `flat` from everyone's own interval of it, in place; tag: 2 × the number of the buffer that was
        shared, which has the same numbers as this rank's interval."""
        if self.size == 1:
            return _Done()
        self._count(self._own(flat, bounds).nbytes * (self.size - 1))
        return self._gather(self.algorithm_for(bounds), flat, bounds, tag)

    def start_reduce_scatter(
        self, flat: Tensor, bounds: Sequence[int], out: Tensor, tag: int, add: bool = False
    ) -> Pending:
        """Start to sum everyone's `flat` and put this rank's interval of it into `out`; add: to what is there.

        `flat` must not change before `wait`, and may be any numbers afterwards.
        """
        own = self._own(flat, bounds)
        if self.size == 1:
            (out.add_ if add else out.copy_)(own)
            return _Done()
        self._count(flat.nbytes - own.nbytes)
        return self._reduce_scatter(self.algorithm_for(bounds), flat, bounds, out, tag, add)

    def start_all_reduce(self, tensor: Tensor) -> Pending:
        """Start to sum `tensor` over the group, in place."""
        if self.size == 1:
            return _Done()
        self._count(2 * tensor.nbytes * (self.size - 1) // self.size)
        if self.algorithm == "direct":
            return self._on_thread("reduce", lambda: self._direct_all_reduce(tensor))
        return cast(Pending, dist.all_reduce(tensor, group=self._group, async_op=True))

    def collect(self, own: Tensor, sizes: Sequence[int]) -> Tensor | None:
        """Everyone's flat `own`, one behind the other, on the group's first rank; None on the others.

        sizes: elements of each rank's, known to all.
        """
        if self.index:
            for work in _started(self._send(own.to(self.device).contiguous(), 0, tag=_COLLECT)):
                work.wait()
            return None
        flat = torch.empty(sum(sizes), dtype=own.dtype, device=self.device)
        parts = list(torch.split(flat, list(sizes)))
        parts[0].copy_(own)
        operations = [self._receive(parts[index], index, _COLLECT) for index in range(1, self.size)]
        for work in _started([operation for one in operations for operation in one]):
            work.wait()
        return flat

    # --- how ---------------------------------------------------------------------------------------------------

    def algorithm_for(self, bounds: Sequence[int]) -> Algorithm:
        """That of buffers with such cuts."""
        is_even = len({stop - start for start, stop in pairwise(bounds)}) == 1
        return self.algorithm if is_even else "pairwise"

    def _own(self, flat: Tensor, bounds: Sequence[int]) -> Tensor:
        return flat[bounds[self.index] : bounds[self.index + 1]]

    def _gather(self, algorithm: Algorithm, flat: Tensor, bounds: Sequence[int], tag: int) -> Pending:
        own = self._own(flat, bounds)
        if algorithm == "native":
            return cast(Pending, _native("all_gather")(flat, own, group=self._group, async_op=True))
        if algorithm == "ring":
            return self._on_thread("gather", lambda: self._ring_gather(flat, bounds, tag))
        if algorithm == "direct":
            version = self._version
            self._started_gathers += 1
            return self._on_thread("gather", lambda: self._direct_gather(flat, bounds, tag // 2, version))
        operations = []
        for distance in range(1, self.size):
            to, source = (self.index + distance) % self.size, (self.index - distance) % self.size
            operations += self._send(own, to, tag) + self._receive(
                flat[bounds[source] : bounds[source + 1]], source, tag
            )
        return _Pairwise(_started(operations))

    def _reduce_scatter(
        self, algorithm: Algorithm, flat: Tensor, bounds: Sequence[int], out: Tensor, tag: int, add: bool
    ) -> Pending:
        if algorithm == "native":
            return self._native_reduce_scatter(flat, out, add)
        if algorithm == "ring":
            return self._on_thread("reduce", lambda: self._ring_reduce_scatter(flat, bounds, out, tag, add))
        if algorithm == "direct":
            return self._on_thread("reduce", lambda: self._direct_reduce_scatter(flat, bounds, out, tag, add))
        return self._pairwise_reduce_scatter(flat, bounds, out, tag, add)

    def _send(self, tensor: Tensor, index: int, tag: int) -> list[Any]:
        return [dist.P2POp(dist.isend, tensor, self.ranks[index], self._group, tag)] if tensor.numel() else []

    def _receive(self, tensor: Tensor, index: int, tag: int) -> list[Any]:
        return [dist.P2POp(dist.irecv, tensor, self.ranks[index], self._group, tag)] if tensor.numel() else []

    def _pairwise_reduce_scatter(
        self, flat: Tensor, bounds: Sequence[int], out: Tensor, tag: int, add: bool
    ) -> Pending:
        own = self._own(flat, bounds)
        received: list[Tensor] = []  # in the ring's order: that of the rank behind this one comes first
        operations: list[Any] = []
        for distance in range(1, self.size):
            to, source = (self.index - distance) % self.size, (self.index + distance) % self.size
            space = out if distance == 1 and not add else torch.empty_like(own)
            received.append(space)
            operations += self._send(flat[bounds[to] : bounds[to + 1]], to, tag) + self._receive(space, source, tag)

        def finish() -> None:
            total = received[0]
            for part in (*received[1:], own):
                total.add_(part)
            if add:
                out.add_(total)

        return _Pairwise(_started(operations), finish)

    def _native_reduce_scatter(self, flat: Tensor, out: Tensor, add: bool) -> Pending:
        space = torch.empty_like(out) if add else out
        work = _native("reduce_scatter")(space, flat, group=self._reducing, async_op=True)
        return _Then(work, lambda: cast(None, out.add_(space))) if add else cast(Pending, work)

    def _on_thread(self, kind: str, work: Callable[[], None]) -> Pending:
        """One thread for each kind: ranks whose gradients come in other orders start them in between other gathers.
        They are daemons: a process that ends does not wait for them."""
        if kind not in self._works:
            self._works[kind] = queue.SimpleQueue()
            name = f"dstrain ring {kind}"
            threading.Thread(target=_work_off, args=(self._works[kind],), name=name, daemon=True).start()
        future: Future[None] = Future()
        self._works[kind].put((work, future))
        return _OnThread(future)

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
        (out.add_ if add else out.copy_)(self._own(flat, bounds))

    # --- ranks on one host: [Note: shared] and comm_direct.py --------------------------------------------------

    def _direct_gather(self, flat: Tensor, bounds: Sequence[int], number: int, version: int) -> None:
        assert self._neighbours is not None
        for distance in range(1, self.size):
            source = (self.index + distance) % self.size
            while self._heard[source] < version:
                self._heard[source] = self._neighbours.hear(source, "gather", _VERSION)
            self._neighbours.read(source, self._shared[source][number], flat[bounds[source] : bounds[source + 1]])
        self._finished_gathers += 1

    def _direct_reduce_scatter(self, flat: Tensor, bounds: Sequence[int], out: Tensor, tag: int, add: bool) -> None:
        self._sum_own(flat, bounds, out, self._exchange(flat.data_ptr(), tag), add)
        self._exchange(0, tag + _READ)

    def _direct_all_reduce(self, tensor: Tensor) -> None:
        """Each rank sums its interval in place; nobody else looks at that until it says that it is done."""
        flat = tensor.view(-1)
        bounds = [flat.numel() * shard // self.size for shard in range(self.size + 1)]
        addresses = self._exchange(flat.data_ptr(), _ALL_REDUCE)
        self._sum_own(flat, bounds, self._own(flat, bounds), addresses, add=False)
        self._exchange(0, _ALL_REDUCE + _READ)
        assert self._neighbours is not None
        for distance, address in enumerate(addresses, 1):
            source = (self.index + distance) % self.size
            part = flat[bounds[source] : bounds[source + 1]]
            self._neighbours.read(source, address + bounds[source] * flat.itemsize, part)
        self._exchange(0, _ALL_REDUCE + 2 * _READ)

    def _exchange(self, word: int, tag: int) -> list[int]:
        """Give every other rank a number; theirs come back, that of the rank behind this one first."""
        assert self._neighbours is not None
        others = [(self.index + distance) % self.size for distance in range(1, self.size)]
        for other in others:
            self._neighbours.tell(other, "reduce", tag, word)
        return [self._neighbours.hear(other, "reduce", tag) for other in others]

    def _sum_own(self, flat: Tensor, bounds: Sequence[int], out: Tensor, addresses: Sequence[int], add: bool) -> None:
        """Everyone's part of this rank's interval, in the ring's order; out may be that interval."""
        assert self._neighbours is not None
        own, low = self._own(flat, bounds), bounds[self.index]
        for start in range(0, own.numel(), _CHUNK):
            here, there = own[start : start + _CHUNK], out[start : start + _CHUNK]
            total, part = (self._scratch(kind, own.dtype)[: here.numel()] for kind in ("total", "part"))
            for distance, address in enumerate(addresses, 1):
                source = (self.index + distance) % self.size
                into = total if distance == 1 else part
                self._neighbours.read(source, address + (low + start) * flat.itemsize, into)
                if distance > 1:
                    total.add_(part)
            total.add_(here)
            (there.add_ if add else there.copy_)(total)

    def _scratch(self, kind: str, dtype: torch.dtype) -> Tensor:
        if (kind, dtype) not in self._scratches:
            self._scratches[kind, dtype] = torch.empty(_CHUNK, dtype=dtype)
        return self._scratches[kind, dtype]


def _work_off(works: _Works) -> None:
    while True:
        work, future = works.get()
        try:
            work()
            future.set_result(None)
        except BaseException as error:
            future.set_exception(error)


def _started(operations: list[Any]) -> list[Any]:
    return dist.batch_isend_irecv(operations) if operations else []


def _native(name: Literal["all_gather", "reduce_scatter"]) -> Callable[..., Any]:
    """torch 2.13 renames all_gather_into_tensor to all_gather_single and warns of the old name; 2.11 has only that."""
    old = {"all_gather": "all_gather_into_tensor", "reduce_scatter": "reduce_scatter_tensor"}[name]
    return cast(Callable[..., Any], getattr(dist, f"{name}_single", None) or getattr(dist, old))
