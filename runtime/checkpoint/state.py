"""The state of an engine as named tensors and JSON, and back. [Note: what is stored] in manifest.py."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dstrain.runtime.engine import Engine, TorchSchedule
from dstrain.runtime.spec.errors import CheckpointError


@dataclass
class State:
    """A checkpoint that was read. tensors: whole, by name. values: JSON."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]


@dataclass(frozen=True)
class Stored:
    """A tensor to save. whole: gives it on rank 0; all ranks call it, in the same order, if it is sharded."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    whole: Callable[[], Tensor | None]

    @classmethod
    def of(cls, tensor: Tensor) -> Stored:
        """One that every rank has."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)


@dataclass
class Captured:
    """What to save: tensors as they lie in the engine, not copied, and JSON; the same names on all ranks."""

    tensors: dict[str, Stored]
    values: dict[str, Any]


def model_tensors(engine: Engine) -> dict[str, Tensor]:
    """Parameters and persistent buffers by their names; a tied parameter once, under its first name. Where parameters
    are sharded, shapes and dtypes are right, and numbers are not."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in engine.module.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[f"model.{name}"] = tensor.detach()
    return tensors


def capture(engine: Engine) -> Captured:
    """Everything that the next step depends on, of what all ranks share. A small collective of objects."""
    tensors = capture_model(engine)
    if engine.weights.exist:
        tensors |= {f"master.{name}": _stored(engine, name, own) for name, own in engine.trained}
    if engine.average is not None:
        averages = engine.average.tensors.items()
        tensors |= {f"average.{name}": _stored(engine, name, own) for name, own in averages}
    states = dict(_optimizer_states(engine))
    scalars: dict[str, dict[str, Any]] = {}
    for name, keys in _merged_outlines(engine, states).items():
        for key, outline in keys.items():
            if isinstance(outline, _Outline):
                own = states.get(name, {}).get(key)
                tensors[f"optimizer.{name}.{key}"] = _stored_state(engine, name, own, outline)
            else:
                scalars.setdefault(name, {})[key] = outline
    groups = [
        {key: value for key, value in group.items() if key not in ("params", "names")}
        for group in engine.optimizer.param_groups
    ]
    values = {"optimizer": {"class": type(engine.optimizer).__name__, "scalars": scalars, "groups": groups}}
    return Captured(tensors, {**values, "engine": engine.state_dict()})


def capture_model(engine: Engine) -> dict[str, Stored]:
    """The model's parameters and persistent buffers."""
    tensors = {}
    for name, tensor in model_tensors(engine).items():
        shard = engine.weights.shard_of(name.removeprefix("model."))
        stored = Stored.of(tensor)
        if shard is not None:
            stored = _sharded(engine, name.removeprefix("model."), shard, tuple(tensor.shape))
        tensors[name] = stored
    return tensors


class _Outline(NamedTuple):
    """Of a tensor of an optimizer's state, on the rank that has it. by_element: it is cut as the parameter is."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    by_element: bool
    owner: int


def _merged_outlines(engine: Engine, states: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What the optimizers of all ranks hold, by parameter and key: outlines of tensors, and plain values."""
    own_of = dict(engine.trained)
    here: dict[str, dict[str, Any]] = {}
    for name, state in states.items():
        for key, value in state.items():
            outline: Any = value
            if isinstance(value, Tensor):
                by_element = value.shape == own_of[name].shape
                outline = _Outline(tuple(value.shape), value.dtype, by_element, engine.rank)
            here.setdefault(name, {})[key] = outline
    everyone = engine.comm.all_gather_object(here) if engine.weights.sharers > 1 else [here]
    order = [name for name, _ in engine.trained]
    return {name: next(held[name] for held in everyone if name in held) for name in order
            if any(name in held for held in everyone)}  # fmt: skip


def _stored(engine: Engine, name: str, own: Tensor) -> Stored:
    """A tensor with the elements of parameter `name`, of which this rank has `own`."""
    if engine.weights.sharers == 1:
        return Stored.of(own.detach())
    return _sharded(engine, name, own, tuple(dict(engine.trained)[name].whole_shape))  # type: ignore[attr-defined]


def _sharded(engine: Engine, name: str, own: Tensor, shape: tuple[int, ...]) -> Stored:
    return Stored(shape, own.dtype, lambda: engine.weights.collect(name, own))


def _stored_state(engine: Engine, name: str, own: Tensor | None, outline: _Outline) -> Stored:
    if engine.weights.sharers == 1:
        assert own is not None
        return Stored.of(own)
    if outline.by_element:
        held = own if own is not None else torch.empty(0, dtype=outline.dtype, device=engine.device)
        return _sharded(engine, name, held, tuple(dict(engine.trained)[name].whole_shape))  # type: ignore[attr-defined]

    def whole() -> Tensor | None:
        return engine.comm.send_to_first(own, outline.owner, outline.shape, outline.dtype)

    return Stored(outline.shape, outline.dtype, whole)


def _optimizer_states(engine: Engine) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, parameter in engine.trained:
        if state := engine.optimizer.state.get(parameter):
            yield name, state


Tensors = Iterator[tuple[str, Tensor]]


def restore(engine: Engine, shapes: Mapping[str, tuple[int, ...]], values: dict[str, Any], tensors: Tensors) -> None:
    """Put a captured state back, in place, tensor by tensor as they come. Raises CheckpointError, and changes nothing
    and takes no tensor, where names and shapes do not fit."""
    own = model_tensors(engine)
    _check_names(engine, own, shapes, values)
    pieces = dict(engine.trained)
    states: dict[str, dict[str, Any]] = {n: dict(v) for n, v in values["optimizer"]["scalars"].items()}
    averages: dict[str, Tensor] = {}
    engine.weights.settle()
    with torch.no_grad():
        for full_name, tensor in tensors:
            kind, _, name = full_name.partition(".")
            if kind == "model":
                shard = engine.weights.shard_of(name)
                target = own[full_name] if shard is None else shard
                target.copy_(tensor if shard is None else engine.weights.own_part(name, tensor).reshape(-1))
            elif kind == "master":
                pieces[name].copy_(engine.weights.own_part(name, tensor))
            elif kind == "average":
                averages[name] = engine.weights.own_part(name, tensor).clone()
            elif kind == "optimizer":
                name, _, key = name.rpartition(".")
                states.setdefault(name, {})[key] = _own_state(engine, name, pieces.get(name), tensor)
    if engine.average is not None:
        engine.average.load(averages, values["engine"]["average_updates"])
    _restore_optimizer(engine, states, values["optimizer"]["groups"])
    engine.weights.restored()
    engine.load_state_dict(values["engine"])


def _own_state(engine: Engine, name: str, own: nn.Parameter | None, tensor: Tensor) -> Tensor:
    """This rank's part of a tensor of an optimizer's state; all of it if it is not cut as the parameter is."""
    by_element = own is not None and tuple(tensor.shape) == tuple(getattr(own, "whole_shape", own.shape))
    return engine.weights.own_part(name, tensor).clone() if by_element else tensor


def _check_names(
    engine: Engine, own: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], values: Mapping[str, Any]
) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in own.items()}
    trained = {name: tuple(getattr(p, "whole_shape", p.shape)) for name, p in engine.trained}
    if engine.weights.exist:
        wanted |= {f"master.{name}": shape for name, shape in trained.items()}
    if engine.average is not None:
        wanted |= {f"average.{name}": shape for name, shape in trained.items()}
    kinds = ("model.", "master.", "average.")
    missing = [name for name in wanted if name not in shapes]
    foreign = [name for name in shapes if name.startswith(kinds) and name not in wanted]
    for name, shape in wanted.items():
        found = shapes.get(name)
        if found is not None and found != shape:
            raise CheckpointError(f"checkpoint: expected {name} of shape {shape}, found {found}; another model?")
    if missing or foreign:
        raise CheckpointError(
            "checkpoint: expected the tensors of this model and precision, "
            f"found {_some('none of', missing)}{' and ' if missing and foreign else ''}{_some('besides', foreign)}; "
            "was it saved with another model, precision.dtype or train.ema_decay?"
        )
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
