"""What a save does to the folder of checkpoints, on one disk. Without torch.

[Note: commit]
1. Every rank writes its file into `step-N.tmp-ID`, never over anything, and syncs it.
2. Every rank votes: what its file holds, or what went wrong. Rank 0 puts the manifest together.
3. Each disk's keeper (its first rank) writes the manifest, syncs it and its folder, renames the folder to `step-N`,
   syncs the folder above.
4. When all keepers have done so, older checkpoints that are too many are deleted.
A kill at any moment leaves either no `step-N` or a whole one; where hosts have disks of their own, a manifest names all
files, and a step counts when each is on some disk. An older `step-N` stands aside as `step-N.old-ID` meanwhile. The
next start sweeps `.tmp-` and puts an `.old-` back whose successor never came.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from dstrain.runtime.checkpoint.manifest import FILE_NAME, Manifest, folder_of, steps_in
from dstrain.runtime.checkpoint.verify import damages
from dstrain.runtime.spec.errors import CheckpointError


def draft_of(root: Path, step: int, token: str) -> Path:
    """Where a step is written before it counts."""
    return root / f"{folder_of(root, step).name}.tmp-{token}"


def commit(root: Path, step: int, token: str, manifest: str) -> None:
    """Make the draft a checkpoint. Raises OSError; what was there before is whole then."""
    draft, target = draft_of(root, step, token), folder_of(root, step)
    write_file(draft / FILE_NAME, manifest.encode())
    sync(draft)
    if target.exists():  # of an earlier life: it was damaged and passed over, or the script saves twice
        target.rename(root / f"{target.name}.old-{token}")
    draft.rename(target)
    sync(root)


def discard(root: Path, step: int, token: str, committed: bool = False) -> None:
    """Leave nothing of a draft, nor of what it has become here where another disk has failed; put back what stood
    aside for it."""
    aside, target = root / f"{folder_of(root, step).name}.old-{token}", folder_of(root, step)
    remove(draft_of(root, step, token))
    if committed:
        remove(target)
    if aside.exists() and not target.exists():
        aside.rename(target)


def retire(root: Path, step: int, keep_last: int | None, keep_every: int | None) -> None:
    """Behind the commit of `step`: what it has replaced, and those before it that are too many, go; those after it are
    of another life. What is damaged does not count among the last. Raises OSError."""
    target = folder_of(root, step)
    for aside in root.glob(f"{target.name}.old-*"):
        _delete(aside)
    leave_later(root, step)
    if keep_last is None:
        return
    held = [other for other in steps_in(root) if other <= step]
    whole = [other for other in held if other == step or _is_whole(folder_of(root, other))][:keep_last]
    for old in held if len(whole) == keep_last else []:
        if old < whole[-1] and (keep_every is None or old % keep_every):
            _delete(folder_of(root, old))


def leave_later(root: Path, step: int) -> list[int]:
    """Set the checkpoints of steps beyond `step` aside, as `step-N.left-ID`; returns the steps. Raises OSError."""
    later = [other for other in steps_in(root) if other > step]
    for other in later:
        folder = folder_of(root, other)
        with contextlib.suppress(FileNotFoundError):  # another host that sees the folder was faster
            folder.rename(folder.with_name(f"{folder.name}.left-{secrets.token_hex(4)}"))
    return later


def _is_whole(folder: Path) -> bool:
    """By its manifest and the sizes of its files."""
    try:
        return next(damages(folder, Manifest.read(folder)), None) is None
    except CheckpointError:
        return False


def _delete(folder: Path) -> None:
    remove(folder)
    if folder.exists():
        raise OSError(None, "it is still there", str(folder))


@contextlib.contextmanager
def in_use(root: Path) -> Iterator[None]:
    """Around all that is written to `root`: meanwhile no other process on this machine sweeps it. First sweeps it, if
    nobody else uses it. Where folders cannot be locked (NFS), nobody is kept from it."""
    fd = os.open(root, os.O_RDONLY | os.O_CLOEXEC)
    try:
        is_alone = _lock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if is_alone:
            sweep(root)
        _lock(fd, fcntl.LOCK_SH)
        yield
    finally:
        os.close(fd)


def _lock(fd: int, how: int) -> bool:
    try:
        fcntl.flock(fd, how)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def sweep(root: Path) -> None:
    """Remove what saves have left unfinished; put back a checkpoint whose successor never came. None may be under
    way."""
    for left in root.glob("step-*.tmp-*"):
        remove(left)
    for old in root.glob("step-*.old-*"):
        target = root / old.name.partition(".")[0]
        if target.exists():
            remove(old)
        else:
            with contextlib.suppress(OSError):  # another host that sees the folder was faster
                old.rename(target)


def remove(folder: Path) -> None:
    """Delete a checkpoint; its manifest first, so that what is left is none."""
    with contextlib.suppress(OSError):
        (folder / FILE_NAME).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def write_file(path: Path, data: bytes) -> None:
    """Write and sync a new file. Raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.fsync(fd)
    finally:
        os.close(fd)


def sync(path: Path) -> None:
    """Have the disk hold a file, or a folder's names."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
