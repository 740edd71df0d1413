"""What is costly is made once on a host, and only whole."""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path
from typing import BinaryIO

import pytest

import lab
from dstrain.runtime.data.host_cache import DEFAULT_FOLDER, HostCache
from dstrain.runtime.spec.errors import UsageError

WHOLE = b"whole" * 1000
FORK = multiprocessing.get_context("fork")


def is_whole(entry: Path) -> bool:
    return entry.read_bytes() == WHOLE


def write_whole(out: BinaryIO) -> None:
    out.write(WHOLE)


def waiting(lock: Path) -> int:
    """Processes that the kernel keeps waiting for the lock of a file."""
    inode = f":{lock.stat().st_ino} "
    return sum("->" in line and inode in line for line in Path("/proc/locks").read_text().splitlines())


def ask(folder: Path, waiters: int) -> None:
    """Ask for the entry; whoever makes it notes its pid, and ends when all others wait for it."""

    def make(out: BinaryIO) -> None:
        with (folder / "makers").open("a") as makers:
            makers.write(f"{os.getpid()}\n")
        out.write(WHOLE[:100])
        out.flush()
        lab.wait_for(lambda: waiting(folder / "cache/entry.lock") == waiters, "the others to wait")
        out.write(WHOLE[100:])

    entry = HostCache(folder / "cache").entry("entry", make, is_whole)
    (folder / f"got-{os.getpid()}").write_bytes(entry.read_bytes())


def test_many_processes_make_an_entry_once(tmp_path: Path) -> None:
    processes = [FORK.Process(target=ask, args=(tmp_path, 4)) for _ in range(5)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 5
    assert len((tmp_path / "makers").read_text().splitlines()) == 1
    assert [file.read_bytes() for file in tmp_path.glob("got-*")] == [WHOLE] * 5
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700


def test_a_killed_maker_leaves_the_work_to_who_waits(tmp_path: Path) -> None:
    def die(folder: Path, begun: Connection) -> None:
        def make(out: BinaryIO) -> None:
            out.write(WHOLE[:100])
            out.flush()
            begun.send(None)
            signal.pause()

        HostCache(folder / "cache").entry("entry", make, is_whole)

    reader, writer = FORK.Pipe(duplex=False)
    maker = FORK.Process(target=die, args=(tmp_path, writer))
    maker.start()
    assert reader.poll(30)
    heir = FORK.Process(target=ask, args=(tmp_path, 0))
    heir.start()
    lab.wait_for(lambda: waiting(tmp_path / "cache/entry.lock") == 1, "the heir to wait")
    assert not (tmp_path / "cache/entry").exists()
    assert maker.pid is not None
    os.kill(maker.pid, signal.SIGKILL)
    maker.join(30)
    heir.join(30)
    assert heir.exitcode == 0
    assert (tmp_path / f"got-{heir.pid}").read_bytes() == WHOLE
    assert sorted(file.name for file in (tmp_path / "cache").iterdir()) == ["entry", "entry.lock"]


def test_a_broken_entry_is_made_anew_and_a_whole_one_is_left_alone(tmp_path: Path) -> None:
    cache = HostCache(tmp_path)
    (tmp_path / "entry").write_bytes(WHOLE[:-1])
    assert cache.entry("entry", write_whole, is_whole).read_bytes() == WHOLE

    def never(out: BinaryIO) -> None:
        raise AssertionError("it is there")

    assert cache.entry("entry", never, is_whole) == tmp_path / "entry"


def test_what_making_raises_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail(out: BinaryIO) -> None:
        out.write(b"half")
        raise UsageError("data.path: no such luck")

    with pytest.raises(UsageError, match=r"^data\.path: no such luck$"):
        HostCache(tmp_path).entry("entry", fail, is_whole)
    assert [file.name for file in tmp_path.iterdir()] == ["entry.lock"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError) as caught:
        HostCache(tmp_path / "file/cache").entry("entry", lambda out: None, is_whole)
    path = tmp_path / "file/cache"
    assert str(caught.value) == f"data.cache: cannot write {path}: Not a directory; name another folder"


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    def fill(out: BinaryIO) -> None:
        with Path("/dev/full").open("wb") as full:
            full.write(WHOLE)

    with pytest.raises(UsageError) as caught:
        HostCache(tmp_path).entry("entry", fill, is_whole)
    assert str(caught.value) == (
        f"data.cache: cannot write {tmp_path / 'entry'}: No space left on device; name another folder"
    )


def test_the_default_folder_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    entry = HostCache(None).entry("entry", write_whole, is_whole)
    assert entry == tmp_path / DEFAULT_FOLDER / "entry"
    assert entry.parent.stat().st_mode & 0o777 == 0o700
