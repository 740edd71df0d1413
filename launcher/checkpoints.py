"""Checkpoints on disk as `dstrain ckpt` sees them: found, surveyed, and deleted where there are too many."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from dstrain.runtime.checkpoint.manifest import FILE_NAME, PREFIX, Manifest, folder_of, steps_in
from dstrain.runtime.checkpoint.verify import damages, elsewhere
from dstrain.runtime.spec.errors import CheckpointError, UsageError


@dataclass(frozen=True)
class Held:
    """One checkpoint. saved_at: Unix time, as its manifest says, else that of the manifest's file. size_bytes: of the
    files here. ranks: that saved it, None where the manifest cannot be read. damages: a line each. elsewhere: files
    that other hosts have on disks of their own, by host. Whole is what has neither."""

    path: Path
    step: int
    saved_at: float
    size_bytes: int
    ranks: int | None
    run_id: str
    damages: tuple[str, ...]
    elsewhere: Mapping[str, Sequence[str]] = field(default_factory=dict)


def find_checkpoint(path: Path) -> Path:
    """`path`, or the newest checkpoint in it. Raises UsageError."""
    if (path / FILE_NAME).is_file():
        return path
    steps = steps_in(path)
    if steps:
        return folder_of(path, steps[0])
    raise _nothing(path, "PATH", f"a checkpoint ({PREFIX}N), or a folder of them")


def find_folders(path: Path) -> list[Path]:
    """`path` and the folders in it that hold checkpoints. Raises UsageError when there is none."""
    if not path.is_dir():
        raise _nothing(path, "DIR", "a folder")
    folders = [each for each in [path, *sorted(path.iterdir())] if each.is_dir() and not _step_of(each)]
    folders = [each for each in folders if any(_steps(each))]
    if not folders:
        raise _nothing(path, "DIR", f"checkpoints ({PREFIX}N) in it or in its folders")
    return folders


def only_folder(path: Path) -> Path:
    """The one folder of checkpoints that `path` is or holds. Raises UsageError."""
    folders = find_folders(path)
    if len(folders) > 1:
        found = f"{len(folders)}: {', '.join(each.name for each in folders[:5])}"
        raise UsageError.mismatch("PATH", f"one folder of checkpoints in {path}", found, f"give {folders[0]}")
    return folders[0]


def survey(folder: Path) -> list[Held]:
    """All checkpoints in a folder, the newest first; those too that a kill or a hand has left incomplete."""
    held = []
    for each in _steps(folder):
        with contextlib.suppress(FileNotFoundError):  # a training deletes its older ones meanwhile
            held.append(look(each))
    return sorted(held, key=lambda each: each.step, reverse=True)


def look(path: Path) -> Held:
    """One checkpoint, checked cheaply."""
    manifest, found = None, []
    away: Mapping[str, Sequence[str]] = {}
    try:
        manifest = Manifest.read(path)
        found, away = list(damages(path, manifest)), elsewhere(path, manifest)
    except CheckpointError as error:
        found = [str(error)]
    step, ranks, run_id, saved_at = int(_step_of(path) or 0), None, "", 0.0
    if manifest is not None:
        step, ranks, run_id = manifest.step, manifest.layout.get("world_size"), manifest.run_id
        saved_at = manifest.saved_at
    return Held(path, step, saved_at or _saved_at(path), _size(path), ranks, run_id, tuple(found), away)


@dataclass(frozen=True)
class Pruning:
    """Which checkpoints stay and which go, the newest first."""

    kept: tuple[Held, ...]
    deleted: tuple[Held, ...]


def plan_pruning(
    held: Sequence[Held], keep_last: int, keep_every: int | None, still_whole: Callable[[Held], tuple[str, ...]]
) -> Pruning:
    """Keep the last whole ones, of the others every so many steps; damaged ones go with the older ones.

    held: the newest first. still_whole: the damages of one by every byte; asked until one has none, which then stays.
    Raises CheckpointError when there is no whole one: then nothing may go.
    """
    checked: list[Held] = []
    for index, each in enumerate(held):
        found = each.damages or still_whole(each)
        checked.append(replace(each, damages=found))
        if not found:
            checked += held[index + 1 :]
            break
    else:
        why = "; ".join(each.damages[0] for each in checked) or f"no {PREFIX}N"
        raise CheckpointError(f"expected a whole checkpoint to keep, found {why}; nothing was deleted")
    last = [each for each in checked if not each.damages][:keep_last]
    kept: list[Held] = []
    deleted: list[Held] = []
    for each in checked:
        is_kept = each.step >= last[-1].step or (keep_every and each.step % keep_every == 0 and not each.damages)
        (kept if is_kept else deleted).append(each)
    return Pruning(tuple(kept), tuple(deleted))


def delete(path: Path) -> list[str]:
    """Delete a checkpoint's own files, its manifest first, so that what is left is none; returns what else is there.

    Raises CheckpointError.
    """
    if path.is_symlink():
        raise CheckpointError(
            f"{path}: expected a folder to delete, found a link to {path.readlink()}; remove it by hand"
        )
    own = [each.name for each in path.glob("rank-*.safetensors")]
    with contextlib.suppress(CheckpointError):
        own += [name for name in Manifest.read(path).files if Path(name).name == name]
    try:
        (path / FILE_NAME).unlink(missing_ok=True)
        for name in own:
            (path / name).unlink(missing_ok=True)
        others = sorted(each.name for each in path.iterdir())
        if not others:
            path.rmdir()
    except OSError as error:
        found = f"{error.strerror or error}: {error.filename or path}"
        raise CheckpointError(f"{path}: expected to delete it, found {found}") from None
    return others


def _step_of(path: Path) -> str:
    """The digits of step-N; "" of any other name."""
    digits = path.name.removeprefix(PREFIX)
    return digits if path.name.startswith(PREFIX) and digits.isascii() and digits.isdigit() else ""


def _steps(folder: Path) -> Iterator[Path]:
    return (each for each in folder.glob(f"{PREFIX}*") if _step_of(each) and each.is_dir())


def _saved_at(path: Path) -> float:
    try:
        return (path / FILE_NAME).stat().st_mtime
    except OSError:
        return path.stat().st_mtime


def _size(path: Path) -> int:
    return sum(each.stat().st_size for each in path.iterdir() if each.is_file())


def _nothing(path: Path, where: str, expected: str) -> UsageError:
    if not path.is_dir():
        found = f"{path}, a file" if path.exists() else f"no {path}"
        return UsageError.mismatch(where, expected, found, "`dstrain ckpt list` shows what is in ./checkpoints")
    if _step_of(path):
        return UsageError.mismatch(where, expected, f"no {FILE_NAME} in {path}: a save or a deletion was cut off")
    below = sorted({each.parent.parent.name for each in path.glob(f"*/{PREFIX}*/{FILE_NAME}")})
    if below:
        return UsageError.mismatch(where, expected, f"in {path} only {', '.join(below)}", f"give {path / below[0]}")
    return UsageError.mismatch(where, expected, f"none in {path}")
