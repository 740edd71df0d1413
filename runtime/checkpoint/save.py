"""Saving, and the one place where a checkpoint becomes one.

[Note: commit]
1. Rank 0 writes all files into `step-N.tmp-ID`, never over anything, and syncs each.
2. It writes the manifest, syncs it and its folder, renames the folder to `step-N`, syncs the folder above.
3. All ranks hear whether that went well, and go on, or raise, together.
A kill at any moment leaves either no `step-N` or a whole one. An older `step-N` stands aside as `step-N.old-ID`
meanwhile. The next save, or resuming, sweeps `.tmp-` and puts an `.old-` back whose successor never came.

Rank 0 writes; what it does not have (shards, random numbers of others) is sent to it, tensor by tensor. So the folder
need not be shared between hosts, and the files are the same whatever the layout.
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
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dstrain.runtime.checkpoint.dtypes import NAMES
from dstrain.runtime.checkpoint.manifest import FILE_NAME, Manifest, Piece, TensorEntry, folder_of, steps_in
from dstrain.runtime.checkpoint.state import Stored, capture, capture_model, capture_rng
from dstrain.runtime.comm import Communicator
from dstrain.runtime.data.agreement import together
from dstrain.runtime.engine import Engine
from dstrain.runtime.spec.errors import CheckpointError

STATE_FILE = "state-0.safetensors"


def save(
    engine: Engine,
    root: Path,
    keep_last: int | None = None,
    extra: Mapping[str, Any] | None = None,
    keep_every: int | None = None,
) -> Path:
    """Save the engine's state below `root` as step-N; all ranks call it, between two steps.

    Some small collectives of objects; sharded tensors are sent to rank 0 one at a time, which holds no more of them.
    keep_last: older checkpoints than so many are deleted, once this one stands. Checkpoints of later steps are of a
    timeline that was left: they are deleted too, or set aside (`step-N.left-ID`) where all are kept. keep_every: steps
    whose multiples stay. extra: plain values of the script's, rank 0's, which `load` gives back. Raises CheckpointError
    on all ranks, with the cause; what was there before is untouched then.
    """
    assert engine.micro_step == 0, "a checkpoint is saved between two steps"
    comm, step = engine.comm, engine.global_step
    target = folder_of(root, step)
    everyones_rng = comm.all_gather_object({name: tensor.numpy() for name, tensor in capture_rng().items()})
    engine.share_buffers()
    captured = capture(engine)
    for rank, rng in enumerate(everyones_rng):
        captured.tensors |= {f"rng.{rank}.{name}": Stored.of(torch.from_numpy(array)) for name, array in rng.items()}
    draft = Draft(root, step)

    def write() -> str:
        """What went wrong; "" if nothing."""
        if comm.rank:
            for stored in captured.tensors.values():
                stored.whole()
            return ""
        return _problem(lambda: draft.write(captured.tensors), target)

    def commit() -> str:
        if comm.rank:
            return ""
        values = {**captured.values, "extra": extra or {}}
        return _problem(lambda: draft.commit(values, {"world_size": comm.world_size}), target) or _problem(
            lambda: _retire(root, step, keep_last, keep_every), target
        )

    if engine.weights.sharers > 1:
        problem = comm.all_gather_object(write())[0]
        problem = problem or comm.all_gather_object(together(commit, comm))[0]
    else:
        problem = comm.all_gather_object(together(lambda: write() or commit(), comm))[0]
    if problem:
        fix = "the checkpoints before it are untouched; look at the disk, or give another checkpoint.dir"
        raise CheckpointError(f"{target}: expected to save step {step}, found {problem}; {fix}")
    return target


def _problem(work: Callable[[], object], target: Path) -> str:
    try:
        work()
    except OSError as error:
        return f"{error.strerror or error}: {error.filename or target}"
    except Exception as error:  # or the others would wait for us in their next collective
        return f"{type(error).__name__}: {error}"
    return ""


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


def _retire(root: Path, step: int, keep_last: int | None, keep_every: int | None) -> None:
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
            if keep_every is None or old % keep_every:
                _remove(folder_of(root, old))


def save_model(engine: Engine, folder: Path) -> Path:
    """Write the model alone as folder/model.safetensors, with config.json for a transformers model; all ranks call it.

    As `save`, rank 0 writes and holds one tensor of others at a time. Raises CheckpointError on all ranks; a file that
    was there before is whole then.
    """
    target, comm = folder / "model.safetensors", engine.comm
    engine.share_buffers()
    tensors = {name.removeprefix("model."): stored for name, stored in capture_model(engine).items()}
    temporary = folder / f".{target.name}.tmp-{secrets.token_hex(4)}"

    def write() -> None:
        waiting = iter(tensors.items())
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_tensors(temporary, tensors, waiting)
            _sync(temporary)
            temporary.rename(target)
            _sync(folder)
            config: Any = getattr(engine.module, "config", None)
            if hasattr(config, "to_json_file"):
                config.to_json_file(folder / "config.json")
        finally:
            for _, stored in waiting:
                stored.whole()
            with contextlib.suppress(OSError):
                temporary.unlink()

    problem = ""
    if comm.rank == 0:
        problem = _problem(write, target)
    else:
        for stored in tensors.values():
            stored.whole()
    problem = comm.all_gather_object(problem)[0]
    if problem:
        raise CheckpointError(f"{target}: expected to save the model, found {problem}; look at the disk")
    return target


class Draft:
    """A checkpoint that one process writes. [Note: commit] What fails leaves nothing of it behind."""

    def __init__(self, root: Path, step: int) -> None:
        self._root, self._step = root, step
        self._target = folder_of(root, step)
        self._folder = root / f"{self._target.name}.tmp-{secrets.token_hex(4)}"
        self._entries: list[TensorEntry] = []

    def write(self, tensors: Mapping[str, Stored]) -> None:
        """Write all tensors, each taken (`whole`) just before; all are taken even where writing fails, for other ranks
        send them. Raises OSError, TypeError."""
        waiting = iter(tensors.items())
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            sweep(self._root)
            self._folder.mkdir()
            self._entries = write_tensors(self._folder / STATE_FILE, tensors, waiting)
        except BaseException:
            for _, stored in waiting:
                stored.whole()
            self.discard()
            raise

    def commit(self, values: Mapping[str, Any], layout: Mapping[str, int]) -> None:
        """Make it a checkpoint. Raises OSError."""
        try:
            _sync(self._folder / STATE_FILE)
            manifest = Manifest(
                step=self._step,
                layout=layout,
                versions={"torch": torch.__version__, "python": platform.python_version()},
                run_id=os.environ.get("DSTRAIN_RUN_ID", ""),
                tensors=tuple(self._entries),
                files={STATE_FILE: (self._folder / STATE_FILE).stat().st_size},
                state=values,
            )
            path = self._folder / FILE_NAME
            path.write_text(manifest.to_text(), encoding="utf-8")
            _sync(path)
            _sync(self._folder)
            if self._target.exists():  # of an earlier life: it was damaged and passed over, or the script saves twice
                self._target.rename(self._root / f"{self._target.name}.old-{secrets.token_hex(4)}")
            self._folder.rename(self._target)
            _sync(self._root)
        except BaseException:
            self.discard()
            raise
        finally:
            sweep(self._root)

    def discard(self) -> None:
        """Leave nothing of it."""
        _remove(self._folder)


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


def write_tensors(
    path: Path, tensors: Mapping[str, Stored], waiting: Iterator[tuple[str, Stored]] | None = None
) -> list[TensorEntry]:
    """One safetensors file, tensor by tensor, and what the manifest says of it. Raises OSError, TypeError.

    waiting: over `tensors`; left where it was if writing fails.
    """
    header: dict[str, Any] = {}
    end = 0
    for name, stored in tensors.items():
        if stored.dtype not in NAMES:
            raise TypeError(f"{name} of {stored.dtype}, which the format does not hold")
        size = prod(stored.shape) * stored.dtype.itemsize
        offsets = [end, end + size]
        header[name] = {"dtype": NAMES[stored.dtype], "shape": list(stored.shape), "data_offsets": offsets}
        end += size
    header["__metadata__"] = {"format": "pt"}  # transformers asks for it
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    entries = []
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, stored in waiting if waiting is not None else iter(tensors.items()):
            whole = stored.whole()
            assert whole is not None, "rank 0 has them all"
            assert tuple(whole.shape) == stored.shape, f"{name} {tuple(whole.shape)}, not {stored.shape}"
            data = _bytes(whole)
            file.write(data)
            entries.append(_entry(name, stored, path.name, 8 + len(text) + header[name]["data_offsets"][0], data))
    return entries


def _entry(name: str, stored: Stored, file: str, offset: int, data: memoryview) -> TensorEntry:
    piece = Piece(
        box_start=(0,) * len(stored.shape),
        box_size=stored.shape,
        start=0,
        stop=prod(stored.shape),
        file=file,
        offset=offset,
        size=data.nbytes,
        sha256=hashlib.sha256(data).hexdigest(),
    )
    return TensorEntry(name, stored.shape, NAMES[stored.dtype], (piece,))


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    data: Any = flat.view(torch.uint8).numpy() if flat.numel() else b""  # an array is a buffer, which mypy denies
    return memoryview(data)


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
