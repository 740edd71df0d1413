"""A tensor put together from its pieces, each compared with its SHA-256. Without torch."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dstrain.runtime.checkpoint.manifest import ITEM_BYTES, Piece, TensorEntry
from dstrain.runtime.spec.errors import CheckpointError


def assemble(checkpoint: Path, entry: TensorEntry) -> NDArray[Any]:
    """All of the tensor, flat, as items without a meaning; beside it, at most one box of it is in memory.

    Raises CheckpointError where a piece is damaged, OSError.
    """
    whole = np.empty(entry.shape, dtype=f"V{ITEM_BYTES[entry.dtype]}")
    boxes: dict[tuple[tuple[int, ...], tuple[int, ...]], list[Piece]] = {}
    for piece in entry.pieces:
        boxes.setdefault((piece.box_start, piece.box_size), []).append(piece)
    for (start, size), pieces in boxes.items():
        slices = (slice(begin, begin + count) for begin, count in zip(start, size, strict=True))
        index: Any = (*slices, ...)  # the dots: a scalar stays an array
        box = whole[index]
        flat = np.ascontiguousarray(box).reshape(-1)  # a copy, of a box that does not lie in one piece
        for piece in pieces:
            _read(checkpoint, entry.name, piece, flat[piece.start : piece.stop].view(np.uint8))
        box[...] = flat.reshape(box.shape)
    return whole.reshape(-1)


def _read(checkpoint: Path, name: str, piece: Piece, target: Any) -> None:
    path = checkpoint / piece.file
    with path.open("rb") as file:
        file.seek(piece.offset)
        file.readinto(target)
    found = hashlib.sha256(target).hexdigest()
    if found != piece.sha256:
        raise CheckpointError(
            f"{path}: expected {name} with SHA-256 {piece.sha256[:16]}…, found {found[:16]}…: the file is damaged; "
            "take an older checkpoint"
        )
