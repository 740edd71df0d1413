"""Communication between ranks: with `comm_group` and `comm_edge`, the only module that calls torch.distributed.

Gloo on CPU, NCCL on CUDA, behind one small class. A single process without torchrun's environment needs no
process group: its collectives are the identity. Every wait ends after `TIMEOUT`.

Only calls that torch 2.11 and 2.13 spell alike are used here.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from dstrain.runtime.comm_edge import Edge
from dstrain.runtime.comm_group import CommGroup, Pending
from dstrain.runtime.spec.errors import UsageError

T = TypeVar("T")

TIMEOUT = timedelta(minutes=10)
"""The longest that a rank waits for the others; a large model's slowest rank may start minutes late."""


class _Done:
    def wait(self) -> None:
        return None


class Communicator:
    """The ranks of one job, or of a part of it, seen from one of them.

    rank, world_size, local_rank: as torchrun defines them, rank and world_size within the part. device: where this
    rank's tensors live. whole: the job's communicator. job_ranks: the job's ranks of all that are in this part.
    traffic_bytes: of the whole: what this rank has sent in messages and in collectives on tensors since `take_traffic`
    was last called, by the formula of a ring: an all-reduce of S bytes over N ranks sends 2·S·(N−1)/N.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        local_rank: int,
        device: torch.device,
        whole: Communicator | None = None,
        parts: Sequence[Sequence[int]] = (),
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """whole, parts, group: of a part (see `part`): the job's communicator, all parts by the job's ranks, and the
        connections of this one."""
        self.rank, self.world_size, self.local_rank, self.device = rank, world_size, local_rank, device
        self.whole, self._group = whole or self, group
        self._parts = [list(ranks) for ranks in parts] or [list(range(world_size))]
        job_rank = rank if whole is None else whole.rank
        self.job_ranks = next(ranks for ranks in self._parts if job_rank in ranks)  # of the job
        self.traffic_bytes = 0

    @classmethod
    @contextlib.contextmanager
    def connect(cls, environ: Mapping[str, str] = os.environ, meet: bool = True) -> Iterator[Communicator]:
        """Join the other ranks by torchrun's environment, and leave them at the end.

        meet: leave only when all are there; not for the end of a process that may have failed.
        Without RANK in the environment this process is the only rank. A rank that leaves by an exception does
        not wait for the others; they notice the closed connections.
        """
        local_rank = int(environ.get("LOCAL_RANK", "0"))
        device = _device_of(local_rank)
        if dist.is_initialized():  # by the script, which leaves it too
            yield cls(dist.get_rank(), dist.get_world_size(), local_rank, device)
            return
        if "RANK" not in environ:
            yield cls(0, 1, local_rank, device)
            return
        on_cuda = device.type == "cuda"
        dist.init_process_group("nccl" if on_cuda else "gloo", timeout=TIMEOUT, device_id=device if on_cuda else None)
        try:
            comm = cls(dist.get_rank(), dist.get_world_size(), local_rank, device)
            yield comm
            if meet:
                comm.barrier()
        finally:
            dist.destroy_process_group()

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Sum `tensor` over all ranks, in place."""
        self.start_all_reduce(tensor).wait()

    def start_all_reduce(self, tensor: torch.Tensor) -> Pending:
        """Start to sum `tensor` over all ranks, in place; it may be used after `wait()`.

        All ranks start their collectives in the same order.
        """
        if self.world_size == 1:
            return _Done()
        self._count(2 * tensor.nbytes * (self.world_size - 1) // self.world_size)
        work: Pending = dist.all_reduce(tensor, group=self._group, async_op=True)
        return work

    def broadcast(self, tensor: torch.Tensor, source: int = 0) -> None:
        """Replace `tensor` by rank `source`'s, in place."""
        if self.world_size > 1:
            self._count(tensor.nbytes * (self.world_size - 1) // self.world_size)
            dist.broadcast(tensor, src=self.job_ranks[source], group=self._group)

    def all_gather_object(self, item: T) -> list[T]:
        """Each rank's `item`, in the order of ranks. For small things such as a hash: it is pickled."""
        if self.world_size == 1:
            return [item]
        items: list[T | None] = [None] * self.world_size
        dist.all_gather_object(items, item, group=self._group)
        return cast(list[T], items)

    def gather_object(self, item: T) -> list[T] | None:
        """Each rank's `item` on rank 0, None on the others. It is pickled."""
        if self.world_size == 1:
            return [item]
        items: list[T | None] | None = [None] * self.world_size if self.rank == 0 else None
        dist.gather_object(item, items, dst=self.job_ranks[0], group=self._group)
        return cast("list[T] | None", items)

    def broadcast_object(self, item: T, source: int = 0) -> T:
        """Rank `source`'s item. It is pickled."""
        if self.world_size == 1:
            return item
        items = [item]
        dist.broadcast_object_list(items, self.job_ranks[source], group=self._group)
        return items[0]

    def pass_on(self, tensor: torch.Tensor, source: int, to: int) -> None:
        """Fill rank `to`'s tensor, on the CPU, with rank `source`'s; the others need not call it."""
        if self.rank == source:
            dist.send(tensor.to(self.device), self.job_ranks[to], group=self._group)
        elif self.rank == to:
            received = tensor if self.device.type == "cpu" else torch.empty_like(tensor, device=self.device)
            dist.recv(received, self.job_ranks[source], group=self._group)
            if received is not tensor:
                tensor.copy_(received)

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        self.all_reduce(torch.zeros(1, device=self.device))

    def part(self, parts: Sequence[Sequence[int]]) -> Communicator:
        """The part of the job that this rank is in; all ranks call it. parts: equally large, every rank in one."""
        if len(parts) == 1:
            return self
        group = self._new_group(parts)
        ranks = next(ranks for ranks in parts if self.rank in ranks)
        place = ranks.index(self.rank)
        return Communicator(place, len(ranks), self.local_rank, self.device, self, parts, group)

    def edge(self, edges: Sequence[tuple[int, int]]) -> Edge | None:
        """Of pairs (source, to) of the job's ranks the one that this rank is in, if any; all ranks call it."""
        own = None
        for source, to in edges:
            group = dist.new_group(sorted((source, to)), timeout=TIMEOUT)
            if self.rank in (source, to):
                assert own is None, "a rank is in one of the pairs"
                own = Edge(group, source, to, self.device, self._count)
        return own

    def groups(self, shard_size: int, native: bool = False) -> tuple[CommGroup, CommGroup]:
        """This rank's shard group, `shard_size` neighbouring ranks, and its replicas: those with its place in theirs.

        All ranks call it. shard_size divides the number of ranks. native: the backend's own collectives will be used,
        which need other connections for reductions than for gathers.
        """
        count = self.world_size // shard_size
        shards = [[start * shard_size + place for place in range(shard_size)] for start in range(count)]
        replicas = [[start * shard_size + place for start in range(count)] for place in range(shard_size)]
        return self._group_among(shards, native), self._group_among(replicas)

    def some(self, groups: Sequence[Sequence[int]]) -> CommGroup | None:
        """Of groups of the job's ranks the one that this rank is in, if any; all ranks of the job call it."""
        made = self._new_group(groups)
        own = next((ranks for ranks in groups if self.rank in ranks), None)
        return None if own is None else CommGroup(made, self.device, self._count, own)

    def everyone(self) -> CommGroup:
        """All ranks, over connections of their own."""
        return self._group_among([list(range(self.world_size))])

    def _group_among(self, partition: Sequence[Sequence[int]], native: bool = False) -> CommGroup:
        """With connections of its own, so that gathers do not queue behind the job's all-reduces. All ranks of the job
        call it, whichever part they are in, and all make all groups."""
        everyones = [[[part[rank] for rank in ranks] for ranks in partition] for part in self._parts]
        job_ranks = [ranks for groups in everyones for ranks in groups]
        made = self._new_group(job_ranks)
        reducing = self._new_group(job_ranks) if native else None
        own = next(ranks for ranks in job_ranks if self.job_ranks[self.rank] in ranks)
        return CommGroup(made, self.device, self._count, own, reducing)

    def _new_group(self, partition: Sequence[Sequence[int]]) -> dist.ProcessGroup | None:
        """Of the job's ranks, those that this one is together with; None where it is alone."""
        own = None
        for ranks in partition:
            made = dist.new_group(list(ranks), timeout=TIMEOUT) if len(ranks) > 1 else None
            if self.job_ranks[self.rank] in ranks:
                own = made
        return own

    def store(self) -> JobStore:
        """A connection of its own to the job's store."""
        return JobStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))

    def _count(self, sent: int) -> None:
        self.whole.traffic_bytes += sent

    def take_traffic(self) -> int:
        """The bytes sent since the last call."""
        taken, self.traffic_bytes = self.traffic_bytes, 0
        return taken


class JobStore:
    """Words that ranks leave for each other, beside all collectives."""

    def __init__(self, host: str, port: int) -> None:
        store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False)  # type: ignore[attr-defined] # public
        self._store = dist.PrefixStore("dstrain", store)  # type: ignore[attr-defined] # public, but not in __all__

    def put(self, key: str, text: str) -> None:
        """Leave a word, in place of the one before."""
        self._store.set(key, text)

    def get(self, key: str) -> str | None:
        """The word under `key`, if there is one."""
        return self._store.get(key).decode() if self._store.check([key]) else None


def _device_of(local_rank: int) -> torch.device:
    """The GPU of this local rank, or the CPU on a host without one."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise UsageError(
            f"local rank {local_rank}: expected one GPU for each rank, found {count} on this host; "
            f"start at most {count} ranks here, or empty CUDA_VISIBLE_DEVICES to train on the CPU"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device
