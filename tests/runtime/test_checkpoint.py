"""Saving and resuming: bitwise, in another world, after a kill, from damaged files, on a full disk."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dstrain.runtime import trainer
from dstrain.runtime.checkpoint.commit import sweep
from dstrain.runtime.checkpoint.load import read, read_newest
from dstrain.runtime.checkpoint.manifest import FILE_NAME, Manifest, steps_in
from dstrain.runtime.comm import Communicator
from dstrain.runtime.engine import Engine, EngineConfig, TorchSchedule
from dstrain.runtime.models.gpt import GPT
from dstrain.runtime.optimizers import make_optimizer
from dstrain.runtime.spec.errors import CheckpointError
from dstrain.runtime.spec.model_config import GPTConfig
from dstrain.runtime.spec.training_config import OptimizerConfig, PrecisionConfig

RunRanks = Callable[..., list[Any]]

STATE_FILE = "rank-0.safetensors"

YAML = """
name: tiny
model: {{gpt: {{layers: 1, width: 16, heads: 2, context: 16}}}}
data: {{path: {folder}/text, validation_fraction: 0.1}}
batch: {{global: 12, micro: 2}}
optimizer: {{lr: 1e-2}}
schedule: {{warmup_steps: 2}}
train: {{steps: 20, eval_samples: 7, sample_bytes: 0, ema_decay: 0.9}}
checkpoint: {{dir: {folder}/saved, every_steps: 5, keep_last: null}}
log: {{every: 100}}
"""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "DSTRAIN_JOB", "DSTRAIN_EVENT_FD", "DSTRAIN_ATTEMPT"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "text").write_bytes(random.Random(0).randbytes(8000))
    (tmp_path / "job.yaml").write_text(YAML.format(folder=tmp_path))
    return tmp_path / "job.yaml"


def train(job: Path, events: Path, *words: str) -> list[dict[str, Any]]:
    """Train in this process; returns the events."""
    with events.open("wb") as file:
        os.environ["DSTRAIN_EVENT_FD"] = str(file.fileno())
        try:
            assert trainer.main([str(job), *words]) == 0
        finally:
            del os.environ["DSTRAIN_EVENT_FD"]
    return [json.loads(line) for line in events.read_text().splitlines()]


def losses(events: list[dict[str, Any]]) -> dict[int, float]:
    return {event["step"]: event["loss"] for event in events if event["kind"] == "step"}


def bytes_of(folder: Path, step: int) -> dict[str, bytes]:
    tensors = read(folder / f"step-{step}")[1].tensors
    return {name: tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("dtype", "ranks"),
    [
        ("fp16", 1),
        ("fp32", 2),
        pytest.param("fp32", 1, marks=pytest.mark.slow),
        pytest.param("fp16", 2, marks=pytest.mark.slow),
    ],
)
def test_ten_steps_and_a_kill_and_ten_are_twenty_bitwise(
    run_ranks: RunRanks, job: Path, tmp_path: Path, ranks: int, dtype: str
) -> None:
    """The second life starts from step 10's files alone: what the first did behind them is lost with it. With dropout,
    shuffled data, accumulation, and fp16's scale."""
    text = job.read_text()
    model = next(line for line in text.splitlines() if line.startswith("model:"))
    job.write_text(
        text.replace(model, f'model: {{factory: "{__name__}:dropping"}}').replace(
            "data: {", "data: {sequence_length: 16, "
        )
    )
    precision = ["--set", f"precision.dtype={dtype}"]
    whole, halves = tmp_path / "whole", tmp_path / "halves"

    def straight(rank: int) -> dict[int, float]:
        return losses(train(job, tmp_path / f"whole-{rank}", *precision, "--set", f"checkpoint.dir={whole}"))

    expected = run_ranks(ranks, straight)[0] if ranks > 1 else straight(0)

    def killed(rank: int) -> None:
        words = [*precision, "--set", f"checkpoint.dir={halves}", "--set", "checkpoint.every_steps=10"]
        words += ["--set", "checkpoint.asynchronous=false"]
        pid = os.fork()
        if pid == 0:
            die_behind(13)
            train(job, tmp_path / f"first-{rank}", *words)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL

    run_ranks(ranks, killed) if ranks > 1 else killed(0)
    assert steps_in(halves) == [10]

    def resumed(rank: int) -> dict[int, float]:
        return losses(
            train(job, tmp_path / f"second-{rank}", *precision, "--set", f"checkpoint.dir={halves}", "--resume", "auto")
        )

    found = run_ranks(ranks, resumed)[0] if ranks > 1 else resumed(0)
    assert sorted(found) == list(range(11, 21))
    assert all(found[step] == expected[step] for step in found)
    assert bytes_of(halves, 20) == bytes_of(whole, 20)
    assert read_newest(halves)[1].values == read_newest(whole)[1].values


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gpt = GPT(GPTConfig(layers=1, width=16, heads=2, context=16, vocabulary=256))
        self.dropout = nn.Dropout(0.2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.dropout(self.gpt(tokens))
        return logits


def dropping() -> nn.Module:
    return Dropping()


def die_behind(step: int) -> None:
    """Kill this process as soon as the engine has done so many steps."""
    inner = Engine.step

    def step_and_die(self: Engine) -> Any:
        result = inner(self)
        if self.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    Engine.step = step_and_die  # type: ignore[method-assign]


def test_another_world_goes_on_with_the_same_samples(run_ranks: RunRanks, job: Path, tmp_path: Path) -> None:
    """The losses are those of one rank's twenty steps, but for the order of sums."""
    expected = losses(train(job, tmp_path / "whole", "--set", f"checkpoint.dir={tmp_path / 'whole-saved'}"))
    train(job, tmp_path / "first", "--set", "train.steps=10", "--set", "schedule.name=constant")
    constant = losses(train(job, tmp_path / "same", "--set", "schedule.name=constant", "--resume", "10"))

    def work(rank: int) -> dict[int, float]:
        folder = tmp_path / f"world-{rank}"
        words = ["--set", "schedule.name=constant", "--set", f"checkpoint.dir={tmp_path / 'elsewhere'}"]
        return losses(train(job, folder, *words, "--resume", str(tmp_path / "saved" / "step-10")))

    for found in run_ranks(3, work):
        assert sorted(found) == list(range(11, 21))
        assert found == pytest.approx(constant, abs=1e-4)
    assert expected.keys() == {*range(1, 21)}


def test_every_ranks_random_numbers_go_on(run_ranks: RunRanks, tmp_path: Path) -> None:
    def draw() -> list[float]:
        return [torch.rand(()).item(), random.gauss(0, 1), random.random(), np.random.normal(), np.random.rand()]

    def work(rank: int) -> tuple[list[float], list[float]]:
        with Communicator.connect() as comm:
            engine = engine_of(nn.Linear(2, 2), comm)
            torch.manual_seed(rank)
            random.seed(rank)
            np.random.seed(rank)
            draw()
            engine.save_checkpoint(tmp_path)
            expected = draw()
            draw()
            engine.load_checkpoint(tmp_path)
            return expected, draw()

    replies = run_ranks(2, work)
    for expected, found in replies:
        assert found == expected
    assert replies[0] != replies[1]


def engine_of(model: nn.Module, comm: Communicator | None = None, **config: Any) -> Engine:
    comm = comm or Communicator(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    return Engine(
        model,
        comm,
        EngineConfig(**config),
        lambda parameters: (
            make_optimizer(parameters, OptimizerConfig()) if parameters else torch.optim.SGD([torch.zeros(1)])
        ),
        TorchSchedule(None),
    )


def step_of(engine: Engine) -> None:
    engine.backward(engine(torch.ones(2, 4, dtype=next(engine.module.parameters()).dtype)).float().sum())
    engine.step()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Three checkpoints of a small model: steps 1, 2 and 3."""
    engine = engine_of(nn.Linear(4, 3))
    for _ in range(3):
        step_of(engine)
        engine.save_checkpoint(tmp_path / "saved")
    return tmp_path / "saved"


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def damage(folder: Path, how: str) -> None:
    state, manifest = folder / STATE_FILE, folder / FILE_NAME
    if how == "bit":
        flip(state, state.stat().st_size - 3)
    elif how == "truncated":
        os.truncate(state, state.stat().st_size - 3)
    elif how == "missing":
        state.unlink()
    elif how == "manifest":
        flip(manifest, manifest.stat().st_size // 2)
    elif how == "empty manifest":
        manifest.write_text("")
    elif how == "format":
        manifest.write_text(json.dumps({"format": 9, "checksum": ""}))


WORDS = {
    "bit": "found [0-9a-f]{16}…: the file is damaged",
    "truncated": "it was cut off or changed",
    "missing": "found No such file",
    "manifest": "expected (a manifest, found damaged text|checksum .*: it is damaged|format 1)",
    "empty manifest": "found damaged text",
    "format": "expected format 1, found format 9",
}


@pytest.mark.parametrize("how", WORDS)
def test_what_is_damaged_is_named_and_passed_over(saved: Path, how: str) -> None:
    damage(saved / "step-3", how)
    loaded, _, _ = read_newest(saved)
    assert loaded.step == 2
    (why,) = loaded.passed_over
    assert str(saved / "step-3") in why
    with pytest.raises(CheckpointError, match=WORDS[how]):
        engine_of(nn.Linear(4, 3)).load_checkpoint(saved / "step-3")


def test_none_that_is_whole_is_an_error_that_changes_nothing(saved: Path) -> None:
    for step in (1, 2, 3):
        damage(saved / f"step-{step}", "bit")
    engine = engine_of(nn.Linear(4, 3))
    before = engine.module.weight.detach().clone()
    with pytest.raises(CheckpointError, match=r"expected a whole checkpoint, found .*step-3.*step-2.*step-1"):
        engine.load_checkpoint(saved)
    assert torch.equal(engine.module.weight, before)
    with pytest.raises(CheckpointError, match=r"nowhere: expected a checkpoint, found no manifest\.json"):
        engine.load_checkpoint(saved / "nowhere")


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        (nn.Linear(4, 5), {}, r"expected model.weight of shape \(5, 4\), found \(3, 4\); another model\?"),
        (nn.Linear(4, 3, bias=False), {}, "besides model.bias"),
        (nn.Sequential(nn.Linear(4, 3)), {}, "none of model.0.weight, model.0.bias and besides model.weight"),
        (nn.Linear(4, 3), {"ema_decay": 0.5}, "none of average.weight, average.bias; .*train.ema_decay"),
        (nn.Linear(4, 3), {"precision": PrecisionConfig(dtype="bf16")}, "none of master.weight"),
    ],
)
def test_what_does_not_fit_is_refused(saved: Path, model: nn.Module, config: dict[str, Any], message: str) -> None:
    engine = engine_of(model, **config)
    with pytest.raises(CheckpointError, match=message):
        engine.load_checkpoint(saved)
    assert engine.global_step == 0


def test_the_manifest_says_what_is_stored(saved: Path) -> None:
    manifest = Manifest.read(saved / "step-3")
    assert manifest.step == 3
    assert manifest.layout == {"world_size": 1, "stage": 0, "data_shard": 1, "pipeline": 1}
    entry = next(entry for entry in manifest.tensors if entry.name == "model.weight")
    (piece,) = entry.pieces
    assert (entry.shape, entry.dtype) == ((3, 4), "F32")
    assert (piece.box_start, piece.box_size, piece.start, piece.stop, piece.size) == ((0, 0), (3, 4), 0, 12, 48)
    data = (saved / "step-3" / piece.file).read_bytes()[piece.offset : piece.offset + piece.size]
    assert data == load_file(saved / "step-3" / STATE_FILE)["model.weight"].numpy().tobytes()
    assert {"model.weight", "model.bias", "optimizer.weight.exp_avg", "rng.0.torch"} <= {
        entry.name for entry in manifest.tensors
    }


def test_tied_weights_are_stored_once_and_come_back_tied(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model[1].weight = model[0].weight
        return model

    engine = engine_of(tied())
    step_of(engine)
    engine.save_checkpoint(tmp_path)
    names = {entry.name for entry in Manifest.read(tmp_path / "step-1").tensors}
    assert "model.0.weight" in names
    assert "model.1.weight" not in names
    other = engine_of(tied())
    other.load_checkpoint(tmp_path)
    assert torch.equal(other.module[0].weight, engine.module[0].weight)
    assert other.module[1].weight is other.module[0].weight


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "adafactor", "muon"])
def test_every_optimizer_goes_on_bitwise(tmp_path: Path, name: str) -> None:
    def make() -> Engine:
        torch.manual_seed(0)
        comm = Communicator(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
        config = OptimizerConfig(name=name, lr=0.01)  # type: ignore[arg-type]
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
        return Engine(model, comm, EngineConfig(), lambda p: make_optimizer(p, config), TorchSchedule(None))

    straight, first, second = make(), make(), make()
    for _ in range(4):
        step_of(straight)
    for _ in range(2):
        step_of(first)
    first.save_checkpoint(tmp_path)
    second.load_checkpoint(tmp_path)
    for _ in range(2):
        step_of(second)
    for found, wanted in zip(second.module.parameters(), straight.module.parameters(), strict=True):
        assert torch.equal(found, wanted)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], check=True)
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.lab
def test_a_full_disk_leaves_the_older_checkpoint_whole(small_disk: Path) -> None:
    engine = engine_of(nn.Linear(4, 600))  # 36 KB with the moments, and 10 KB of random numbers
    step_of(engine)
    engine.save_checkpoint(small_disk)
    step_of(engine)
    with pytest.raises(CheckpointError, match=r"expected to save step 2, found .*[Nn]o space left"):
        engine.save_checkpoint(small_disk)
    assert [path.name for path in small_disk.iterdir()] == ["step-1"]
    assert read_newest(small_disk)[0].step == 1
    assert engine.saver is not None
    engine.saver.close()


def test_a_folder_that_cannot_be_written_is_noticed_before_the_first_step(
    run_ranks: RunRanks, job: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.touch()
    arguments = [str(job), "--set", f"checkpoint.dir={in_the_way / 'checkpoints'}"]
    assert run_ranks(2, lambda rank: trainer.main(arguments)) == [204, 204]
    said = capfd.readouterr()
    assert "step " not in said.out
    assert said.err == (
        "dstrain: checkpoint.dir: expected a folder that can be written, found Not a directory: "
        f"{in_the_way / 'checkpoints'}; nothing was trained; give another checkpoint.dir\n"
    )


@pytest.mark.lab
def test_a_read_only_disk_is_noticed_before_the_first_step(
    job: Path, small_disk: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert trainer.main([str(job), "--set", f"checkpoint.dir={small_disk}"]) == 204
    said = capfd.readouterr()
    assert "Read-only file system" in said.err
    assert "step " not in said.out


def test_only_the_newest_are_kept_and_torsos_are_swept(job: Path, tmp_path: Path) -> None:
    (tmp_path / "saved" / "step-3.tmp-dead").mkdir(parents=True)
    train(job, tmp_path / "events", "--set", "checkpoint.keep_last=2")
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["step-15", "step-20"]


def test_every_nth_is_kept_too(job: Path, tmp_path: Path) -> None:
    train(job, tmp_path / "events", "--set", "checkpoint.keep_last=1", "--set", "checkpoint.keep_every=10")
    assert steps_in(tmp_path / "saved") == [20, 10]


def test_minutes_between_two_are_those_of_rank_zeros_clock(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count(step=7.0)  # seconds, read before each step and behind each save
    own = SimpleNamespace(monotonic=lambda: next(clock), perf_counter=time.perf_counter)
    monkeypatch.setattr(trainer, "time", own)
    words = ["checkpoint.every_steps=null", "checkpoint.every_minutes=0.75", "checkpoint.keep_last=null"]
    events = train(job, tmp_path / "events", *(word for one in words for word in ("--set", one)))
    saved = [event["step"] for event in events if event["kind"] == "checkpoint"]
    assert len(saved) > 2
    gaps = {after - before for before, after in itertools.pairwise(saved[:-1])}
    assert len(gaps) == 1
    assert saved[-1] == 20


@pytest.mark.parametrize("times", [1, 2])
def test_a_fault_is_rewound_once(
    job: Path, tmp_path: Path, times: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    straight = train(job, tmp_path / "straight", "--set", f"checkpoint.dir={tmp_path}/other")
    backward, faults = Engine.backward, iter(range(times))

    def faulty(engine: Engine, loss: Any, tokens: int | None = None) -> None:
        spoil = engine.global_step == 12 and engine.micro_step == 0 and next(faults, None) is not None
        backward(engine, loss * float("nan") if spoil else loss, tokens)

    monkeypatch.setattr(Engine, "backward", faulty)
    words = ["--set", "train.on_nonfinite=rewind"]
    if times == 2:
        assert trainer.main([str(job), *words]) == 206
        assert "step 13: expected a finite loss" in capfd.readouterr().err
        return
    events = train(job, tmp_path / "events", *words)
    assert losses(events) == losses(straight)
    assert [event["step"] for event in events if event["kind"] == "resume"] == [10]
    assert any("rewound: step 13: expected a finite loss" in event.get("text", "") for event in events)
    assert bytes_of(tmp_path / "saved", 20) == bytes_of(tmp_path / "other", 20)


def test_rewinding_needs_checkpoints(job: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = job.read_text()
    job.write_text("\n".join(line for line in text.splitlines() if not line.startswith("checkpoint:")))
    assert trainer.main([str(job), "--set", "train.on_nonfinite=rewind"]) == 2
    assert "train.on_nonfinite: expected a section checkpoint for rewind" in capfd.readouterr().err


def test_another_runs_checkpoints_are_not_written_over(job: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert trainer.main([str(job), "--set", "train.steps=5"]) == 0
    capfd.readouterr()
    assert trainer.main([str(job)]) == 2
    error = capfd.readouterr().err
    assert error.startswith("dstrain: checkpoint.dir: expected no checkpoints of another run, found step 5 in ")
    assert "--resume auto" in error
    assert trainer.main([str(job), "--set", "train.steps=3", "--resume", "auto"]) == 2
    assert "train.steps: expected more steps than the checkpoint has, found step 5" in capfd.readouterr().err


def test_resuming_from_a_damaged_one_says_so_and_replaces_it(
    job: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert trainer.main([str(job), "--set", "train.steps=10"]) == 0
    damage(tmp_path / "saved" / "step-10", "bit")
    events = train(job, tmp_path / "events", "--set", "train.steps=10", "--resume", "auto")
    out = capfd.readouterr().out
    assert "warning: a checkpoint was passed over: " in out
    assert f"resumed from step 5: {tmp_path / 'saved' / 'step-5'}" in out
    assert [event["kind"] for event in events][:2] == ["warning", "resume"]
    assert read_newest(tmp_path / "saved")[0].step == 10


PROGRAM = "import sys; from dstrain.runtime import trainer; sys.exit(trainer.main(sys.argv[1:]))"


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 0)])
def test_signals_save(job: Path, tmp_path: Path, number: signal.Signals, code: int) -> None:
    """SIGTERM saves and ends, SIGUSR1 saves and goes on."""
    steps = 100_000 if number == signal.SIGTERM else 200
    words = ["--set", f"train.steps={steps}", "--set", "checkpoint.every_steps=1000000", "--set", "log.every=1"]
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(job), *words],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            lines = iter(process.stdout.readline, "")
            assert any(re.match(r"(step)? *2/", line) for line in lines)
            process.send_signal(number)
            began = time.monotonic()
            rest = "".join(lines)
            assert process.wait(60) == code
        finally:
            process.kill()
    saves = [line for line in rest.splitlines() if ": saved " in line]
    if number == signal.SIGTERM:
        assert time.monotonic() - began < 10
        assert len(saves) == 1
        assert "stopped behind step" in rest.splitlines()[-1]
        assert len(steps_in(tmp_path / "saved")) == 1
    else:
        assert len(saves) == 2  # on the signal, and at the end
        assert rest.splitlines()[-1].startswith("done: 200 steps")


def test_what_is_after_the_step_that_was_gone_on_from_is_of_another_life(job: Path, tmp_path: Path) -> None:
    """Else `auto` would go back to it, and the newest would be deleted as the oldest."""
    folder = tmp_path / "saved"
    train(job, tmp_path / "first")
    train(job, tmp_path / "all", "--resume", "5", "--set", "train.steps=7")
    assert steps_in(folder) == [7, 5]
    assert sorted(path.name.partition(".left-")[0] for path in folder.glob("*.left-*")) == [
        "step-10",
        "step-15",
        "step-20",
    ]
    damage(folder / "step-7", "bit")
    words = ["--resume", "auto", "--set", "train.steps=6", "--set", "checkpoint.keep_last=1"]
    train(job, tmp_path / "one", *words)
    assert steps_in(folder) == [6]
    assert read_newest(folder)[0].step == 6


def test_a_restart_does_not_go_on_from_the_life_that_was_left(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DSTRAIN_RUN_ID", "one")
    assert trainer.main([str(job)]) == 0
    monkeypatch.setenv("DSTRAIN_RUN_ID", "two")
    assert trainer.main([str(job), "--resume", "5", "--set", "train.steps=12"]) == 0
    assert steps_in(tmp_path / "saved") == [12, 10, 5]
    monkeypatch.setenv("DSTRAIN_ATTEMPT", "1")
    capfd.readouterr()
    assert trainer.main([str(job), "--resume", "5"]) == 0
    assert "resumed from step 12" in capfd.readouterr().out


def test_a_kill_between_two_renames_loses_nothing(saved: Path) -> None:
    (saved / "step-3").rename(saved / "step-3.old-1234")
    (saved / "step-3.tmp-5678").mkdir()
    sweep(saved)
    assert steps_in(saved) == [3, 2, 1]
    assert read_newest(saved)[0].step == 3
    (saved / "step-3.old-9").mkdir()
    sweep(saved)
    assert sorted(path.name for path in saved.iterdir()) == ["step-1", "step-2", "step-3"]


def test_another_attempt_goes_on_from_its_own_run_alone(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DSTRAIN_RUN_ID", "one")
    assert trainer.main([str(job), "--set", "train.steps=10"]) == 0
    monkeypatch.setenv("DSTRAIN_ATTEMPT", "1")
    assert trainer.main([str(job), "--set", "train.steps=12", "--resume", "5"]) == 0
    assert "resumed from step 10" in capfd.readouterr().out
    monkeypatch.setenv("DSTRAIN_RUN_ID", "two")
    assert trainer.main([str(job), "--set", "train.steps=12", "--resume", "5"]) == 0
    assert "resumed from step 5" in capfd.readouterr().out


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.1),
    "multi-step": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [1, 3], 0.1),
    "exponential": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    "one-cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1.0, 10),
    "constant": lambda o: None,
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_torchs_schedulers_go_on(tmp_path: Path, name: str) -> None:
    def make() -> Engine:
        torch.manual_seed(0)
        comm = Communicator(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
        return Engine(
            nn.Linear(4, 3),
            comm,
            EngineConfig(),
            lambda p: torch.optim.SGD([parameter for _, parameter in p], lr=1.0, momentum=0.9),
            lambda optimizer: TorchSchedule(SCHEDULERS[name](optimizer)),
        )

    def rates(engine: Engine, steps: int) -> list[float]:
        found = []
        for _ in range(steps):
            step_of(engine)
            found.append(engine.learning_rate)
        return found

    expected = rates(make(), 6)[3:]
    first, second = make(), make()
    rates(first, 3)
    if name == "constant":
        first.optimizer.param_groups[0]["lr"] = 0.25
        expected = [0.25] * 3
    first.save_checkpoint(tmp_path)
    second.load_checkpoint(tmp_path)
    assert rates(second, 3) == expected


def test_what_cannot_be_held_is_an_error_on_all_ranks(run_ranks: RunRanks, tmp_path: Path) -> None:
    """Nobody is left waiting in a collective."""

    def work(rank: int) -> str:
        with Communicator.connect() as comm:
            model = nn.Linear(4, 3)
            model.register_buffer("odd", torch.ones(2, dtype=torch.complex64))
            engine = engine_of(model, comm)
            with pytest.raises(CheckpointError) as caught:
                engine.save_checkpoint(tmp_path)
            return str(caught.value)

    first, second = run_ranks(2, work, timeout_s=30)
    assert first == second
    assert "model.odd of torch.complex64, which the format does not hold" in first
    assert list(tmp_path.glob("step-*")) == []


def test_what_is_saved_and_validated_is_rank_zeros_statistics(run_ranks: RunRanks, tmp_path: Path) -> None:
    def work(rank: int) -> list[float]:
        with Communicator.connect() as comm:
            torch.manual_seed(0)
            norm = nn.BatchNorm1d(2)
            engine = engine_of(norm, comm)
            engine(torch.randn(8, 2, generator=torch.Generator().manual_seed(rank)))
            assert norm.running_mean is not None
            before = norm.running_mean.tolist()
            engine.save_checkpoint(tmp_path)
            return before + norm.running_mean.tolist()

    first, second = run_ranks(2, work)
    assert first[:2] != second[:2]
    assert first[2:] == second[2:] == first[:2]
