"""One unit of sharded parameters on one rank: its buffers, and whether its parameters are whole.

[Note: states]
    SHARDED    this rank has its own interval alone; the parameters are placeholders
    GATHERING  the others' intervals are on their way into `full`
    WHOLE      the parameters are views of `full`, as every rank holds them
A resident unit (all of stages 1 and 2, small ones of stage 3) has a `full` of its own, of which its shard is a view.
Any other borrows one of the arena's slots while it is gathered, and its shard is a buffer of its own. A step makes
what was gathered before it stale: SHARDED again.

A placeholder has the parameter's shape and no memory: one NaN, expanded. Whoever reads it by mistake gets NaN, not
another unit's weights; whoever writes to it gets torch's error.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, auto

import torch
from torch import Tensor, nn

from dstrain.runtime.comm_group import CommGroup, Pending
from dstrain.runtime.pages import prefer_large_pages
from dstrain.runtime.zero.plan import UnitPlan


class UnitState(Enum):
    """[Note: states]"""

    SHARDED = auto()
    GATHERING = auto()
    WHOLE = auto()


def host_memory(elements: int, dtype: torch.dtype) -> Tensor:
    """Zeros in the host's memory; pinned where there is a GPU, so that copies go on beside the computation."""
    return torch.zeros(elements, dtype=dtype, pin_memory=torch.cuda.is_available())


class ZeroUnit:
    """Parameters that are gathered, reduced and freed together. [Note: units] in plan.py, [Note: states] here.

    number: among the units, the same on all ranks. full: the flat buffer, while there is one. shard: this rank's
    interval in the model's dtype. grad: of the shard, summed over all ranks; made by the reduction.
    host_grad: its copy in the host's memory, where the optimizer works there. pins: how many users want it to stay
    whole.
    """

    def __init__(
        self,
        number: int,
        plan: UnitPlan,
        parameters: Sequence[nn.Parameter],
        group: CommGroup,
        dtype: torch.dtype,
        resident: bool,
        shard_in_host: bool = False,
    ) -> None:
        """dtype: of parameters that are fp32 now. shard_in_host: keep the shard, if the unit is not resident, in the
        host's memory."""
        self.number, self.plan, self.parameters, self.group = number, plan, list(parameters), group
        self.resident, self.device = resident, group.device
        self.state = UnitState.SHARDED
        self.full: Tensor | None = None
        self.grad: Tensor | None = None
        self.host_grad: Tensor | None = None
        self.pins = 0
        self._pending: Pending | None = None
        first = self.parameters[0]
        low, high = plan.interval(group.index)
        self.dtype = dtype if first.dtype is torch.float32 else first.dtype
        self.is_trained = first.requires_grad
        if resident:
            self.full = prefer_large_pages(torch.empty(plan.size, dtype=self.dtype, device=self.device)).zero_()
            self.shard = self.full[low:high]
        elif shard_in_host:
            self.shard = host_memory(high - low, self.dtype)
        else:
            self.shard = prefer_large_pages(torch.empty(high - low, dtype=self.dtype, device=self.device)).zero_()

    @property
    def name(self) -> str:
        return self.plan.name

    # --- taking over the model's parameters --------------------------------------------------------------------

    @torch.no_grad()
    def take(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Keep this rank's share of `parameter`, which is `value`; free its own memory."""
        entry = self.plan.entries[self._number_of(parameter)]
        flat = value.reshape(-1)
        if self.resident:
            assert self.full is not None
            self.full[entry.start : entry.stop].copy_(flat)
        else:
            low, high = self.plan.interval(self.group.index)
            start, stop = max(low, entry.start), min(high, entry.stop)
            if start < stop:
                self.shard[start - low : stop - low].copy_(flat[start - entry.start : stop - entry.start])
            parameter.data = self._placeholder(entry.shape)

    def show(self) -> None:
        """Make a resident unit's parameters views of its buffer: all have been taken."""
        self._point_parameters()
        self.state = UnitState.WHOLE

    # --- whole and sharded -------------------------------------------------------------------------------------

    def start_gather(self, slot: Tensor | None = None) -> None:
        """SHARDED -> GATHERING. slot: at least plan.size elements, for a unit that has no buffer of its own."""
        assert self.state is UnitState.SHARDED
        if not self.resident:
            assert slot is not None
            self.full = slot[: self.plan.size]
            low, high = self.plan.interval(self.group.index)
            self.full[low:high].copy_(self.shard, non_blocking=True)
        assert self.full is not None
        self._pending = self.group.start_all_gather(self.full, self.plan.bounds, tag=2 * self.number)
        self.state = UnitState.GATHERING

    def finish_gather(self) -> None:
        """GATHERING -> WHOLE: wait, and let the parameters be views of the buffer."""
        assert self.state is UnitState.GATHERING
        assert self._pending is not None
        self._pending.wait()
        self._pending = None
        if not self.resident:
            self._point_parameters()
        self.state = UnitState.WHOLE

    def release(self) -> None:
        """WHOLE -> SHARDED: give the slot back."""
        assert self.state is UnitState.WHOLE
        if not self.resident:
            for entry, parameter in zip(self.plan.entries, self.parameters, strict=True):
                parameter.data = self._placeholder(entry.shape)
            self.full = None
        self.state = UnitState.SHARDED

    @torch.no_grad()
    def _point_parameters(self) -> None:
        assert self.full is not None
        for entry, parameter in zip(self.plan.entries, self.parameters, strict=True):
            parameter.data = self.full[entry.start : entry.stop].view(entry.shape)

    def _placeholder(self, shape: tuple[int, ...]) -> Tensor:
        nothing = torch.nan if self.dtype.is_floating_point else 0
        return torch.full((), nothing, dtype=self.dtype, device=self.device).expand(shape)

    def _number_of(self, parameter: nn.Parameter) -> int:
        return next(number for number, own in enumerate(self.parameters) if own is parameter)
