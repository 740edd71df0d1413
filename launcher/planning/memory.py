"""The memory of one rank, tensor by tensor as the runtime allocates it.

[Note: what a rank holds]
    parameters   stages 0 to 2: whole, in flat units from stage 1 on; stage 3: shards, and small units whole
                 (runtime/zero/unit.py). Units are laid out and padded by the runtime's own `plan_unit`.
    gradients    stage 0: of all parameters; else of this rank's shards (runtime/zero/gradients.py). Of one that several
                 stages of the rank have, besides, what waits for the stage that ends it (runtime/pipeline/executor.py)
    optimizer    its state, the fp32 masters of bf16 and fp16 parameters, and the weights' average
    live         stage 3: the two slots that units are gathered into (runtime/zero/gatherer.py)
    buckets      stages 1 to 3: the pool of two buffers of the largest unit, for each pipeline stage; where gradients of
                 several micro-batches are added up locally, a buffer for each unit (runtime/zero/gradients.py)
    activations  what forwards keep for backwards, of as many micro-batches as the schedule has in flight; of a block
                 that is recomputed its input, and all of one such block (`activations.py`)
    messages     what a pipeline stage has room for before it comes, and has sent last (runtime/pipeline/messages.py)
HEADROOM is for the rest: what an operation needs while it runs, and a reduction while it is under way (a shard), the
GPU's context, and the allocator's gaps.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from dstrain.launcher.planning.parts import Named, Part
from dstrain.runtime.spec.config import JobConfig
from dstrain.runtime.spec.model_shapes import CONFIGURED, ITEM_BYTES, ModelShapes, ParameterShape
from dstrain.runtime.spec.parallel_dims import ParallelDims
from dstrain.runtime.spec.training_config import OptimizerConfig, ZeroConfig
from dstrain.runtime.zero.groups import Group, by_place, by_size
from dstrain.runtime.zero.plan import plan_unit

HEADROOM = 0.1
"""Share of a GPU's memory that a plan leaves free."""
SLOTS = 2
"""As runtime/zero/gatherer.py has it."""
POOL = 2
"""As runtime/zero/gradients.py has it."""
WHOLE_TENSORS = ("muon", "adafactor")
"""Optimizers that look at whole tensors, so that units are cut between parameters (runtime/zero/spread.py)."""
FP32 = 4
LOW = ("bfloat16", "float16")


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank. [Note: what a rank holds] host: in the host's memory, by `zero.offload`."""

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    live: int = 0
    buckets: int = 0
    activations: int = 0
    messages: int = 0
    host: int = 0

    @property
    def total(self) -> int:
        """On the GPU."""
        state = self.parameters + self.gradients + self.optimizer + self.live + self.buckets
        return state + self.activations + self.messages


class Unit(NamedTuple):
    """What is gathered and reduced together. stage: of the pipeline. size: elements, padded; own: of them, this rank's.
    state: elements of the optimizer's state, this rank's. sum_bytes: of an element of the gradients' sum."""

    stage: int
    size: int
    own: int
    state: int
    item_bytes: int
    sum_bytes: int
    is_low: bool
    is_trained: bool


class _Planned(NamedTuple):
    """A unit before it is cut. states: elements of the optimizer's state, for each parameter."""

    unit: Unit
    shapes: tuple[tuple[int, ...], ...]
    states: tuple[int, ...]


class _Cut(NamedTuple):
    """How a unit is cut between tensors: elements in all, and for each shard its elements and its parameters."""

    size: int
    own: tuple[int, ...]
    members: tuple[range, ...]


class Sent(NamedTuple):
    """Bytes of a part's units: of the sums of trained ones, of parameters that are gathered for each use, and of those
    that are gathered once a step."""

    sums: int
    moving: int
    staying: int


class StateMemory:
    """What all layouts of one job have in common, and the groups of parts that several of them share."""

    def __init__(self, job: JobConfig, shapes: ModelShapes) -> None:
        self._job, self._blocks = job, shapes.blocks
        self._in_blocks = tuple(f"{block}." for block in shapes.blocks)
        precision = job.precision
        self._dtype = "float32" if precision.autocast else CONFIGURED[precision.dtype]
        self._sums = ITEM_BYTES[CONFIGURED[precision.reduce_dtype or "fp32"]]
        self._whole_tensors = job.optimizer.factory is None and job.optimizer.name in WHOLE_TENSORS
        self._units_of: dict[tuple[Part, bool], list[_Planned]] = {}
        self._memory: dict[tuple[Part, ZeroConfig, int, bool], Memory] = {}
        self._sent: dict[tuple[Part, ZeroConfig, int], Sent] = {}

    def of(self, part: Part, dims: ParallelDims, zero: ZeroConfig, micro_batches: int) -> Memory:
        """The state alone, of the rank that has most of it."""
        key = part, zero, dims.data_shard, micro_batches > 1
        if key not in self._memory:
            found = self._replicated(part) if zero.stage == 0 else self._sharded(part, dims, zero, micro_batches)
            waiting = sum(one.numel() * self._item(one) for one in part.shared)
            self._memory[key] = replace(found, gradients=found.gradients + waiting)
        return self._memory[key]

    def sent(self, part: Part, dims: ParallelDims, zero: ZeroConfig) -> Sent:
        """What one reduction and one gathering move; at stage 0 nothing is gathered."""
        key = part, zero, dims.data_shard
        if key not in self._sent:
            self._sent[key] = self._find_sent(part, dims, zero)
        return self._sent[key]

    def _find_sent(self, part: Part, dims: ParallelDims, zero: ZeroConfig) -> Sent:
        if zero.stage == 0:
            return Sent(sum(one.numel() * self.sum_bytes(one) for _, one in part.trained), 0, 0)
        sums = moving = staying = 0
        for unit, shapes, _ in self._planned(part, zero.stage == 3):
            size = self._size_of(shapes, dims.data_shard)
            sums += size * unit.sum_bytes if unit.is_trained else 0
            if is_moving(size, zero):
                moving += size * unit.item_bytes
            elif unit.is_trained:
                staying += size * unit.item_bytes
        return Sent(sums, moving, staying)

    def _sharded(self, part: Part, dims: ParallelDims, zero: ZeroConfig, micro_batches: int) -> Memory:
        units = self.units(part, dims, zero)
        trained = [unit for unit in units if unit.is_trained]
        moving = [unit for unit in units if is_moving(unit.size, zero)]
        parameters = sum(unit.size * unit.item_bytes for unit in units if not is_moving(unit.size, zero))
        if zero.stage < 3:
            parameters += sum(self._item(one) * one.numel() for _, one in part.parameters if not one.requires_grad)
        shards = sum(unit.own * unit.item_bytes for unit in moving)
        gradients = sum(unit.own * unit.sum_bytes for unit in trained)
        optimizer = self._optimizer(trained, zero)
        host = 0
        if zero.offload.optimizer:
            optimizer, host = 0, optimizer + gradients
        if zero.offload.parameters:
            shards, host = 0, host + shards
        return Memory(
            parameters=parameters + shards,
            gradients=gradients,
            optimizer=optimizer,
            live=_slots([unit.size * unit.item_bytes for unit in moving]),
            buckets=_buckets(trained, accumulates(zero) == "local" and micro_batches > 1),
            host=host,
        )

    def units(self, part: Part, dims: ParallelDims, zero: ZeroConfig) -> list[Unit]:
        """Of the rank of the shard group that has most; stages 1 to 3."""
        shards, planned = dims.data_shard, self._planned(part, zero.stage == 3)
        if not self._whole_tensors:
            sizes = [_size(each.shapes, shards) for each in planned]
            return [
                each.unit._replace(size=size, own=size // shards, state=sum(each.states) // shards)
                for each, size in zip(planned, sizes, strict=True)
            ]
        cuts = [_cut_between_tensors(each.shapes, shards) for each in planned]
        totals = [sum(cut.own[shard] for cut in cuts) for shard in range(shards)]
        most = totals.index(max(totals))
        return [
            each.unit._replace(
                size=cut.size, own=cut.own[most], state=sum(each.states[place] for place in cut.members[most])
            )
            for each, cut in zip(planned, cuts, strict=True)
        ]

    def _size_of(self, shapes: tuple[tuple[int, ...], ...], shards: int) -> int:
        return _cut_between_tensors(shapes, shards).size if self._whole_tensors else _size(shapes, shards)

    def sum_bytes(self, parameter: ParameterShape) -> int:
        """Of an element of its gradient, while it is summed."""
        is_usual = self._dtype_of(parameter) in ("float32", *LOW)
        return self._sums if is_usual else self._item(parameter)

    def _replicated(self, part: Part) -> Memory:
        trained = part.trained
        masters = sum(one.numel() for _, one in trained if self._dtype_of(one) in LOW)
        average = sum(one.numel() for _, one in trained) if self._job.train.ema_decay else 0
        return Memory(
            parameters=sum(one.numel() * self._item(one) for _, one in part.parameters),
            gradients=sum(one.numel() * self.sum_bytes(one) for _, one in trained),
            optimizer=FP32 * (masters + average + sum(map(self._state_elements, trained))),
        )

    def _optimizer(self, trained: Sequence[Unit], zero: ZeroConfig) -> int:
        offload = zero.offload
        with_masters = [unit for unit in trained if unit.is_low]
        if offload.optimizer:
            with_masters = [u for u in trained if u.is_low or not (offload.parameters and is_moving(u.size, zero))]
        elements = sum(unit.own for unit in with_masters)
        elements += sum(unit.state for unit in trained)
        elements += sum(unit.own for unit in trained) if self._job.train.ema_decay else 0
        return FP32 * elements

    def _planned(self, part: Part, by_module: bool) -> list[_Planned]:
        """The part's units."""
        key = part, by_module
        if key not in self._units_of:
            if by_module:
                small = self._job.zero.resident_elements
                groups = by_place(part.parameters, self._blocks, small, part.sections)
            else:
                groups = by_size(part.trained, self._job.zero.bucket_elements, part.sections)
            self._units_of[key] = [self._unit(part, group) for group in groups]
        return self._units_of[key]

    def _unit(self, part: Part, group: Group[ParameterShape]) -> _Planned:
        name, first = group.parameters[0]
        unit = Unit(
            stage=part.stage_of[name],
            size=0,
            own=0,
            state=0,
            item_bytes=self._item(first),
            sum_bytes=self.sum_bytes(first),
            is_low=self._dtype_of(first) in LOW,
            is_trained=first.requires_grad,
        )
        states = tuple(map(self._state_elements, group.parameters))
        return _Planned(unit, tuple(one.shape for _, one in group.parameters), states)

    def _dtype_of(self, parameter: ParameterShape) -> str:
        return self._dtype if parameter.dtype == "float32" else parameter.dtype

    def _item(self, parameter: ParameterShape) -> int:
        return ITEM_BYTES[self._dtype_of(parameter)]

    def _state_elements(self, named: Named) -> int:
        name, parameter = named
        return optimizer_elements(self._job.optimizer, parameter, name.startswith(self._in_blocks))


def accumulates(zero: ZeroConfig) -> str:
    """How gradients of several micro-batches are added up, by default too."""
    return zero.accumulate or ("local" if zero.stage < 2 else "sharded")


def is_moving(size: int, zero: ZeroConfig) -> bool:
    """Whether a unit of so many elements is gathered for each use, and freed."""
    return zero.stage == 3 and zero.reshard != "step" and size >= zero.resident_elements


def optimizer_elements(config: OptimizerConfig, parameter: ParameterShape, in_block: bool) -> int:
    """Of the optimizer's state for one parameter. in_block: muon is taken to move the matrices there, adamw all the
    rest. A factory's optimizer is taken to keep two for each element, as adamw does."""
    count = parameter.numel()
    if config.factory is not None:
        return 2 * count
    match config.name:
        case "sgd":
            return 0 if config.momentum == 0 else count
        case "adafactor":
            is_matrix = len(parameter.shape) > 1 and count > 0
            return count // parameter.shape[-1] + count // parameter.shape[-2] if is_matrix else count
        case "muon" if in_block and len(parameter.shape) == 2:
            return count
        case _:
            return (3 if config.args.get("amsgrad") else 2) * count


def _buckets(trained: Sequence[Unit], all_open: bool) -> int:
    """One pool for each pipeline stage of the rank. all_open: none is reduced before the last micro-batch."""
    total = 0
    for stage in {unit.stage for unit in trained}:
        sizes = [unit.size * unit.sum_bytes for unit in trained if unit.stage == stage]
        total += max(sizes) * (len(sizes) if all_open else min(POOL, len(sizes)))
    return total


def _slots(sizes: Sequence[int]) -> int:
    """Slots are multiples of 16 bytes."""
    return min(SLOTS, len(sizes)) * (-(-max(sizes, default=0) // 16) * 16)


@lru_cache(maxsize=4096)
def _size(shapes: tuple[tuple[int, ...], ...], shards: int) -> int:
    """Elements of a unit's buffer that is cut evenly."""
    return plan_unit("", [("", shape) for shape in shapes], shards).size


@lru_cache(maxsize=256)
def _cut_between_tensors(shapes: tuple[tuple[int, ...], ...], shards: int) -> _Cut:
    plan = plan_unit("", [("", shape) for shape in shapes], shards, whole_tensors=True)
    starts = [entry.start for entry in plan.entries]
    members = [range(bisect_left(starts, low), bisect_left(starts, high)) for low, high in pairwise(plan.bounds)]
    return _Cut(plan.size, tuple(high - low for low, high in pairwise(plan.bounds)), tuple(members))
