"""The state of an engine as parts of named tensors and JSON, and back. [Note: what is stored] in manifest.py.

[Note: shares]
What several ranks hold alike (everything at stage 0, each shard once per replica) is written once: laid out in one row,
the row is cut evenly, and each writes one section; only a tensor of LARGE_BYTES or more is cut itself. What one rank
holds alone (its random numbers, a Muon moment that is not sharded by elements) it writes itself.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dstrain.runtime.checkpoint.dtypes import DTYPES, NAMES
from dstrain.runtime.checkpoint.manifest import Piece, TensorEntry
from dstrain.runtime.checkpoint.parts import Part
from dstrain.runtime.engine import Engine, TorchSchedule
from dstrain.runtime.pipeline.pipeline import Pipeline
from dstrain.runtime.spec.errors import CheckpointError

LARGE_BYTES = 1 << 20


@dataclass
class State:
    """A checkpoint that was read. tensors: whole, by name. values: JSON."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]


@dataclass(frozen=True)
class Stored:
    """A tensor of the model. whole: gives it on rank 0; all ranks call it, in the same order, if it is sharded."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    whole: Callable[[], Tensor | None]


@dataclass(frozen=True)
class Held:
    """A part of a tensor on this rank. tensor: flat."""

    part: Part
    tensor: Tensor


@dataclass
class Captured:
    """What this rank saves. held: as it lies in the engine, not copied. scalars: what its optimizer holds beside
    tensors, by parameter. order: all names that this rank knows."""

    held: list[Held] = field(default_factory=list)
    scalars: dict[str, dict[str, Any]] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)


def model_tensors(engine: Engine) -> dict[str, Tensor]:
    """Parameters and persistent buffers by their names; a tied parameter once, under its first name. Where parameters
    are sharded, shapes and dtypes are right, and numbers are not."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in engine.module.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            fix = "let get_extra_state return a tensor, or keep it elsewhere"
            raise CheckpointError(
                f"model.{name}: expected a tensor in the state_dict, found {type(tensor).__name__}; {fix}"
            )
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[f"model.{name}"] = tensor.detach()
    return tensors


def capture_model(engine: Engine) -> dict[str, Stored]:
    """The model's parameters and persistent buffers."""

    def stored(name: str, tensor: Tensor) -> Stored:
        shard = engine.weights.shard_of(name)
        if shard is None:
            return Stored(tuple(tensor.shape), tensor.dtype, lambda: tensor)
        return Stored(tuple(tensor.shape), shard.dtype, lambda: engine.weights.collect(name, shard))

    own = {name: stored(name.removeprefix("model."), tensor) for name, tensor in model_tensors(engine).items()}
    return own if engine.pipeline is None else _of_all_stages(engine, engine.pipeline, own)


def _of_all_stages(engine: Engine, pipeline: Pipeline, own: Mapping[str, Stored]) -> dict[str, Stored]:
    """What other stages have is sent to rank 0 by the first rank that has it."""
    counted = {
        name: (stored.shape, stored.dtype)
        for name, stored in own.items()
        if pipeline.part.is_counted(name.removeprefix("model."))
    }
    everyones = engine.comm.all_gather_object(counted)

    def fetch(name: str, shape: tuple[int, ...], dtype: torch.dtype, place: int) -> Tensor | None:
        source = engine.dims.data_ranks(place)[0]
        whole = own[name].whole() if pipeline.place == place else None
        if source == 0 or engine.rank not in (0, source):
            return whole if engine.rank == 0 else None
        if engine.rank == source:
            assert whole is not None
            engine.comm.pass_on(whole.detach().contiguous().view(-1).view(torch.uint8), source, 0)
            return None
        received = torch.empty(shape, dtype=dtype)
        engine.comm.pass_on(received.view(-1).view(torch.uint8), source, 0)
        return received

    return {
        name: Stored(shape, dtype, partial(fetch, name, shape, dtype, place))
        for place in range(engine.dims.pipeline)
        for name, (shape, dtype) in everyones[engine.dims.data_ranks(place)[0]].items()
    }


def describe_model(engine: Engine) -> dict[str, Any]:
    """What an export needs besides the numbers: a transformers configuration, and which names mean one tensor."""
    config, generation = (_as_json(getattr(engine.module, name, None)) for name in ("config", "generation_config"))
    first: dict[int, str] = {}
    tied = {}
    for name, tensor in engine.module.state_dict(keep_vars=True).items():
        known = first.setdefault(id(tensor), name)
        if known != name:
            tied[name] = known
    if engine.pipeline is not None:
        tied = engine.pipeline.part.aliases
    kind = None if config is None else "hf"
    return {"kind": kind, "config": config, "generation_config": generation, "tied": tied}


def _as_json(config: Any) -> Any:
    """A transformers configuration; None: it is none."""
    return json.loads(config.to_json_string(use_diff=False)) if hasattr(config, "to_json_string") else None


def capture(engine: Engine) -> Captured:
    """Everything that the next step depends on, of which this rank writes its share. [Note: shares]"""
    weights, comm, data = engine.weights, engine.comm, engine.data
    shared, sharded, own = _Row(engine), _Row(engine), _Row(engine)
    alike = sharded if weights.sharers > 1 else shared  # by elements, or all of it
    found = Captured()
    for full_name, tensor in model_tensors(engine).items():
        found.order.append(full_name)
        name = full_name.removeprefix("model.")
        if not _saves(engine, name):
            continue
        shard = weights.shard_of(name)
        if shard is None:
            shared.add(full_name, tuple(tensor.shape), tensor)
        else:
            alike.add(full_name, tuple(tensor.shape), shard, weights.interval_of(name))
    for name, tensor, kind in _beside_the_model(engine):
        found.order.append(f"{kind}.{name}")
        if not _saves(engine, name):
            continue
        alike.add(f"{kind}.{name}", _whole_shape(engine, name), tensor, weights.interval_of(name))
    for name, parameter in engine.trained:
        start, stop = weights.interval_of(name)
        for key, value in engine.optimizer.state.get(parameter, {}).items():
            full_name = f"optimizer.{name}.{key}"
            if not isinstance(value, Tensor):
                found.scalars.setdefault(name, {})[key] = value
                continue
            found.order.append(full_name)
            if not _saves(engine, name):
                continue
            if value.shape == parameter.shape:
                alike.add(full_name, _whole_shape(engine, name), value, (start, stop))
            elif start == 0 < stop:  # who has a parameter's beginning has what there is of it once
                alike.add(full_name, tuple(value.shape), value)
    for name, tensor in capture_rng().items():
        own.add(f"rng.{comm.rank}.{name}", tuple(tensor.shape), tensor)
    replicas = data.world_size // weights.sharers
    found.held = [
        *share(shared.held, data.world_size, data.rank),
        *share(sharded.held, replicas, data.rank // weights.sharers),
        *own.held,
    ]
    groups = [
        {key: _plain(value) for key, value in group.items() if key not in ("params", "names")}
        for group in engine.optimizer.param_groups
    ]
    found.values = {
        "optimizer": {"class": type(engine.optimizer).__name__, "scalars": {}, "groups": groups},
        "engine": engine.state_dict(),
    }
    return found


def _saves(engine: Engine, name: str) -> bool:
    """Whether this rank's part of the model is the one that a tensor is saved with."""
    return engine.pipeline is None or engine.pipeline.part.is_counted(name)


def _plain(value: Any) -> Any:
    """A learning rate may be a tensor of one number."""
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


class _Row:
    def __init__(self, engine: Engine) -> None:
        self._device = engine.device
        self.held: list[Held] = []

    def add(self, name: str, shape: tuple[int, ...], tensor: Tensor, interval: tuple[int, int] | None = None) -> None:
        if tensor.dtype not in NAMES:
            raise TypeError(f"{name} of {tensor.dtype}, which the format does not hold")
        start, stop = interval if interval is not None else (0, prod(shape))
        if stop > start or not prod(shape):
            part = Part(name, shape, NAMES[tensor.dtype], start, stop)
            self.held.append(Held(part, tensor.detach().reshape(-1)))


def share(held: Sequence[Held], copies: int, index: int) -> list[Held]:
    """What copy `index` of `copies` that hold the same writes of it. [Note: shares]"""
    if copies == 1:
        return list(held)
    total = sum(one.part.size for one in held)
    low, high = total * index // copies, total * (index + 1) // copies
    chosen, begin = [], 0
    for one in held:
        size = one.part.size
        if size < LARGE_BYTES:
            is_last = index == copies - 1
            if low <= begin < high or (is_last and begin >= high):
                chosen.append(one)
        else:
            item = size // (one.part.stop - one.part.start)
            start, stop = (min(max(-(-(edge - begin) // item), 0), size // item) for edge in (low, high))
            if start < stop:
                first = one.part.start
                part = replace(one.part, start=first + start, stop=first + stop)
                chosen.append(Held(part, one.tensor[start:stop]))
        begin += size
    return chosen


def _beside_the_model(engine: Engine) -> Iterator[tuple[str, Tensor, str]]:
    if engine.weights.exist:
        for name, own in engine.trained:
            yield name, own, "master"
    if engine.average is not None:
        for name, average in engine.average.tensors.items():
            yield name, average, "average"


def _whole_shape(engine: Engine, name: str) -> tuple[int, ...]:
    parameter = engine.piece_of(name)
    return tuple(getattr(parameter, "whole_shape", parameter.shape))


# --- and back ------------------------------------------------------------------------------------------------


Interval = tuple[int, int]
Shapes = Mapping[str, tuple[tuple[int, ...], str]]
"""Of a checkpoint: shape and safetensors' dtype by name."""


class Restoration:
    """Puts a saved state back into an engine, in place, piece by piece.

    wants: [start, stop), flattened, of each tensor that this rank needs. missing: tensors of the model that keep what
    they have. foreign: of the checkpoint's model, those that this one lacks.
    """

    def __init__(
        self,
        engine: Engine,
        shapes: Shapes,
        values: Mapping[str, Any],
        same_world: bool,
        model_only: bool,
        exempt: Sequence[str],
    ) -> None:
        """same_world: of as many ranks, so that random numbers go on. model_only: parameters and buffers, also from a
        checkpoint of another precision or optimizer. exempt: patterns of names that may be missing on either side, or
        differ in shape. Raises CheckpointError, and changes nothing, where names and shapes do not fit."""
        self._engine, self._values, self._same_world, self._model_only = engine, values, same_world, model_only
        self._own = model_tensors(engine)
        self._pieces = dict(engine.trained)
        self._targets: dict[str, list[tuple[Tensor, int]]] = {}
        self._copy_back: list[tuple[Tensor, Tensor]] = []
        self._states: dict[str, dict[str, Any]] = {}
        self._rng: dict[str, Tensor] = {}
        self.wants: dict[str, Interval] = {}
        self.missing: list[str] = []
        self.foreign: list[str] = []
        if model_only:
            self.missing, self.foreign = _check_model(_everyones(engine, _shapes(self._own)), shapes, exempt)
        else:
            _check_names(engine, self._own, shapes, values)
        self._plan(shapes)

    def begin(self) -> None:
        """Nobody reads what will change."""
        self._engine.weights.settle()

    @torch.no_grad()
    def put(self, entry: TensorEntry, piece: Piece, data: Tensor) -> None:
        """Numbers of a piece, flat, where they belong."""
        for target, begin in self._targets[entry.name]:
            end = begin + target.numel()
            if piece.box_size == entry.shape:
                start, stop = max(begin, piece.start), min(end, piece.stop)
                if start < stop:
                    target[start - begin : stop - begin].copy_(data[start - piece.start : stop - piece.start])
                continue
            places = flat_places(entry.shape, piece)
            inside = (places >= begin) & (places < end)
            target[(places[inside] - begin).to(target.device)] = data[inside].to(target.device, target.dtype)

    @torch.no_grad()
    def finish(self) -> None:
        """All pieces have come."""
        engine = self._engine
        for target, flat in self._copy_back:
            target.copy_(flat.view(target.shape))
        if self._model_only:
            engine.weights.restored()
            if engine.average is not None:
                engine.average.restart()
            return
        if engine.average is not None:
            engine.average.updates = self._values["engine"]["average_updates"]
        states = {name: dict(scalars) for name, scalars in self._values["optimizer"]["scalars"].items()}
        for name, tensors in self._states.items():
            states.setdefault(name, {}).update(tensors)
        _restore_optimizer(engine, states, self._values["optimizer"]["groups"])
        engine.weights.restored()
        engine.load_state_dict(self._values["engine"])
        if self._rng:
            restore_rng(self._rng)

    def _plan(self, shapes: Shapes) -> None:
        for full_name, (shape, dtype) in shapes.items():
            kind, _, name = full_name.partition(".")
            if kind == "model":
                self._plan_model(full_name, name, shape, shapes)
            elif kind == "master" and name in self._pieces and f"model.{name}" not in self.missing:
                self._plan_master(full_name, name)
            elif self._model_only:
                continue
            elif kind == "average":
                tensors = self._engine.average.tensors if self._engine.average is not None else {}
                if name in tensors:
                    self._into(full_name, tensors[name], self._engine.weights.interval_of(name))
            elif kind == "optimizer":
                self._plan_state(full_name, name, shape, dtype)
            elif full_name.startswith(f"rng.{self._engine.rank}.") and self._same_world:
                self._rng[name.partition(".")[2]] = made = torch.empty(shape, dtype=DTYPES[dtype])
                self._into(full_name, made, (0, prod(shape)))

    def _plan_master(self, full_name: str, name: str) -> None:
        """Into the master; where this training has none, into the parameter itself, which it is better than."""
        weights = self._engine.weights
        if weights.exist:
            self._into(full_name, self._pieces[name], weights.interval_of(name))
        elif self._model_only:
            shard = weights.shard_of(name)
            own = self._own[f"model.{name}"] if shard is None else shard
            self._into(full_name, own, weights.interval_of(name))

    def _plan_model(self, full_name: str, name: str, shape: tuple[int, ...], shapes: Shapes) -> None:
        if full_name not in self._own or full_name in self.missing:
            return
        weights = self._engine.weights
        if self._model_only and not weights.exist and name in self._pieces and f"master.{name}" in shapes:
            return
        shard = weights.shard_of(name)
        if shard is None:
            self._into(full_name, self._own[full_name], (0, prod(shape)))
        else:
            self._into(full_name, shard, weights.interval_of(name))
        if self._model_only and weights.exist and name in self._pieces and f"master.{name}" not in shapes:
            self._into(full_name, self._pieces[name], weights.interval_of(name))

    def _plan_state(self, full_name: str, name: str, shape: tuple[int, ...], dtype: str) -> None:
        name, _, key = name.rpartition(".")
        own = self._pieces.get(name)
        if own is None or not own.numel():
            return
        by_element = shape == _whole_shape(self._engine, name)
        made = torch.empty(own.shape if by_element else shape, dtype=DTYPES[dtype])
        self._states.setdefault(name, {})[key] = made
        self._into(full_name, made, self._engine.weights.interval_of(name) if by_element else (0, prod(shape)))

    def _into(self, full_name: str, target: Tensor, interval: Interval) -> None:
        start, stop = interval
        if start == stop:
            return
        self.wants[full_name] = interval
        target = target.detach()
        if target.is_contiguous():
            flat = target.view(-1)
        else:
            flat = torch.empty(target.numel(), dtype=target.dtype, device=target.device)
            self._copy_back.append((target, flat))
        assert flat.numel() == stop - start, full_name
        self._targets.setdefault(full_name, []).append((flat, start))


def flat_places(shape: tuple[int, ...], piece: Piece) -> Tensor:
    """Where each element of a piece of a box lies in the tensor, flattened; int64."""
    left = torch.arange(piece.start, piece.stop)
    places, stride = torch.zeros_like(left), 1
    for size, start, whole in zip(reversed(piece.box_size), reversed(piece.box_start), reversed(shape), strict=True):
        places += (left % size + start) * stride
        left, stride = left // size, stride * whole
    return places


def overlaps(entry: TensorEntry, piece: Piece, interval: Interval) -> bool:
    """Whether a piece may hold something of [start, stop) of its tensor. A box is never sure not to."""
    if piece.box_size != entry.shape:
        return piece.start < piece.stop
    return max(interval[0], piece.start) < min(interval[1], piece.stop)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _everyones(engine: Engine, own: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Of all parts of the model."""
    if engine.pipeline is None:
        return own
    return {name: shape for found in engine.comm.all_gather_object(own) for name, shape in found.items()}


def _check_model(
    own: Mapping[str, tuple[int, ...]], shapes: Shapes, exempt: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Returns what of the model the checkpoint lacks, and what it has besides, as far as that may be."""

    def may_differ(name: str) -> bool:
        return any(fnmatchcase(name.removeprefix("model."), pattern) for pattern in exempt)

    fix = "name what may differ in checkpoint.init_except"
    there = {name: shape for name, (shape, _) in shapes.items() if name.startswith("model.")}
    missing = [name for name in own if name not in there]
    besides = [name for name in there if name not in own]
    foreign = [name for name in besides if not may_differ(name)]
    refused = [name for name in missing if not may_differ(name)]
    if refused or foreign:
        raise CheckpointError(
            f"checkpoint: expected the tensors of this model, found {_some('none of', refused)}"
            f"{' and ' if refused and foreign else ''}{_some('besides', foreign)}; {fix}"
        )
    for name, shape in own.items():
        if name in there and there[name] != shape:
            if not may_differ(name):
                found = f"expected {name} of shape {shape}, found {there[name]}"
                raise CheckpointError(f"checkpoint: {found}; another model? {fix}")
            missing.append(name)
    return missing, besides


def _check_names(engine: Engine, own: Mapping[str, Tensor], shapes: Shapes, values: Mapping[str, Any]) -> None:
    if "engine" not in values:
        fix = "load the model alone: checkpoint.init_from"
        raise CheckpointError(f"checkpoint: expected one of a training, found one of a model alone; {fix}")
    wanted = _shapes(own)
    trained = {name: _whole_shape(engine, name) for name, _ in engine.trained}
    if engine.weights.exist:
        wanted |= {f"master.{name}": shape for name, shape in trained.items()}
    if engine.average is not None:
        wanted |= {f"average.{name}": shape for name, shape in trained.items()}
    wanted = _everyones(engine, wanted)
    kinds = ("model.", "master.", "average.")
    missing = [name for name in wanted if name not in shapes]
    foreign = [name for name in shapes if name.startswith(kinds) and name not in wanted]
    for name, shape in wanted.items():
        found = shapes.get(name)
        if found is not None and found[0] != shape:
            raise CheckpointError(f"checkpoint: expected {name} of shape {shape}, found {found[0]}; another model?")
    if missing or foreign:
        raise CheckpointError(
            "checkpoint: expected the tensors of this model and precision, "
            f"found {_some('none of', missing)}{' and ' if missing and foreign else ''}{_some('besides', foreign)}; "
            "was it saved with another model, precision.dtype or train.ema_decay?"
        )
    groups, held = len(engine.optimizer.param_groups), len(values["optimizer"]["groups"])
    if groups != held:
        raise CheckpointError(f"checkpoint: expected an optimizer with {groups} groups of parameters, found {held}")
    optimizer, saved = type(engine.optimizer).__name__, values["optimizer"]["class"]
    if optimizer != saved:
        raise CheckpointError(f"checkpoint: expected the state of {optimizer}, found that of {saved}")


def _some(words: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{words} {', '.join(names[:3])}{more}"


def _restore_optimizer(engine: Engine, states: Mapping[str, dict[str, Any]], groups: list[dict[str, Any]]) -> None:
    """By load_state_dict, which numbers the parameters group by group."""
    own = engine.optimizer.state_dict()
    name_of = {id(parameter): name for name, parameter in engine.trained if parameter.numel()}
    ordered = [name_of.get(id(p), "") for group in engine.optimizer.param_groups for p in group["params"]]
    own["state"] = {index: states[name] for index, name in enumerate(ordered) if name in states}
    if isinstance(
        engine.schedule, TorchSchedule
    ):  # torch's schedules go on from what the groups say; ours from the job
        for group, saved in zip(own["param_groups"], groups, strict=True):
            group.update({key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()})
    engine.optimizer.load_state_dict(own)


# --- random numbers ------------------------------------------------------------------------------------------


def capture_rng() -> dict[str, Tensor]:
    """The state of this rank's random number generators."""
    tensors = {"torch": torch.get_rng_state(), **_python_rng()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    return tensors


def _python_rng() -> dict[str, Tensor]:
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    assert (version, name) == (3, "MT19937")
    return {
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([gauss is not None, gauss or 0.0], dtype=torch.float64),
        "numpy": torch.from_numpy(np.array(keys, dtype=np.int64)),
        "numpy_gauss": torch.tensor([position, has_gauss, cached], dtype=torch.float64),
    }


def restore_rng(tensors: Mapping[str, Tensor]) -> None:
    """Go on drawing where `capture_rng` was."""
    torch.set_rng_state(tensors["torch"])
    has_gauss, gauss = tensors["python_gauss"].tolist()
    random.setstate((3, tuple(tensors["python"].tolist()), gauss if has_gauss else None))
    position, has, cached = tensors["numpy_gauss"].tolist()
    keys = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has), cached))
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
