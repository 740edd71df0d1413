"""A checkpoint is a folder `step-N` of safetensors and one manifest that says what must be in them.

    step-120/
      manifest.json      written last: a folder without it is no checkpoint
      rank-0.safetensors what each rank has written (parts.py)
      rank-1.safetensors

[Note: what is stored]
Each tensor has a name (`model.…`, `optimizer.…`, `master.…`, `average.…`, `rng.…`), its global shape and dtype, and
pieces. A piece is the box of the tensor that one pipeline or tensor rank holds, and of that box, flattened row by
row, the interval [start, stop); so flat ZeRO shards and whole tensors are stored alike. Its bytes are `size` bytes at
`offset` of `file`, with their SHA-256. What is not a tensor (steps, schedule, loss scale) is JSON in the manifest,
which carries a checksum of itself. Nothing is pickled.

Where hosts have disks of their own, each has the files of its ranks, and all have the same manifest.

Without torch: `dstrain ckpt` reads it too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
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
    """All of a checkpoint. files: name -> bytes. hosts: which host wrote a file. layout: ranks that saved it.
    state: what is not a tensor. run_id: of the run that saved it. saved_at: seconds since 1970."""

    step: int
    layout: Mapping[str, int]
    versions: Mapping[str, str]
    tensors: tuple[TensorEntry, ...]
    files: Mapping[str, int]
    state: Mapping[str, Any]
    run_id: str = ""
    hosts: Mapping[str, str] = field(default_factory=dict)
    saved_at: float = 0.0
    format: int = field(default=FORMAT)

    def to_text(self) -> str:
        """JSON, a line for each key and each tensor, with a checksum of the rest of itself."""
        body = {**vars(self), "state": encode(self.state), "tensors": [_row(entry) for entry in self.tensors]}
        rows = ",\n  ".join(json.dumps(row) for row in body.pop("tensors"))
        lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in body.items()]
        lines += [f' "tensors": [\n  {rows}\n ]']
        text = "{\n" + ",\n".join(lines)
        return f'{text},\n "checksum": "{_digest(text)}"\n}}\n'

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of `folder`. Raises CheckpointError where it is missing, damaged, or of a later format."""
        path = folder / FILE_NAME
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"{folder}: expected a checkpoint, found no {FILE_NAME}: {error.strerror}") from None
        except ValueError:
            raise CheckpointError(f"{path}: expected a manifest, found damaged text") from None
        return cls.parse(text, path)

    @classmethod
    def parse(cls, text: str, path: Path) -> Manifest:
        """The manifest that `path` holds. Raises CheckpointError where it is damaged or of a later format."""
        try:
            body = json.loads(text)
            checksum = body.pop("checksum")
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            raise CheckpointError(f"{path}: expected a manifest, found damaged text") from None
        if body.get("format") != FORMAT:
            found = f"format {body.get('format')}"
            raise CheckpointError(f"{path}: expected format {FORMAT}, found {found}; which version saved it?")
        found = _digest(text[: max(0, text.rfind(_CHECKSUM))])
        if checksum != found:
            raise CheckpointError(f"{path}: expected checksum {checksum}, found {found}: it is damaged")
        try:
            entries = tuple(_entry(*row) for row in body.pop("tensors"))
            return cls(**{**body, "state": decode(body["state"])}, tensors=entries)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: expected the keys of format {FORMAT}, found others: {error}") from None


_CHECKSUM = ',\n "checksum": '
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


def _row(entry: TensorEntry) -> list[Any]:
    """An entry as JSON without repeating itself: [name, shape, dtype, [[file, offset, size, start, stop, SHA-256,
    box_start, box_size], …]]; the box is left out where it is all of the tensor."""
    pieces = []
    for piece in entry.pieces:
        row: list[Any] = [piece.file, piece.offset, piece.size, piece.start, piece.stop, piece.sha256]
        pieces.append(row if piece.box_size == entry.shape else [*row, piece.box_start, piece.box_size])
    return [entry.name, entry.shape, entry.dtype, pieces]


def _entry(name: str, shape: list[int], dtype: str, pieces: list[list[Any]]) -> TensorEntry:
    whole = ([0] * len(shape), shape)
    rows = ((*row[:6], *(row[6:] or whole)) for row in pieces)
    return TensorEntry(
        name,
        tuple(shape),
        dtype,
        tuple(
            Piece(tuple(box_start), tuple(box_size), start, stop, file, offset, size, sha256)
            for file, offset, size, start, stop, sha256, box_start, box_size in rows
        ),
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def folder_of(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies below the folder of them."""
    return root / f"{PREFIX}{step}"


def steps_in(root: Path) -> list[int]:
    """The steps that have been committed below `root`, newest first."""
    names = [path.name.removeprefix(PREFIX) for path in root.glob(f"{PREFIX}*") if (path / FILE_NAME).is_file()]
    return sorted((int(name) for name in names if name.isdigit()), reverse=True)
