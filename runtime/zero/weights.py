"""The parameters of a model at ZeRO stages 1 to 3, and what of them this rank's optimizer moves.

[Note: pieces]
The optimizer of a rank moves *pieces*: what the rank's shards hold of each parameter. A piece that is a whole
parameter has its shape, any other is a row of as many dimensions, by which users make groups, and empty where the rank
has nothing of it: all ranks' optimizers have the same groups of the same parameters. `whole_shape` is that of the
parameter. In fp32 a piece is a view of the shard, so
that the optimizer moves the parameters themselves; bf16 and fp16 shards have fp32 masters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from dstrain.runtime.comm import Communicator
from dstrain.runtime.comm_group import CommGroup, Wish
from dstrain.runtime.spec.errors import UsageError
from dstrain.runtime.spec.training_config import OffloadConfig
from dstrain.runtime.tracing.recorder import Recorder
from dstrain.runtime.zero.divergence import BACKWARD, END_OF_BACKWARD, END_OF_STEP, Lookout
from dstrain.runtime.zero.gatherer import Gatherer
from dstrain.runtime.zero.grouping import Group, by_module, by_size
from dstrain.runtime.zero.plan import Piece, entry_overlap, plan_unit
from dstrain.runtime.zero.unit import ZeroUnit, host_memory
from dstrain.runtime.zero.watch import Watch


@dataclass(frozen=True)
class OwnPiece:
    """What this rank has of one parameter. place: in its shard; None if nothing. own: what the optimizer moves."""

    unit: ZeroUnit
    place: Piece | None
    parameter: nn.Parameter
    own: nn.Parameter


class ShardedWeights:
    """Takes a model's parameters over into units; on construction rank 0's values are broadcast, unit by unit.

    trained: pieces by their parameters' names. units: in the order of the model. exist: whether pieces are fp32
    masters of parameters in lower precision.
    """

    def __init__(
        self,
        model: nn.Module,
        comm: Communicator,
        shards: CommGroup,
        stage: int,
        bucket_elements: int,
        resident_elements: int,
        keep_whole: bool,
        whole_tensors: bool,
        dtype: torch.dtype = torch.float32,
        comm_wish: Wish = "auto",
        offload: OffloadConfig | None = None,
        fill: Callable[[Tensor], object] = lambda parameter: None,
        watched: bool = True,
        sections: Sequence[frozenset[str]] = (),
    ) -> None:
        """resident_elements: units of fewer stay whole at stage 3; keep_whole: all of them, from step to step.
        whole_tensors: cut only between parameters. dtype: of parameters that are fp32 now. comm_wish: zero.comm. fill:
        gives a parameter its numbers, on rank 0, just before they are needed. watched: modules have hooks; without,
        which a compiler needs and stage 3 cannot, everyone waits behind each step. sections: names of parameters that
        share no unit with others; without any, all may."""
        self.stage, self.shards = stage, shards
        self._offload = offload or OffloadConfig()
        groups = _groups(model, stage, bucket_elements, resident_elements, sections)
        self.units: list[ZeroUnit] = []
        for number, group in enumerate(groups):
            shapes = [(name, tuple(parameter.shape)) for name, parameter in group.parameters]
            plan = plan_unit(group.name, shapes, shards.size, whole_tensors)
            resident = stage < 3 or keep_whole or plan.size < resident_elements
            parameters = [parameter for _, parameter in group.parameters]
            in_host = self._offload.parameters and not resident
            unit = ZeroUnit(number, plan, parameters, shards, dtype, resident, in_host)
            _take(unit, comm, fill)
            self.units.append(unit)
        shards.choose(comm_wish, 0 if whole_tensors else max((unit.plan.size for unit in self.units), default=0))
        self.lookout = Lookout(comm.whole, shards.ranks) if stage == 3 and shards.size > 1 else None
        shards.share([unit.shard for unit in self.units])
        self.gatherer = Gatherer(self.units, self.lookout)
        of_module: dict[str, list[ZeroUnit]] = {}
        for unit, group in zip(self.units, groups, strict=True):
            of_module.setdefault(group.module, []).append(unit)
        blocks = {module: units for module, units in of_module.items() if module}
        assert watched or stage < 3
        self.watch = Watch(model if watched else nn.Module(), self.gatherer, blocks)
        self._is_watched = watched
        self._masters: dict[ZeroUnit, Tensor] = {}
        pieces = {name: made for unit in self.units if unit.is_trained for name, made in self._make_pieces(unit)}
        self.pieces = {name: pieces[name] for name, _ in model.named_parameters() if name in pieces}
        self.trained = [(name, piece.own) for name, piece in self.pieces.items()]
        self._piece_of = {piece.parameter: piece for piece in self.pieces.values()}
        self._place_of = {
            entry.name: (unit, number) for unit in self.units for number, entry in enumerate(unit.plan.entries)
        }

    @property
    def exist(self) -> bool:
        return any(unit.dtype is not torch.float32 for unit in self._masters)

    @property
    def sharers(self) -> int:
        """Ranks that share one copy of the state."""
        return self.shards.size

    @property
    def backward_gathers(self) -> bool:
        """Whether a rank's backward needs the other ranks' backwards, even where it counts for nothing."""
        return any(not unit.resident for unit in self.units)

    @contextmanager
    def in_forward(self) -> Iterator[None]:
        """Around each forward of the model."""
        training = torch.is_grad_enabled()
        self.gatherer.begin_forward(training)
        with self.gatherer.saving():
            yield

    @contextmanager
    def in_backward(self) -> Iterator[None]:
        """Around each backward."""
        self.watch.in_backward = True
        self.gatherer.begin_backward()
        self._note(BACKWARD)
        try:
            yield
            self._note(END_OF_BACKWARD)
        finally:
            self.watch.in_backward = False
            self.gatherer.unpin_all()

    def record(self, trace: Recorder) -> None:
        """Let `trace` have the waits for parameters."""
        self.gatherer.trace = trace

    def describe(self) -> str:
        """One line for people on how the state is spread."""
        ranks, units = self.shards.size, len(self.units)
        largest = max((unit.plan.size for unit in self.units), default=0)
        return (
            f"ZeRO stage {self.stage}: {ranks} {'rank shares' if ranks == 1 else 'ranks share'} one copy, "
            f"{units} {'unit' if units == 1 else 'units'} of up to {largest / 1e6:.2f} M elements, "
            f"comm {self._comm()}"
        )

    def _comm(self) -> str:
        """How units are gathered, with what was measured to choose it."""
        used = sorted({self.shards.algorithm_for(unit.plan.bounds) for unit in self.units})
        trial = [f"{name} {1000 * seconds:.1f} ms" for name, seconds in self.shards.trial_s.items()]
        return " and ".join(used or [self.shards.algorithm]) + (f" ({', '.join(trial)})" if trial else "")

    def at_step_end(self) -> AbstractContextManager[None]:
        """Around the collectives that end a step."""
        if self.lookout is None:
            return nullcontext()
        self._note(END_OF_STEP)
        return self.lookout.waiting()

    @property
    def order(self) -> int:
        """A small number for the order in which this rank has used its units; 0 where it does not matter."""
        return 0 if self.lookout is None else self.lookout.checksum

    def check_order(self, total: float, squares: float, ranks: Sequence[int]) -> None:
        """Raise UsageError, on all ranks of the job, where `order`, summed over some, and its squares show that it
        differs between those."""
        if self.lookout is not None and len(ranks) * squares != total * total:
            self.lookout.compare(ranks)

    def _note(self, place: str) -> None:
        if self.lookout is not None:
            self.lookout.note(place)

    def begin_step(self) -> None:
        """Behind each step."""
        self.gatherer.begin_step()

    def done_with(self, unit: ZeroUnit) -> None:
        """A backward has made all the unit's gradients: nobody uses it any more."""
        unit.pins = 0

    def settle(self) -> None:
        """Before shards or masters change, but for the end of a step: nobody reads them any more; on all ranks."""
        self.shards.settle()

    def publish(self) -> None:
        """Round the masters into the shards, and start to give everyone what has changed."""
        with torch.no_grad():
            for unit, master in self._masters.items():
                unit.shard.copy_(master, non_blocking=True)
        self.shards.announce()
        self.gatherer.forget()
        self.gatherer.start_residents()
        if not self._is_watched:
            self.gatherer.finish_residents()

    @contextmanager
    def whole(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """Around what reads whole parameters; on all ranks."""
        units = self._units_of(parameters)
        for unit in units:
            self.gatherer.pin(unit)
            self.gatherer.demand(unit, foresee=False)
        try:
            yield
        finally:
            for unit in units:
                self.gatherer.unpin(unit)

    def adopt(self, parameters: Sequence[nn.Parameter]) -> None:
        """Somebody has written the same to these of the model's parameters on all ranks: shards and masters follow."""
        with torch.no_grad():
            for unit in self._units_of(parameters):
                assert unit.full is not None
                low, high = unit.plan.interval(self.shards.index)
                if not unit.resident:
                    unit.shard.copy_(unit.full[low:high])
                if unit in self._masters:
                    self._masters[unit].copy_(unit.shard)

    def _units_of(self, parameters: Sequence[nn.Parameter]) -> list[ZeroUnit]:
        chosen = set(parameters)
        return [unit for unit in self.units if not chosen.isdisjoint(unit.parameters)]

    def restored(self) -> None:
        """Parameters, and masters where they `exist`, have been put back: everyone needs them."""
        with torch.no_grad():
            for unit, master in self._masters.items():
                if unit.dtype is torch.float32:  # in the host's memory, not stored for itself
                    master.copy_(unit.shard)
        self.publish()

    def with_gradients(self) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        """What this rank has of each parameter, with its name and its part of the reduced gradients."""
        for name, piece in self.pieces.items():
            if piece.place is not None:
                sums = piece.unit.grad if piece.unit.host_grad is None else piece.unit.host_grad
                assert sums is not None
                start = piece.place.offset
                yield name, piece.own, sums[start : start + piece.place.numel].view(piece.own.shape)

    def copies(self, parameters: Mapping[str, nn.Parameter]) -> list[tuple[str, Tensor]]:
        """Those of the model's parameters that are whole on all ranks when a step ends."""
        self.gatherer.finish_residents()
        return [
            (name, parameter.detach())
            for name, parameter in parameters.items()
            if name not in self._place_of or self._place_of[name][0].resident
        ]

    def collect(self, name: str, own: Tensor) -> Tensor | None:
        """Put the ranks' pieces of a tensor with the elements of parameter `name` together, whole on the first rank of
        the shard group; None on the others. own: this rank's piece. All ranks call it."""
        unit, number = self._place_of[name]
        entry = unit.plan.entries[number]
        sizes = [entry_overlap(unit.plan, shard, entry) for shard in range(self.shards.size)]
        flat = self.shards.collect(own.detach().reshape(-1), [stop - start for start, stop in sizes])
        return None if flat is None else flat.view(entry.shape)

    def interval_of(self, name: str) -> tuple[int, int]:
        """What this rank has of parameter `name`: [start, stop) of it flattened."""
        unit, number = self._place_of[name]
        return entry_overlap(unit.plan, self.shards.index, unit.plan.entries[number])

    def shard_of(self, name: str) -> Tensor | None:
        """This rank's interval of a parameter in the model's dtype, flat; None: it is not sharded."""
        if name not in self._place_of:
            return None
        unit, number = self._place_of[name]
        entry, (low, _) = unit.plan.entries[number], unit.plan.interval(self.shards.index)
        start, stop = entry_overlap(unit.plan, self.shards.index, entry)
        begin = entry.start + start - low if stop > start else 0
        return unit.shard[begin : begin + stop - start]

    def stand_in(self, optimizer: torch.optim.Optimizer) -> None:
        """Have an optimizer that was made for the model's parameters move this rank's pieces."""
        for group in optimizer.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.requires_grad]
            for parameter in trained:
                if parameter not in self._piece_of:
                    raise UsageError.mismatch(
                        "optimizer",
                        "parameters of the model that are trained",
                        f"another one, of shape {tuple(parameter.shape)}",
                        "make what a loss trains a part of the model",
                    )
                if parameter in optimizer.state:
                    expected = "an optimizer that has done no step, at zero.stage 1 to 3"
                    raise UsageError.mismatch("optimizer", expected, "one with state")
            group["params"] = [self._piece_of[parameter].own for parameter in trained]

    def _make_pieces(self, unit: ZeroUnit) -> Iterator[tuple[str, OwnPiece]]:
        source = unit.shard
        is_low = unit.dtype in (torch.bfloat16, torch.float16)
        if self._offload.optimizer and (is_low or unit.resident or not self._offload.parameters):
            source = self._masters[unit] = host_memory(unit.shard.numel(), torch.float32)
            source.copy_(unit.shard)
        elif is_low:
            source = self._masters[unit] = unit.shard.float()
        places = {place.entry: place for place in unit.plan.pieces(unit.group.index)}
        for entry, parameter in zip(unit.plan.entries, unit.parameters, strict=True):
            place = places.get(entry)
            part = source[:0] if place is None else source[place.offset : place.offset + place.numel]
            own = nn.Parameter(_as_piece(part, entry.shape))
            own.whole_shape = entry.shape  # type: ignore[attr-defined] # rules of groups look at it
            yield entry.name, OwnPiece(unit, place, parameter, own)


def _as_piece(part: Tensor, shape: tuple[int, ...]) -> Tensor:
    """What a rank has of a parameter of `shape`, flat, in the shape of a piece. [Note: pieces]"""
    if part.numel() == prod(shape):
        return part.view(shape)
    return part.view(*[1] * (len(shape) - 1), -1) if part.numel() else part.view(0, *shape[1:])


def _groups(
    model: nn.Module, stage: int, bucket_elements: int, small: int, sections: Sequence[frozenset[str]]
) -> list[Group]:
    if stage == 3:
        return by_module(model, small, sections)
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return list(reversed(by_size(trained, bucket_elements, sections)))


def _take(unit: ZeroUnit, comm: Communicator, fill: Callable[[Tensor], object]) -> None:
    """Rank 0's values, parameter by parameter: no other is in memory meanwhile."""
    for parameter in unit.parameters:
        if comm.rank == 0:
            fill(parameter)
            value = parameter.detach().to(unit.device, unit.dtype).contiguous()
        else:
            value = torch.empty(parameter.shape, dtype=unit.dtype, device=unit.device)
        comm.broadcast(value)
        unit.take(parameter, value)
    if unit.resident:
        unit.show()
