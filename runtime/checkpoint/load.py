"""Loading: the newest whole checkpoint, verified byte by byte before anything is changed."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dstrain.runtime.checkpoint.dtypes import DTYPES
from dstrain.runtime.checkpoint.manifest import FILE_NAME, Manifest, TensorEntry, folder_of, steps_in
from dstrain.runtime.checkpoint.save import sweep
from dstrain.runtime.checkpoint.state import State, restore, restore_rng
from dstrain.runtime.comm import Communicator
from dstrain.runtime.engine import Engine
from dstrain.runtime.spec.config import JobConfig
from dstrain.runtime.spec.errors import CheckpointError, UsageError


@dataclass(frozen=True)
class Loaded:
    """What was loaded. passed_over: why newer checkpoints were not. extra: what the script has saved with it."""

    path: Path
    step: int
    passed_over: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)


def resolve(root: Path, resume: str) -> Path | None:
    """What `--resume auto|STEP|PATH` means: a checkpoint or a folder of them; None: auto, and there is none."""
    if resume == "auto":
        return root if steps_in(root) else None
    if resume.isdigit():
        return folder_of(root, int(resume))
    return Path(resume)


def folder_of_job(job: JobConfig) -> Path | None:
    """Where the job keeps its checkpoints; None: it keeps none."""
    if job.checkpoint is None:
        return None
    return job.checkpoint.dir or Path("checkpoints") / job.name


def resume_job(engine: Engine, job: JobConfig, *, fresh_only: bool) -> Loaded | None:
    """Go on as `checkpoint.resume` says, or from the newest whole checkpoint if this is another attempt of the job.

    None: nothing to go on from. fresh_only: without a word to go on, checkpoints that are there already are an error,
    since those of this run would mix with them. Raises UsageError, CheckpointError.
    """
    root = folder_of_job(job)
    if root is None or job.checkpoint is None:
        return None
    if engine.rank == 0:
        sweep(root)
    word = job.checkpoint.resume
    if int(os.environ.get("DSTRAIN_ATTEMPT", "0")) > 0 and _has_saved(root, os.environ.get("DSTRAIN_RUN_ID", "")):
        word = "auto"
    here = resolve(root, word) if word else None
    is_first = os.environ.get("DSTRAIN_ATTEMPT", "0") == "0"
    held = steps_in(root) if word is None and fresh_only and is_first else []
    here, held = engine.comm.all_gather_object((here, held))[0]  # rank 0's disk is the one that counts
    if held:
        fix = "go on from it by --resume auto, or give another checkpoint.dir or name"
        found = f"step {held[0]} in {root}"
        raise UsageError.mismatch("checkpoint.dir", "no checkpoints of another run", found, fix)
    if here is None:
        return None
    loaded = load(engine, here)
    if job.train.steps is not None and loaded.step > job.train.steps:
        found = f"step {loaded.step} in {loaded.path}"
        raise UsageError.mismatch("train.steps", "more steps than the checkpoint has", found)
    return loaded


def _has_saved(root: Path, run_id: str) -> bool:
    """Whether this run, in an attempt before, has saved anything."""
    for step in steps_in(root):
        with contextlib.suppress(CheckpointError):
            if Manifest.read(folder_of(root, step)).run_id == run_id:
                return True
    return False


def load(engine: Engine, path: Path) -> Loaded:
    """Restore the engine from the checkpoint `path`, or from the newest whole one in that folder; on all ranks.

    Rank 0 reads and verifies, and sends one tensor after the other; each rank keeps what is its own. The random
    numbers go on where they were if the number of ranks is the same. Raises CheckpointError on all ranks, before
    anything has changed.
    """
    comm = engine.comm
    found: tuple[Loaded, State, Manifest] | None = None
    problem = None
    if comm.rank == 0:
        try:
            found = read_newest(path)
        except CheckpointError as error:
            problem = str(error)
        except Exception as error:  # or the others would wait for us in their next collective
            problem = f"{path}: expected a checkpoint that can be read, found {type(error).__name__}: {error}"
    problem = comm.all_gather_object(problem)[0]
    if problem is not None:
        raise CheckpointError(problem)
    outline = comm.all_gather_object(_outline(found) if found else None)[0]
    assert outline is not None
    rng: dict[str, Tensor] = {}
    tensors = _shared(outline, found[1].tensors if found else {}, comm)
    restore(engine, {name: shape for name, (shape, _) in outline.tensors.items()}, outline.values, _but(rng, tensors))
    if outline.layout["world_size"] == comm.world_size:
        prefix = f"rng.{comm.rank}."
        restore_rng({n.removeprefix(prefix): t for n, t in rng.items() if n.startswith(prefix)})
    return outline.loaded


def read_newest(path: Path) -> tuple[Loaded, State, Manifest]:
    """The checkpoint `path`, or the newest one below it that is whole. Raises CheckpointError."""
    if (path / FILE_NAME).is_file() or not path.is_dir():
        manifest, state = read(path)
        return Loaded(path, manifest.step, extra=state.values.get("extra", {})), state, manifest
    passed_over: list[str] = []
    for step in steps_in(path):
        try:
            manifest, state = read(folder_of(path, step))
        except CheckpointError as error:
            passed_over.append(str(error))
            continue
        loaded = Loaded(folder_of(path, step), step, tuple(passed_over), state.values.get("extra", {}))
        return loaded, state, manifest
    why = "; ".join(passed_over) or "no step-N with a manifest"
    raise CheckpointError(f"{path}: expected a whole checkpoint, found {why}")


def read(folder: Path) -> tuple[Manifest, State]:
    """Read and verify one checkpoint. Raises CheckpointError that names the file and the tensor."""
    manifest = Manifest.read(folder)
    for name, size in manifest.files.items():
        try:
            found = (folder / name).stat().st_size
        except OSError as error:
            raise CheckpointError(f"{folder / name}: expected {size} bytes, found {error.strerror}") from None
        if found != size:
            raise CheckpointError(f"{folder / name}: expected {size} bytes, found {found}: it was cut off or changed")
    return manifest, State({entry.name: _tensor(folder, entry) for entry in manifest.tensors}, dict(manifest.state))


def _tensor(folder: Path, entry: TensorEntry) -> Tensor:
    flat = torch.empty(int(np.prod(entry.shape, dtype=np.int64)), dtype=DTYPES[entry.dtype])
    for piece in entry.pieces:
        assert piece.box_size == entry.shape, "a box of a tensor: saved by a pipeline or tensor rank"
        data = _bytes(folder / piece.file, piece.offset, piece.size)
        if hashlib.sha256(data).hexdigest() != piece.sha256:
            raise CheckpointError(
                f"{folder / piece.file}: expected {entry.name} with SHA-256 {piece.sha256[:16]}…, "
                f"found {hashlib.sha256(data).hexdigest()[:16]}…: the file is damaged"
            )
        if data:
            flat[piece.start : piece.stop] = torch.frombuffer(data, dtype=flat.dtype)
    return flat.view(entry.shape)


def _bytes(path: Path, offset: int, size: int) -> bytearray:
    data = bytearray(size)
    try:
        with path.open("rb") as file:
            read = os.preadv(file.fileno(), [data], offset) if size else 0
            while read < size:
                more = os.preadv(file.fileno(), [memoryview(data)[read:]], offset + read)
                if not more:
                    raise CheckpointError(f"{path}: expected {size} bytes at {offset}, found {read}")
                read += more
    except OSError as error:
        raise CheckpointError(f"{path}: expected {size} bytes at {offset}, found {error.strerror}") from None
    return data


class _Outline(NamedTuple):
    """All of a checkpoint but the numbers. tensors: shape and dtype by name."""

    loaded: Loaded
    values: dict[str, Any]
    layout: dict[str, int]
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]


def _outline(found: tuple[Loaded, State, Manifest]) -> _Outline:
    loaded, state, manifest = found
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.tensors.items()}
    return _Outline(loaded, state.values, dict(manifest.layout), shapes)


def _shared(outline: _Outline, here: Mapping[str, Tensor], comm: Communicator) -> Iterator[tuple[str, Tensor]]:
    """Rank 0's tensors on all ranks, one at a time."""
    for name, (shape, dtype) in outline.tensors.items():
        tensor = here[name] if comm.rank == 0 else torch.empty(shape, dtype=dtype)
        if comm.world_size > 1:
            sent = tensor.to(comm.device)
            comm.broadcast(sent)
            tensor = sent.cpu()
        yield name, tensor


def _but(rng: dict[str, Tensor], tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The tensors, random numbers set aside."""
    for name, tensor in tensors:
        if name.startswith("rng."):
            rng[name] = tensor
        else:
            yield name, tensor
