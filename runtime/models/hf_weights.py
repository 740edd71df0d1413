"""Weights of a transformers model, from a local folder of safetensors.

[Note: streamed weights]
The model is made at its place with its parameters left unfilled (no random numbers are drawn, and memory that
nobody writes to costs nothing), so that buffers which no file has, such as rotary frequencies, are right by
construction, and tied parameters are tied. Then parameter after parameter is read from the files and copied
over: what is in memory beside the model is one parameter as the files have it. Files may have other names than
the model, and other shapes (each expert by itself); transformers' own table of conversions says so. Only
safetensors are read, never a pickle, and no code of the folder is run: config.json is data.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from copy import deepcopy
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

Read = Callable[[], Tensor]

RefillBy = Callable[[Tensor, Callable[[], object]], None]


def load_weights(model: nn.Module, folder: Path, refill_by: RefillBy | None = None) -> None:
    """Copy the tensors of the folder's safetensors into a transformers model. [Note: streamed weights]

    refill_by: told how to read each parameter once more; the files stay open for it, as long as the process. Raises
    UsageError, naming them, for tensors that are missing, superfluous or of another shape.
    """
    targets: dict[str, Tensor] = model.state_dict(keep_vars=True)  # both names of a tied parameter
    filled: set[int] = set()
    mismatched: list[str] = []
    with ExitStack() as files:
        plan, superfluous = _plan(model, _tensors_of(folder, files), targets)
        if refill_by is not None:
            files.pop_all()
        for name, tensor, again in _converted(model, plan, mismatched):
            target = targets[name]
            if target.shape != tensor.shape:
                mismatched.append(f"{name} {list(tensor.shape)} in place of {list(target.shape)}")
            elif id(target) not in filled:
                with torch.no_grad():
                    target.copy_(tensor)
                if refill_by is not None:
                    refill_by(target, partial(_copy_again, target, again, name))
            elif not torch.equal(target, tensor.to(target.dtype)):
                mismatched.append(f"{name} unlike the tensor that it is tied to")
            filled.add(id(target))
    missing = [name for name, target in targets.items() if id(target) not in filled]
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


def _plan(model: Any, tensors: Mapping[str, Read], targets: Mapping[str, Tensor]) -> tuple[dict[str, Any], list[str]]:
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
    return plan, superfluous


def _copy_again(target: Tensor, again: Callable[[], dict[str, Any]], name: str) -> None:
    value = again()[name]
    target.copy_(value[0] if isinstance(value, list) else value)


def _converted(
    model: Any, plan: Mapping[str, Any], failed: list[str]
) -> Iterator[tuple[str, Tensor, Callable[[], dict[str, Any]]]]:
    """Names in the model and tensors, read and converted one parameter at a time, and what reads them once more;
    `failed` gets the others."""
    for first, conversion in plan.items():
        again = partial(_convert, model, first, conversion, dict(conversion.collected_tensors))
        try:
            made = again()
        except (RuntimeError, ValueError, LookupError) as error:
            failed.append(f"{first} cannot be made of its tensors: {error}")
            continue
        for name, value in made.items():
            yield name, value[0] if isinstance(value, list) else value, again


def _convert(model: Any, first: str, conversion: Any, sources: Mapping[str, list[Read]]) -> dict[str, Any]:
    """All that a conversion makes; it forgets its sources, so they are given to it anew."""
    conversion.collected_tensors.update({pattern: list(reads) for pattern, reads in sources.items()})
    made: dict[str, Any] = conversion.convert(first, model=model, config=model.config)
    return made


def _tensors_of(folder: Path, files: ExitStack) -> dict[str, Read]:
    """How to read each tensor of the folder, while `files` are open. Raises UsageError on unreadable files."""
    tensors: dict[str, Read] = {}
    for file in _weight_files(folder):
        try:
            opened = files.enter_context(safe_open(file, framework="pt"))
        except (OSError, SafetensorError) as error:
            raise UsageError.mismatch(_KEY, f"tensors in {file}", str(error)) from None
        tensors |= {name: partial(opened.get_tensor, name) for name in opened.keys()}  # noqa: SIM118 # it is no mapping
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
