"""Trackers: their files are read back; what fails never ends a training."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from dstrain.runtime.spec.errors import UsageError
from dstrain.runtime.spec.training_config import LogConfig
from dstrain.runtime.trackers import Trackers, open_trackers

JOB = {"name": "gpt", "train": {"steps": 3}}


PROGRAM = """
import sys
from pathlib import Path
from dstrain.runtime.spec.errors import UsageError
from dstrain.runtime.spec.training_config import LogConfig
from dstrain.runtime.trackers import open_trackers

tracker, folder = sys.argv[1:3]
config = LogConfig(trackers=(tracker,), project="tests")
sys.modules.update(dict.fromkeys(sys.argv[3:]))  # None: as if it were not installed
try:
    trackers = open_trackers(config, "gpt", "20261121-gpt", Path(folder), {job})
except UsageError as error:
    sys.exit(f"usage: {{error}}")
for step in range(1, 4):
    trackers.log(step, {{"loss": 1 / step, "lr": 1e-3}})
trackers.close()
"""


def run(tracker: str, folder: Path, *missing: str, mode: str = "offline") -> str:
    """Train in a process of its own, since wandb keeps its settings for a process; returns what it says."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment = kept | {"HOME": str(folder), "WANDB_MODE": mode}
    command = [sys.executable, "-c", PROGRAM.format(job=JOB), tracker, str(folder), *missing]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100).stderr


def train(folder: Path, steps: range, run_id: str = "20261121-gpt") -> None:
    """Train in this process, with TensorBoard."""
    trackers = open_trackers(LogConfig(trackers=("tensorboard",)), "gpt", run_id, folder, JOB)
    for step in steps:
        trackers.log(step, {"loss": 1 / step, "lr": 1e-3})
    trackers.close()


# --- TensorBoard ---------------------------------------------------------------------------------------------


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_reads_every_step(tmp_path: Path) -> None:
    train(tmp_path, range(1, 4))
    (own,) = (tmp_path / "tensorboard").iterdir()
    assert own.name == "20261121-gpt"
    assert scalars(own, "loss") == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    assert [step for step, _ in scalars(own, "lr")] == [1, 2, 3]


def test_tensorboard_shows_a_resumed_step_once(tmp_path: Path) -> None:
    train(tmp_path, range(1, 6))
    train(tmp_path, range(4, 8))
    (own,) = (tmp_path / "tensorboard").iterdir()
    assert [step for step, _ in scalars(own, "loss")] == [1, 2, 3, 4, 5, 6, 7]


def test_without_a_launcher_each_training_has_a_folder(tmp_path: Path) -> None:
    train(tmp_path, range(1, 2), run_id="")
    (own,) = (tmp_path / "tensorboard").iterdir()
    assert own.name.startswith("gpt-20")


# --- Weights & Biases ----------------------------------------------------------------------------------------

BLOCK = 1 << 15  # its file is a log in LevelDB's format: blocks, in them records of checksum, length, kind
HEAD = struct.Struct("<IHB")
FULL, LAST = 1, 4


def records(path: Path) -> Iterator[bytes]:
    data, position, parts = path.read_bytes(), 7, b""
    while position + HEAD.size <= len(data):
        if BLOCK - position % BLOCK < HEAD.size:
            position += BLOCK - position % BLOCK
        _, length, kind = HEAD.unpack_from(data, position)
        position += HEAD.size
        parts += data[position : position + length]
        position += length
        if kind in (FULL, LAST):
            yield parts
            parts = b""


def wandb_records(folder: Path) -> list[Any]:
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    return [wandb_internal_pb2.Record.FromString(record) for record in records(path)]


@pytest.mark.slow
def test_wandb_keeps_every_step_offline(tmp_path: Path) -> None:
    said = run("wandb", tmp_path)
    assert "wandb sync" in said
    found = wandb_records(tmp_path)
    (kept,) = [record.run for record in found if record.WhichOneof("record_type") == "run"]
    assert (kept.run_id, kept.project, kept.display_name) == ("20261121-gpt", "tests", "gpt")
    settings = {item.key: json.loads(item.value_json) for item in kept.config.update}
    assert settings["train"] == {"steps": 3}
    rows = []
    for record in found:
        if record.WhichOneof("record_type") == "history":
            row = {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            rows.append((row["step"], row["loss"], row["lr"]))
    assert rows == [(1, 1.0, 1e-3), (2, 0.5, 1e-3), (3, 1 / 3, 1e-3)]


def test_wandb_without_a_key_is_one_clear_line(tmp_path: Path) -> None:
    said = run("wandb", tmp_path, mode="online")
    assert said.startswith("usage: log.trackers: expected a wandb that lets us in, found No API key configured.")
    assert "WANDB_MODE=offline" in said
    assert said.count("\n") == 1


# --- what is missing or fails --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_a_missing_package_is_one_line_with_its_remedy(tmp_path: Path, tracker: str) -> None:
    (line,) = run(tracker, tmp_path, tracker).splitlines()
    assert line.startswith(f"usage: log.trackers: expected the package {tracker}, found ")
    assert line.endswith(f"; pip install {tracker}")


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UsageError, match=r"^log\.trackers: expected a folder that can be written, found .*Not a directory"
    ):
        train(tmp_path / "file", range(1, 2))


class Fragile:
    """A tracker that works for two steps."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.closed = False

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if len(self.steps) == 2:
            raise RuntimeError("the server\nhas gone")
        self.steps.append(step)

    def close(self) -> None:
        self.closed = True


class Sturdy(Fragile):
    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.steps.append(step)


def test_one_that_fails_is_told_once_and_the_others_go_on(capfd: pytest.CaptureFixture[str]) -> None:
    fragile, sturdy = Fragile(), Sturdy()
    trackers = Trackers({"wandb": fragile, "tensorboard": sturdy})
    for step in range(1, 6):
        trackers.log(step, {"loss": 1.0})
    trackers.close()
    trackers.close()
    assert (fragile.steps, sturdy.steps) == ([1, 2], [1, 2, 3, 4, 5])
    assert (fragile.closed, sturdy.closed) == (False, True)
    assert capfd.readouterr().err == (
        "dstrain: log.trackers: wandb failed (RuntimeError: the server has gone); the training goes on without it\n"
    )


@pytest.mark.lab
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # tensorboard's own thread
def test_a_full_disk_does_not_end_the_training(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], check=True)
    try:
        train(disk, range(1, 3000))
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)
    for thread in threading.enumerate():  # or its exception would be another test's
        if type(thread).__module__.startswith("tensorboard"):
            thread.join(30)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("dstrain: ")]
    assert line.startswith("dstrain: log.trackers: tensorboard failed (")
    assert "No space left on device" in line


def test_no_trackers_import_nothing(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from dstrain.runtime import trackers;"
        "from dstrain.runtime.spec.training_config import LogConfig;"
        "trackers.open_trackers(LogConfig(), 'gpt', '', Path(), {}).close();"
        "assert not {'torch', 'wandb', 'tensorboard'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
