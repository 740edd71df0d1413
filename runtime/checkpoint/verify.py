"""What is wrong with a checkpoint, one line each. Without torch, and without holding more than a chunk of a file."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from dstrain.runtime.checkpoint.manifest import ITEM_BYTES, Manifest, Piece, TensorEntry

CHUNK_BYTES = 1 << 20
MAX_HEADER_BYTES = 100_000_000
"""safetensors' own limit."""


def damages(folder: Path, manifest: Manifest, *, deep: bool = False) -> Iterator[str]:
    """Every damage as a line that names the file, the tensor, what was expected and what was found.

    Cheap: that the manifest agrees with itself, and that its files are there with their sizes. deep: also every piece's
    SHA-256, and the headers by which other programs read the files.
    """
    for entry in manifest.tensors:
        yield from contradictions(folder, manifest, entry)
    for name in manifest.files:
        if Path(name).name != name:
            yield f"{folder}: expected names of files in this folder, found {name}"
            continue
        found = _size(folder / name)
        yield from _of_file(folder / name, manifest, found)
        if deep and isinstance(found, int):
            yield from _of_bytes(folder / name, manifest)


def whole_piece(entry: TensorEntry) -> Piece | None:
    """The one piece that is all of the tensor, if there is one."""
    for piece in entry.pieces:
        if piece.box_size == entry.shape and (piece.start, piece.stop) == (0, prod(entry.shape)):
            return piece
    return None


def chunks(file: BinaryIO, offset: int, size: int) -> Iterator[bytes]:
    """`size` bytes from `offset`, fewer where the file ends. Raises OSError."""
    file.seek(offset)
    while size > 0:
        data = file.read(min(size, CHUNK_BYTES))
        if not data:
            return
        size -= len(data)
        yield data


def contradictions(folder: Path, manifest: Manifest, entry: TensorEntry) -> Iterator[str]:
    """Where the pieces cannot be those of the tensor."""
    where = f"{folder}: {entry.name}"
    if entry.dtype not in ITEM_BYTES:
        yield f"{where}: expected a dtype of {', '.join(ITEM_BYTES)}, found {entry.dtype}"
        return
    for piece in entry.pieces:
        if piece.file not in manifest.files:
            yield f"{where}: expected its bytes in one of {', '.join(manifest.files)}, found {piece.file}"
        expected = (piece.stop - piece.start) * ITEM_BYTES[entry.dtype]
        if piece.size != expected:
            yield f"{where}: expected {expected} bytes of it in {piece.file}, found {piece.size}"
        if not _fits(entry, piece):
            box = f"[{piece.start}, {piece.stop}) of the box {piece.box_size} at {piece.box_start}"
            yield f"{where}: expected pieces of a tensor {entry.shape}, found {box}"
    places = {(piece.box_start, piece.box_size, piece.start, piece.stop) for piece in entry.pieces}
    held = sum(stop - start for _, _, start, stop in places)
    if held != prod(entry.shape):
        yield f"{where}: expected pieces of {prod(entry.shape)} elements, found {held}"


def _fits(entry: TensorEntry, piece: Piece) -> bool:
    if not len(piece.box_start) == len(piece.box_size) == len(entry.shape):
        return False
    boxes = zip(piece.box_start, piece.box_size, entry.shape, strict=True)
    inside = all(start >= 0 and size >= 0 and start + size <= whole for start, size, whole in boxes)
    return inside and 0 <= piece.start <= piece.stop <= prod(piece.box_size)


def _size(path: Path) -> int | str:
    """Its bytes, or why it has none."""
    try:
        return path.stat().st_size
    except OSError as error:
        return error.strerror or str(error)


def _of_file(path: Path, manifest: Manifest, found: int | str) -> Iterator[str]:
    expected = manifest.files[path.name]
    if found == expected:
        return
    end = found if isinstance(found, int) else 0
    inside = [
        entry.name
        for entry in manifest.tensors
        if any(piece.file == path.name and piece.size and piece.offset + piece.size > end for piece in entry.pieces)
    ]
    more = f" and {len(inside) - 1} more tensors" if len(inside) > 1 else ""
    lost = f"; lost: {inside[0]}{more}" if inside else ""
    said = f"found {found}: it was cut off or changed" if isinstance(found, int) else f"found {found}"
    yield f"{path}: expected {expected} bytes, {said}{lost}"


def _of_bytes(path: Path, manifest: Manifest) -> Iterator[str]:
    pieces = [(piece, entry) for entry in manifest.tensors for piece in entry.pieces if piece.file == path.name]
    pieces.sort(key=lambda pair: pair[0].offset)
    try:
        with path.open("rb") as file:
            if path.suffix == ".safetensors":
                yield from _of_header(path, file, [entry for _, entry in pieces])
            for piece, entry in pieces:
                yield from _of_piece(path, file, piece, entry)
    except OSError as error:
        yield f"{path}: expected a file that can be read, found {error.strerror or error}"


def _of_piece(path: Path, file: BinaryIO, piece: Piece, entry: TensorEntry) -> Iterator[str]:
    digest, found = hashlib.sha256(), 0
    for data in chunks(file, piece.offset, piece.size):
        digest.update(data)
        found += len(data)
    name = entry.name if piece is whole_piece(entry) else f"{entry.name}[{piece.start}:{piece.stop}]"
    if found != piece.size:
        yield f"{path}: expected {name} in {piece.size} bytes at {piece.offset}, found {found}: it was cut off"
    elif digest.hexdigest() != piece.sha256:
        digests = f"{piece.sha256[:16]}…, found {digest.hexdigest()[:16]}…"
        yield f"{path}: expected {name} with SHA-256 {digests}: the file is damaged"


def _of_header(path: Path, file: BinaryIO, entries: list[TensorEntry]) -> Iterator[str]:
    """The loader reads by the manifest alone; other programs go by this."""
    header, start = read_header(file)
    if header is None:
        yield f"{path}: expected a header of safetensors, found damaged text"
        return
    expected: dict[str, Mapping[str, Any]] = {}
    for entry in entries:
        piece = whole_piece(entry)
        if piece is not None and piece.file == path.name:
            offsets = [piece.offset - start, piece.offset - start + piece.size]
            expected[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
    for name, said in expected.items():
        found = json.dumps(header[name]) if name in header else "nothing of it"
        if header.get(name) != said:
            yield f"{path}: expected {name} in the header as {json.dumps(said)}, found {found}: the header is damaged"


def read_header(file: BinaryIO) -> tuple[dict[str, Any] | None, int]:
    """A safetensors file's header, None if it is damaged; and where the tensors begin."""
    file.seek(0)
    length = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))[0]
    if length > MAX_HEADER_BYTES:
        return None, 0
    try:
        header = json.loads(file.read(length))
    except (ValueError, RecursionError):
        return None, 0
    return (header, 8 + length) if isinstance(header, dict) else (None, 0)
