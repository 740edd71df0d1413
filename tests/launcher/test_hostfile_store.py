"""Hostfiles on disk: concurrent edits lose nothing, a killed edit leaves a whole file, attributes stay."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from dstrain.launcher import hostfile_store
from dstrain.launcher.hostfile import Hostfile, load_hostfile
from dstrain.launcher.hostfile_edit import add_host, edit_file, remove_hosts, set_options
from dstrain.runtime.spec.errors import HostfileError, UsageError

OLD = "# lab\r\na slots=2 # x\n"
NEW = "# lab\r\na slots=2 # x\nb\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "hosts"
    path.write_bytes(OLD.encode())
    return path


def add(path: Path, name: str = "b") -> None:
    edit_file(path, partial(_add, name))


def _add(name: str, hostfile: Hostfile) -> Hostfile:
    return add_host(hostfile, [name])


def files_beside(path: Path) -> list[str]:
    return sorted(found.name for found in path.parent.iterdir())


EDITOR = """if True:
    import sys
    from pathlib import Path
    from dstrain.launcher.hostfile_edit import add_host, edit_file, remove_hosts, set_options
    path, me = Path(sys.argv[1]), sys.argv[2]
    print("ready", flush=True)
    sys.stdin.readline()
    for i in range(8):
        edit_file(path, lambda before: add_host(before, [f"new{me}-{i}", "slots=1"]), create=True)
        edit_file(path, lambda before: remove_hosts(before, [f"old{me}-{i}"]))
        edit_file(path, lambda before: set_options(before, f"kept{me}-{i}", ["port=22"]))
"""


def test_concurrent_edits_of_real_processes_lose_nothing(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# top\nold[0-5]-[0-7]\nkept[0-5]-[0-7] slots=2 # kept\n")
    command = [sys.executable, "-W", "error", "-c", EDITOR, str(path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    editors = [subprocess.Popen([*command, str(me)], **pipes) for me in range(6)]
    try:
        for editor in editors:
            assert editor.stdout.readline() == "ready\n"
        for editor in editors:
            editor.stdin.write("go\n")
            editor.stdin.flush()
        for editor in editors:
            editor.communicate(timeout=60)
    finally:
        for editor in editors:
            editor.kill()
            editor.wait()
    assert [editor.returncode for editor in editors] == [0] * 6
    hosts = load_hostfile(path).hosts
    numbers = [f"{me}-{i}" for me in range(6) for i in range(8)]
    assert sorted(h.name for h in hosts) == sorted([f"{kind}{n}" for kind in ("kept", "new") for n in numbers])
    assert all(h.port == 22 and h.slots == 2 for h in hosts if h.name.startswith("kept"))
    assert path.read_text().startswith("# top\n")
    assert path.read_text().count("# kept") <= 1
    assert files_beside(path) == ["hosts"]


KILLED = """if True:
    import json, os, signal, sys
    from pathlib import Path
    from dstrain.launcher.hostfile_edit import add_host, edit_file

    path, old = Path(sys.argv[1]), Path(sys.argv[1]).read_bytes()
    edit = lambda: edit_file(path, lambda before: add_host(before, ["b"]))

    def edit_and_die_at(step):
        left, real_fsync = step, os.fsync
        def count():
            nonlocal left
            left -= 1
            if left == -1:  # the kill itself is an event too
                os.kill(os.getpid(), signal.SIGKILL)
        def fsync(descriptor):
            count()
            real_fsync(descriptor)
            count()
        os.fsync = fsync
        sys.addaudithook(lambda event, _: count() if event == "open" or event.startswith(("os.", "shutil.", "fcntl.")) else None)
        edit()

    outcomes = []
    for step in range(1000):
        path.write_bytes(old)
        child = os.fork()
        if child == 0:
            edit_and_die_at(step)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        beside = sorted(os.listdir(path.parent))
        outcomes.append([status, path.read_bytes().decode(), len(beside)])
        path.write_bytes(old)
        edit()
        outcomes[-1].append(sorted(os.listdir(path.parent)))
        if status == 0:
            break
    print(json.dumps(outcomes))
"""  # noqa: E501


def test_an_edit_killed_at_any_step_leaves_the_old_file_or_the_new_one(path):
    command = [sys.executable, "-W", "error", "-c", KILLED, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    outcomes = json.loads(done.stdout)
    statuses = [status for status, *_ in outcomes]
    assert statuses[:-1] == [-9] * (len(outcomes) - 1)
    assert statuses[-1] == 0
    assert len(outcomes) > 8, "the edit's steps were counted"
    texts = [text for _, text, *_ in outcomes]
    switch = texts.index(NEW)
    assert texts == [OLD] * switch + [NEW] * (len(texts) - switch)
    assert 3 < switch < len(texts) - 1, "some die before the rename, some behind it"
    assert any(beside == 2 for *_, beside, _ in outcomes), "a killed edit left its temporary file"
    assert all(after == ["hosts"] for *_, after in outcomes), "and the next one removed it"


def test_the_old_file_is_replaced_and_never_written_into(path):
    """A hard link to the old file keeps the old text: nobody ever reads half of the new one."""
    os.link(path, path.parent / "kept")
    add(path)
    assert path.read_bytes().decode() == NEW
    assert (path.parent / "kept").read_bytes().decode() == OLD


def test_a_full_disk_leaves_the_old_file(path, monkeypatch):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UsageError, match="No space left on device"):
        add(path)
    assert path.read_bytes().decode() == OLD
    assert files_beside(path) == ["hosts"]


def test_a_refused_edit_leaves_the_file_untouched(path):
    before = path.stat()
    with pytest.raises(HostfileError):
        add(path, "a")
    with pytest.raises(HostfileError):
        edit_file(path, lambda hostfile: set_options(hostfile, "a", ["slots=0"]))
    assert path.stat() == before
    assert files_beside(path) == ["hosts"]


def test_an_edit_that_changes_nothing_writes_nothing(path):
    before = path.stat()
    edit_file(path, lambda hostfile: set_options(hostfile, "a", ["slots=2"]))
    assert path.stat() == before


def test_mode_owner_and_extended_attributes_stay(path):
    if os.geteuid() == 0:
        os.chown(path, 12345, 23456)
    path.chmod(0o640)
    with suppress(OSError):  # not every file system has them
        os.setxattr(path, "user.note", b"keep")
    before = path.stat()
    attributes = os.listxattr(path)
    add(path)
    after = path.stat()
    assert path.read_bytes().decode() == NEW
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    assert os.listxattr(path) == attributes
    assert after.st_mtime_ns > before.st_mtime_ns


def test_a_file_whose_owner_cannot_be_kept_is_left_alone(path, monkeypatch):
    real = hostfile_store._fingerprint

    def owned_by_another(target: Path) -> os.stat_result:
        fields = list(real(target))
        fields[stat.ST_UID] += 1
        return os.stat_result(fields)

    def refused(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(hostfile_store, "_fingerprint", owned_by_another)
    monkeypatch.setattr(os, "chown", refused)
    with pytest.raises(UsageError, match="edit it as its owner"):
        add(path)
    assert path.read_bytes().decode() == OLD
    assert files_beside(path) == ["hosts"]


def test_a_new_file_gets_the_usual_mode(tmp_path):
    path = tmp_path / "new"
    with pytest.raises(UsageError, match="no such file"):
        add(path)
    edit_file(path, lambda hostfile: add_host(hostfile, ["b"]), create=True)
    (tmp_path / "other").touch()
    assert path.read_text() == "b\n"
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_symlink_stays_and_its_target_changes(path, tmp_path):
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "hosts"
    link.symlink_to("../hosts")
    dangling = tmp_path / "links" / "dangling"
    dangling.symlink_to("../made")
    add(link)
    edit_file(dangling, lambda hostfile: add_host(hostfile, ["c"]), create=True)
    assert link.is_symlink()
    assert dangling.is_symlink()
    assert path.read_bytes().decode() == NEW
    assert (tmp_path / "made").read_text() == "c\n"
    assert files_beside(link) == ["dangling", "hosts"]


def test_what_takes_no_lock_is_not_overwritten(path):
    """An editor saves the file while we edit: the edit starts over with what the editor wrote."""
    seen: list[str] = []

    def edit(hostfile: Hostfile) -> Hostfile:
        seen.append(hostfile.render())
        if len(seen) == 1:
            path.write_text("edited\n")
        return add_host(hostfile, ["b"])

    edit_file(path, edit)
    assert seen == [OLD, "edited\n"]
    assert path.read_text() == "edited\nb\n"


def test_a_file_that_never_rests_is_left_to_the_other(path):
    def edit(hostfile: Hostfile) -> Hostfile:
        path.write_text(hostfile.render() + "# more\n")
        return remove_hosts(hostfile, ["a"])

    with pytest.raises(UsageError, match="another that keeps writing it"):
        edit_file(path, edit)
    assert path.read_text().count("# more") == 10
    assert files_beside(path) == ["hosts"]


def test_a_stuck_edit_is_waited_for_only_so_long(path, monkeypatch):
    monkeypatch.setattr(hostfile_store, "LOCK_TIMEOUT_S", 0.05)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="expected no other edit in this directory"):
            add(path)
    finally:
        os.close(descriptor)
    add(path)
    assert path.read_bytes().decode() == NEW


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("directory", "expected a regular file"),
        ("pipe", "expected a regular file"),
        ("nowhere/hosts", "No such file or directory"),
        ("loop", "Too many levels of symbolic links"),
        ("hosts/below", "Not a directory"),
        ("a\0b", "null byte"),
    ],
)
def test_what_cannot_be_edited_is_refused(path, target, message):
    (path.parent / "directory").mkdir()
    os.mkfifo(path.parent / "pipe")
    (path.parent / "loop").symlink_to("loop")
    with pytest.raises(UsageError, match=message):
        edit_file(path.parent / target, lambda hostfile: add_host(hostfile, ["b"]), create=True)


def test_a_read_only_file_stays(path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everything
    with pytest.raises(UsageError, match="expected a writable file, found a read-only one"):
        add(path)
    assert path.read_bytes().decode() == OLD
