"""Weights of a transformers model, from a local folder of safetensors.

[Note: streamed weights]
The model is made at its place with its parameters left unfilled (no random numbers are drawn, and memory that
nobody writes to costs nothing), so that buffers which no file has, such as rotary frequencies, are right by
construction, and tied parameters are tied. Names and shapes are checked from the files' headers alone. Then
parameter after parameter is read from the files and copied over, once, on the one rank whose values count: what
is in memory beside the model is one parameter as the files have it. Files may have other names than the model,
and other shapes (each expert by itself); transformers' own table of conversions says so. Only safetensors are
read, never a pickle, and no code of the folder is run: config.json is data.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dstrain.runtime.imports import optional_module
from dstrain.runtime.spec.errors import UsageError

_KEY = "model.hf.path"
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_NAMES_SHOWN = 5

_BUFFERS_OF_OLD_FILES = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")
"""Once saved, now computed: superfluous in many files that are right."""

RefillBy = Callable[[Tensor, Callable[[], object]], bool]


@dataclass(frozen=True)
class _Stored:
    """A tensor of an open file."""

    name: str
    file: Any

    def read(self) -> Tensor:
        tensor: Tensor = self.file.get_tensor(self.name)
        return tensor

    def shape_alone(self) -> Tensor:
        """A tensor of its shape without numbers, from the file's header."""
        return torch.empty(self.file.get_slice(self.name).get_shape(), device="meta")


class _Conversion:
    """What makes one parameter, or several, of the tensors of the files."""

    def __init__(self, model: Any, first: str, conversion: Any) -> None:
        self._model, self._first, self._conversion = model, first, conversion
        self._sources: dict[str, list[_Stored]] = dict(conversion.collected_tensors)
        self._left: dict[str, Tensor] = {}

    def shapes(self) -> dict[str, Tensor]:
        """What it makes, without numbers; only where that fails are the tensors themselves read."""
        try:
            return self._made(_Stored.shape_alone)
        except (RuntimeError, ValueError, LookupError):
            return self.values()

    def values(self) -> dict[str, Tensor]:
        return self._made(_Stored.read)

    def copy_to(self, target: Tensor, name: str) -> None:
        """The value of one name; the others of the same reading are kept for their own turns."""
        if name not in self._left:
            self._left = self.values()
        with torch.no_grad():
            target.copy_(self._left.pop(name))

    def forget(self) -> None:
        """Keep nothing for later turns."""
        self._left.clear()

    def _made(self, look: Callable[[_Stored], Tensor]) -> dict[str, Tensor]:
        given = {pattern: [partial(look, stored) for stored in some] for pattern, some in self._sources.items()}
        self._conversion.collected_tensors.update(given)  # it forgets its sources
        made = self._conversion.convert(self._first, model=self._model, config=self._model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def load_weights(model: nn.Module, folder: Path, refill_by: RefillBy | None = None, *, parameters: bool = True) -> None:
    """Copy the tensors of the folder's safetensors into a transformers model. [Note: streamed weights]

    refill_by: told how to read each tensor; where it returns True it does so itself, later. The files stay open for
    it, as long as the process. parameters: without it only buffers are read, for a rank that gets its parameters from
    another; names and shapes are checked all the same. Raises UsageError, naming them, for tensors that are missing,
    superfluous or of another shape.
    """
    targets: dict[str, Tensor] = model.state_dict(keep_vars=True)  # both names of a tied parameter
    made_by: dict[int, tuple[_Conversion, str]] = {}
    mismatched: list[str] = []
    with ExitStack() as files:
        plan, superfluous = _plan(model, _tensors_of(folder, files), targets)
        if refill_by is not None:
            files.pop_all()
        for first, conversion in plan.items():
            try:
                shapes = conversion.shapes()
            except (RuntimeError, ValueError, LookupError) as error:
                mismatched.append(f"{first} cannot be made of its tensors: {error}")
                continue
            wanted = []
            for name, made in shapes.items():
                target = targets[name]
                if target.shape != made.shape:
                    mismatched.append(f"{name} {list(made.shape)} in place of {list(target.shape)}")
                elif id(target) not in made_by:
                    wanted.append(name)
                elif not _are_equal(target, made_by[id(target)], (conversion, name)):
                    mismatched.append(f"{name} unlike the tensor that it is tied to")
                made_by.setdefault(id(target), (conversion, name))
            for name in wanted:
                target = targets[name]
                if not parameters and isinstance(target, nn.Parameter):
                    continue
                if refill_by is None or not refill_by(target, partial(conversion.copy_to, target, name)):
                    conversion.copy_to(target, name)
            conversion.forget()
    missing = [name for name, target in targets.items() if id(target) not in made_by]
    _check(folder, model, missing, superfluous, mismatched)


def read_json(file: Path, key: str) -> dict[str, Any]:
    """The object in a file of JSON. Raises UsageError, under the configuration's `key`, where there is none."""
    try:
        values = json.loads(file.read_text())
    except OSError as error:
        raise UsageError.mismatch(key, f"{file}", error.strerror or str(error)) from None
    except ValueError as error:
        raise UsageError.mismatch(key, f"JSON in {file}", str(error)) from None
    if not isinstance(values, dict):
        raise UsageError.mismatch(key, f"an object in {file}", type(values).__name__)
    return values


def _plan(
    model: Any, tensors: Mapping[str, _Stored], targets: Mapping[str, Tensor]
) -> tuple[dict[str, _Conversion], list[str]]:
    """For each parameter (the first, where one tensor makes several) the conversion with the tensors that it
    needs, unread; and the tensors that nothing needs."""
    loading = optional_module("transformers.core_model_loading", "model.hf", "hf")  # new: old versions lack it
    table = optional_module("transformers.conversion_mapping", "model.hf", "hf").get_model_conversion_mapping(model)
    renamings = [entry for entry in table if isinstance(entry, loading.WeightRenaming)]
    converters = [entry for entry in table if isinstance(entry, loading.WeightConverter)]
    converter_of = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    plan: dict[str, Any] = {}
    superfluous = []
    for name in sorted(tensors, key=loading.dot_natural_key):  # experts stand in their order
        prefix = model.base_model_prefix  # files of the bare model lack it
        target, pattern = loading.rename_source_key(name, renamings, converters, prefix, targets)
        if target not in targets:
            target, pattern = loading.rename_source_key(name, [], [], prefix, targets)
        if target not in targets:
            superfluous += [] if _is_ignored(name, model) else [name]
            continue
        new = loading.WeightRenaming(name, target) if pattern is None else deepcopy(converter_of[pattern])
        plan.setdefault(target, new).add_tensor(target, name, pattern or name, tensors[name])
    return {first: _Conversion(model, first, conversion) for first, conversion in plan.items()}, superfluous


def _are_equal(target: Tensor, *made_by: tuple[_Conversion, str]) -> bool:
    one, other = (conversion.values()[name].to(target.dtype) for conversion, name in made_by)
    return torch.equal(one, other)


def _tensors_of(folder: Path, files: ExitStack) -> dict[str, _Stored]:
    """The tensors of the folder, to be read while `files` are open. Raises UsageError on unreadable files."""
    tensors: dict[str, _Stored] = {}
    for file in _weight_files(folder):
        try:
            opened = files.enter_context(safe_open(file, framework="pt"))
        except (OSError, SafetensorError) as error:
            raise UsageError.mismatch(_KEY, f"tensors in {file}", str(error)) from None
        tensors |= {name: _Stored(name, opened) for name in opened.keys()}  # noqa: SIM118 # it is no mapping
    return tensors


def _weight_files(folder: Path) -> list[Path]:
    """The files of an index, else the single one."""
    names = [_SINGLE]
    if (folder / _INDEX).exists():
        names = sorted(set(read_json(folder / _INDEX, _KEY).get("weight_map", {}).values()))
        if strange := [name for name in names if Path(name).name != name]:
            raise UsageError.mismatch(f"{_KEY}: {_INDEX}", "names of files beside it", strange[0])
    if absent := [name for name in names if not (folder / name).is_file()]:
        pickles = sorted(file.name for file in folder.glob("*.bin"))
        found = f"{pickles[0]}, a pickle, which is never read" if pickles else f"no {absent[0]}"
        raise UsageError.mismatch(_KEY, f"safetensors in {folder}", found, "save_pretrained writes them")
    return [folder / name for name in names]


def _is_ignored(name: str, model: Any) -> bool:
    patterns = (*(model._keys_to_ignore_on_load_unexpected or ()), *_BUFFERS_OF_OLD_FILES)
    return any(re.search(pattern, name) for pattern in patterns)


def _check(folder: Path, model: nn.Module, missing: list[str], superfluous: list[str], mismatched: list[str]) -> None:
    problems = [
        f"{len(names)} {what} ({', '.join(names[:_NAMES_SHOWN])}{', …' if len(names) > _NAMES_SHOWN else ''})"
        for what, names in (("missing", missing), ("superfluous", superfluous), ("mismatched", mismatched))
        if names
    ]
    if problems:
        expected = f"the tensors of {type(model).__name__} in {folder}"
        raise UsageError.mismatch(_KEY, expected, ", ".join(problems), "another model.hf.auto_class may fit")
