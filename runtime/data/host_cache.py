"""Files that are costly to make, made once on each host, whatever the number of ranks.

[Note: one maker]
A finished entry has its name by a rename, so it is whole. Who misses it takes the entry's lock; who gets the lock looks
again, and makes it only if it is still missing. The kernel lifts the lock of a maker that dies, and the next one starts
over: what the dead one has left has another name.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from dstrain.runtime.spec.errors import UsageError

DEFAULT_FOLDER = ".cache/dstrain/tokens"
"""Below the user's home."""


class HostCache:
    """A folder of entries; each is one file. Anything in it may be deleted while no job starts."""

    def __init__(self, folder: Path | None) -> None:
        """folder: made when first needed, for this user alone; by default `DEFAULT_FOLDER`."""
        self._folder = folder if folder is not None else Path.home() / DEFAULT_FOLDER

    def entry(self, name: str, make: Callable[[BinaryIO], None], usable: Callable[[Path], bool]) -> Path:
        """The file of this name; where no usable one exists, `make` writes it. [Note: one maker]

        usable: whether an existing file is what `make` wrote. Raises what `make` raises, and UsageError where the
        folder cannot be written; waits as long as another process makes the entry.
        """
        path = self._folder / name
        if path.exists() and usable(path):
            return path
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with (self._folder / f"{name}.lock").open("wb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not (path.exists() and usable(path)):
                    _write(path, make)
        except OSError as error:
            raise UsageError(
                f"data.cache: cannot write {error.filename or path}: {error.strerror}; name another folder"
            ) from None
        return path


def _write(path: Path, make: Callable[[BinaryIO], None]) -> None:
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            make(file)
            file.flush()
            os.fsync(file.fileno())  # a power cut must not leave the name without the content
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
