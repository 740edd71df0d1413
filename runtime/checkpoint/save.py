"""Saving, and the one place where a checkpoint becomes one.

[Note: commit]
1. Rank 0 writes all files into `step-N.tmp-ID`, never over anything, and syncs each.
2. It writes the manifest, syncs it and its folder, renames the folder to `step-N`, syncs the folder above.
3. All ranks hear whether that went well, and go on, or raise, together.
A kill at any moment leaves either no `step-N` or a whole one. An older `step-N` stands aside as `step-N.old-ID`
meanwhile. The next save, or resuming, sweeps `.tmp-` and puts an `.old-` back whose successor never came.

All ranks of stage 0 hold the same state, so rank 0 writes it; what differs (random numbers) is sent to it. So the
folder need not be shared between hosts.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import secrets
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dstrain.runtime.checkpoint.manifest import DTYPES, FILE_NAME, Manifest, Piece, TensorEntry, folder_of, steps_in
from dstrain.runtime.checkpoint.state import State, capture, capture_rng
from dstrain.runtime.comm import Communicator
from dstrain.runtime.data.agreement import together
from dstrain.runtime.engine import Engine
from dstrain.runtime.spec.errors import CheckpointError

STATE_FILE = "state-0.safetensors"


def save(engine: Engine, root: Path, keep_last: int | None = None) -> Path:
    """Save the engine's state below `root` as step-N; all ranks call it, between two steps.

    Some small collectives of objects. keep_last: older checkpoints than so many are deleted, once this one stands.
    Checkpoints of later steps are of a timeline that was left: they are deleted too, or set aside (`step-N.left-ID`)
    where all are kept. Raises CheckpointError on all ranks, with the cause; what was there before is untouched then.
    """
    assert engine.micro_step == 0, "a checkpoint is saved between two steps"
    comm, step = engine.comm, engine.global_step
    target = folder_of(root, step)
    everyones_rng = comm.all_gather_object({name: tensor.numpy() for name, tensor in capture_rng().items()})
    engine.share_buffers()

    def write() -> str:
        """What went wrong; "" if nothing."""
        if comm.rank:
            return ""
        try:
            state = capture(engine)
            for rank, rng in enumerate(everyones_rng):
                state.tensors |= {f"rng.{rank}.{name}": torch.from_numpy(array) for name, array in rng.items()}
            commit(root, step, state, {"world_size": comm.world_size})
            _retire(root, step, keep_last)
        except OSError as error:
            return f"{error.strerror or error}: {error.filename or target}"
        except Exception as error:  # or the others would wait for us in their next collective
            return f"{type(error).__name__}: {error}"
        return ""

    problem = comm.all_gather_object(together(write, comm))[0]
    if problem:
        fix = "the checkpoints before it are untouched; look at the disk, or give another checkpoint.dir"
        raise CheckpointError(f"{target}: expected to save step {step}, found {problem}; {fix}")
    return target


def check_writable(root: Path, comm: Communicator) -> None:
    """Try, on rank 0, what a save begins with; all ranks call it. One small collective of objects.

    Makes `root`. Raises CheckpointError on all ranks: better before the first step than at the first save.
    """
    problem = ""
    if comm.rank == 0:
        try:
            root.mkdir(parents=True, exist_ok=True)
            trial = root / f"{folder_of(root, 0).name}.tmp-{secrets.token_hex(4)}"
            trial.mkdir()
            trial.rmdir()
        except OSError as error:
            problem = f"{error.strerror or error}: {root}"
    problem = comm.all_gather_object(problem)[0]
    if problem:
        fix = "nothing was trained; give another checkpoint.dir"
        raise CheckpointError(f"checkpoint.dir: expected a folder that can be written, found {problem}; {fix}")


def _retire(root: Path, step: int, keep_last: int | None) -> None:
    """Behind the commit of `step`: those before it that are too many, and those after it, which are of another life."""
    held = steps_in(root)
    for later in (other for other in held if other > step):
        if keep_last is None:
            folder = folder_of(root, later)
            folder.rename(folder.with_name(f"{folder.name}.left-{secrets.token_hex(4)}"))
        else:
            _remove(folder_of(root, later))
    if keep_last is not None:
        for old in [other for other in held if other <= step][keep_last:]:
            _remove(folder_of(root, old))


def commit(root: Path, step: int, state: State, layout: Mapping[str, int]) -> None:
    """[Note: commit], by one process. Raises OSError; then nothing of it is left."""
    root.mkdir(parents=True, exist_ok=True)
    sweep(root)
    target = folder_of(root, step)
    folder = root / f"{target.name}.tmp-{secrets.token_hex(4)}"
    try:
        folder.mkdir()
        entries = write_tensors(folder / STATE_FILE, state.tensors)
        manifest = Manifest(
            step=step,
            layout=layout,
            versions={"torch": torch.__version__, "python": platform.python_version()},
            run_id=os.environ.get("DSTRAIN_RUN_ID", ""),
            tensors=tuple(entries),
            files={STATE_FILE: (folder / STATE_FILE).stat().st_size},
            state=state.values,
        )
        path = folder / FILE_NAME
        path.write_text(manifest.to_text(), encoding="utf-8")
        _sync(path)
        _sync(folder)
        if target.exists():  # of an earlier life: it was damaged and passed over, or the script saves twice
            target.rename(root / f"{target.name}.old-{secrets.token_hex(4)}")
        folder.rename(target)
        _sync(root)
    except BaseException:
        _remove(folder)
        raise
    finally:
        sweep(root)


def sweep(root: Path) -> None:
    """Remove what saves have left unfinished; put back a checkpoint whose successor never came. [Note: commit]"""
    for left in root.glob("step-*.tmp-*"):
        _remove(left)
    for old in root.glob("step-*.old-*"):
        target = root / old.name.partition(".")[0]
        if target.exists():
            _remove(old)
        else:
            old.rename(target)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> list[TensorEntry]:
    """One synced safetensors file, and what the manifest says of it. Raises OSError."""
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    held = {name: tensor.clone() if _shares(tensor) else tensor for name, tensor in held.items()}
    for name, tensor in held.items():
        if tensor.dtype not in DTYPES.values():
            raise TypeError(f"{name} of {tensor.dtype}, which the format does not hold")
    try:
        save_file(held, path)
    except Exception as error:  # safetensors' own class, for a full disk too
        raise OSError(getattr(error, "errno", None) or 5, str(error), str(path)) from None
    _sync(path)
    with path.open("rb") as file:
        header_size = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(header_size))
    entries = []
    for name, tensor in held.items():
        start, stop = header[name]["data_offsets"]
        shape = tuple(tensor.shape)
        piece = Piece(
            box_start=(0,) * len(shape),
            box_size=shape,
            start=0,
            stop=tensor.numel(),
            file=path.name,
            offset=8 + header_size + start,
            size=stop - start,
            sha256=digest(tensor),
        )
        entries.append(TensorEntry(name, shape, header[name]["dtype"], (piece,)))
    return entries


def digest(tensor: Tensor) -> str:
    """SHA-256 of a contiguous CPU tensor's bytes."""
    flat = tensor.reshape(-1)
    data: Any = flat.view(torch.uint8).numpy() if flat.numel() else b""  # an array is a buffer, which mypy denies
    return hashlib.sha256(data).hexdigest()


def _shares(tensor: Tensor) -> bool:
    """Whether it is a part of a larger storage: safetensors refuses to write those."""
    return tensor.untyped_storage().nbytes() != tensor.nbytes


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _remove(folder: Path) -> None:
    """Delete a checkpoint; its manifest first, so that what is left is none."""
    with contextlib.suppress(OSError):
        (folder / FILE_NAME).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
