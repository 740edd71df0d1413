"""Saves beside the training: what they hold, and what happens when their writer or disk fails."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dstrain.runtime import trainer
from dstrain.runtime.checkpoint.background import Writer
from dstrain.runtime.checkpoint.load import read, read_newest
from dstrain.runtime.checkpoint.manifest import steps_in
from dstrain.runtime.checkpoint.save import Saver, save
from dstrain.runtime.comm import Communicator
from dstrain.runtime.engine import Engine
from dstrain.runtime.spec.errors import CheckpointError

from .conftest import RunRanks
from .test_checkpoint import job, train  # noqa: F401 # a fixture
from .test_zero_checkpoint import engine_of
from .test_zero_checkpoint import train as train_steps


def numbers(folder: Path) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in read(folder)[1].tensors.items()}


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s for {what}"
        time.sleep(0.01)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_it_holds_the_step_at_which_it_began(run_ranks: RunRanks, tmp_path: Path, stage: int) -> None:
    """However much is trained before it is written."""

    def work(rank: int) -> list[int]:
        with Communicator.connect() as comm:
            engine = engine_of(comm, stage)
            train_steps(engine, 0)
            engine.save_checkpoint(tmp_path / "at-once")
            engine.saver = Saver(engine, tmp_path / "beside", asynchronous=True)
            engine.saver.reserve()
            engine.saver.begin()
            counts = []
            for step in range(3, 400):
                train_steps(engine, step, 1)
                if not engine.saver.in_flight:
                    break
                counts.append(step)
            engine.finish_checkpoint()
            engine.saver.close()
            return counts

    first, second = run_ranks(2, work)
    assert first == second
    beside, at_once = numbers(tmp_path / "beside" / "step-3"), numbers(tmp_path / "at-once" / "step-3")
    assert beside == at_once


def test_a_training_saves_beside_itself(run_ranks: RunRanks, job: Path, tmp_path: Path) -> None:  # noqa: F811
    """Every save stands at the end, holds what one at once holds, and costs the steps little."""

    def work(rank: int) -> list[dict[str, Any]]:
        train(job, tmp_path / f"once-{rank}", "--set", f"checkpoint.dir={tmp_path}/once", "--set",
              "checkpoint.asynchronous=false")  # fmt: skip
        return []

    def beside(rank: int) -> list[dict[str, Any]]:
        return train(job, tmp_path / f"beside-{rank}")

    run_ranks(2, work)
    events = run_ranks(2, beside)[0]
    saves = [event for event in events if event["kind"] == "checkpoint"]
    assert [event["step"] for event in saves] == [5, 10, 15, 20]
    assert all(event["stall_s"] <= event["seconds"] for event in saves)
    for step in (5, 10, 15, 20):
        assert numbers(tmp_path / "saved" / f"step-{step}") == numbers(tmp_path / "once" / f"step-{step}")


def pid_of_writer(saver: Saver) -> int:
    return saver._own_writer.pid


def test_a_writer_that_is_killed_costs_one_save(tmp_path: Path) -> None:
    engine = one_rank()
    saver = Saver(engine, tmp_path, asynchronous=True)
    pid = pid_of_writer(saver)
    os.kill(pid, signal.SIGSTOP)
    saver.begin()
    os.kill(pid, signal.SIGKILL)
    saver.finish()
    (saved,) = saver.take_finished()
    assert "the writer process has ended (signal 9)" in saved.problem
    assert steps_in(tmp_path) == []
    assert not list(tmp_path.glob("*.tmp-*"))
    saver.begin()
    saver.finish()
    saver.raise_problems()
    assert steps_in(tmp_path) == [0]
    second = pid_of_writer(saver)
    saver.close()
    assert not Path(f"/proc/{second}").exists()


def test_a_writer_ends_with_its_rank(tmp_path: Path) -> None:
    """Killed in the middle of a save: nothing of it counts, and nobody is left."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        saver = Saver(one_rank(), tmp_path / "saved", asynchronous=True)
        saver.begin()
        saver.finish()  # it is up
        writer = pid_of_writer(saver)
        os.kill(writer, signal.SIGSTOP)
        saver.begin()
        os.write(write_end, str(writer).encode())
        signal.pause()
    writer = int(os.read(read_end, 100))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    wait_until(lambda: not Path(f"/proc/{writer}").exists() or _is_zombie(writer), "the writer's end")
    assert steps_in(tmp_path / "saved") == [0]
    assert read_newest(tmp_path / "saved")[0].step == 0


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def one_rank() -> Engine:
    return engine_of(Communicator(rank=0, world_size=1, local_rank=0, device=torch.device("cpu")), 0)


def test_a_script_hears_of_it_at_its_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = one_rank()
    path = engine.save_checkpoint(tmp_path / "saved", asynchronous=True)
    engine.finish_checkpoint()
    assert read_newest(path)[0].step == 0
    assert engine.saver is not None
    os.kill(pid_of_writer(engine.saver), signal.SIGKILL)
    train_steps(engine, 0, 1)
    engine.save_checkpoint(tmp_path / "saved", asynchronous=True)
    with pytest.raises(CheckpointError, match="writer process has ended"):
        engine.finish_checkpoint()
    train_steps(engine, 1, 1)
    engine.save_checkpoint(tmp_path / "saved", asynchronous=True)
    engine.finish_checkpoint()
    assert steps_in(tmp_path / "saved") == [2, 0]
    engine.saver.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], check=True)
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.lab
@pytest.mark.parametrize("at_the_end", [False, True])
def test_training_goes_on_when_the_disk_is_full(
    job: Path,  # noqa: F811
    tmp_path: Path,
    small_disk: Path,
    at_the_end: bool,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is said loudly; only if the last one fails too, the job ends with 204."""
    begin, filler = Saver.begin, small_disk / "filler"

    def begin_and_fill(self: Saver, *words: Any) -> Path:
        self.finish()
        if self._engine.global_step == 10:
            filler.write_bytes(bytes(shutil.disk_usage(small_disk).free))
        elif self._engine.global_step == 20 and not at_the_end:
            filler.unlink()
        return begin(self, *words)

    monkeypatch.setattr(Saver, "begin", begin_and_fill)
    events = tmp_path / "events"
    with events.open("wb") as file:
        monkeypatch.setenv("DSTRAIN_EVENT_FD", str(file.fileno()))
        words = ["--set", f"checkpoint.dir={small_disk}/saved", "--set", "checkpoint.keep_last=1"]
        assert trainer.main([str(job), *words]) == (204 if at_the_end else 0)
    found = [json.loads(line) for line in events.read_text().splitlines()]
    assert [event["step"] for event in found if event["kind"] == "step"] == list(range(1, 21))
    warnings = [event["text"] for event in found if event["kind"] == "warning"]
    assert len(warnings) == (3 if at_the_end else 2)
    assert all("No space left on device" in text for text in warnings)
    said = capfd.readouterr()
    assert "warning: " in said.out
    assert steps_in(small_disk / "saved") == ([5] if at_the_end else [20])
    if at_the_end:
        assert said.err.startswith(f"dstrain: {small_disk}/saved/step-20: expected to save step 20, found No space")


def test_a_rank_waits_for_nothing_that_an_earlier_save_left(tmp_path: Path) -> None:
    """A second save begins behind the first, whatever the first has come to."""
    engine = one_rank()
    engine.saver = saver = Saver(engine, tmp_path, keep_last=1, asynchronous=True)
    for step in range(4):
        train_steps(engine, step, 1)
        saver.begin()
    saver.finish()
    assert [saved.step for saved in saver.take_finished()] == [1, 2, 3, 4]
    assert steps_in(tmp_path) == [4]
    saver.close()


def test_the_writer_imports_no_torch(tmp_path: Path) -> None:
    writer = Writer()
    try:
        maps = Path(f"/proc/{writer.pid}/maps")
        wait_until(lambda: "_hashlib" in maps.read_text() or "libcrypto" in maps.read_text(), "its imports")
        assert "libtorch" not in maps.read_text()
        assert "numpy" not in maps.read_text()
    finally:
        writer.close()


def test_a_save_is_saved_by_shares(run_ranks: RunRanks, tmp_path: Path) -> None:
    """No rank writes what another has written: together the files hold the state once, in even shares."""

    def work(rank: int) -> None:
        with Communicator.connect() as comm:
            for stage in range(4):
                engine = engine_of(comm, stage)
                train_steps(engine, 0)
                save(engine, tmp_path / str(stage))

    run_ranks(4, work)
    sizes = []
    for stage in range(4):
        manifest, found = read(tmp_path / str(stage) / "step-3")
        stored = sum(piece.size for entry in manifest.tensors for piece in entry.pieces)
        assert stored == sum(tensor.nbytes for tensor in found.tensors.values())
        sizes.append(stored)
    assert len(set(sizes)) == 1
