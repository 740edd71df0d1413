"""Tensors of safetensors files, one or in transformers' layout. Without torch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from dstrain.runtime.checkpoint import transformers_layout as layout
from dstrain.runtime.checkpoint.foreign import ForeignTensor, Source, describe, files_of
from dstrain.runtime.checkpoint.manifest import ITEM_BYTES
from dstrain.runtime.checkpoint.parts import Part
from dstrain.runtime.checkpoint.verify import read_header
from dstrain.runtime.spec.errors import CheckpointError


def open_safetensors(path: Path) -> Source:
    """Raises CheckpointError where a file is missing, cut off or of another format."""
    files: list[Path] = [path]
    weight_map: dict[str, str] = {}
    if path.is_dir():
        files, weight_map = files_of(path, layout.SINGLE, layout.INDEX)
    tensors: dict[str, ForeignTensor] = {}
    for file in files:
        held = dict(_tensors_of(file))
        for name in held:
            if name in tensors:
                raise CheckpointError(f"{file}: expected tensors that no other file has, found {name} again")
        for name, named in weight_map.items():
            if named == file.name and name not in held:
                raise CheckpointError(f"{file}: expected {name}, which {layout.INDEX} says is there, found none")
        tensors |= held
    what = "safetensors" if len(files) == 1 else f"safetensors in {len(files)} files"
    return Source(path, what, list(tensors.values()), describe(path if path.is_dir() else path.parent))


def _tensors_of(path: Path) -> Iterator[tuple[str, ForeignTensor]]:
    try:
        with path.open("rb") as file:
            header, start = read_header(file)
        size = path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{path}: expected a file that can be read, found {error.strerror or error}") from None
    if header is None:
        raise CheckpointError(f"{path}: expected a header of safetensors, found other bytes")
    for name, said in header.items():
        if name == "__metadata__":
            continue
        try:
            part = Part.whole(f"model.{name}", tuple(map(int, said["shape"])), str(said["dtype"]))
            begin, end = map(int, said["data_offsets"])
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(f"{path}: expected dtype, shape and data_offsets of {name}, found {said}") from None
        if part.dtype not in ITEM_BYTES:
            raise CheckpointError(f"{path}: expected {name} in one of {', '.join(ITEM_BYTES)}, found {part.dtype}")
        if min(begin, *part.shape, 0) < 0 or end - begin != prod(part.shape) * ITEM_BYTES[part.dtype]:
            raise CheckpointError(f"{path}: expected {part.size} bytes of {name}, found {end - begin}: damaged")
        if start + end > size:
            raise CheckpointError(f"{path}: expected {name} up to byte {start + end}, found {size}: it was cut off")
        yield name, ForeignTensor(part, partial(_read, path, start + begin, part.size))


def _read(path: Path, offset: int, size: int) -> Any:
    data = bytearray(size)
    with path.open("rb") as file:
        file.seek(offset)
        if file.readinto(data) != size:
            raise CheckpointError(f"{path}: expected {size} bytes at {offset}, found fewer: it was cut off")
    return data
