"""The state of an engine as named tensors and JSON, and back. [Note: what is stored] in manifest.py."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dstrain.runtime.engine import Engine, TorchSchedule
from dstrain.runtime.spec.errors import CheckpointError


@dataclass
class State:
    """tensors: by name, as they lie in the engine (not copied). values: JSON."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]


def model_tensors(engine: Engine) -> dict[str, Tensor]:
    """Parameters and persistent buffers by their names; a tied parameter once, under its first name."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in engine.module.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[f"model.{name}"] = tensor.detach()
    return tensors


def capture(engine: Engine) -> State:
    """Everything that the next step depends on, of what all ranks share."""
    tensors, values = model_tensors(engine), dict[str, Any]()
    if engine.weights.exist:
        tensors |= {f"master.{name}": master.detach() for name, master in engine.trained}
    if engine.average is not None:
        tensors |= {f"average.{name}": tensor for name, tensor in engine.average.tensors.items()}
    scalars: dict[str, dict[str, Any]] = {}
    for name, state in _optimizer_states(engine):
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{name}.{key}"] = value
            else:
                scalars.setdefault(name, {})[key] = value
    groups = [
        {key: value for key, value in group.items() if key not in ("params", "names")}
        for group in engine.optimizer.param_groups
    ]
    values["optimizer"] = {"class": type(engine.optimizer).__name__, "scalars": scalars, "groups": groups}
    values["engine"] = engine.state_dict()
    return State(tensors, values)


def _optimizer_states(engine: Engine) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, parameter in engine.trained:
        if state := engine.optimizer.state.get(parameter):
            yield name, state


def restore(engine: Engine, state: State) -> None:
    """Put a captured state back, in place. Raises CheckpointError, and changes nothing, where it does not fit."""
    own = model_tensors(engine)
    _check_names(engine, own, state)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state.tensors[name])
        if engine.weights.exist:
            for name, master in engine.trained:
                master.copy_(state.tensors[f"master.{name}"])
        if engine.average is not None:
            prefix = "average."
            averages = {n.removeprefix(prefix): t for n, t in state.tensors.items() if n.startswith(prefix)}
            engine.average.load(averages, state.values["engine"]["average_updates"])
    _restore_optimizer(engine, state)
    engine.load_state_dict(state.values["engine"])


def _check_names(engine: Engine, own: Mapping[str, Tensor], state: State) -> None:
    wanted = dict(own)
    if engine.weights.exist:
        wanted |= {f"master.{name}": master for name, master in engine.trained}
    if engine.average is not None:
        wanted |= {f"average.{name}": tensor for name, tensor in engine.average.tensors.items()}
    kinds = ("model.", "master.", "average.")
    missing = [name for name in wanted if name not in state.tensors]
    foreign = [name for name in state.tensors if name.startswith(kinds) and name not in wanted]
    for name, tensor in wanted.items():
        found = state.tensors.get(name)
        if found is not None and found.shape != tensor.shape:
            expected = f"{name} of shape {tuple(tensor.shape)}"
            raise CheckpointError(f"checkpoint: expected {expected}, found {tuple(found.shape)}; another model?")
    if missing or foreign:
        raise CheckpointError(
            "checkpoint: expected the tensors of this model and precision, "
            f"found {_some('none of', missing)}{' and ' if missing and foreign else ''}{_some('besides', foreign)}; "
            "was it saved with another model, precision.dtype or train.ema_decay?"
        )
    optimizer, saved = type(engine.optimizer).__name__, state.values["optimizer"]["class"]
    if optimizer != saved:
        raise CheckpointError(f"checkpoint: expected the state of {optimizer}, found that of {saved}")


def _some(words: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{words} {', '.join(names[:3])}{more}"


def _restore_optimizer(engine: Engine, state: State) -> None:
    """By load_state_dict, which numbers the parameters group by group."""
    own = engine.optimizer.state_dict()
    name_of = {id(parameter): name for name, parameter in engine.trained}
    ordered = [name_of.get(id(p), "") for group in engine.optimizer.param_groups for p in group["params"]]
    by_name: dict[str, dict[str, Any]] = {n: dict(v) for n, v in state.values["optimizer"]["scalars"].items()}
    for name, tensor in state.tensors.items():
        if name.startswith("optimizer."):
            parameter, _, key = name.removeprefix("optimizer.").rpartition(".")
            by_name.setdefault(parameter, {})[key] = tensor
    own["state"] = {index: by_name[name] for index, name in enumerate(ordered) if name in by_name}
    if isinstance(
        engine.schedule, TorchSchedule
    ):  # torch's schedules go on from what the groups say; ours from the job
        for group, saved in zip(own["param_groups"], state.values["optimizer"]["groups"], strict=True):
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
