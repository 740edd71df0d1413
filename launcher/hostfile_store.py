"""Hostfiles on disk: which one to use, reading it, and changing it so that nothing is lost.

[Note: how a hostfile is changed]
An edit holds `flock` on the directory of the file that is really meant (a symlink is followed to its
target). A lock on the directory needs no lock file that would be left lying about, and, unlike one on the
hostfile, it is still the same lock after a rename has put another inode in its place. The kernel drops it
when the process dies. Under it the file is read, changed, written to a temporary file in the same
directory, synced, and renamed over the old one: whoever reads, or kills us, finds the whole old file or the
whole new one. A killed edit leaves its temporary file, which has a fixed name, so that the next edit
removes it. What takes no lock (an editor, another machine that shares the directory by NFS) is noticed just
before the rename, and the edit starts over from there.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from dstrain.runtime.spec.errors import HostfileError, UsageError

HOSTFILE_VARIABLE = "DSTRAIN_HOSTFILE"
DEFAULT_HOSTFILE = Path("hostfile")
MAX_FILE_BYTES = 4 * 2**20

LOCK_TIMEOUT_S = 30.0
_LOCK_POLL_S = 0.01
_ATTEMPTS = 10


def find_hostfile(option: Path | None, environment: Mapping[str, str]) -> Path | None:
    """The hostfile to use: --hostfile, else DSTRAIN_HOSTFILE, else ./hostfile where there is one, else None.

    One that is named need not exist: reading it then says so.
    """
    if option is not None:
        return option
    if environment.get(HOSTFILE_VARIABLE):
        return Path(environment[HOSTFILE_VARIABLE])
    return DEFAULT_HOSTFILE if DEFAULT_HOSTFILE.exists() else None


def read_text(path: Path) -> str:
    """A hostfile's text, newlines as they are (a pipe will do).

    Raises UsageError when it is missing, unreadable or huge, HostfileError where it is not UTF-8.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        fix = "check the path; `dstrain hosts add HOST -H PATH` creates one"
        raise UsageError.mismatch(str(path), "a hostfile", "no such file", fix) from None
    except (OSError, ValueError) as error:
        raise _unusable(path, error) from None
    if len(data) > MAX_FILE_BYTES:
        fix = "check that this is a hostfile"
        raise UsageError.mismatch(str(path), f"at most {MAX_FILE_BYTES:,} bytes", "more", fix)
    return _decode(data, str(path))


def edit_text(path: Path, edit: Callable[[str], str], *, create: bool = False) -> None:
    """Replace the file's text by `edit(text)`, atomically and alone; see [Note: how a hostfile is changed].

    Mode, ownership and extended attributes stay. With `create`, a missing file counts as empty and is made.
    `edit` may be called again when something else wrote the file meanwhile; when it raises, the file stays.
    Raises UsageError when the file cannot be read or replaced.
    """
    try:
        target = Path(os.path.realpath(path))
    except ValueError as error:  # a NUL in the path
        raise _unusable(path, error) from None
    try:
        with _locked(target.parent):
            for _ in range(_ATTEMPTS):
                if _try_edit(path, target, edit, create):
                    return
    except OSError as error:
        raise _unusable(path, error) from None
    fix = "let the other program finish, then repeat the edit"
    raise UsageError.mismatch(str(path), "a file that only we write", "another that keeps writing it", fix)


def _try_edit(path: Path, target: Path, edit: Callable[[str], str], create: bool) -> bool:
    """One attempt. False when the file changed under it."""
    before = _fingerprint(target)
    if before is not None:
        _check_editable(path, before)
    text = "" if before is None and create else read_text(path)
    changed = edit(text)
    if changed == text and before is not None:
        return True
    temporary = _temporary_for(target)
    try:
        _write_synced(temporary, changed, target, before)
        if not _same(before, _fingerprint(target)):
            return False
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_directory(target.parent)
    return True


def _check_editable(path: Path, before: os.stat_result) -> None:
    if not stat.S_ISREG(before.st_mode):
        fix = "name a file that can be edited"
        raise UsageError.mismatch(str(path), "a regular file", "something else", fix)
    if not os.access(path, os.W_OK):  # a rename would get around the file's own permissions
        fix = "chmod u+w it, or edit a copy"
        raise UsageError.mismatch(str(path), "a writable file", "a read-only one", fix)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the lock of a directory's hostfiles. Raises UsageError after LOCK_TIMEOUT_S."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        while True:
            with suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if time.monotonic() > deadline:
                found = f"one that has lasted {LOCK_TIMEOUT_S:.0f} s"
                fix = "end the `dstrain hosts` that is stuck there"
                raise UsageError.mismatch(str(directory), "no other edit in this directory", found, fix)
            time.sleep(_LOCK_POLL_S)
        yield
    finally:
        os.close(descriptor)


def _temporary_for(target: Path) -> Path:
    # One name per machine: only the holder of this machine's lock can meet a leftover there.
    return target.with_name(f".dstrain-hosts.{os.uname().nodename}.tmp")


def _write_synced(temporary: Path, text: str, target: Path, before: os.stat_result | None) -> None:
    temporary.unlink(missing_ok=True)
    mode = 0o666 if before is None else 0o600  # the umask's for a new file; a known one gets its own at the end
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(temporary, flags, mode), "wb") as file:
        file.write(text.encode("utf-8"))
        file.flush()
        if before is not None:
            _keep_attributes(temporary, target, before)
        os.fsync(file.fileno())


def _keep_attributes(temporary: Path, target: Path, before: os.stat_result) -> None:
    """Give the new file the old one's owner, group, mode and extended attributes."""
    now = temporary.stat()
    if (now.st_uid, now.st_gid) != (before.st_uid, before.st_gid):
        try:
            os.chown(temporary, before.st_uid, before.st_gid)
        except PermissionError:
            expected = "a file whose owner and group we can keep"
            found = f"user {before.st_uid}, group {before.st_gid}"
            raise UsageError.mismatch(str(target), expected, found, "edit it as its owner") from None
    shutil.copystat(target, temporary)
    os.utime(temporary)  # copystat took the old times too


def _fingerprint(target: Path) -> os.stat_result | None:
    try:
        return target.stat()
    except FileNotFoundError:
        return None


def _same(one: os.stat_result | None, other: os.stat_result | None) -> bool:
    if one is None or other is None:
        return one is other
    return (one.st_ino, one.st_size, one.st_mtime_ns) == (other.st_ino, other.st_size, other.st_mtime_ns)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _decode(data: bytes, source: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8")
        where = f"{source}:{before.count(chr(10)) + 1}:{len(before) - before.rfind(chr(10))}"
        found = f"byte 0x{data[error.start]:02x}"
        raise HostfileError.mismatch(where, "UTF-8", found, "save it as UTF-8") from None


def _unusable(path: Path, error: Exception) -> UsageError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return UsageError.mismatch(str(path), "a file that can be used", reason, "check the path and its permissions")
