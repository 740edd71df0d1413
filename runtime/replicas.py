"""What several ranks hold alike is compared, so that a rank whose memory has silently changed is found and named.

[Note: what is compared]
    copies   parameters that are whole on every rank: all of them at stage 0; at stages 1 and 2 as they were gathered,
             and the frozen ones; at stage 3 those of small units
    state    what each rank computes for itself and others compute too: fp32 copies of parameters, the optimizer's
             tensors, the average; at stage 0 on all ranks, with hybrid sharding on ranks with the same shard, whose
             shards of the parameters belong to it
Copies and state take turns. Of either, one slice is compared at a time, the next one the next time, until all have had
their turn and it begins anew. Buffers are left out: a batch norm's statistics are each rank's own.

[Note: checksum]
The bits of a slice are added up as integers modulo 2^64, and the sum is taken modulo a prime below 2^30. A single
flipped bit changes the sum by a power of two, so it always shows. Each rank puts its number into a slot of its own,
where the others have zero, of the one small all-reduce of the step: it arrives exactly.

[Note: unlike processors]
The same operations on other processors, or on other numbers of threads, may be rounded otherwise. Where ranks are not
alike, what each computes for itself is not compared; what one has computed for the others still is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dstrain.runtime.comm import Communicator
from dstrain.runtime.ema import WeightAverage
from dstrain.runtime.spec.errors import ReplicasDifferError
from dstrain.runtime.zero.divergence import ranks_in_words
from dstrain.runtime.zero.spread import Weights

PARTS = 16
"""Slices of all that is compared: one is a 16th of a pass over the memory, far below what an update reads."""

SLICE_ELEMENTS = 1 << 16
"""Smaller slices would save nothing."""

PRIME = 1_000_000_007
"""[Note: checksum]"""

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers by their bytes."""

_REMEDY = "memory or a processor there may be faulty: go on from a checkpoint, without that host if it comes again"

Named = tuple[str, Tensor]


class Kind(NamedTuple):
    """Tensors, in an order, that each of some groups of ranks holds alike. [Note: what is compared]"""

    tensors: Callable[[], list[Named]]
    groups: list[list[int]]


class Reading(NamedTuple):
    """Everyone's checksum of the same slice, by rank, on the device."""

    kind: Kind
    sums: Tensor


class ReplicaGuard:
    """Compares what ranks hold alike, a slice every few steps. Has nothing to do where no two ranks do."""

    def __init__(
        self,
        comm: Communicator,
        weights: Weights,
        optimizer: torch.optim.Optimizer,
        parameters: Mapping[str, nn.Parameter],
        average: WeightAverage | None,
        every: int | None,
        parts: int = 1,
    ) -> None:
        """comm: the whole job's. parameters: of the model, by name. parts: of the model, each on as many neighbouring
        ranks. every: steps between two slices; None or 0: never."""
        self._comm, self._weights, self._optimizer = comm, weights, optimizer
        self._parameters, self._average = parameters, average
        self._every = every if every and comm.world_size > 1 else 0
        self._parts = parts
        self._kinds: list[Kind] | None = None

    @torch.no_grad()
    def all_reduce(self, totals: Tensor, step: int) -> Reading | None:
        """Sum `totals` over all ranks, in place; when a slice has its turn, with a number more for each rank."""
        kinds = self._known_kinds() if self._every and step % self._every == 0 else []
        if not kinds:
            self._comm.all_reduce(totals)
            return None
        part, number = divmod(step // self._every, len(kinds))
        slots = self._slots(slice_of(kinds[number].tensors(), part), totals.dtype)
        both = torch.cat([totals, slots])
        self._comm.all_reduce(both)
        totals.copy_(both[: len(totals)])
        return Reading(kinds[number], both[len(totals) :])

    def check(self, reading: Reading | None, where: str) -> None:
        """Raise ReplicasDifferError, on all ranks, where the checksums show that ranks differ. where: for people."""
        if reading is None:
            return
        sums = [int(value) for value in reading.sums.tolist()]
        groups = [versions for group in reading.kind.groups if len(versions := _versions(group, sums)) > 1]
        if groups:
            self._fail(reading.kind, groups[0], where)

    @torch.no_grad()
    def check_all(self, where: str) -> None:
        """Compare everything at once; all ranks call it, between two steps. Raises ReplicasDifferError."""
        for kind in self._known_kinds() if self._every else []:
            slots = self._slots((tensor.reshape(-1) for _, tensor in kind.tensors()), torch.float64)
            self._comm.all_reduce(slots)
            self.check(Reading(kind, slots), where)

    # --- what there is to compare ------------------------------------------------------------------------------

    def _known_kinds(self) -> list[Kind]:
        if self._kinds is None:
            self._kinds = self._find_kinds()
        return self._kinds

    def _find_kinds(self) -> list[Kind]:
        """[Note: what is compared], [Note: unlike processors]"""
        ranks, sharers = self._comm.world_size // self._parts, self._weights.sharers
        alike = len(set(self._comm.all_gather_object(_processor(self._comm.device)))) == 1
        shards = [list(range(first, first + sharers)) for first in range(0, ranks, sharers)]
        groups = [list(range(ranks))] if alike else shards
        kinds = []
        if len(groups[0]) > 1 and any(self._comm.all_gather_object(bool(self._copies()))):
            kinds.append(Kind(self._copies, self._in_all_parts(groups)))
        if alike and sharers < ranks:
            same = [list(range(place, ranks, sharers)) for place in range(sharers)]
            kinds.append(Kind(self._state, self._in_all_parts(same)))
        if not alike:
            self._tell_unlike()
        return kinds

    def _in_all_parts(self, groups: list[list[int]]) -> list[list[int]]:
        size = self._comm.world_size // self._parts
        return [[part * size + rank for rank in group] for part in range(self._parts) for group in groups]

    def _tell_unlike(self) -> None:
        if self._comm.rank == 0:
            sys.stderr.write(
                "dstrain: train.check_replicas_every: ranks have other processors or numbers of threads, which may "
                "round otherwise: what each computes for itself is not compared\n"
            )
            sys.stderr.flush()

    def _copies(self) -> list[Named]:
        return self._weights.copies(self._parameters)

    def _state(self) -> list[Named]:
        return list(self._states())

    def _states(self) -> Iterator[Named]:
        for name in self._parameters:
            shard = self._weights.shard_of(name)
            if shard is not None:
                yield name, shard
        has_tensors = _is_known(self._optimizer)
        for name, own in self._weights.trained:
            if self._weights.exist:
                yield f"the fp32 copy of {name}", own.detach()
            for key, value in self._optimizer.state.get(own, {}).items() if has_tensors else ():
                if isinstance(value, Tensor) and value.numel() > 1:
                    yield f"{key} of {name}", value
        for name, average in self._average.tensors.items() if self._average is not None else ():
            yield f"the average of {name}", average

    # --- checksums ---------------------------------------------------------------------------------------------

    def _slots(self, pieces: Iterable[Tensor], dtype: torch.dtype) -> Tensor:
        """Zeros but for this rank's checksum."""
        slots = torch.zeros(self._comm.world_size, dtype=dtype, device=self._comm.device)
        slots[self._comm.rank] = checksum(pieces, self._comm.device)
        return slots

    @torch.no_grad()
    def _fail(self, kind: Kind, versions: list[list[int]], where: str) -> None:
        """Name the tensor; all ranks."""
        device = self._comm.device
        own = [(name, int(checksum([tensor.reshape(-1)], device))) for name, tensor in kind.tensors()]
        everyones = self._comm.all_gather_object(own)
        group = sorted(rank for version in versions for rank in version)
        differ = []
        for place, (name, _) in enumerate(everyones[group[0]]):
            found = _versions(group, [sums[place][1] if place < len(sums) else -1 for sums in everyones])
            if len(found) > 1:
                differ.append((name, found))
        raise _error(where, differ or [("what was read once", versions)])


def slice_of(tensors: Sequence[Named], turn: int) -> list[Tensor]:
    """The flat pieces of one slice of all tensors, laid end to end; those of consecutive turns are all of them."""
    sizes = [tensor.numel() for _, tensor in tensors]
    total = sum(sizes)
    parts = min(PARTS, max(1, total // SLICE_ELEMENTS))
    bounds = [total * part // parts // 8 * 8 for part in range(parts)] + [total]
    start, stop = list(pairwise(bounds))[turn % parts]
    pieces, begin = [], 0
    for size, (_, tensor) in zip(sizes, tensors, strict=True):
        low, high = max(start - begin, 0), min(stop - begin, size)
        if low < high:
            pieces.append(tensor.reshape(-1)[low:high])
        begin += size
    return pieces


def checksum(pieces: Iterable[Tensor], device: torch.device) -> Tensor:
    """Of the bits of flat tensors: an integer below `PRIME`, as a tensor on `device`. [Note: checksum]"""
    sums = [_words(piece).sum(dtype=torch.int64).to(device) for piece in pieces if piece.numel()]
    total = torch.stack(sums).sum() if sums else torch.zeros((), dtype=torch.int64, device=device)
    return torch.remainder(total, PRIME)


def _words(flat: Tensor) -> Tensor:
    """The same bits as integers: of 64 where they fit, for those are added fastest. The choice depends on the size
    alone, for ranks whose memory lies otherwise must choose alike."""
    if flat.nbytes % 8:
        return flat.view(_WORDS[flat.itemsize])
    if flat.storage_offset() * flat.itemsize % 8:
        flat = flat.clone()
    return flat.view(torch.int64)


def _versions(group: Sequence[int], sums: Sequence[int]) -> list[list[int]]:
    """The ranks of a group by what they have; those that most have first."""
    ranks: dict[int, list[int]] = {}
    for rank in group:
        ranks.setdefault(sums[rank], []).append(rank)
    return sorted(ranks.values(), key=len, reverse=True)


def _error(where: str, differ: Sequence[tuple[str, list[list[int]]]]) -> ReplicasDifferError:
    """Which rank is at fault is known where most agree."""
    name, versions = differ[0]
    group = sorted(rank for version in versions for rank in version)
    more = f" and {len(differ) - 1} more tensors" if len(differ) > 1 else ""
    if 2 * len(versions[0]) > len(group):
        odd = sorted(rank for version in versions[1:] for rank in version)
        found = f"{ranks_in_words(odd)} to differ from {ranks_in_words(versions[0])}"
    else:
        odd = group
        found = " against ".join(ranks_in_words(version) for version in versions)
    said = f"{where}: expected {name}{more} to be the same on {ranks_in_words(group)}, found {found}; {_REMEDY}"
    return ReplicasDifferError(said, tuple(odd))


def _is_known(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its state is a function of gradients: others may keep what is each rank's own."""
    stepping = next(kind for kind in type(optimizer).__mro__ if "step" in vars(kind))
    return stepping.__module__.startswith(("torch.optim", "dstrain."))


def _processor(device: torch.device) -> str:
    """What decides how sums are rounded. [Note: unlike processors]"""
    on_gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return f"{_cpu()}, {torch.get_num_threads()} threads, {on_gpu}, torch {torch.__version__}"


def _cpu() -> str:
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as file:
            return next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "")
    except OSError:
        return ""
