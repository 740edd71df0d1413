"""Hosts with disks of their own: each rank here has its own folder, as if it were alone on its host."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dstrain.runtime.checkpoint.commit import in_use
from dstrain.runtime.checkpoint.disks import Disks
from dstrain.runtime.checkpoint.load import load
from dstrain.runtime.checkpoint.manifest import Manifest, steps_in
from dstrain.runtime.checkpoint.save import Saver
from dstrain.runtime.comm import Communicator
from dstrain.runtime.spec.errors import CheckpointError

from .conftest import RunRanks
from .test_checkpoint_crash import flip
from .test_zero_checkpoint import engine_of, train

Roots = Callable[[int], Path]


def save_on(run_ranks: RunRanks, roots: Roots, ranks: int, stage: int, **words: Any) -> list[float]:
    """Steps 3 and 6; returns the losses behind them."""

    def work(rank: int) -> list[float]:
        with Communicator.connect() as comm:
            engine = engine_of(comm, stage)
            saver = Saver(engine, roots(rank), **words)
            for step in (0, 3):
                train(engine, step)
                saver.begin()
                saver.finish()
                saver.raise_problems()
            assert saver.notes == []
            losses = train(engine, 6)
            saver.close()
            return losses

    return list(run_ranks(ranks, work)[0])


def resume_on(run_ranks: RunRanks, roots: Roots, ranks: int, stage: int) -> list[tuple[int, list[float], list[str]]]:
    def work(rank: int) -> tuple[int, list[float], list[str]]:
        with Communicator.connect() as comm:
            engine = engine_of(comm, stage)
            loaded = load(engine, roots(rank))
            return loaded.step, train(engine, 6) if loaded.step == 6 else [], list(loaded.passed_over)

    return list(run_ranks(ranks, work))


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("stage", [0, 3])
def test_each_keeps_its_own_and_all_go_on(run_ranks: RunRanks, tmp_path: Path, stage: int, asynchronous: bool) -> None:
    def root(rank: int) -> Path:
        return tmp_path / f"host-{rank}"

    straight = save_on(run_ranks, root, 3, stage, asynchronous=asynchronous, keep_last=1)
    for rank in range(3):
        assert steps_in(root(rank)) == [6]
        names = {path.name for path in (root(rank) / "step-6").iterdir()}
        assert names == {"manifest.json", f"rank-{rank}.safetensors"}
    texts = {(root(rank) / "step-6" / "manifest.json").read_text() for rank in range(3)}
    assert len(texts) == 1
    for step, losses, passed_over in resume_on(run_ranks, root, 3, stage):
        assert (step, passed_over) == (6, [])
        assert losses == straight
    for ranks in (4, 2):  # another host that has nothing; one whose files are where a rank sees them
        if ranks == 2:
            shutil.copytree(root(2), root(1), dirs_exist_ok=True)
        for step, losses, _ in resume_on(run_ranks, root, ranks, stage):
            assert step == 6
            assert losses == pytest.approx(straight, rel=1e-5)


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_with_two_copies_one_disk_may_be_lost(run_ranks: RunRanks, tmp_path: Path, lost: int) -> None:
    def root(rank: int) -> Path:
        return tmp_path / f"host-{rank}"

    straight = save_on(run_ranks, root, 3, 2, replicas=2)
    for rank in range(3):
        names = {path.name for path in (root(rank) / "step-6").iterdir()}
        assert names == {"manifest.json", f"rank-{rank}.safetensors", f"rank-{(rank - 1) % 3}.safetensors"}
    shutil.rmtree(root(lost))
    for step, losses, passed_over in resume_on(run_ranks, root, 3, 2):
        assert (step, passed_over) == (6, [])
        assert losses == straight


def test_with_two_copies_a_damaged_file_is_taken_from_the_other(run_ranks: RunRanks, tmp_path: Path) -> None:
    def root(rank: int) -> Path:
        return tmp_path / f"host-{rank}"

    straight = save_on(run_ranks, root, 2, 3, replicas=2, asynchronous=True)
    path = root(0) / "step-6" / "rank-0.safetensors"
    flip(path, path.stat().st_size - 3)
    for step, losses, passed_over in resume_on(run_ranks, root, 2, 3):
        assert (step, passed_over) == (6, [])
        assert losses == straight


def test_without_copies_the_newest_step_that_is_complete_counts(run_ranks: RunRanks, tmp_path: Path) -> None:
    def root(rank: int) -> Path:
        return tmp_path / f"host-{rank}"

    save_on(run_ranks, root, 2, 1)
    (root(1) / "step-6" / "rank-1.safetensors").unlink()
    found = resume_on(run_ranks, root, 2, 1)
    assert [step for step, _, _ in found] == [3, 3]
    assert "rank-1.safetensors: expected" in found[0][2][0]
    shutil.rmtree(root(1))
    with pytest.raises(BaseException, match="No such file or directory"):
        resume_on(run_ranks, root, 2, 1)


def test_a_disk_that_fails_leaves_no_half_anywhere(run_ranks: RunRanks, tmp_path: Path) -> None:
    """Rank 1 cannot write: no disk has the step, and all ranks say why."""

    def work(rank: int) -> str:
        with Communicator.connect() as comm:
            engine = engine_of(comm, 2)
            root = tmp_path / f"host-{rank}"
            saver = Saver(engine, root)
            train(engine, 0)
            if rank == 1:
                shutil.rmtree(root)
                root.touch()
            saver.begin()
            saver.finish()
            (saved,) = saver.take_finished()
            return saved.problem

    first, second = run_ranks(2, work)
    assert first.partition("found")[2] == second.partition("found")[2]
    assert "found rank 1 on " in first
    assert "Not a directory" in first
    assert list((tmp_path / "host-0").iterdir()) == []


def test_a_commit_that_fails_on_one_disk_is_undone_on_the_others(
    run_ranks: RunRanks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it has replaced the same step of before."""

    def work(rank: int) -> str:
        with Communicator.connect() as comm:
            engine = engine_of(comm, 2)
            saver = Saver(engine, tmp_path / f"host-{rank}")
            train(engine, 0)
            for _ in range(2):
                saver.begin()
                saver.finish()
                (saved,) = saver.take_finished()
                if rank == 1:
                    monkeypatch.setattr("dstrain.runtime.checkpoint.save.commit_all", failing)
            return saved.problem

    problems = run_ranks(2, work)
    assert all("found rank 1 on " in problem and "no room" in problem for problem in problems)
    for rank in range(2):
        assert [path.name for path in (tmp_path / f"host-{rank}").iterdir()] == ["step-3"]
    assert [step for step, _, _ in resume_on(run_ranks, lambda rank: tmp_path / f"host-{rank}", 2, 2)] == [3, 3]


def failing(root: Path, step: int, token: str, manifest: str) -> None:
    raise OSError(28, "no room", str(root))


def test_ranks_that_hold_different_tensors_save_nothing(run_ranks: RunRanks, tmp_path: Path) -> None:
    """What one rank alone has would shift where the others cut what they share."""

    def work(rank: int) -> str:
        with Communicator.connect() as comm:
            engine = engine_of(comm, 0)
            train(engine, 0)
            if rank == 1:
                engine.optimizer.state[engine.trained[0][1]]["own"] = torch.ones(1000)
            saver = Saver(engine, tmp_path)
            saver.begin()
            saver.finish()
            (saved,) = saver.take_finished()
            return saved.problem

    first, second = run_ranks(2, work)
    assert first == second
    assert "ranks that share a state hold different tensors" in first
    assert list(tmp_path.iterdir()) == []


def test_a_save_under_way_is_not_swept_by_another_process(run_ranks: RunRanks, tmp_path: Path) -> None:
    with in_use(tmp_path):
        (tmp_path / "step-1.tmp-live").mkdir()

        def work(rank: int) -> None:
            with Communicator.connect() as comm:
                Saver(engine_of(comm, 0), tmp_path).close()

        run_ranks(1, work)
        assert (tmp_path / "step-1.tmp-live").exists()
    with in_use(tmp_path):
        assert list(tmp_path.iterdir()) == []


def test_an_older_life_on_one_disk_is_not_mixed_in(run_ranks: RunRanks, tmp_path: Path) -> None:
    """The same step of two runs: the files of one manifest count."""

    def root(rank: int) -> Path:
        return tmp_path / f"host-{rank}"

    save_on(run_ranks, root, 2, 2)
    shutil.copytree(root(1), tmp_path / "older")
    shutil.rmtree(root(0))
    shutil.rmtree(root(1))
    save_on(run_ranks, root, 2, 2)
    shutil.rmtree(root(1))
    shutil.copytree(tmp_path / "older", root(1))
    assert Manifest.read(root(0) / "step-6").files == Manifest.read(root(1) / "step-6").files
    with pytest.raises(BaseException, match="No such file or directory"):
        resume_on(run_ranks, root, 2, 2)


def test_a_shared_folder_needs_no_second_copy(run_ranks: RunRanks, tmp_path: Path) -> None:
    def work(rank: int) -> list[str]:
        with Communicator.connect() as comm:
            return Saver(engine_of(comm, 0), tmp_path, replicas=2).notes

    assert (
        run_ranks(2, work)
        == [[f"checkpoint.replicas: all ranks share {tmp_path}, so one copy of each file is kept"]] * 2
    )


def test_copies_go_to_the_next_disk_in_turns() -> None:
    disks = Disks((0, 0, 2, 2, 2), ("a", "a", "b", "b", "b"))
    assert [disks.next_of(rank) for rank in range(5)] == [2, 3, 0, 1, 0]


def test_a_folder_that_one_host_cannot_write(run_ranks: RunRanks, tmp_path: Path) -> None:
    def work(rank: int) -> str:
        root = tmp_path / f"host-{rank}" / "saved"
        if rank == 1:
            root.parent.touch()
        with Communicator.connect() as comm, pytest.raises(CheckpointError) as caught:
            Saver(engine_of(comm, 0), root)
        return str(caught.value)

    first, second = run_ranks(2, work)
    assert first == second
    assert "expected a folder that can be written, found Not a directory: " in first
