"""The model of a checkpoint as safetensors, as the library transformers lays them out. Without torch.

[Note: streaming]
One tensor is in memory at a time, twice where it is cast: its pieces are read, each compared with its SHA-256, put
together, cast, written. Each file is then read again and compared.

[Note: what comes last]
Everything is written into a folder beside the files' places and then renamed. Transformers finds shards by their index
alone, so an older index goes before the first shard is renamed and the new one comes last: a kill leaves no mix of two
models that could be loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from dstrain.runtime.checkpoint import transformers_layout as layout
from dstrain.runtime.checkpoint.assembly import assemble
from dstrain.runtime.checkpoint.casts import FLOATS, cast
from dstrain.runtime.checkpoint.commit import sync
from dstrain.runtime.checkpoint.manifest import ITEM_BYTES, Manifest, TensorEntry
from dstrain.runtime.checkpoint.parts import Part, Written, write_file
from dstrain.runtime.checkpoint.verify import chunks, damages, elsewhere
from dstrain.runtime.spec.errors import CheckpointError, UsageError

_TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class ExportOptions:
    """dtype: safetensors' name for all floating-point tensors; None: as they were trained. average: the averaged
    weights (train.ema_decay). max_shard_bytes: of one file."""

    dtype: str | None = None
    average: bool = False
    max_shard_bytes: int = layout.MAX_SHARD_BYTES


@dataclass(frozen=True)
class ExportedTensor:
    """entry: what of the checkpoint it is made of. dtype: that it gets."""

    name: str
    entry: TensorEntry
    dtype: str

    @property
    def size(self) -> int:
        """Bytes."""
        return prod(self.entry.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class ExportPlan:
    """shards: tensors by file. texts: files of JSON, by name; the index among them where there are several shards."""

    shards: Mapping[str, Sequence[ExportedTensor]]
    texts: Mapping[str, str]

    @property
    def tensors(self) -> list[ExportedTensor]:
        return [tensor for tensors in self.shards.values() for tensor in tensors]

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.size for tensor in self.tensors)

    @property
    def files(self) -> list[str]:
        """In the order in which they get their names. [Note: what comes last]"""
        names = [*self.texts, *self.shards]
        last = layout.INDEX if layout.INDEX in names else layout.SINGLE
        return [*(name for name in names if name != last), last]


def plan_export(manifest: Manifest, options: ExportOptions) -> ExportPlan:
    """Which files of which tensors. Pure. Raises UsageError where the checkpoint has no such weights."""
    entries = {entry.name: entry for entry in manifest.tensors}
    names = [name.removeprefix("model.") for name in entries if name.startswith("model.")]
    if not names:
        raise UsageError.mismatch("PATH", "a checkpoint of a model", "no model.…")
    if options.average and not any(f"average.{name}" in entries for name in names):
        fix = "train.ema_decay keeps an average"
        raise UsageError.mismatch("--average", "a checkpoint with averaged weights", "no average.…", fix)
    tensors = {name: _choose(name, entries, options) for name in names}
    files = layout.in_shards({name: tensor.size for name, tensor in tensors.items()}, options.max_shard_bytes)
    shards = {file: tuple(tensors[name] for name in held) for file, held in files.items()}
    texts = _texts(manifest.state.get("model"), list(tensors.values()))
    if layout.SINGLE not in shards:
        total = sum(tensor.size for tensor in tensors.values())
        weight_map = {name: file for file, held in files.items() for name in held}
        texts[layout.INDEX] = _json({"metadata": {"total_size": total}, "weight_map": weight_map})
    return ExportPlan(shards, texts)


def _choose(name: str, entries: Mapping[str, TensorEntry], options: ExportOptions) -> ExportedTensor:
    """The most precise numbers that there are, unless those that were trained with are asked for."""
    own = entries[f"model.{name}"]
    if own.dtype not in FLOATS:
        return ExportedTensor(name, own, own.dtype)
    dtype = options.dtype or own.dtype
    source = own if dtype == own.dtype else entries.get(f"master.{name}", own)
    if options.average:
        source = entries.get(f"average.{name}", source)
    return ExportedTensor(name, source, dtype)


def _texts(model: Any, tensors: Sequence[ExportedTensor]) -> dict[str, str]:
    """config.json and generation_config.json of a model of transformers, where the checkpoint has them."""
    if not isinstance(model, Mapping) or model.get("kind") != "hf" or not isinstance(model.get("config"), Mapping):
        return {}
    config = dict(model["config"])
    if config.get("use_cache") is False:  # only training has no use for it; the usual value is right again
        del config["use_cache"]
    sizes = {dtype: sum(t.size for t in tensors if t.dtype == dtype) for dtype in _TORCH_NAMES}
    if any(sizes.values()):
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        config[key] = _TORCH_NAMES[max(sizes, key=lambda dtype: sizes[dtype])]
    texts = {layout.CONFIG: _json(config)}
    if isinstance(model.get("generation_config"), Mapping):
        texts[layout.GENERATION] = _json(model["generation_config"])
    return texts


def _json(value: object) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def in_the_way(folder: Path, plan: ExportPlan) -> list[Path]:
    """Files in `folder` that an export would write over, or beside which its weights would not be found."""
    names = [*plan.files, *sorted(path.name for path in folder.glob("*") if layout.is_of_weights(path.name))]
    return [folder / name for name in dict.fromkeys(names) if (folder / name).exists()]


def export_model(checkpoint: Path, folder: Path, manifest: Manifest, plan: ExportPlan) -> None:
    """Write the plan's files over whatever has their names, and remove other weights of a model there.

    Raises CheckpointError where the checkpoint is damaged or not all here, or a file cannot be written; what was in the
    folder is whole then.
    """
    for damage in damages(checkpoint, manifest):
        raise CheckpointError(damage)
    _check_all_here(checkpoint, manifest, plan)
    draft = folder / f".export.tmp-{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        draft.mkdir()
        for file, tensors in plan.shards.items():
            parts = [Part.whole(tensor.name, tensor.entry.shape, tensor.dtype) for tensor in tensors]
            data = (cast(assemble(checkpoint, t.entry), t.entry.dtype, t.dtype).view("u1") for t in tensors)
            _compare(draft / file, folder / file, parts, write_file(draft / file, parts, data))
        for file, text in plan.texts.items():
            (draft / file).write_text(text, encoding="utf-8")
            sync(draft / file)
        _move(draft, folder, plan)
    except OSError as error:
        target = folder / plan.files[-1]
        found = f"{error.strerror or error}: {error.filename or target}"
        fix = "give another folder by -o, or make room"
        raise CheckpointError(f"{target}: expected to write the model, found {found}; {fix}") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _check_all_here(checkpoint: Path, manifest: Manifest, plan: ExportPlan) -> None:
    host_of = {file: host for host, files in elsewhere(checkpoint, manifest).items() for file in files}
    away = sorted({piece.file for t in plan.tensors for piece in t.entry.pieces if piece.file in host_of})
    if away:
        where = ", ".join(f"{file} on {host_of[file]}" for file in away[:3]) + (", …" if len(away) > 3 else "")
        raise CheckpointError(f"{checkpoint}: expected all files of the model here, found {where}; copy them here")


def _compare(draft: Path, target: Path, parts: Sequence[Part], written: Written) -> None:
    """Read what was written; it must be what was meant. Raises CheckpointError, OSError."""
    with draft.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # the disk is read, not memory
        for part, pieces in zip(parts, written.pieces, strict=True):
            for piece in pieces:
                digest = hashlib.sha256()
                for data in chunks(file, piece.offset, piece.size):
                    digest.update(data)
                if digest.hexdigest() != piece.sha256:
                    said = f"{part.name} with SHA-256 {piece.sha256[:16]}…, read back {digest.hexdigest()[:16]}…"
                    raise CheckpointError(f"{target}: expected {said}: the disk does not keep what it is given")


def _move(draft: Path, folder: Path, plan: ExportPlan) -> None:
    """[Note: what comes last]"""
    if layout.SINGLE not in plan.shards:
        for name in (layout.INDEX, layout.SINGLE):
            (folder / name).unlink(missing_ok=True)
    for name in plan.files:
        (draft / name).rename(folder / name)
    for path in in_the_way(folder, plan):
        if path.name not in plan.files:
            path.unlink()
    draft.rmdir()
    sync(folder)
