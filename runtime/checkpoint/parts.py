"""What one rank writes of a checkpoint: parts of tensors, into one safetensors file. Without torch.

[Note: pieces]
A part is the interval [start, stop) of a tensor's box, flattened row by row. It is written in pieces of up to
PIECE_BYTES, each with its own SHA-256, so that any other layout can read, and verify, little more than it needs. In the
file's header, which other programs read, a part is one tensor: under its own name if it is whole, else flat, as
`name[start:stop]`.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from dstrain.runtime.checkpoint.manifest import ITEM_BYTES, Piece, TensorEntry

PIECE_BYTES = 16 << 20
ALIGNMENT = 64
"""Of a file's first tensor."""


@dataclass(frozen=True)
class Part:
    """[start, stop) of a box of a tensor, flattened. shape: the tensor's. dtype: safetensors' name. Without a box, it
    is all of the tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    start: int
    stop: int
    box_start: tuple[int, ...] | None = None
    box_size: tuple[int, ...] | None = None

    @classmethod
    def whole(cls, name: str, shape: Sequence[int], dtype: str) -> Part:
        return cls(name, tuple(shape), dtype, 0, prod(shape))

    @property
    def size(self) -> int:
        """Bytes."""
        return (self.stop - self.start) * ITEM_BYTES[self.dtype]

    @property
    def is_whole(self) -> bool:
        return self.box_size in (None, self.shape) and (self.start, self.stop) == (0, prod(self.shape))

    @property
    def label(self) -> str:
        """Its name in the file's header."""
        if self.is_whole:
            return self.name
        box = "" if self.box_start is None else f"@{','.join(map(str, self.box_start))}"
        return f"{self.name}{box}[{self.start}:{self.stop}]"


class Written(NamedTuple):
    """A file that has been written and synced. pieces: of each part, in the order of the parts."""

    file: str
    size: int
    pieces: list[list[Piece]]


def write_file(path: Path, parts: Sequence[Part], data: Iterable[Any]) -> Written:
    """Write and sync a new file. data: the bytes of each part, as buffers, taken one at a time. Raises OSError."""
    text = _header(parts)
    pieces: list[list[Piece]] = []
    with path.open("xb", buffering=0) as file:
        _write(file.fileno(), memoryview(struct.pack("<Q", len(text)) + text))
        offset = 8 + len(text)
        for part, given in zip(parts, data, strict=True):
            view = memoryview(given).cast("B") if part.size else memoryview(b"")
            assert view.nbytes == part.size, f"{part.name}: {view.nbytes} bytes, not {part.size}"
            pieces.append(_write_part(file.fileno(), part, view, path.name, offset))
            offset += part.size
        os.fsync(file.fileno())
    return Written(path.name, offset, pieces)


def entries_of(written: Iterable[tuple[Sequence[Part], Written]]) -> list[TensorEntry]:
    """What the manifest says of the tensors in some files, in the order in which they first come."""
    first: dict[str, Part] = {}
    pieces: dict[str, list[Piece]] = {}
    for parts, file in written:
        for part, stored in zip(parts, file.pieces, strict=True):
            first.setdefault(part.name, part)
            pieces.setdefault(part.name, []).extend(stored)
    return [
        TensorEntry(name, part.shape, part.dtype, tuple(sorted(pieces[name], key=lambda p: (p.box_start, p.start))))
        for name, part in first.items()
    ]


def _header(parts: Sequence[Part]) -> bytes:
    said: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    end = 0
    for part in parts:
        shape = list(part.shape) if part.is_whole else [part.stop - part.start]
        said[part.label] = {"dtype": part.dtype, "shape": shape, "data_offsets": [end, end + part.size]}
        end += part.size
    text = json.dumps(said).encode()
    return text + b" " * (-(8 + len(text)) % ALIGNMENT)


def _write_part(fd: int, part: Part, view: memoryview, file: str, offset: int) -> list[Piece]:
    item = ITEM_BYTES[part.dtype]
    box_start = part.box_start if part.box_start is not None else (0,) * len(part.shape)
    box_size = part.box_size if part.box_size is not None else part.shape
    pieces = []
    for begin in range(0, max(part.size, 1), PIECE_BYTES):
        block = view[begin : begin + PIECE_BYTES]
        _write(fd, block)
        _start_writeback(fd, offset + begin, block.nbytes)
        start = part.start + begin // item
        digest = hashlib.sha256(block).hexdigest()
        stop = start + block.nbytes // item
        pieces.append(Piece(box_start, box_size, start, stop, file, offset + begin, block.nbytes, digest))
    return pieces


def _write(fd: int, view: memoryview) -> None:
    while view.nbytes:
        view = view[os.write(fd, view) :]


_SYNC_FILE_RANGE_WRITE = 2
_libc = ctypes.CDLL(None, use_errno=True)


def _start_writeback(fd: int, offset: int, size: int) -> None:
    """The disk begins now, beside the hashing; the fsync at the end waits for less. What fails here, fails there."""
    if size and hasattr(_libc, "sync_file_range"):
        _libc.sync_file_range(fd, ctypes.c_int64(offset), ctypes.c_int64(size), _SYNC_FILE_RANGE_WRITE)
