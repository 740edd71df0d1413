"""What is wrong with a checkpoint, one line each. Without torch, and without holding more than a chunk of a file.

[Note: elsewhere]
Where hosts have disks of their own, each has the files of its ranks beside the whole manifest. A host of which no file
is here has its files there: that is no damage, and nothing of it can be checked here. Of a host that has any file here,
or that is this machine, every file must be here.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import struct
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from dstrain.runtime.checkpoint.manifest import FILE_NAME, ITEM_BYTES, Manifest, Piece, TensorEntry
from dstrain.runtime.checkpoint.parts import Part

CHUNK_BYTES = 1 << 20
MAX_HEADER_BYTES = 100_000_000
"""safetensors' own limit."""
MAX_READERS = 8
"""Files that are read at the same time; hashing takes a core for each."""

Stored = Sequence[tuple[Piece, TensorEntry]]
"""What one file holds, in the order of the bytes."""


def damages(folder: Path, manifest: Manifest, *, deep: bool = False) -> Iterator[str]:
    """Every damage as a line that names the file, the tensor, what was expected and what was found.

    Cheap: that the manifest agrees with itself, and that its files are there with their sizes. deep: also every piece's
    SHA-256, and the headers by which other programs read the files. Files of other hosts are left out. [Note:
    elsewhere]
    """
    for entry in manifest.tensors:
        yield from contradictions(folder, manifest, entry)
    away = {name for names in elsewhere(folder, manifest).values() for name in names}
    stored = stored_in(manifest)
    here = []
    for name, size in manifest.files.items():
        if Path(name).name != name:
            yield f"{folder}: expected names of files in this folder, found {name}"
        elif name not in away:
            here.append(name)
            yield from _of_file(folder / name, size, stored.get(name, ()))
    if deep:
        yield from _of_all_bytes([folder / name for name in here if (folder / name).is_file()], stored)


def foreign_files(folder: Path, manifest: Manifest) -> list[str]:
    """What lies there and is none of the checkpoint's files."""
    return sorted({path.name for path in folder.iterdir()} - {FILE_NAME, *manifest.files})


def elsewhere(folder: Path, manifest: Manifest) -> dict[str, list[str]]:
    """The files that other hosts have on disks of their own, by host. [Note: elsewhere]"""
    if len(set(manifest.hosts.values())) < 2:
        return {}
    here = {platform.node()}
    here |= {host for name, host in manifest.hosts.items() if Path(name).name == name and (folder / name).exists()}
    away: dict[str, list[str]] = {}
    for name in manifest.files:
        host = manifest.hosts.get(name)
        if host is not None and host not in here:
            away.setdefault(host, []).append(name)
    return away


def stored_in(manifest: Manifest) -> Mapping[str, Stored]:
    """What each file holds."""
    stored: dict[str, list[tuple[Piece, TensorEntry]]] = {}
    for entry in manifest.tensors:
        for piece in entry.pieces:
            stored.setdefault(piece.file, []).append((piece, entry))
    for pieces in stored.values():
        pieces.sort(key=lambda pair: pair[0].offset)
    return stored


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
            yield f"{where}: expected its bytes in one of {_some(manifest.files)}, found {piece.file}"
        expected = (piece.stop - piece.start) * ITEM_BYTES[entry.dtype]
        if piece.size != expected:
            yield f"{where}: expected {expected} bytes of it in {piece.file}, found {piece.size}"
        if not _fits(entry, piece):
            box = f"[{piece.start}, {piece.stop}) of the box {piece.box_size} at {piece.box_start}"
            yield f"{where}: expected pieces of a tensor {entry.shape}, found {box}"
    places = sorted({(piece.box_start, piece.box_size, piece.start, piece.stop) for piece in entry.pieces})
    held = sum(stop - start for _, _, start, stop in places)
    if held != prod(entry.shape):
        yield f"{where}: expected pieces of {prod(entry.shape)} elements, found {held}"
        return
    for (start, size), intervals in groupby(places, key=lambda place: place[:2]):
        end = 0
        for _, _, begin, stop in intervals:
            if begin != end:
                box = f" of the box {size} at {start}" if size != entry.shape else ""
                yield f"{where}: expected a piece from element {end}{box}, found one from {begin}"
                break
            end = stop


def _some(names: Mapping[str, int]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(list(names)[:3]) + more


def _fits(entry: TensorEntry, piece: Piece) -> bool:
    if not len(piece.box_start) == len(piece.box_size) == len(entry.shape):
        return False
    boxes = zip(piece.box_start, piece.box_size, entry.shape, strict=True)
    inside = all(start >= 0 and size >= 0 and start + size <= whole for start, size, whole in boxes)
    return inside and 0 <= piece.start <= piece.stop <= prod(piece.box_size)


def _of_file(path: Path, expected: int, stored: Stored) -> Iterator[str]:
    try:
        found: int | str = path.stat().st_size
    except OSError as error:
        found = error.strerror or str(error)
    if found == expected:
        return
    end = found if isinstance(found, int) else 0
    lost = dict.fromkeys(entry.name for piece, entry in stored if piece.size and piece.offset + piece.size > end)
    names = list(lost)
    more = f" and {len(names) - 1} more tensors" if len(names) > 1 else ""
    inside = f"; lost: {names[0]}{more}" if names else ""
    said = f"found {found}: it was cut off or changed" if isinstance(found, int) else f"found {found}"
    yield f"{path}: expected {expected} bytes, {said}{inside}"


def _of_all_bytes(paths: list[Path], stored: Mapping[str, Stored]) -> Iterator[str]:
    """Several files at once; the lines in the order of the files."""
    with ThreadPoolExecutor(min(MAX_READERS, os.cpu_count() or 1)) as readers:
        for lines in readers.map(lambda path: list(_of_bytes(path, stored.get(path.name, ()))), paths):
            yield from lines


def _of_bytes(path: Path, stored: Stored) -> Iterator[str]:
    try:
        with path.open("rb") as file:
            if path.suffix == ".safetensors":
                yield from _of_header(path, file, stored)
            for piece, entry in stored:
                yield from _of_piece(path, file, piece, entry)
    except OSError as error:
        yield f"{path}: expected a file that can be read, found {error.strerror or error}"


def _of_piece(path: Path, file: BinaryIO, piece: Piece, entry: TensorEntry) -> Iterator[str]:
    digest, found = hashlib.sha256(), 0
    for data in chunks(file, piece.offset, piece.size):
        digest.update(data)
        found += len(data)
    whole = piece.stop - piece.start == prod(entry.shape)
    name = entry.name if whole else f"{entry.name}[{piece.start}:{piece.stop}]"
    if found != piece.size:
        yield f"{path}: expected {name} in {piece.size} bytes at {piece.offset}, found {found}: it was cut off"
    elif digest.hexdigest() != piece.sha256:
        digests = f"{piece.sha256[:16]}…, found {digest.hexdigest()[:16]}…"
        yield f"{path}: expected {name} with SHA-256 {digests}: the file is damaged"


def _of_header(path: Path, file: BinaryIO, stored: Stored) -> Iterator[str]:
    """The loader reads by the manifest alone; other programs go by this."""
    header, start = read_header(file)
    if header is None:
        yield f"{path}: expected a header of safetensors, found damaged text"
        return
    begins = {said["data_offsets"][0] for said in header.values() if _has_offsets(said)}
    for part, offset in _parts(stored, {start + begin for begin in begins}):
        shape = list(part.shape) if part.is_whole else [part.stop - part.start]
        said = {"dtype": part.dtype, "shape": shape, "data_offsets": [offset - start, offset - start + part.size]}
        if header.get(part.label) != said:
            found = json.dumps(header[part.label]) if part.label in header else "nothing of it"
            expected = f"{part.label} in the header as {json.dumps(said)}"
            yield f"{path}: expected {expected}, found {found}: the header is damaged"


def _has_offsets(said: Any) -> bool:
    offsets = said.get("data_offsets") if isinstance(said, dict) else None
    return isinstance(offsets, list) and len(offsets) == 2 and all(isinstance(offset, int) for offset in offsets)


def _parts(stored: Stored, begins: set[int]) -> Iterator[tuple[Part, int]]:
    """The parts that a file's pieces were cut from, each with its offset: pieces that follow one another, both in the
    tensor and in the file, up to where an entry of the header begins."""
    pieces_of: dict[str, tuple[TensorEntry, list[Piece]]] = {}
    for piece, entry in stored:
        if entry.dtype in ITEM_BYTES:
            pieces_of.setdefault(entry.name, (entry, []))[1].append(piece)
    for entry, pieces in pieces_of.values():
        first = last = pieces[0]
        for piece in pieces[1:]:
            if piece.offset in begins or not _follows(last, piece):
                yield _part(entry, first, last), first.offset
                first = piece
            last = piece
        yield _part(entry, first, last), first.offset


def _follows(piece: Piece, other: Piece) -> bool:
    same_box = (piece.box_start, piece.box_size) == (other.box_start, other.box_size)
    return same_box and piece.stop == other.start and piece.offset + piece.size == other.offset


def _part(entry: TensorEntry, first: Piece, last: Piece) -> Part:
    if first.box_size == entry.shape:
        return Part(entry.name, entry.shape, entry.dtype, first.start, last.stop)
    return Part(entry.name, entry.shape, entry.dtype, first.start, last.stop, first.box_start, first.box_size)


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
