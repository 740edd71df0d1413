"""Units made whole when they are needed, ahead of time where the need can be foreseen.

[Note: demand]
`demand` is called whenever somebody is about to use a unit's parameters: before a module's forward, on access to an
attribute, when the backward unpacks a saved tensor. It waits for the unit, notes the order of such demands, and
starts to gather what was demanded next at this point of the step before. So the order need not be declared, and a
recomputation (activation checkpointing), a module called twice or an evaluation are demands like any other.

[Note: slots]
A unit that is not resident is gathered into one of two slots, each of the largest unit's size: one in use, one on its
way. The slot of the unit that was used longest ago is taken; a pinned one never is: that of a module inside its
forward, or recomputed and waiting for its backward. If all are pinned, a slot more is made. In a step nothing else is
allocated. Where a script has kept a view of a weight, it keeps that slot's memory with it, and the slot gets another.

[Note: saved tensors]
The backward needs weights that the forward has used, and by then their slot holds another unit. So what autograd
saves of a slot is kept as (unit, size, stride, offset), and becomes a tensor again when the backward asks for it. One
operation may need weights of several units: what its node has asked for stays until it is another node's turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dstrain.runtime.hooks import repeatable
from dstrain.runtime.pages import prefer_large_pages
from dstrain.runtime.spec.trace import Category
from dstrain.runtime.tracing.recorder import Recorder
from dstrain.runtime.zero.divergence import Lookout
from dstrain.runtime.zero.unit import UnitState, ZeroUnit

SLOTS = 2
_LARGEST_ITEM = 16  # bytes, so that a slot may be viewed as any dtype


class _Saved(NamedTuple):
    """A view of a unit's parameters. [Note: saved tensors]"""

    unit: ZeroUnit
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Slot:
    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self.unit: ZeroUnit | None = None
        self.used = 0
        self._storage = memory.untyped_storage()
        self._references = self._count()

    @property
    def address(self) -> int:
        return self._storage.data_ptr()

    def is_held(self) -> bool:
        """Whether somebody has a view of the memory, though no unit lies there."""
        return self._count() > self._references

    def _count(self) -> int:
        return int(torch._C._storage_Use_Count(self._storage._cdata))


class Gatherer:
    """Keeps track of which units are whole. [Note: demand]

    lookout: told of every gather, where ranks may differ.
    """

    def __init__(self, units: Sequence[ZeroUnit], lookout: Lookout | None = None) -> None:
        self.units = list(units)
        self.trace = Recorder()
        self._lookout = lookout
        self._moving = [unit for unit in units if not unit.resident]
        self._slots: list[_Slot] = []
        self._slot_at: dict[int, _Slot] = {}  # by its address
        self._order: list[ZeroUnit] = []  # of the demands in the step before
        self._demands: list[ZeroUnit] = []  # of this step
        self._place = 0  # in _order: behind the last demand that was foreseen
        self._last: ZeroUnit | None = None
        self._clock = 0
        self._is_recording = False
        self._is_saving = False
        self._node: int | None = None  # of the backward: the last that has asked for weights
        self._node_uses: set[ZeroUnit] = set()

    # --- what is whole -----------------------------------------------------------------------------------------

    def demand(self, unit: ZeroUnit, foresee: bool = True) -> None:
        """Return once the unit's parameters are whole. [Note: demand] foresee: prefetch what came next."""
        if unit is self._last and unit.state is UnitState.WHOLE:
            return
        if unit.state is UnitState.SHARDED:
            self._start(unit)
        if unit.state is UnitState.GATHERING:
            with self._lookout.waiting() if self._lookout is not None else nullcontext():
                self._finish(unit)
        self._touch(unit)
        self._last = unit
        if self._is_recording:
            self._demands.append(unit)
        if foresee:
            self._foresee(unit)

    def begin_forward(self, training: bool) -> None:
        """Before each forward. training: a backward follows; other forwards are not noted."""
        self._is_recording = training
        self._last = None
        if not training or not self._demands:
            self._place = 0

    def begin_backward(self) -> None:
        """Before each backward: what it demands is noted, whatever the last forward was."""
        self._is_recording = True

    def begin_step(self) -> None:
        """The order of demands begins anew; what was used first is gathered at once. Slots that were more than usual
        are given back."""
        for slot in self._slots[SLOTS:]:
            if slot.unit is not None:
                self._release(slot.unit)
            self._remove(slot)
        self._order, self._demands, self._place = self._demands, [], 0
        self._is_recording = False
        for unit in self._order[:SLOTS]:
            if unit.state is UnitState.SHARDED and (unit.resident or self._free_slot(keep=unit) is not None):
                self._start(unit)

    def forget(self) -> None:
        """What is whole is stale: it must be gathered again before use."""
        for unit in self.units:
            if unit.state is not UnitState.SHARDED:
                self._release(unit)
            unit.pins = 0
        self._last = None

    def start_residents(self) -> None:
        """Start to gather the units that stay whole, in the order in which they are used."""
        for unit in self.units:
            if unit.resident and unit.state is UnitState.SHARDED:
                self._start(unit)

    def finish_residents(self) -> None:
        """Wait for all that `start_residents` has begun."""
        for unit in self.units:
            if unit.resident and unit.state is UnitState.GATHERING:
                self._finish(unit)

    def pin(self, unit: ZeroUnit) -> None:
        """Keep the unit where it is until `unpin`."""
        unit.pins += 1

    def unpin(self, unit: ZeroUnit) -> None:
        """Take one `pin` back."""
        unit.pins = max(0, unit.pins - 1)

    def unpin_all(self) -> None:
        """Nobody uses anything any more: the backward is over."""
        for unit in self._moving:
            unit.pins = 0

    # --- autograd ----------------------------------------------------------------------------------------------

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Inside, autograd keeps views of slots as what they are views of. [Note: saved tensors]"""
        if self._is_saving or not self._moving:
            yield
            return
        self._is_saving = True
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
                yield
        finally:
            self._is_saving = False

    def units_in(self, output: Any) -> set[ZeroUnit]:
        """Units in whose slots a module's output lies: it has given its own parameter, or a view of it."""
        if isinstance(output, Tensor):
            slot = self._slot_at.get(output.untyped_storage().data_ptr())
            return {slot.unit} if slot is not None and slot.unit is not None else set()
        if isinstance(output, Mapping):
            output = output.values()
        elif not isinstance(output, list | tuple):
            return set()
        return {unit for item in output for unit in self.units_in(item)}

    def _pack(self, tensor: Tensor) -> Tensor | _Saved:
        slot = self._slot_at.get(tensor.untyped_storage().data_ptr())
        if slot is None or slot.unit is None or tensor.is_conj() or tensor.is_neg():
            return tensor
        return _Saved(slot.unit, tensor.dtype, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    @repeatable
    def _unpack(self, saved: Tensor | _Saved) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        self.demand(saved.unit)
        if self._node != (node := _current_node()):
            self._node, self._node_uses = node, set()
        self._node_uses.add(saved.unit)
        full = saved.unit.full
        assert full is not None
        if saved.dtype == full.dtype:
            return full.as_strided(saved.size, saved.stride, saved.offset)
        other = torch.empty(0, dtype=saved.dtype, device=full.device)
        return other.set_(full.untyped_storage(), saved.offset, saved.size, saved.stride)

    # --- slots -------------------------------------------------------------------------------------------------

    def _start(self, unit: ZeroUnit) -> None:
        if self._lookout is not None:
            self._lookout.note(unit.name)
        if unit.resident:
            unit.start_gather()
            return
        slot = self._free_slot(keep=None) or self._new_slot()
        if slot.unit is not None:
            self._release(slot.unit)
        if slot.is_held():
            self._remove(slot)
            slot = self._new_slot()
        slot.unit = unit
        unit.start_gather(slot.memory.view(unit.dtype))
        self._touch(unit)

    def _free_slot(self, keep: ZeroUnit | None) -> _Slot | None:
        """An empty slot, else the one used longest ago of those that nobody uses, `keep` and what is on its way
        being the last choice and, for a prefetch (which has somebody to keep), none at all."""
        while len(self._slots) < min(SLOTS, len(self._moving)):
            self._new_slot()
        free = [slot for slot in self._slots if slot.unit is None]
        if free:
            return free[0]
        in_use = self._node_uses if self._node == _current_node() else set()
        idle = [
            slot
            for slot in self._slots
            if slot.unit is not None and slot.unit is not keep and not slot.unit.pins and slot.unit not in in_use
        ]
        whole = [slot for slot in idle if slot.unit is not None and slot.unit.state is UnitState.WHOLE]
        if keep is not None:
            idle = whole
        return min(whole or idle, key=lambda slot: slot.used, default=None)

    def _new_slot(self) -> _Slot:
        size = max(_LARGEST_ITEM, *(unit.plan.size * unit.dtype.itemsize for unit in self._moving))
        memory = torch.empty(
            -(-size // _LARGEST_ITEM) * _LARGEST_ITEM, dtype=torch.uint8, device=self._moving[0].device
        )
        prefer_large_pages(memory)
        slot = _Slot(memory)
        self._slots.append(slot)
        self._slot_at[slot.address] = slot
        return slot

    def _remove(self, slot: _Slot) -> None:
        self._slots.remove(slot)
        del self._slot_at[slot.address]

    def _finish(self, unit: ZeroUnit) -> None:
        with self.trace.span(Category.WAIT, f"parameters of {unit.name}" if self.trace.is_on else ""):
            unit.finish_gather()

    def _touch(self, unit: ZeroUnit) -> None:
        self._clock += 1
        for slot in self._slots:
            if slot.unit is unit:
                slot.used = self._clock

    def _release(self, unit: ZeroUnit) -> None:
        if unit.state is UnitState.GATHERING:
            self._finish(unit)
        unit.release()
        for slot in self._slots:
            if slot.unit is unit:
                slot.unit = None

    # --- foresight ---------------------------------------------------------------------------------------------

    def _foresee(self, unit: ZeroUnit) -> None:
        """Start to gather what followed this demand in the step before."""
        order, place = self._order, self._place
        if place >= len(order) or order[place] is not unit:
            place = next((later for later in range(place, len(order)) if order[later] is unit), -1)
            if place < 0:
                return  # another way than in the step before: nothing is foreseen until it comes back
        self._place = place + 1
        following = next((later for later in order[place + 1 : place + 4] if later is not unit), None)
        if following is None or following.state is not UnitState.SHARDED:
            return
        if following.resident or self._free_slot(keep=unit) is not None:
            self._start(following)


def _current_node() -> int | None:
    """The number of the operation that the backward differentiates at this moment."""
    node = torch._C._current_autograd_node()
    return None if node is None else int(node._sequence_nr())
