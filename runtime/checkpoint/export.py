"""The model of a checkpoint as one safetensors file, for other programs. Without torch.

[Note: streaming] One tensor is in memory at a time (twice, where it was saved as boxes): its pieces are read, each
compared with its SHA-256, put together, written. The file is then read again and compared piece by piece, and only
then gets its name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import struct
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from dstrain.runtime.checkpoint.manifest import ITEM_BYTES, Manifest, Piece, TensorEntry
from dstrain.runtime.checkpoint.verify import damages, whole_piece
from dstrain.runtime.spec.errors import CheckpointError

MODEL_FILE = "model.safetensors"
_PREFIX = "model."


def export_model(checkpoint: Path, folder: Path, manifest: Manifest) -> tuple[Path, int]:
    """Write folder/model.safetensors over whatever has that name; returns it and how many tensors it has.

    Raises CheckpointError where the checkpoint is damaged or the file cannot be written; what was there is whole then.
    """
    for damage in damages(checkpoint, manifest):
        raise CheckpointError(damage)
    entries = [entry for entry in manifest.tensors if entry.name.startswith(_PREFIX)]
    target = folder / MODEL_FILE
    temporary = folder / f".{MODEL_FILE}.tmp-{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb+") as file:
            start = _write_header(file, entries)
            for entry in entries:
                file.write(_whole(checkpoint, entry).data)
            file.flush()
            os.fsync(file.fileno())
            _compare(target, file, start, entries)
        temporary.rename(target)
    except OSError as error:
        found = f"{error.strerror or error}: {error.filename or target}"
        fix = "give another folder by -o, or make room"
        raise CheckpointError(f"{target}: expected to write the model, found {found}; {fix}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return target, len(entries)


def _write_header(file: BinaryIO, entries: list[TensorEntry]) -> int:
    """Returns where the tensors begin."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    end = 0
    for entry in entries:
        offsets = [end, end + prod(entry.shape) * ITEM_BYTES[entry.dtype]]
        said = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
        header[entry.name.removeprefix(_PREFIX)] = said
        end = offsets[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    return 8 + len(text)


def _whole(checkpoint: Path, entry: TensorEntry) -> NDArray[Any]:
    """The tensor of all its pieces, as items without a meaning. Raises CheckpointError, OSError."""
    whole = np.empty(entry.shape, dtype=_items(entry))
    for piece in entry.pieces:
        box = _box(whole, piece)
        flat = np.ascontiguousarray(box).reshape(-1)  # a copy, of a box that is not the whole
        part: Any = flat[piece.start : piece.stop].view(np.uint8)
        with (checkpoint / piece.file).open("rb") as file:
            file.seek(piece.offset)
            file.readinto(part)
        found = hashlib.sha256(part).hexdigest()
        if found != piece.sha256:
            raise CheckpointError(
                f"{checkpoint / piece.file}: expected {entry.name} with SHA-256 {piece.sha256[:16]}…, "
                f"found {found[:16]}…: the file is damaged; export an older checkpoint"
            )
        if piece.box_size != entry.shape:
            box[...] = flat.reshape(box.shape)
    return whole


def _compare(target: Path, file: BinaryIO, start: int, entries: list[TensorEntry]) -> None:
    """Read what was written; each tensor's bytes must be those of the manifest. Raises CheckpointError, OSError."""
    file.seek(start)
    for entry in entries:
        data = file.read(prod(entry.shape) * ITEM_BYTES[entry.dtype])
        for piece, found in _digests(entry, data):
            if found != piece.sha256:
                said = f"{entry.name} with SHA-256 {piece.sha256[:16]}…, read back {found[:16]}…"
                raise CheckpointError(f"{target}: expected {said}: the disk does not keep what it is given")


def _digests(entry: TensorEntry, data: bytes) -> Iterator[tuple[Piece, str]]:
    whole = whole_piece(entry)
    if whole is not None:
        yield whole, hashlib.sha256(data).hexdigest()
        return
    array = np.frombuffer(data, dtype=_items(entry)).reshape(entry.shape)
    for piece in entry.pieces:
        flat = _box(array, piece).reshape(-1)[piece.start : piece.stop]
        yield piece, hashlib.sha256(flat.tobytes()).hexdigest()


def _items(entry: TensorEntry) -> np.dtype[Any]:
    return np.dtype(f"V{ITEM_BYTES[entry.dtype]}")


def _box(whole: NDArray[Any], piece: Piece) -> NDArray[Any]:
    """A view of the tensor."""
    boxes = zip(piece.box_start, piece.box_size, strict=True)
    index: Any = (*(slice(start, start + size) for start, size in boxes), ...)  # the dots: a scalar stays an array
    view: NDArray[Any] = whole[index]
    return view
