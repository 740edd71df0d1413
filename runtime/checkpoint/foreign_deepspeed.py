"""DeepSpeed's ZeRO checkpoints, stages 1 to 3: whole fp32 parameters, and Adam's moments.

Where the numbers lie is in [Note: DeepSpeed's layout] (deepspeed_files.py). Files are mapped into memory, and one
parameter at a time is put together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil, prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dstrain.runtime.checkpoint.deepspeed_files import DeepSpeedFiles, number_of
from dstrain.runtime.checkpoint.foreign import ForeignTensor, Source, describe
from dstrain.runtime.checkpoint.foreign_torch import foreign
from dstrain.runtime.checkpoint.parts import Part
from dstrain.runtime.checkpoint.torch_files import bytes_of, check_tensor, tensors_of, without_prefixes
from dstrain.runtime.spec.errors import CheckpointError

Vectors = Sequence[Sequence[Tensor]]
"""Each is flat tensors laid end to end. Stages 1 and 2: one for each group, over the ranks. Stage 3: one for each rank,
over the groups."""

_MOMENTS = ("exp_avg", "exp_avg_sq")
_HYPERPARAMETERS = ("lr", "betas", "eps", "weight_decay")


@dataclass(frozen=True)
class Place:
    """Where a parameter's elements are: (vector, start, stop), one behind the other, as many as it has."""

    shape: tuple[int, ...]
    takes: tuple[tuple[int, int, int], ...]


def open_deepspeed(path: Path) -> Source:
    """`path`: a tag's folder, or the one above it. Raises UsageError for what is not understood, CheckpointError where
    a file is missing, cut off, or does not fit the others."""
    try:
        return _source(path, DeepSpeedFiles.open(path))
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError) as error:
        found = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path}: expected files as DeepSpeed writes them, found {found}") from None


def _source(path: Path, files: DeepSpeedFiles) -> Source:
    model = files.models[0]
    notes: list[str] = []
    tied = {str(alias): str(name) for alias, name in (model.get("shared_params") or {}).items()}
    places = _places(files, notes)
    others = dict(_others(files, places, tied))
    in_order = (name for name in model["module"] if name in places or name in others)
    own = without_prefixes(list(dict.fromkeys([*in_order, *places, *others, *tied])), notes)
    fp32 = _in_vectors(files, _fp32(files)) if places else ()
    _check_lengths(files, fp32, places)
    tensors = [
        _whole(f"model.{short}", fp32, places[name]) if name in places else foreign(f"model.{short}", others[name])
        for name, short in own.items()
        if name not in tied
    ]
    optimizer: Mapping[str, Any] = {}
    states = _adam_states(files, notes) if places else []
    if states:
        moments = {key: _in_vectors(files, [[group[key] for group in state] for state in states]) for key in _MOMENTS}
        optimizer = {"class": "Adam", "scalars": {}, "groups": _hyperparameters(files)}
        for name, place in places.items():
            step = torch.tensor(float(number_of(states[0][0]["step"])))
            tensors.append(foreign(f"optimizer.{own[name]}.step", step))
            tensors += [_whole(f"optimizer.{own[name]}.{key}", moments[key], place) for key in _MOMENTS]
    shards = f"ZeRO stage {files.stage}, {len(files.ranks)} ranks" if files.ranks else "without ZeRO"
    described = describe(path, {own[alias]: own.get(name, name) for alias, name in tied.items()})
    steps = model.get("global_steps")
    what = f"DeepSpeed {model.get('ds_version') or '?'}, {shards}"
    return Source(files.folder, what, tensors, described, optimizer, steps if isinstance(steps, int) else None, notes)


def _places(files: DeepSpeedFiles, notes: list[str]) -> dict[str, Place]:
    """Of each parameter that was trained."""
    if not files.ranks:
        return {}
    groups = files.models[0].get("param_shapes")
    if groups is None and files.stage < 3:
        notes.append("took the module's own numbers: the files do not say which of the fp32 parts are whose")
        return {}
    if groups is None:
        raise CheckpointError(f"{files.folder}: expected param_shapes, the names of the parameters, found none")
    shapes = [{str(name): tuple(map(int, shape)) for name, shape in group.items()} for group in groups]
    if files.stage == 3:
        return _places_by_rank({name: shape for group in shapes for name, shape in group.items()}, len(files.ranks))
    return _places_by_group(shapes, files.ranks[0].get("param_alignment_paddings"))


def _places_by_group(groups: Sequence[Mapping[str, tuple[int, ...]]], paddings: Any) -> dict[str, Place]:
    places = {}
    for group, shapes in enumerate(groups):
        behind = [0] * len(shapes) if paddings is None else list(paddings[group])
        begin = 0
        for (name, shape), padding in zip(shapes.items(), behind, strict=True):
            stop = begin + prod(shape)
            places[name] = Place(shape, ((group, begin, stop),))
            begin = stop + padding
    return places


def _places_by_rank(shapes: Mapping[str, tuple[int, ...]], ranks: int) -> dict[str, Place]:
    places, begin = {}, 0
    for name, shape in shapes.items():
        stop = begin + ceil(prod(shape) / ranks)
        places[name] = Place(shape, tuple((rank, begin, stop) for rank in range(ranks)))
        begin = stop
    return places


def _others(
    files: DeepSpeedFiles, places: Mapping[str, Place], tied: Mapping[str, str]
) -> Iterator[tuple[str, Tensor]]:
    """Buffers, and parameters that were not trained; fp32 as the others, where they are floating-point numbers."""
    model = files.models[0]
    buffers = set(model.get("buffer_names") or ())
    for name, tensor in tensors_of(model["module"]).items():
        if name not in places and name not in tied and (files.stage < 3 or name in buffers):
            check_tensor(files.folder, name, tensor)
            yield name, tensor.float() if places and tensor.is_floating_point() else tensor
    frozen = model.get("frozen_param_shapes") or {}
    for name, shape in frozen.items() if files.stage == 3 else ():
        flat = torch.cat([each["frozen_param_fragments"][name].reshape(-1) for each in files.models])
        yield name, flat[: prod(shape)].view(tuple(shape)).float()


def _fp32(files: DeepSpeedFiles) -> list[list[Tensor]]:
    """Each rank's flat tensors."""
    key = "fp32_flat_groups" if files.stage == 3 else "single_partition_of_fp32_groups"
    return [list(rank[key]) for rank in files.ranks]


def _in_vectors(files: DeepSpeedFiles, parts: list[list[Tensor]]) -> Vectors:
    flat = [[tensor.reshape(-1) for tensor in part] for part in parts]
    return flat if files.stage == 3 else [list(group) for group in zip(*flat, strict=True)]


def _check_lengths(files: DeepSpeedFiles, vectors: Vectors, places: Mapping[str, Place]) -> None:
    """What the names need, and what there is, are alike but for padding at the end."""
    needed = [0] * len(vectors)
    for place in places.values():
        for vector, _, stop in place.takes:
            needed[vector] = max(needed[vector], stop)
    paddings = files.ranks[0].get("param_alignment_paddings") if files.stage < 3 and vectors else None
    needed = [end + (paddings[i][-1] if paddings else 0) for i, end in enumerate(needed)]
    alignment = 1 if files.stage == 3 else 2 * len(files.ranks)
    for parts, end in zip(vectors, needed, strict=True):
        held = sum(tensor.numel() for tensor in parts)
        if held < end or ceil(held / alignment) != ceil(end / alignment):
            raise CheckpointError(f"{files.folder}: expected {end} elements in the fp32 parts, found {held}")


def _base_state(files: DeepSpeedFiles, rank: Mapping[str, Any]) -> Any:
    return rank.get("optimizer_state_dict" if files.stage == 3 else "base_optimizer_state")


def _adam_states(files: DeepSpeedFiles, notes: list[str]) -> list[list[dict[str, Any]]]:
    """Of each rank and flat tensor Adam's state; nothing where the optimizer is another."""
    states = [_by_group(_base_state(files, rank), rank) for rank in files.ranks]
    for state, parts in zip(states, _fp32(files), strict=True):
        fits = len(state) == len(parts) and all(
            isinstance(group.get(key), Tensor) and group[key].numel() >= part.numel() and group["step"] is not None
            for group, part in zip(state, parts, strict=True)
            for key in _MOMENTS
        )
        if not fits:
            keys = ", ".join(sorted({str(key) for group in state for key in group})) or "nothing"
            notes.append(f"left out the optimizer's state: it is not Adam's ({keys})")
            return []
    return states


def _by_group(state: Any, rank: Mapping[str, Any]) -> list[dict[str, Any]]:
    """With the step, which is beside the moments, in the optimizer's group, or, of elastic checkpoints, elsewhere."""
    if isinstance(state, list):
        return [{"step": rank.get("base_optimizer_state_step"), **each} for each in state]
    states = state["state"] if state else {}
    return [
        {"step": group.get("step"), **states[index]}
        for group in (state["param_groups"] if states else ())
        for index in group["params"]
        if index in states
    ]


def _hyperparameters(files: DeepSpeedFiles) -> list[dict[str, Any]]:
    state = _base_state(files, files.ranks[0])
    groups = state["param_groups"] if isinstance(state, Mapping) else []
    return [{key: group[key] for key in _HYPERPARAMETERS if _is_plain(group.get(key))} for group in groups]


def _is_plain(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, list | tuple) and all(map(_is_plain, value)))


def _whole(name: str, vectors: Vectors, place: Place) -> ForeignTensor:
    return ForeignTensor(Part.whole(name, place.shape, "F32"), partial(_gather, vectors, place))


def _gather(vectors: Vectors, place: Place) -> Any:
    parts = [part.float() for vector, start, stop in place.takes for part in _between(vectors[vector], start, stop)]
    return bytes_of(torch.cat([torch.empty(0), *parts])[: prod(place.shape)])


def _between(vector: Sequence[Tensor], start: int, stop: int) -> Iterator[Tensor]:
    """[start, stop) of tensors laid end to end."""
    begin = 0
    for tensor in vector:
        end = begin + tensor.numel()
        if start < end and begin < stop:
            yield tensor[max(start - begin, 0) : stop - begin]
        begin = end
