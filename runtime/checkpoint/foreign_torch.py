"""A state_dict in a file of torch.save, alone or beside other things, or in several files by an index."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from dstrain.runtime.checkpoint.dtypes import NAMES
from dstrain.runtime.checkpoint.foreign import TORCH_INDEX, TORCH_SINGLE, ForeignTensor, Source, describe, files_of
from dstrain.runtime.checkpoint.parts import Part
from dstrain.runtime.checkpoint.torch_files import (
    bytes_of,
    check_tensor,
    load_torch_file,
    tensors_of,
    without_prefixes,
)
from dstrain.runtime.spec.errors import CheckpointError, UsageError

KEYS = ("state_dict", "model_state_dict", "model", "module")
"""Under which programs keep a state_dict beside other things; the first that is there is taken."""


def open_torch(path: Path) -> Source:
    """Raises UsageError where there is no state_dict, CheckpointError where a file is missing or damaged."""
    files = files_of(path, TORCH_SINGLE, TORCH_INDEX)[0] if path.is_dir() else [path]
    notes: list[str] = []
    tensors: dict[str, Tensor] = {}
    for file in files:
        held = _state_dict(load_torch_file(file), file, notes)
        for name, tensor in held.items():
            check_tensor(file, name, tensor)
            if name in tensors:
                raise CheckpointError(f"{file}: expected tensors that no other file has, found {name} again")
        tensors |= held
    own_names = without_prefixes(list(tensors), notes)
    tensors = {own_names[name]: tensor for name, tensor in tensors.items()}
    tied = find_tied(tensors)
    if tied:
        notes.append(f"one tensor, stored once: {', '.join(f'{alias} is {name}' for alias, name in tied.items())}")
    given = [foreign(f"model.{name}", tensor) for name, tensor in tensors.items() if name not in tied]
    what = "a state_dict of torch" if len(files) == 1 else f"a state_dict of torch in {len(files)} files"
    return Source(path, what, given, describe(path if path.is_dir() else path.parent, tied), notes=notes)


def foreign(name: str, tensor: Tensor) -> ForeignTensor:
    """A tensor that is there, or that its file will be asked for."""
    return ForeignTensor(Part.whole(name, tuple(tensor.shape), NAMES[tensor.dtype]), partial(bytes_of, tensor))


def find_tied(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Names of the same numbers in the same memory: for each the first of them."""
    first: dict[Any, str] = {}
    tied = {}
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            continue
        place = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        known = first.setdefault(place, name)
        if known != name:
            tied[name] = known
    return tied


def _state_dict(held: Any, path: Path, notes: list[str]) -> dict[str, Tensor]:
    expected = "a state_dict: names and tensors"
    if not isinstance(held, Mapping):
        raise UsageError.mismatch(f"SOURCE: {path}", expected, f"a {type(held).__name__}")
    for key in KEYS:
        inner = held.get(key)
        if isinstance(inner, Mapping) and tensors_of(inner):
            notes.append(f"took the state_dict under {key!r}" + _rest(held, key))
            held = inner
            break
    tensors = tensors_of(held)
    if not tensors:
        keys = ", ".join(str(key) for key in list(held)[:5]) or "nothing"
        fix = f"it is looked for at the top and under {', '.join(KEYS)}"
        raise UsageError.mismatch(f"SOURCE: {path}", expected, f"the keys {keys}", fix)
    others = [str(key) for key in held if str(key) not in tensors]
    if others:
        notes.append(f"left out what is no tensor: {_some(others)}")
    return tensors


def _rest(held: Mapping[Any, Any], key: str) -> str:
    others = [str(other) for other in held if other != key]
    return f", and left out {_some(others)}" if others else ""


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
