"""A checkpoint is a folder `step-N` of safetensors and one manifest that says what must be in them.

    step-120/
      manifest.json      written last: a folder without it is no checkpoint
      state-0.safetensors

[Note: what is stored]
Each tensor has a name (`model.…`, `optimizer.…`, `master.…`, `average.…`, `rng.…`), its global shape and dtype, and
pieces. A piece is the box of the tensor that one pipeline or tensor rank holds, and of that box, flattened row by
row, the interval [start, stop); so flat ZeRO shards and whole tensors are stored alike. Its bytes are `size` bytes at
`offset` of `file`, with their SHA-256. What is not a tensor (steps, schedule, loss scale) is JSON in the manifest,
which carries a checksum of itself. Nothing is pickled.

Without torch: `dstrain ckpt` reads it too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dstrain.runtime.spec.errors import CheckpointError

ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
"""safetensors' names of what can be stored, and the bytes of one element; as torch's dtypes in dtypes.py."""

FORMAT = 1
FILE_NAME = "manifest.json"
PREFIX = "step-"


@dataclass(frozen=True)
class Piece:
    """A part of a tensor, and where its bytes are. box_start, box_size: per dimension of the tensor."""

    box_start: tuple[int, ...]
    box_size: tuple[int, ...]
    start: int
    stop: int
    file: str
    offset: int
    size: int
    sha256: str


@dataclass(frozen=True)
class TensorEntry:
    """One tensor. dtype: safetensors' name for it, such as F32."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Manifest:
    """All of a checkpoint. files: name -> bytes. layout: ranks that saved it. state: what is not a tensor.
    run_id: of the run that saved it."""

    step: int
    layout: Mapping[str, int]
    versions: Mapping[str, str]
    tensors: tuple[TensorEntry, ...]
    files: Mapping[str, int]
    state: Mapping[str, Any]
    run_id: str = ""
    format: int = field(default=FORMAT)

    def to_text(self) -> str:
        """JSON with a checksum of the rest of itself."""
        tensors = [asdict(entry) for entry in self.tensors]
        body = {**vars(self), "tensors": tensors, "state": encode(self.state)}
        return json.dumps({**body, "checksum": _digest(body)}, indent=1) + "\n"

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of `folder`. Raises CheckpointError where it is missing, damaged, or of a later format."""
        path = folder / FILE_NAME
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
            checksum = body.pop("checksum")
        except OSError as error:
            raise CheckpointError(f"{folder}: expected a checkpoint, found no {FILE_NAME}: {error.strerror}") from None
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            raise CheckpointError(f"{path}: expected a manifest, found damaged text") from None
        if body.get("format") != FORMAT:
            found = f"format {body.get('format')}"
            raise CheckpointError(f"{path}: expected format {FORMAT}, found {found}; which version saved it?")
        if checksum != _digest(body):
            raise CheckpointError(f"{path}: expected checksum {checksum}, found {_digest(body)}: it is damaged")
        try:
            entries = tuple(_entry(entry) for entry in body.pop("tensors"))
            return cls(**{**body, "state": decode(body["state"])}, tensors=entries)
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: expected the keys of format {FORMAT}, found others: {error}") from None


_PAIRS = "__pairs__"


def encode(value: Any) -> Any:
    """JSON for plain values, also for mappings whose keys are numbers. Raises TypeError for anything else."""
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            return {key: encode(inner) for key, inner in value.items()}
        return {_PAIRS: [[key, encode(inner)] for key, inner in value.items()]}
    if isinstance(value, list | tuple):
        return [encode(inner) for inner in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a {type(value).__name__}, which a checkpoint cannot hold")


def decode(value: Any) -> Any:
    """The inverse of `encode`, but that tuples have become lists."""
    if isinstance(value, dict):
        if value.keys() == {_PAIRS}:
            return {key: decode(inner) for key, inner in value[_PAIRS]}
        return {key: decode(inner) for key, inner in value.items()}
    return [decode(inner) for inner in value] if isinstance(value, list) else value


def _entry(entry: Mapping[str, Any]) -> TensorEntry:
    pieces = tuple(
        Piece(**{**piece, "box_start": tuple(piece["box_start"]), "box_size": tuple(piece["box_size"])})
        for piece in entry["pieces"]
    )
    return TensorEntry(entry["name"], tuple(entry["shape"]), entry["dtype"], pieces)


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def folder_of(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies below the folder of them."""
    return root / f"{PREFIX}{step}"


def steps_in(root: Path) -> list[int]:
    """The steps that have been committed below `root`, newest first."""
    names = [path.name.removeprefix(PREFIX) for path in root.glob(f"{PREFIX}*") if (path / FILE_NAME).is_file()]
    return sorted((int(name) for name in names if name.isdigit()), reverse=True)
