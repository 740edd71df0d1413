"""Gradients of ZeRO stages 1 to 3: reduced and scattered, so that each rank keeps those of its own shard.

[Note: pool]
A bucket has a buffer only from its first gradient to the end of its reduction; the buffers are used again and again.
When none is free, the oldest reduction under way is waited for. More are made only where buckets must be open at the
same time: while micro-batches are added up locally, or gradients come in an odd order.

[Note: accumulation]
`local`: gradients of all micro-batches are added up in the buckets, and reduced once a step: least communication, and
the memory of all gradients. `sharded`: every micro-batch is reduced, shards are added up: least memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from dstrain.runtime.comm_group import CommGroup, Pending
from dstrain.runtime.gradients import GradientBucket, GradientReducer, sum_dtype
from dstrain.runtime.lazy_gradients import LazyGradient
from dstrain.runtime.pages import prefer_large_pages
from dstrain.runtime.spec.trace import Category
from dstrain.runtime.zero.divergence import Lookout
from dstrain.runtime.zero.unit import ZeroUnit, host_memory

POOL = 2
"""Buffers: one is filled while another is reduced."""


class ShardedGradients(GradientReducer):
    """Every bucket is the gradients of one unit; its reduction leaves `unit.grad`, the sum of this rank's shard."""

    def __init__(
        self,
        units: Sequence[ZeroUnit],
        shards: CommGroup,
        replicas: CommGroup,
        dtype: torch.dtype,
        sharded_accumulation: bool,
        done_with: Callable[[ZeroUnit], None],
        offload: bool = False,
        lookout: Lookout | None = None,
    ) -> None:
        """units: those that are trained, in the order in which the backward makes their gradients. dtype: of sums of
        real numbers of at most 32 bits. done_with: told when a backward has made all gradients of a unit. offload: copy
        sums to the host. lookout: told of waits."""
        super().__init__([GradientBucket(unit.plan, unit.parameters, sum_dtype(unit.dtype, dtype)) for unit in units])
        self._units, self._shards, self._replicas = list(units), shards, replicas
        self._sharded_accumulation, self._done_with = sharded_accumulation, done_with
        self._unit_of = {id(bucket): unit for bucket, unit in zip(self.buckets, units, strict=True)}
        self._lookout = lookout
        self._free: list[Tensor] = []
        self._memory_of: dict[int, Tensor] = {}
        self._made = 0
        self._largest = max((bucket.plan.size * bucket.dtype.itemsize for bucket in self.buckets), default=0)
        self._pending: deque[tuple[GradientBucket, Pending]] = deque()
        self._all_reduces: list[tuple[ZeroUnit, Pending]] = []
        self._is_last = False
        self._has_sum: set[int] = set()  # units that a micro-batch of this step has already been added to
        for unit, bucket in zip(units, self.buckets, strict=True):
            dtype = bucket.dtype
            low, high = unit.plan.interval(shards.index)
            unit.grad = prefer_large_pages(torch.empty(high - low, dtype=dtype, device=unit.device)).zero_()
            unit.host_grad = host_memory(high - low, dtype) if offload else None

    def wait(self) -> None:
        while self._pending:
            self._finish_oldest()
        for unit, pending in self._all_reduces:
            pending.wait()
            self._offload(unit)
        self._all_reduces.clear()
        if self._shards.device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # copies to the host

    def reduced(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        for unit in self._units:
            assert unit.grad is not None
            yield unit.parameters[0], unit.grad

    def changed(self, parameter: nn.Parameter) -> None:
        """Somebody has changed `sum_of(parameter)`."""
        self._offload(next(unit for unit in self._units if unit.parameters[0] is parameter))

    def scale(self, factor: float) -> None:
        for unit in self._units:
            gradient = unit.grad if unit.host_grad is None else unit.host_grad
            assert gradient is not None
            gradient.mul_(factor)

    def begin_backward(self, last: bool, counts: bool = True) -> None:
        if self._sharded_accumulation:  # what the micro-batch before has launched: its buckets are filled anew
            while self._pending:
                self._finish_oldest()
        self._is_last = last
        super().begin_backward(last, counts)
        if self._sharded_accumulation:
            for bucket in self.buckets:
                bucket.begin_filling()

    def begin_step(self) -> None:
        self.wait()  # for those of a step that was begun and is forgotten
        for bucket in self.buckets:
            if bucket.flat is not None:
                self._give_back(bucket)
        self._has_sum.clear()
        super().begin_step()

    def launch_in(self, order: Sequence[int]) -> None:
        """Buffers that only the first step's order has needed are given back."""
        super().launch_in(order)
        del self._free[POOL:]
        self._made = len(self._free)

    def _reduces_in(self, last: bool) -> bool:
        return last or self._sharded_accumulation

    def _on_gradient(self, parameter: nn.Parameter, lazy: LazyGradient | None) -> None:
        super()._on_gradient(parameter, lazy)
        bucket = self._bucket_of[parameter]
        if bucket.is_complete:
            self._done_with(self._unit_of[id(bucket)])

    def _open(self, bucket: GradientBucket) -> None:
        """[Note: pool]"""
        if not self._free and self._pending and self._made >= POOL:
            self._finish_oldest()
        if not self._free:
            memory = torch.empty(self._largest, dtype=torch.uint8, device=bucket.parameters[0].device)
            self._free.append(prefer_large_pages(memory))
            self._made += 1
        memory = self._free.pop()
        bucket.open(memory[: bucket.plan.size * bucket.dtype.itemsize].view(bucket.dtype))
        self._memory_of[id(bucket)] = memory

    def _launch(self, bucket: GradientBucket) -> None:
        unit = self._unit_of[id(bucket)]
        assert bucket.flat is not None
        assert unit.grad is not None
        add = unit.number in self._has_sum
        self._has_sum.add(unit.number)
        pending = self._shards.start_reduce_scatter(
            bucket.flat, unit.plan.bounds, unit.grad, tag=2 * unit.number + 1, add=add
        )
        self._pending.append((bucket, pending))

    def _finish_oldest(self) -> None:
        bucket, pending = self._pending.popleft()
        lookout = self._lookout.waiting() if self._lookout is not None else nullcontext()
        with self.trace.span(Category.WAIT, "sums of gradients"), lookout:
            pending.wait()
        self._give_back(bucket)
        unit = self._unit_of[id(bucket)]
        if self._is_last and self._replicas.size > 1:
            assert unit.grad is not None
            self._all_reduces.append((unit, self._replicas.start_all_reduce(unit.grad)))
        elif self._is_last:
            self._offload(unit)

    def _offload(self, unit: ZeroUnit) -> None:
        if unit.host_grad is not None:
            assert unit.grad is not None
            unit.host_grad.copy_(unit.grad, non_blocking=True)

    def _give_back(self, bucket: GradientBucket) -> None:
        bucket.close()
        self._free.append(self._memory_of.pop(id(bucket)))
