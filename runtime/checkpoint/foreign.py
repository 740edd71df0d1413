"""Checkpoints of other programs made into one of ours: the model, and moments of Adam where they are known. No torch.

What reads each kind is in foreign_safetensors.py, foreign_torch.py and foreign_deepspeed.py.
"""

from __future__ import annotations

import json
import platform
import secrets
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from dstrain.runtime.checkpoint import commit
from dstrain.runtime.checkpoint import transformers_layout as layout
from dstrain.runtime.checkpoint.manifest import FILE_NAME, Manifest, folder_of
from dstrain.runtime.checkpoint.parts import Part, entries_of, write_file
from dstrain.runtime.checkpoint.verify import damages
from dstrain.runtime.spec.errors import CheckpointError, UsageError

DATA_FILE = "rank-0.safetensors"
DEEPSPEED_LATEST = "latest"
TORCH_SINGLE = "pytorch_model.bin"
TORCH_INDEX = "pytorch_model.bin.index.json"


class Kind(StrEnum):
    """What can be imported."""

    SAFETENSORS = "safetensors"
    TORCH = "torch"
    DEEPSPEED = "deepspeed"


@dataclass(frozen=True)
class ForeignTensor:
    """part: its name in a checkpoint of ours (`model.…`), shape and dtype. read: its bytes, row by row, as a buffer."""

    part: Part
    read: Callable[[], Any]


@dataclass(frozen=True)
class Source:
    """A checkpoint of another program, opened. what: in words. model: the manifest's state["model"]. optimizer: its
    state["optimizer"]. step: None where it does not say. notes: what a person should know of the reading."""

    path: Path
    what: str
    tensors: Sequence[ForeignTensor]
    model: Mapping[str, Any]
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    step: int | None = None
    notes: Sequence[str] = ()


def kind_of(path: Path) -> Kind:
    """By the name of a file, or by the names in a folder. Raises UsageError."""
    if path.is_file():
        return Kind.SAFETENSORS if path.suffix == ".safetensors" else Kind.TORCH
    expected = "a file of tensors, or a folder of safetensors, of torch files or of DeepSpeed"
    if not path.is_dir():
        raise UsageError.mismatch("SOURCE", expected, f"no {path}")
    names = {each.name for each in path.iterdir()}
    if FILE_NAME in names:
        raise UsageError.mismatch("SOURCE", expected, f"a checkpoint of dstrain, {path}", "it needs no import")
    if DEEPSPEED_LATEST in names or any(name.endswith(("_model_states.pt", "_optim_states.pt")) for name in names):
        return Kind.DEEPSPEED
    if {layout.SINGLE, layout.INDEX} & names:
        return Kind.SAFETENSORS
    if {TORCH_SINGLE, TORCH_INDEX} & names:
        return Kind.TORCH
    if any(name.endswith(".distcp") for name in names):
        fix = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE makes one file of it"
        raise UsageError.mismatch("SOURCE", expected, f"a distributed checkpoint of torch, {path}", fix)
    files = [path / name for name in sorted(names) if name.endswith((".safetensors", ".pt", ".pth", ".bin", ".ckpt"))]
    fix = f"give the file, such as {files[0]}" if files else ""
    raise UsageError.mismatch("SOURCE", expected, f"none of these in {path}", fix)


def files_of(folder: Path, single: str, index: str) -> tuple[list[Path], dict[str, str]]:
    """The files of transformers' layout, and of their index, where there is one, the file of each tensor.

    Raises CheckpointError where the index cannot be read or a file is missing.
    """
    weight_map: dict[str, str] = {}
    if (folder / index).exists():
        given = _read_json(folder / index).get("weight_map")
        weight_map = given if isinstance(given, dict) else {}
        names = sorted({str(name) for name in weight_map.values()})
        if not names or any(Path(name).name != name for name in names):
            raise CheckpointError(f"{folder / index}: expected the names of files beside it, found {names[:1]}")
    else:
        names = [single]
    for name in names:
        if not (folder / name).is_file():
            said = f", which {index} names" if weight_map else ""
            raise CheckpointError(f"{folder}: expected {name}{said}, found no such file")
    return [folder / name for name in names], weight_map


def describe(folder: Path, tied: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The manifest's state["model"], of the config.json of transformers in `folder`, if there is one."""
    described: dict[str, Any] = {"kind": None, "config": None, "tied": dict(tied or {})}
    if (folder / layout.CONFIG).is_file():
        config = _read_json(folder / layout.CONFIG)
        if "model_type" in config:
            described |= {"kind": "hf", "config": config}
            if (folder / layout.GENERATION).is_file():
                described["generation_config"] = _read_json(folder / layout.GENERATION)
    return described


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: expected a file of JSON, found {error.strerror or error}") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: expected JSON, found damaged text") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected an object of JSON, found a {type(value).__name__}")
    return value


def import_checkpoint(source: Source, root: Path, step: int) -> Path:
    """Write root/step-N, read it again, and give it its name only then. Raises UsageError where there is one already,
    CheckpointError where it cannot be written or `source` cannot be read; nothing of it is left then."""
    target = folder_of(root, step)
    if target.exists():
        raise UsageError.mismatch(
            "--output", f"no {target.name} in {root}", str(target), "give another folder or --step"
        )
    if not source.tensors:
        raise UsageError.mismatch("SOURCE", "tensors", f"none in {source.path}")
    draft = root / f"{target.name}.tmp-{secrets.token_hex(8)}"
    try:
        draft.mkdir(parents=True)
        manifest = _write(source, draft, step)
        for damage in damages(draft, manifest, deep=True):
            raise CheckpointError(f"{damage}: the disk does not keep what it is given")
        draft.rename(target)
        commit.sync(root)
    except OSError as error:
        found = f"{error.strerror or error}: {error.filename or target}"
        raise CheckpointError(f"{target}: expected to write the checkpoint, found {found}; make room") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def _write(source: Source, draft: Path, step: int) -> Manifest:
    parts = [tensor.part for tensor in source.tensors]
    written = write_file(draft / DATA_FILE, parts, (tensor.read() for tensor in source.tensors))
    state: dict[str, Any] = {"imported_from": str(source.path.absolute()), "format": source.what, "kind": "model"}
    state["model"] = source.model
    if source.optimizer:
        state["optimizer"] = source.optimizer
    manifest = Manifest(
        step=step,
        layout={"world_size": 1},
        versions={"python": platform.python_version()},
        tensors=tuple(entries_of([(parts, written)])),
        files={written.file: written.size},
        state=state,
        saved_at=time.time(),
    )
    commit.write_file(draft / FILE_NAME, manifest.to_text().encode())
    commit.sync(draft)
    return manifest
