"""Nothing corrupt or mixed is ever loaded: kills at every write, sync and rename, full disks, damaged files."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dstrain.runtime.checkpoint import state
from dstrain.runtime.checkpoint.commit import sweep
from dstrain.runtime.checkpoint.load import read, read_newest
from dstrain.runtime.checkpoint.manifest import FILE_NAME, steps_in
from dstrain.runtime.checkpoint.save import Saver, save
from dstrain.runtime.comm import Communicator
from dstrain.runtime.engine import Engine, EngineConfig, TorchSchedule
from dstrain.runtime.spec.errors import CheckpointError

from .conftest import RunRanks

CALLS = ("write", "fsync", "rename", "mkdir", "rmdir", "unlink")
Numbers = dict[str, bytes]


def make(comm: Communicator | None = None) -> Engine:
    torch.manual_seed(0)
    comm = comm or Communicator(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    adam = torch.optim.AdamW
    return Engine(model, comm, EngineConfig(), lambda p: adam([one for _, one in p], lr=0.1), TorchSchedule(None))


def step(engine: Engine) -> None:
    engine.backward(engine(torch.ones(2, 4) * (1 + engine.global_step)).square().sum())
    engine.step()


def numbers(folder: Path) -> Numbers:
    """Of everything but random numbers."""
    tensors = read(folder)[1].tensors
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items() if not name.startswith("rng.")}


def count_calls(act: Callable[[int, str, tuple[Any, ...]], None]) -> None:
    """From now on `act(number, name, arguments)` is called before each of CALLS in this process."""
    number = 0

    def wrapped(name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **words: Any) -> Any:
            nonlocal number
            number += 1
            act(number, name, arguments)
            return inner(*arguments, **words)

        return call

    for name in CALLS:
        setattr(os, name, wrapped(name, getattr(os, name)))


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def in_child(work: Callable[[], None]) -> int:
    """Returns its exit code, -N for a signal."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Engine, dict[int, Numbers]]:
    """Steps 1 and 2 on disk, an engine at step 3, and what each step holds."""
    root = tmp_path_factory.mktemp("before")
    engine = make()
    expected = {}
    for number in (1, 2, 3):
        step(engine)
        save(engine, root)
        expected[number] = numbers(root / f"step-{number}")
    shutil.rmtree(root / "step-3")
    return root, engine, expected


SCENES: dict[str, dict[str, Any]] = {
    "another": {},
    "older ones go": {"keep_last": 1},
    "in place of a damaged one": {"damaged": True, "keep_last": 2},
    "in place of a whole one": {"again": True},
}


@pytest.mark.parametrize(
    "scene", [pytest.param(one, marks=[pytest.mark.slow] if one.startswith("in place") else []) for one in SCENES]
)
def test_a_kill_at_any_call_leaves_whole_checkpoints(
    before: tuple[Path, Engine, dict[int, Numbers]], tmp_path: Path, scene: str
) -> None:
    """Before each call, and in the middle of each write."""
    origin, engine, expected = before
    words = dict(SCENES[scene])
    damaged, again = words.pop("damaged", False), words.pop("again", False)
    first = tmp_path / "first"
    shutil.copytree(origin, first)
    if damaged or again:
        save(engine, first)
    if damaged:
        (first / "step-3" / FILE_NAME).write_text("{")
    report = tmp_path / "calls"

    def saving(root: Path, act: Callable[[int, str, tuple[Any, ...]], None]) -> int:
        def work() -> None:
            count_calls(act)
            save(engine, root, **words)

        return in_child(work)

    def note(number: int, name: str, arguments: tuple[Any, ...]) -> None:
        with report.open("a") as file:
            file.write(name + "\n")

    whole = tmp_path / "whole"
    shutil.copytree(first, whole)
    assert saving(whole, note) == 0
    calls = report.read_text().split()
    points = [(place, half) for place, name in enumerate(calls, 1) for half in (False, True)[: 1 + (name == "write")]]
    assert len(points) >= 50, calls
    for place, half in points:
        root = tmp_path / "root"
        shutil.copytree(first, root)

        def kill(number: int, name: str, arguments: tuple[Any, ...], place: int = place, half: bool = half) -> None:
            if number == place:
                if half:
                    os.pwrite(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2], os.lseek(arguments[0], 0, 1))
                os.kill(os.getpid(), signal.SIGKILL)

        assert saving(root, kill) == -signal.SIGKILL
        for _ in range(2):  # as the kill left it, and as the next start does
            loaded, found, _ = read_newest(root)
            held = {n: t.numpy().tobytes() for n, t in found.tensors.items() if not n.startswith("rng.")}
            assert held == expected[loaded.step], (place, half, loaded.step)
            assert loaded.step in (2, 3)
            sweep(root)
        assert not list(root.glob("*.tmp-*")) + list(root.glob("*.old-*"))
        assert loaded.step == (3 if again else loaded.step)
        shutil.rmtree(root)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_while_saving(run_ranks: RunRanks, tmp_path: Path, victim: int) -> None:
    """On two ranks, at calls spread over its part of the save."""

    def save_twice(root: Path, rank: int, place: int) -> None:
        with Communicator.connect(meet=False) as comm:
            engine = make(comm)
            step(engine)
            save(engine, root)
            step(engine)

            def kill(number: int, name: str, arguments: tuple[Any, ...]) -> None:
                if number == place:
                    os.kill(os.getpid(), signal.SIGKILL)

            if rank == victim:
                count_calls(kill)
            save(engine, root, keep_last=1)

    found = set()
    for place in range(1, 60, 7):
        root = tmp_path / str(place)
        run_ranks(2, lambda rank, root=root, place=place: in_child(lambda: save_twice(root, rank, place)))
        loaded, _, manifest = read_newest(root)
        assert manifest.layout["world_size"] == 2
        sweep(root)
        assert read_newest(root)[0].step == loaded.step
        assert not list(root.glob("*.tmp-*"))
        found.add(loaded.step)
    assert found <= {1, 2}
    assert 1 in found


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], check=True)
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.lab
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_disk_that_is_full_at_any_stage(small_disk: Path, asynchronous: bool) -> None:
    """From no room at all to just enough; the older checkpoint stays, and training can go on."""
    engine = make()
    step(engine)
    save(engine, small_disk / "checkpoints")
    used = sum(path.stat().st_size for path in (small_disk / "checkpoints" / "step-1").iterdir())
    outcomes = set()
    saver = Saver(engine, small_disk / "checkpoints", asynchronous=asynchronous)
    for room in range(0, 3 * used, 4096):
        filler = small_disk / "filler"
        free = shutil.disk_usage(small_disk).free
        filler.write_bytes(bytes(max(0, free - room)))
        step(engine)
        saver.begin()
        saver.finish()
        (saved,) = saver.take_finished()
        outcomes.add(bool(saved.problem))
        held = steps_in(small_disk / "checkpoints")
        if saved.problem:
            assert "o space left on device" in saved.problem
            assert engine.global_step not in held
            assert not list((small_disk / "checkpoints").glob("*.tmp-*"))
        assert read_newest(small_disk / "checkpoints")[0].step == held[0]
        filler.unlink()
        for old in held[1:]:
            shutil.rmtree(small_disk / "checkpoints" / f"step-{old}")
        saver.notes.clear()
    saver.close()
    assert outcomes == {False, True}


def test_every_file_flipped_and_cut(run_ranks: RunRanks, tmp_path: Path) -> None:
    """Somewhere in each 97 bytes of every file: the step before is used instead, on all ranks alike."""
    root = tmp_path / "root"

    def work(rank: int) -> None:
        with Communicator.connect() as comm:
            engine = make(comm)
            for _ in range(2):
                step(engine)
                save(engine, root)

    run_ranks(2, work)
    files = sorted((root / "step-2").iterdir())
    assert [path.name for path in files] == [FILE_NAME, "rank-0.safetensors", "rank-1.safetensors"]
    good = numbers(root / "step-1")
    for path in files:
        data = path.read_bytes()
        begin = 0 if path.name == FILE_NAME else 8 + int.from_bytes(data[:8], "little")
        for place in range(begin, len(data), 97 if path.name != FILE_NAME else 397):
            path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            loaded, found, _ = read_newest(root)
            assert loaded.step == 1, (path.name, place)
            assert str(path.parent) in loaded.passed_over[0]
        assert found.tensors.keys() >= good.keys()
        for size in range(0, len(data), 1 + len(data) // 7):
            path.write_bytes(data[:size])
            assert read_newest(root)[0].step == 1, (path.name, size)
        path.unlink()
        assert read_newest(root)[0].step == 1
        path.write_bytes(data)
    (root / "step-2" / "foreign.txt").write_text("not ours")
    assert read_newest(root)[0].step == 2


def test_a_damaged_copy_is_an_error_on_all_ranks_and_changes_nothing(run_ranks: RunRanks, tmp_path: Path) -> None:
    def work(rank: int) -> str:
        with Communicator.connect() as comm:
            engine = make(comm)
            step(engine)
            save(engine, tmp_path)
            if rank == 0:
                path = tmp_path / "step-1" / "rank-1.safetensors"
                path.write_bytes(path.read_bytes()[:-1] + b"!")
            comm.barrier()
            other = make(comm)
            kept = [p.detach().clone() for p in other.module.parameters()]
            with pytest.raises(CheckpointError) as caught:
                other.load_checkpoint(tmp_path)
            assert all(torch.equal(a, b) for a, b in zip(kept, other.module.parameters(), strict=True))
            return str(caught.value)

    first, second = run_ranks(2, work)
    assert first == second
    assert "rank-1.safetensors: expected rng.1." in first


def test_large_tensors_are_cut_between_ranks_and_into_pieces(
    run_ranks: RunRanks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "LARGE_BYTES", 20)
    monkeypatch.setattr("dstrain.runtime.checkpoint.parts.PIECE_BYTES", 16)

    def work(rank: int) -> list[float]:
        with Communicator.connect() as comm:
            engine = make(comm)
            step(engine)
            save(engine, tmp_path)
            other = make(comm)
            other.load_checkpoint(tmp_path)
            step(engine)
            step(other)
            pairs = zip(engine.module.parameters(), other.module.parameters(), strict=True)
            return [(a - b).abs().max().item() for a, b in pairs]

    assert run_ranks(3, work) == [[0.0] * 4] * 3
    manifest, _ = read(tmp_path / "step-1")
    weight = next(entry for entry in manifest.tensors if entry.name == "model.0.weight")
    assert len(weight.pieces) >= 3
    held = dict.fromkeys(manifest.files, 0)
    for entry in manifest.tensors:
        for piece in entry.pieces:
            if not entry.name.startswith("rng."):
                held[piece.file] += piece.size
    assert max(held.values()) - min(held.values()) <= 24
