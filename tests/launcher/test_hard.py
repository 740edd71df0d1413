"""Rarer and heavier: a closed terminal, the kernel's out-of-memory killer, a hundred launches at once."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from pathlib import Path

import pexpect
import pytest

import lab

pytestmark = pytest.mark.lab


def test_closed_terminal_ends_the_run(start, script, tmp_path):
    script("import os, signal\nopen(os.environ['RANK'] + '.ready', 'w').close()\nsignal.pause()")
    env = {**os.environ, "XDG_STATE_HOME": str(tmp_path), "MARK_OF_TEST": tmp_path.name}
    terminal = pexpect.spawn(lab.DSTRAIN, ["run", "--pass-env", "MARK_OF_TEST", "job.py"], cwd=str(tmp_path), env=env)
    lab.wait_for(lambda: len(list(tmp_path.glob("*.ready"))) == 2, "the ranks")
    at = time.monotonic()
    with contextlib.suppress(pexpect.ExceptionPexpect):  # it takes the time that it takes: the bound is below
        terminal.close(force=False)

    def left() -> list[int]:
        return lab.processes_with(f"MARK_OF_TEST={tmp_path.name}\0", b"DSTRAIN_HOST=", "\0no such word\0")

    lab.wait_for(lambda: not left(), "the ranks to end", 15 - (time.monotonic() - at))
    report = next((tmp_path / "runs").glob("*")) / "report.json"
    lab.wait_for(report.exists, "the report")
    assert '"exit_code": 129' in report.read_text()


@pytest.fixture
def small_cgroup(tmp_path):
    """A memory cgroup of 300 MiB (version 1, or 2 where that is what there is)."""
    mount = tmp_path / "cgroup"
    mount.mkdir()
    v1 = subprocess.run(["mount", "-t", "cgroup", "-o", "memory", "none", str(mount)], capture_output=True, check=False)
    if v1.returncode != 0:
        subprocess.run(["mount", "-t", "cgroup2", "none", str(mount)], check=True)
    group = mount / f"dstrain-test-{os.getpid()}"
    group.mkdir()
    try:
        limit = "memory.limit_in_bytes" if v1.returncode == 0 else "memory.max"
        (group / limit).write_text(str(300 << 20))
        yield group
    finally:
        with contextlib.suppress(OSError):
            lab.wait_for(lambda: not (group / "cgroup.procs").read_text().strip(), "the cgroup to empty")
            group.rmdir()
        subprocess.run(["umount", str(mount)], check=True)


def test_out_of_memory_is_named(start, script, small_cgroup: Path):
    text = f"""
import os, signal
if os.environ["RANK"] == "1":
    open("{small_cgroup}/cgroup.procs", "w").write(str(os.getpid()))
    hoard = [bytearray(os.urandom(1 << 20)) for _ in range(2000)]
signal.pause()
"""
    run = start(script(text))
    assert run.wait(60) == 137, run.err
    assert "out of memory" in run.report["cause"]["headline"]
    assert run.report["cause"]["rank"] == 1


@pytest.mark.slow
@pytest.mark.alone
def test_a_hundred_parallel_launches_without_one_port_error(start, script, tmp_path):
    """All at once, all on one address: every one gets a port of its own and finishes its rendezvous."""
    path = script("import torch.distributed as d; d.init_process_group('gloo'); d.barrier(); d.destroy_process_group()")
    runs = [start("-n", "1", path, folder=tmp_path / str(number)) for number in range(100)]
    codes = [run.wait(400) for run in runs]
    assert codes == [0] * 100, [run.err for run in runs if run.process.returncode]
