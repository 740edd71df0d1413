"""The model alone as one safetensors file that rank 0 writes, whatever the layout."""

from __future__ import annotations

import contextlib
import json
import secrets
import struct
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dstrain.runtime.checkpoint import commit
from dstrain.runtime.checkpoint.dtypes import NAMES
from dstrain.runtime.checkpoint.state import Stored, capture_model
from dstrain.runtime.checkpoint.writer import problem_of
from dstrain.runtime.engine import Engine
from dstrain.runtime.spec.errors import CheckpointError


def save_model(engine: Engine, folder: Path) -> Path:
    """Write the model alone as folder/model.safetensors, with config.json for a transformers model; all ranks call it.

    Rank 0 writes; what it does not have is sent to it, one tensor at a time. Raises CheckpointError on all ranks; a
    file that was there before is whole then.
    """
    target, comm = folder / "model.safetensors", engine.comm
    engine.share_buffers()
    tensors = {name.removeprefix("model."): stored for name, stored in capture_model(engine).items()}
    temporary = folder / f".{target.name}.tmp-{secrets.token_hex(4)}"
    problem = ""
    if comm.rank:
        for stored in tensors.values():
            stored.whole()
    else:
        try:
            _write(engine, tensors, temporary, target)
        except OSError as error:
            problem = problem_of(error)
        except Exception as error:  # or the others would wait for us in their next collective
            problem = f"{type(error).__name__}: {error}"
    problem = comm.broadcast_object(problem)
    if problem:
        raise CheckpointError(f"{target}: expected to save the model, found {problem}; look at the disk")
    return target


def _write(engine: Engine, tensors: Mapping[str, Stored], temporary: Path, target: Path) -> None:
    waiting = iter(tensors.items())
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _write_tensors(temporary, tensors, waiting)
        commit.sync(temporary)
        temporary.rename(target)
        commit.sync(target.parent)
        config: Any = getattr(engine.module, "config", None)
        if hasattr(config, "to_json_file"):
            config.to_json_file(target.parent / "config.json")
    finally:
        for _, stored in waiting:  # the others send them
            stored.whole()
        with contextlib.suppress(OSError):
            temporary.unlink()


def _write_tensors(path: Path, tensors: Mapping[str, Stored], waiting: Iterator[tuple[str, Stored]]) -> None:
    header: dict[str, Any] = {}
    end = 0
    for name, stored in tensors.items():
        if stored.dtype not in NAMES:
            raise TypeError(f"{name} of {stored.dtype}, which the format does not hold")
        offsets = [end, end + prod(stored.shape) * stored.dtype.itemsize]
        header[name] = {"dtype": NAMES[stored.dtype], "shape": list(stored.shape), "data_offsets": offsets}
        end = offsets[1]
    header["__metadata__"] = {"format": "pt"}  # transformers asks for it
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, stored in waiting:
            whole = stored.whole()
            assert whole is not None, "rank 0 has them all"
            assert tuple(whole.shape) == stored.shape, f"{name} {tuple(whole.shape)}, not {stored.shape}"
            file.write(bytes_of(whole))


def bytes_of(tensor: Tensor) -> memoryview:
    """Of a tensor on any device."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    data: Any = flat.view(torch.uint8).numpy() if flat.numel() else b""  # an array is a buffer, which mypy denies
    return memoryview(data)
