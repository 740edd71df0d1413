"""Checkpoints made by hand, and `dstrain ckpt` called in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from dstrain.launcher.cli import app
from dstrain.runtime.checkpoint.dtypes import NAMES
from dstrain.runtime.checkpoint.manifest import FILE_NAME, Manifest, TensorEntry
from dstrain.runtime.checkpoint.parts import Part, entries_of, write_file
from dstrain.runtime.spec.errors import CheckpointError, DstrainError, UsageError


def ckpt(*words: str | Path) -> str:
    """What `dstrain ckpt …` prints; it must end well."""
    result = CliRunner().invoke(app, ["ckpt", *map(str, words)])
    if isinstance(result.exception, Exception):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def error_of(*words: str | Path) -> DstrainError:
    with pytest.raises(DstrainError) as caught:
        ckpt(*words)
    assert type(caught.value) in (UsageError, CheckpointError)
    assert "\n" not in str(caught.value)
    return caught.value


def flip(path: Path, offset: int) -> None:
    """One bit."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def bytes_of(tensor: Tensor) -> Any:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy() if tensor.numel() else b""


def random_tensors() -> dict[str, Tensor]:
    """Of a model in bf16 with its master weights, averages and moments; a scalar, an empty one, integers."""
    torch.manual_seed(3)
    shapes = {"embed.weight": (7, 8), "block.weight": (5, 8), "block.bias": (5,)}
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        master = torch.randn(shape)
        tensors[f"model.{name}"] = master.bfloat16()
        tensors[f"master.{name}"] = master
        tensors[f"average.{name}"] = master * 0.9
        tensors[f"optimizer.{name}.exp_avg"] = torch.randn(shape)
    tensors |= {"model.count": torch.tensor(7), "model.none": torch.zeros(0, 2, dtype=torch.bfloat16)}
    return tensors | {"rng.0.torch": torch.arange(40, dtype=torch.uint8)}


def save_sharded(
    folder: Path,
    tensors: Mapping[str, Tensor],
    ranks: int = 1,
    hosts: Sequence[str] = (),
    state: Mapping[str, Any] | None = None,
    *,
    boxes: bool = False,
) -> Manifest:
    """Each rank writes an interval of each tensor; with boxes, of the left or of the right columns of a matrix."""
    folder.mkdir(parents=True)
    parts = {
        rank: [p for name, t in tensors.items() for p in _share(name, t, rank, ranks, boxes)] for rank in range(ranks)
    }
    written = {
        rank: write_file(folder / f"rank-{rank}.safetensors", own, [_bytes_of_part(p, tensors[p.name]) for p in own])
        for rank, own in parts.items()
    }
    manifest = Manifest(
        step=int(folder.name.removeprefix("step-")),
        layout={"world_size": ranks},
        versions={"torch": torch.__version__},
        tensors=tuple(entries_of((parts[rank], written[rank]) for rank in range(ranks))),
        files={each.file: each.size for each in written.values()},
        state=state or {},
        hosts={written[rank].file: host for rank, host in enumerate(hosts)},
        saved_at=1_795_000_000.0,
    )
    (folder / FILE_NAME).write_text(manifest.to_text())
    return manifest


def _share(name: str, tensor: Tensor, rank: int, ranks: int, boxes: bool) -> list[Part]:
    shape, dtype = tuple(tensor.shape), NAMES[tensor.dtype]
    if tensor.numel() < ranks:
        return [Part.whole(name, shape, dtype)] if rank == 0 else []
    if boxes and len(shape) == 2 and ranks > 1:
        half = shape[1] // 2
        begin, columns = (0, half) if rank < ranks // 2 else (half, shape[1] - half)
        group, member = (ranks // 2, rank) if rank < ranks // 2 else (ranks - ranks // 2, rank - ranks // 2)
        count = shape[0] * columns
        interval = (count * member // group, count * (member + 1) // group)
        return [Part(name, shape, dtype, *interval, (0, begin), (shape[0], columns))]
    return [Part(name, shape, dtype, tensor.numel() * rank // ranks, tensor.numel() * (rank + 1) // ranks)]


def _bytes_of_part(part: Part, tensor: Tensor) -> Any:
    if part.box_start is not None and part.box_size is not None:
        for dim, (start, size) in enumerate(zip(part.box_start, part.box_size, strict=True)):
            tensor = tensor.narrow(dim, start, size)
    return bytes_of(tensor.reshape(-1)[part.start : part.stop])


def entry_of(folder: Path, name: str) -> TensorEntry:
    return next(entry for entry in Manifest.read(folder).tensors if entry.name == name)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Also of what is not a number."""
    same_kind = one.dtype == other.dtype and one.shape == other.shape
    return same_kind and np.array_equal(np.frombuffer(bytes_of(one), "u1"), np.frombuffer(bytes_of(other), "u1"))
