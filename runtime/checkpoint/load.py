"""Loading: the newest whole checkpoint, verified byte by byte before anything is changed, by all ranks together.

[Note: sources]
Each rank reads what it needs from a disk that it sees, and what only others see is sent to it, piece by piece. A step
counts if each of its files is on some disk beside the same manifest; a file that is damaged on one disk is taken from
another that has it too. The pieces to verify are dealt out to the ranks that see them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dstrain.runtime.checkpoint.disks import Place, firsts_of, place_of
from dstrain.runtime.checkpoint.dtypes import DTYPES
from dstrain.runtime.checkpoint.manifest import FILE_NAME, Manifest, Piece, TensorEntry, folder_of, steps_in
from dstrain.runtime.checkpoint.state import Interval, Restoration, State, flat_places, overlaps
from dstrain.runtime.checkpoint.verify import contradictions
from dstrain.runtime.comm import Communicator
from dstrain.runtime.engine import Engine
from dstrain.runtime.spec.errors import CheckpointError

_TURN_BYTES = 8 << 20
"""That a rank verifies before the next one's turn comes: long runs are read fast."""


@dataclass(frozen=True)
class Loaded:
    """What was loaded. passed_over: why newer checkpoints were not. extra: what the script has saved with it. missing:
    tensors of the model that were not in it, foreign: those of its model that this one lacks. left: later
    steps, of another life, that were set aside."""

    path: Path
    step: int
    passed_over: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()
    model_only: bool = False
    left: tuple[int, ...] = ()


@dataclass(frozen=True)
class Found:
    """A whole checkpoint. folder: on this rank. sources: which ranks can read a file."""

    folder: Path
    manifest: Manifest
    sources: Mapping[str, tuple[int, ...]]
    passed_over: tuple[str, ...] = ()


def load(engine: Engine, path: Path, *, model_only: bool = False, exempt: Sequence[str] = ()) -> Loaded:
    """Restore the engine from the checkpoint `path`, or from the newest whole one in that folder; on all ranks.

    The random numbers go on where they were if the number of ranks is the same. model_only: only parameters and
    buffers; exempt: patterns of names that may be missing on either side or differ in shape. Raises CheckpointError on
    all ranks, before anything has changed.
    """
    comm = engine.comm
    if engine.saver is not None:
        engine.saver.finish()
    known = engine.saver.disks.of if engine.saver is not None and _is_below(path, engine.saver.root) else None
    found = find(path, comm, known)
    manifest = found.manifest
    restoration = Restoration(
        engine,
        {entry.name: (entry.shape, entry.dtype) for entry in manifest.tensors},
        manifest.state,
        manifest.layout.get("world_size") == comm.world_size,
        model_only,
        exempt,
    )
    restoration.begin()
    for entry, piece, data in _pieces(found, restoration.wants, comm):
        restoration.put(entry, piece, data)
    restoration.finish()
    extra = manifest.state.get("extra", {})
    missing, foreign = tuple(restoration.missing), tuple(restoration.foreign)
    return Loaded(found.folder, manifest.step, found.passed_over, extra, missing, foreign, model_only)


def _is_below(path: Path, root: Path) -> bool:
    return path.absolute() == root or path.absolute().parent == root


def find(path: Path, comm: Communicator, known: Sequence[int] | None = None) -> Found:
    """The checkpoint `path`, or the newest one below it that is whole; on all ranks. Raises CheckpointError.

    known: the first rank that sees each rank's folder, where that has been found out (`Disks.of`).
    """
    is_one = (path / FILE_NAME).is_file() or not path.is_dir()
    everyone = comm.all_gather_object((is_one, (path / FILE_NAME).is_file(), [] if is_one else steps_in(path)))
    if all(one for one, _, _ in everyone) or any(has for _, has, _ in everyone):
        return _examine(path, comm, known)
    passed_over: list[str] = []
    for step in sorted({step for _, _, steps in everyone for step in steps}, reverse=True):
        try:
            found = _examine(folder_of(path, step), comm, known)
        except CheckpointError as error:  # on all ranks
            passed_over.append(str(error))
            continue
        return Found(found.folder, found.manifest, found.sources, tuple(passed_over))
    why = "; ".join(passed_over) or "no step-N with a manifest"
    raise CheckpointError(f"{path}: expected a whole checkpoint, found {why}")


# --- one checkpoint on some disks ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _View:
    """Of a checkpoint, on one disk. sizes: bytes by name. text: of the manifest."""

    checksum: str = ""
    saved_at: float = 0.0
    problem: str = ""
    is_absent: bool = False
    sizes: Mapping[str, int] = field(default_factory=dict)


def _examine(folder: Path, comm: Communicator, known: Sequence[int] | None = None) -> Found:
    """Find out whether a checkpoint is whole on the disks of all ranks; on all ranks. [Note: sources]"""
    places: list[Place | int] = comm.all_gather_object(_place(folder, comm.rank))
    is_everywhere = not any(isinstance(place, int) for place in places)
    firsts = list(known) if known is not None and is_everywhere else firsts_of(places)
    text, view = _look(folder) if firsts[comm.rank] == comm.rank else ("", _View())
    views = comm.all_gather_object(view)
    problem = ""
    for checksum in _candidates(views, firsts):
        source = next(rank for rank in sorted(set(firsts)) if views[rank].checksum == checksum)
        manifest = Manifest.parse(comm.broadcast_object(text, source), folder / FILE_NAME)
        try:
            alike = {rank: view.sizes for rank, view in enumerate(views) if view.checksum == checksum}
            sources = _whole(folder, manifest, alike, firsts, comm)
        except CheckpointError as error:  # on all ranks
            problem = problem or str(error)
            continue
        return Found(folder, manifest, sources)
    unread = next((view.problem for view in views if view.problem and not view.is_absent), "")
    absent = next((view.problem for view in views if view.is_absent), "")
    raise CheckpointError("; ".join(words for words in (problem, unread) if words) or absent)


def _place(folder: Path, rank: int) -> Place | int:
    try:
        return place_of(folder)
    except OSError:
        return rank  # nothing is shared that is not there


def _look(folder: Path) -> tuple[str, _View]:
    """The manifest's text, and what this disk has."""
    try:
        text = (folder / FILE_NAME).read_text(encoding="utf-8")
        manifest = Manifest.parse(text, folder / FILE_NAME)
        with os.scandir(folder) as entries:
            sizes = {entry.name: entry.stat().st_size for entry in entries}
    except CheckpointError as error:
        return "", _View(problem=str(error))
    except OSError as error:
        found = f"{folder}: expected a checkpoint, found no {FILE_NAME}: {error.strerror}"
        return "", _View(problem=found, is_absent=True)
    except ValueError:
        return "", _View(problem=f"{folder / FILE_NAME}: expected a manifest, found damaged text")
    return text, _View(hashlib.sha256(text.encode()).hexdigest(), manifest.saved_at, sizes=sizes)


def _candidates(views: Sequence[_View], firsts: Sequence[int]) -> list[str]:
    """Manifests by checksum, the newest first: a disk may hold a step of another life."""
    newest = {views[first].checksum: views[first].saved_at for first in firsts if views[first].checksum}
    return sorted(newest, key=lambda checksum: -newest[checksum])


def _whole(
    folder: Path, manifest: Manifest, sizes: Mapping[int, Mapping[str, int]], firsts: Sequence[int], comm: Communicator
) -> dict[str, tuple[int, ...]]:
    """Which ranks can read each file, all verified. sizes: by the first rank of each disk. Raises CheckpointError on
    all ranks."""
    for entry in manifest.tensors:
        for problem in contradictions(folder, manifest, entry):
            raise CheckpointError(problem)
    copies = [(disk, name) for name, size in manifest.files.items() for disk in sizes if sizes[disk].get(name) == size]
    damages = _verify(folder, manifest, copies, firsts, comm)
    sources = {}
    for name in manifest.files:
        good = {disk for disk, other in copies if other == name} - {disk for disk, other in damages if other == name}
        if not good:
            said = next((words for (_, other), words in damages.items() if other == name), "")
            raise CheckpointError(said or _lost(folder, manifest, name, sizes))
        sources[name] = tuple(rank for rank, disk in enumerate(firsts) if disk in good)
    return sources


def _lost(folder: Path, manifest: Manifest, name: str, sizes: Mapping[int, Mapping[str, int]]) -> str:
    size = manifest.files[name]
    found = next((str(held[name]) for held in sizes.values() if name in held), "")
    if found:
        return f"{folder / name}: expected {size} bytes, found {found}: it was cut off or changed"
    host = manifest.hosts.get(name, "")
    hint = f"; {host} wrote it: has the job a rank there?" if host and len(set(manifest.hosts.values())) > 1 else ""
    return f"{folder / name}: expected {size} bytes, found No such file or directory{hint}"


def _verify(
    folder: Path, manifest: Manifest, copies: Sequence[tuple[int, str]], firsts: Sequence[int], comm: Communicator
) -> dict[tuple[int, str], str]:
    """Read every copy of every piece once, each by a rank that sees it; returns what is damaged, in words."""
    disks_of: dict[str, list[int]] = {}
    for disk, name in copies:
        disks_of.setdefault(name, []).append(disk)
    ranks_at = {disk: [rank for rank, other in enumerate(firsts) if other == disk] for disk, _ in copies}
    turn = dict.fromkeys(ranks_at, 0)
    here: dict[tuple[int, str], str] = {}
    with _Files(folder) as files:
        for entry in manifest.tensors:
            for piece in entry.pieces:
                for disk in disks_of.get(piece.file, ()):
                    turn[disk] += piece.size  # the bytes decide whose turn it is: even shares, in long runs
                    rank = ranks_at[disk][turn[disk] // _TURN_BYTES % len(ranks_at[disk])]
                    if rank == comm.rank and (disk, piece.file) not in here:
                        try:
                            files.read(entry, piece)
                        except CheckpointError as error:
                            here[disk, piece.file] = str(error)
    return {key: words for found in comm.all_gather_object(here) for key, words in found.items()}


# --- its pieces ----------------------------------------------------------------------------------------------


class _Files:
    """The files of a checkpoint, opened once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._fds: dict[str, int] = {}

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._fds.values():
            os.close(fd)

    def read(self, entry: TensorEntry, piece: Piece) -> Tensor:
        """A piece, flat. Raises CheckpointError where it is not what was written."""
        path = self._folder / piece.file
        data = bytearray(piece.size)
        try:
            if piece.file not in self._fds:
                self._fds[piece.file] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            found = _read_into(self._fds[piece.file], data, piece.offset)
        except OSError as error:
            words = f"expected {piece.size} bytes at {piece.offset}, found {error.strerror}"
            raise CheckpointError(f"{path}: {words}") from None
        if found < piece.size:
            words = f"expected {piece.size} bytes at {piece.offset}, found {found}: it was cut off"
            raise CheckpointError(f"{path}: {words}")
        digest = hashlib.sha256(data).hexdigest()
        if digest != piece.sha256:
            words = f"expected {entry.name} with SHA-256 {piece.sha256[:16]}…, found {digest[:16]}…"
            raise CheckpointError(f"{path}: {words}: the file is damaged")
        dtype = DTYPES[entry.dtype]
        return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)


def _read_into(fd: int, data: bytearray, offset: int) -> int:
    view, found = memoryview(data), 0
    while found < len(data):
        count = os.preadv(fd, [view[found:]], offset + found)
        if not count:
            break
        found += count
    return found


def _pieces(
    found: Found, wants: Mapping[str, Interval], comm: Communicator
) -> Iterator[tuple[TensorEntry, Piece, Tensor]]:
    """What this rank wants, piece by piece; meanwhile it sends others what they do not see. Raises CheckpointError, on
    all ranks, where a file changes between verification and here: what has been loaded so far is no state then."""
    is_everywhere = all(len(ranks) == comm.world_size for ranks in found.sources.values())
    everyones = [] if is_everywhere else comm.all_gather_object(dict(wants))
    problem = ""
    with _Files(found.folder) as files:
        for entry in found.manifest.tensors:
            for piece in entry.pieces:
                sources = found.sources[piece.file]
                without = [r for r, its in enumerate(everyones) if r not in sources and _wanted(its, entry, piece)]
                senders = {rank: sources[rank % len(sources)] for rank in without}
                mine = comm.rank in sources and _wanted(wants, entry, piece)
                data = None
                if mine or comm.rank in senders.values():
                    try:
                        data = files.read(entry, piece)
                    except CheckpointError as error:
                        problem = problem or str(error)
                        data = torch.empty(piece.stop - piece.start, dtype=DTYPES[entry.dtype])
                elif comm.rank in without:
                    data = torch.empty(piece.stop - piece.start, dtype=DTYPES[entry.dtype])
                for rank, sender in senders.items():
                    if data is not None and data.numel():
                        comm.pass_on(data.view(torch.uint8), sender, rank)
                if data is not None and (mine or comm.rank in without):
                    yield entry, piece, data
    problem = next((said for said in comm.all_gather_object(problem) if said), "")
    if problem:
        raise CheckpointError(f"{problem}; it was whole a moment ago")


def _wanted(wants: Mapping[str, Interval], entry: TensorEntry, piece: Piece) -> bool:
    return entry.name in wants and overlaps(entry, piece, wants[entry.name])


# --- without an engine ---------------------------------------------------------------------------------------


def read(folder: Path) -> tuple[Manifest, State]:
    """Read and verify one checkpoint whose files are all here. Raises CheckpointError that names file and tensor."""
    alone = Communicator(0, 1, 0, torch.device("cpu"))
    found = _examine(folder, alone)
    return found.manifest, _state(found)


def read_newest(path: Path) -> tuple[Loaded, State, Manifest]:
    """The checkpoint `path`, or the newest one below it that is whole here. Raises CheckpointError."""
    found = find(path, Communicator(0, 1, 0, torch.device("cpu")))
    extra = found.manifest.state.get("extra", {})
    return Loaded(found.folder, found.manifest.step, found.passed_over, extra), _state(found), found.manifest


def _state(found: Found) -> State:
    tensors = {}
    with _Files(found.folder) as files:
        for entry in found.manifest.tensors:
            whole = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
            for piece in entry.pieces:
                data = files.read(entry, piece)
                if piece.box_size == entry.shape:
                    whole.view(-1)[piece.start : piece.stop] = data
                else:
                    whole.view(-1)[flat_places(entry.shape, piece)] = data
            tensors[entry.name] = whole
    return State(tensors, dict(found.manifest.state))
