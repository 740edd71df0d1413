"""`dstrain ckpt` on checkpoints that an engine has saved: whole, damaged, in pieces, with other files beside them."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

from dstrain.launcher import checkpoint_views as views
from dstrain.launcher.checkpoints import Held, plan_pruning
from dstrain.launcher.cli import app
from dstrain.runtime.checkpoint.load import read
from dstrain.runtime.checkpoint.manifest import FILE_NAME, ITEM_BYTES, Manifest, Piece, TensorEntry
from dstrain.runtime.checkpoint.verify import damages
from dstrain.runtime.comm import Communicator
from dstrain.runtime.engine import Engine, EngineConfig, TorchSchedule
from dstrain.runtime.optimizers import make_optimizer
from dstrain.runtime.spec.errors import CheckpointError, DstrainError, UsageError
from dstrain.runtime.spec.training_config import OptimizerConfig, PrecisionConfig

PROGRAM = [sys.executable, "-c", "from dstrain.launcher.cli import main; main()", "ckpt"]


STATE_FILE = "rank-0.safetensors"


class Tied(nn.Module):
    """Two names of one parameter, a buffer that is a number, one without elements; 12 + 15 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(3, 4, bias=False), nn.Linear(4, 3)
        self.last = nn.Linear(3, 4, bias=False)
        self.last.weight = self.first.weight
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("none", torch.zeros(0, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.inner(self.first(x)))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """checkpoints/first/step-1 to step-12, in bf16 with master weights and averages."""
    root = tmp_path_factory.mktemp("original") / "checkpoints"
    comm = Communicator(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    config = EngineConfig(precision=PrecisionConfig(dtype="bf16"), ema_decay=0.9)
    made = Engine(Tied(), comm, config, lambda p: make_optimizer(p, OptimizerConfig()), TorchSchedule(None))
    os.environ["DSTRAIN_RUN_ID"] = "20261121-101748-be9fcf-first"
    try:
        for _ in range(12):
            made.backward(made(torch.ones(2, 3, dtype=torch.bfloat16)).float().sum())
            made.step()
            made.save_checkpoint(root / "first")
    finally:
        del os.environ["DSTRAIN_RUN_ID"]
    return root


@pytest.fixture(autouse=True)
def saved(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of steps, relative; a copy of one's own."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(original, "checkpoints")
    return Path("checkpoints/first")


def ckpt(*words: str | Path) -> str:
    result = CliRunner().invoke(app, ["ckpt", *map(str, words)])
    if isinstance(result.exception, Exception):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def error_of(*words: str | Path) -> DstrainError:
    with pytest.raises(DstrainError) as caught:
        ckpt(*words)
    assert type(caught.value) in (UsageError, CheckpointError)
    return caught.value


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.iterdir())


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def entry_of(folder: Path, name: str) -> TensorEntry:
    return next(entry for entry in Manifest.read(folder).tensors if entry.name == name)


def rewrite(folder: Path, **changes: Any) -> None:
    """With a checksum that is right again."""
    (folder / FILE_NAME).write_text(replace(Manifest.read(folder), **changes).to_text())


def in_pieces(folder: Path) -> None:
    """The same checkpoint in two files: each matrix in two boxes, all in two intervals."""
    manifest = Manifest.read(folder)
    data = (folder / STATE_FILE).read_bytes()
    files = {"a.bin": bytearray(), "b.bin": bytearray(b"between")}
    entries = []
    for entry in manifest.tensors:
        (old,) = entry.pieces
        item = ITEM_BYTES[entry.dtype]
        array = np.frombuffer(data[old.offset : old.offset + old.size], f"V{item}").reshape(entry.shape)
        pieces = []
        for start, size in boxes_of(entry.shape):
            box = array[(*(slice(a, a + n) for a, n in zip(start, size, strict=True)), ...)].reshape(-1)
            half = len(box) // 2
            for (a, b), (name, content) in zip([(0, half), (half, len(box))], files.items(), strict=True):
                part = box[a:b].tobytes()
                digest = hashlib.sha256(part).hexdigest()
                pieces.append(Piece(start, size, a, b, name, len(content), len(part), digest))
                content += part
        entries.append(replace(entry, pieces=tuple(reversed(pieces))))
    for name, content in files.items():
        (folder / name).write_bytes(content)
    rewrite(folder, tensors=tuple(entries), files={name: len(content) for name, content in files.items()})


def boxes_of(shape: tuple[int, ...]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """All of it, or the first column and the other ones."""
    if len(shape) != 2:
        return [((0,) * len(shape), shape)]
    return [((0, 0), (shape[0], 1)), ((0, 1), (shape[0], shape[1] - 1))]


# --- list ----------------------------------------------------------------------------------------------------


def test_a_pipe_gets_one_line_each(saved: Path) -> None:
    flip(saved / "step-2" / FILE_NAME, 500)
    (saved / "step-3" / FILE_NAME).unlink()
    os.truncate(saved / "step-4" / STATE_FILE, 100)
    (saved / "step-5" / "foreign.txt").write_text("mine")
    (saved / "step-x").mkdir()
    (saved / "step-99").write_text("a file")
    (saved / "step-13.tmp-12").mkdir()
    Path("checkpoints/notes.txt").write_text("")
    rows = [line.split("\t") for line in ckpt("list").splitlines()]
    assert [int(row[1]) for row in rows] == list(range(12, 0, -1))
    assert {row[6] for row in rows if int(row[1]) not in (2, 3, 4)} == {"whole"}
    path, step, time, size, ranks, run, state = rows[0]
    assert (path, step, ranks, run, state) == (f"{saved}/step-12", "12", "1", "20261121-101748-be9fcf-first", "whole")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", time)
    assert int(size) == sum(path.stat().st_size for path in (saved / "step-12").iterdir())
    why = {int(row[1]): row[6] for row in rows}
    assert re.search("it is damaged|damaged text", why[2])
    assert "found no manifest.json" in why[3]
    whole = (saved / "step-12" / STATE_FILE).stat().st_size
    assert f"step-4/{STATE_FILE}: expected {whole} bytes, found 100: it was cut off or changed; lost: " in why[4]
    assert ckpt("list", saved) == ckpt("list", "checkpoints") == ckpt("list")


def test_json_of_all(saved: Path) -> None:
    held = json.loads(ckpt("list", "--json"))
    assert held[0] == {
        "path": f"{saved}/step-12",
        "step": 12,
        "saved_at": held[0]["saved_at"],
        "size_bytes": held[0]["size_bytes"],
        "ranks": 1,
        "run_id": "20261121-101748-be9fcf-first",
        "damages": [],
        "elsewhere": {},
        "whole": True,
    }


def on_a_terminal(*words: str | Path, **environment: str) -> str:
    main, terminal = pty.openpty()
    env = {**os.environ, "TERM": "xterm", **environment}
    done = subprocess.Popen([*PROGRAM, *map(str, words)], stdout=terminal, stdin=terminal, stderr=terminal, env=env)
    os.close(terminal)
    shown = b""
    try:
        while data := os.read(main, 65536):
            shown += data
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(main)
    assert done.wait(30) == 0, shown
    return shown.decode().replace("\r\n", "\n")


def test_a_terminal_of_80_columns_gets_a_table(saved: Path) -> None:
    os.truncate(saved / "step-4" / STATE_FILE, 100)
    for shown in (on_a_terminal("list", COLUMNS="80"), on_a_terminal("list", COLUMNS="80", NO_COLOR="1")):
        lines = shown.splitlines()
        assert lines[0] == str(saved)
        assert lines[1].split() == ["step", "saved", "size", "ranks", "run"]
        assert max(map(len, lines)) <= 80
        assert "\x1b" not in shown
        assert re.search(r"\n +12 +\d+ (s|min|h) ago +\d+\.\d kB +1  whole    20261121-101748-be9fcf-first\n", shown)
        assert re.search(r" 4 .* damaged .*\n {12}step-4/rank-0.safetensors: expected \d+ bytes, found 100: ", shown)
    assert max(map(len, on_a_terminal("show", saved, COLUMNS="80").splitlines())) <= 80


def test_what_a_terminal_would_obey_is_escaped(saved: Path) -> None:
    rewrite(saved / "step-12", run_id="\x1b[31mred\n")
    Path("checkpoints/first").rename(os.fsdecode(b"checkpoints/\xff\n"))
    assert "\\x1b[31mred\\n" in ckpt("list")
    assert "checkpoints/\\udcff\\n/step-12" in ckpt("list").splitlines()[0]


# --- show ----------------------------------------------------------------------------------------------------


def test_show_is_one_page(saved: Path) -> None:
    shown = ckpt("show", saved)
    assert shown.startswith(f"{saved}/step-12\n  step      12, saved ")
    assert f"  versions  torch {torch.__version__}, python 3." in shown
    assert "  layout    ranks 1, stage 0, data_shard 1, pipeline 1\n" in shown
    assert re.search(r"  optimizer class AdamW, ", shown)
    assert re.search(r"  engine    global_step 12, ", shown)
    assert re.search(r"\n  model +5 +28 +62 B\n", shown)  # 27 of bf16 and one of int64
    assert "\n  the largest\n" in shown
    assert ckpt("show", saved / "step-12") == shown or "s ago" in shown


def test_show_json_counts_every_tensor(saved: Path) -> None:
    said = json.loads(ckpt("show", "--json", saved / "step-7"))
    entries = Manifest.read(saved / "step-7").tensors
    layout = {"world_size": 1, "stage": 0, "data_shard": 1, "pipeline": 1}
    assert (said["step"], said["whole"], said["layout"]) == (7, True, layout)
    assert sum(counts["tensors"] for counts in said["kinds"].values()) == len(entries) == len(said["tensors"])
    assert said["kinds"]["master"]["elements"] == said["kinds"]["average"]["elements"] == 12 + 15
    assert sum(counts["bytes"] for counts in said["kinds"].values()) == sum(e.pieces[0].size for e in entries)
    assert said["state"]["engine"]["global_step"] == 7


# --- verify --------------------------------------------------------------------------------------------------


def test_whole_ones_are_whole(saved: Path) -> None:
    count = len(Manifest.read(saved / "step-12").tensors)
    assert f"{saved}/step-12: whole, {count} tensors, " in ckpt("verify", saved)
    assert "(every byte was read)" in ckpt("verify", saved, "--deep")
    (saved / "step-12" / "foreign.txt").write_text("mine")
    in_pieces(saved / "step-11")
    for step in (11, 12):
        assert "whole" in ckpt("verify", "--deep", saved / f"step-{step}")


@pytest.mark.parametrize("name", ["model.inner.weight", "optimizer.inner.bias.exp_avg", "rng.0.torch"])
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "in-pieces"])
def test_a_flipped_bit_is_found_and_named(saved: Path, name: str, cut: bool) -> None:
    folder = saved / "step-12"
    if cut:
        in_pieces(folder)
    piece = entry_of(folder, name).pieces[0]
    flip(folder / piece.file, piece.offset + piece.size - 1)
    assert "whole" in ckpt("verify", folder)
    error = error_of("verify", folder, "--deep")
    part = re.escape(f"[{piece.start}:{piece.stop}]") if cut else ""
    where = f"{folder}/{piece.file}: expected {re.escape(name)}{part} with SHA-256 {piece.sha256[:16]}…"
    assert re.fullmatch(rf"{where}, found [0-9a-f]{{16}}…: the file is damaged", str(error))
    assert error.exit_code == 204


def test_every_damage_has_its_line(saved: Path) -> None:
    folder = saved / "step-12"
    for name in ("model.inner.weight", "model.inner.bias"):
        flip(folder / STATE_FILE, entry_of(folder, name).pieces[0].offset)
    assert len(str(error_of("verify", folder, "--deep")).splitlines()) == 2
    in_pieces(saved / "step-11")
    (saved / "step-11" / "a.bin").unlink()
    error = error_of("verify", saved / "step-11")
    assert re.fullmatch(
        rf"{saved}/step-11/a.bin: expected \d+ bytes, found No such file or directory; lost: "
        r"model.first.weight and \d+ more tensors",
        str(error),
    )


def test_a_flipped_bit_anywhere_is_found(saved: Path) -> None:
    """In the header too, by which other programs read."""
    path = saved / "step-12" / STATE_FILE
    data, manifest = path.read_bytes(), Manifest.read(path.parent)
    for offset in range(0, len(data), 37):
        if data[offset : offset + 1] == b" " or b"format" in data[max(0, offset - 12) : offset + 12]:
            continue  # between words of the header, where nothing changes
        flip(path, offset)
        assert list(damages(path.parent, manifest, deep=True)), offset
        path.write_bytes(data)


def test_a_foreign_file_is_named(saved: Path) -> None:
    (saved / "step-3" / "notes.txt").touch()
    said = ckpt("verify", saved / "step-3")
    assert said.startswith(f"{saved / 'step-3' / 'notes.txt'}: not of this checkpoint; nothing reads it\n")
    assert ": whole" in said


def test_what_is_cut_off_is_named(saved: Path) -> None:
    path = saved / "step-12" / STATE_FILE
    size = path.stat().st_size
    os.truncate(path, size - 3)
    last = max(Manifest.read(saved / "step-12").tensors, key=lambda entry: entry.pieces[0].offset)
    said = f"{path}: expected {size} bytes, found {size - 3}: it was cut off or changed; lost: {last.name}"
    assert str(error_of("verify", saved)) == said
    assert f"expected {last.name} in {last.pieces[0].size} bytes at" in str(error_of("verify", "--deep", saved))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"size": 3}, "expected 24 bytes of it in rank-0.safetensors, found 3"),
        ({"file": "../step-1/rank-0.safetensors"}, "expected its bytes in one of rank-0.safetensors, found ../"),
        ({"box_size": (9, 9)}, "expected pieces of a tensor (3, 4), found"),
        ({"stop": 5, "size": 10}, "expected pieces of 12 elements, found 5"),
    ],
    ids=str,
)
def test_a_manifest_that_contradicts_itself(saved: Path, change: dict[str, Any], said: str) -> None:
    folder = saved / "step-12"
    entries = [
        replace(e, pieces=(replace(e.pieces[0], **change),)) if e.name == "model.inner.weight" else e
        for e in Manifest.read(folder).tensors
    ]
    rewrite(folder, tensors=tuple(entries))
    assert f"{folder}: model.inner.weight: {said}" in str(error_of("verify", folder))
    assert error_of("export", folder, "-o", "out").exit_code == 204
    assert not list(Path("out").glob("*"))


@pytest.mark.parametrize("text", ["[]", "3", "", "{}", '{"format": 1, "checksum": 3}', "\xff" * 9, "[" * 999], ids=repr)
def test_any_text_for_a_manifest_is_one_line(saved: Path, text: str) -> None:
    (saved / "step-12" / FILE_NAME).write_text(text, encoding="latin-1")
    for command in ("show", "verify"):
        error = error_of(command, saved)
        assert "expected" in str(error)
        assert "\n" not in str(error)
    assert len(ckpt("list").splitlines()) == 12


# --- export --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "in-pieces"])
def test_what_is_exported_is_what_was_saved(saved: Path, cut: bool) -> None:
    _, state = read(saved / "step-12")
    if cut:
        in_pieces(saved / "step-12")
    said = ckpt("export", saved, "--to", "safetensors", "-o", "out/deep")
    assert said.startswith("wrote out/deep/model.safetensors: 5 tensors, ")
    assert [path.name for path in Path("out/deep").iterdir()] == ["model.safetensors"]
    weights = load_file("out/deep/model.safetensors")
    assert weights.keys() == {"first.weight", "inner.weight", "inner.bias", "count", "none"}  # the tied one once
    for name, tensor in weights.items():
        assert tensor.dtype == state.tensors[f"model.{name}"].dtype
        assert torch.equal(tensor, state.tensors[f"model.{name}"])
    model = Tied().to(torch.bfloat16)
    assert model.load_state_dict(weights, strict=False).missing_keys == ["last.weight"]
    assert torch.equal(model.last.weight, weights["first.weight"])


def test_nothing_is_written_over_without_force(saved: Path) -> None:
    Path("out").mkdir()
    Path("out/model.safetensors").write_text("mine")
    error = error_of("export", saved, "-o", "out")
    assert str(error) == (
        "--output: expected no file of that name, found out/model.safetensors; give another folder, or --force"
    )
    assert error.exit_code == 2
    assert Path("out/model.safetensors").read_text() == "mine"
    ckpt("export", saved, "-o", "out", "--force")
    assert len(load_file("out/model.safetensors")) == 5
    assert "expected a folder, found out/model.safetensors" in str(
        error_of("export", saved, "-o", next(Path("out").iterdir()))
    )
    assert CliRunner().invoke(app, ["ckpt", "export", str(saved), "--to", "pickle", "-o", "x"]).exit_code == 2


def test_a_damaged_model_is_not_exported(saved: Path) -> None:
    folder, piece = saved / "step-12", entry_of(saved / "step-12", "model.inner.bias").pieces[0]
    flip(folder / STATE_FILE, piece.offset)
    Path("out").mkdir()
    Path("out/model.safetensors").write_text("mine")
    error = error_of("export", folder, "-o", "out", "--force")
    assert "expected model.inner.bias with SHA-256" in str(error)
    assert [path.read_text() for path in Path("out").iterdir()] == ["mine"]


def test_a_file_that_cannot_be_written_is_one_line(saved: Path) -> None:
    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

    command = [*PROGRAM, "export", str(saved), "-o", "out"]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=small_files, check=False)
    assert done.returncode == 204
    assert re.fullmatch(
        r"dstrain: out/model.safetensors: expected to write the model, found File too large: .*\n", done.stderr
    )
    assert list(Path("out").iterdir()) == []


# --- prune ---------------------------------------------------------------------------------------------------


def test_the_last_and_every_so_many_stay(saved: Path) -> None:
    said = ckpt("prune", saved, "--keep-last", "2", "--keep-every", "5", "--dry-run")
    assert steps(saved) == list(range(1, 13))
    assert said.splitlines()[-1] == "would keep 12, 11, 10, 5"
    done = ckpt("prune", saved, "--keep-last", "2", "--keep-every", "5")
    assert steps(saved) == [5, 10, 11, 12]
    assert done == said.replace("would delete", "deleted").replace("would keep", "kept")
    assert ckpt("prune", saved, "--keep-last", "9") == "kept 12, 11, 10, 5\n"


def test_the_newest_whole_one_stays_whatever_is_damaged(saved: Path) -> None:
    """Also if only its bytes tell that a newer one is not whole."""
    (saved / "step-12" / STATE_FILE).unlink()
    flip(saved / "step-11" / STATE_FILE, entry_of(saved / "step-11", "model.inner.bias").pieces[0].offset)
    os.truncate(saved / "step-9" / STATE_FILE, 7)
    (saved / "step-5" / FILE_NAME).unlink()
    said = ckpt("prune", saved, "--keep-last", "1", "--keep-every", "3")
    assert said.endswith("kept 12 (damaged), 11 (damaged), 10, 6, 3\n")
    assert steps(saved) == [3, 6, 10, 11, 12]


def test_without_a_whole_one_nothing_goes(saved: Path) -> None:
    for folder in saved.iterdir():
        os.truncate(folder / STATE_FILE, 7)
    error = error_of("prune", saved, "--keep-last", "1")
    assert str(error).endswith("; nothing was deleted")
    assert error.exit_code == 204
    assert steps(saved) == list(range(1, 13))


def test_what_is_not_ours_stays(saved: Path) -> None:
    (saved / "step-1" / "mine.txt").write_text("mine")
    (saved / "notes").mkdir()
    said = ckpt("prune", saved, "--keep-last", "11")
    assert "step-1 (" in said
    assert "; left there, not ours: mine.txt\n" in said
    assert [path.name for path in (saved / "step-1").iterdir()] == ["mine.txt"]
    assert (saved / "notes").is_dir()
    assert len(ckpt("list", saved).splitlines()) == 12  # what is left is no checkpoint


def test_a_link_is_not_followed(saved: Path) -> None:
    (saved / "step-1").rename("elsewhere")
    (saved / "step-1").symlink_to("../../elsewhere")
    said = f"{saved}/step-1: expected a folder to delete, found a link to ../../elsewhere; remove it by hand"
    assert str(error_of("prune", saved, "--keep-last", "11")) == said
    assert "whole" in ckpt("verify", "--deep", "elsewhere")


def test_the_manifest_goes_first(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What remains of a deletion that was cut off is none."""
    gone: list[str] = []
    inner = Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        gone.append(path.name)
        if len(gone) == 2:
            raise PermissionError(13, "Permission denied", str(path))
        inner(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    error = error_of("prune", saved, "--keep-last", "11")
    assert gone == [FILE_NAME, STATE_FILE]
    assert "step-1: expected to delete it, found Permission denied" in str(error)


@pytest.mark.parametrize("keep_last", [1, 2, 5])
@pytest.mark.parametrize("keep_every", [None, 3])
def test_pruning_never_takes_the_newest_whole_one(keep_last: int, keep_every: int | None) -> None:
    """All patterns of damage of six checkpoints, seen by size and seen by every byte."""
    for pattern in range(3**6):
        kinds = [pattern // 3**i % 3 for i in range(6)]
        held = [
            Held(Path(f"step-{6 - i}"), 6 - i, 0.0, 1, 1, "", ("cut off",) if kind == 1 else ())
            for i, kind in enumerate(kinds)
        ]
        hidden = {each.step for each, kind in zip(held, kinds, strict=True) if kind == 2}
        deep = lambda each, hidden=hidden: ("flipped",) if each.step in hidden else ()  # noqa: E731
        if 0 not in kinds:
            with pytest.raises(CheckpointError):
                plan_pruning(held, keep_last, keep_every, deep)
            continue
        plan = plan_pruning(held, keep_last, keep_every, deep)
        newest = 6 - kinds.index(0)
        assert {each.step for each in plan.kept} >= set(range(newest, 7))
        assert sorted(each.step for each in plan.kept + plan.deleted) == list(range(1, 7))


# --- bad input, and the process ------------------------------------------------------------------------------


def test_what_is_no_checkpoint_is_one_clear_line(saved: Path) -> None:
    Path("empty").mkdir()
    (saved / "step-12" / FILE_NAME).unlink()
    expected = "PATH: expected a checkpoint (step-N), or a folder of them, found"
    for path, said in {
        "nowhere": f"{expected} no nowhere; `dstrain ckpt list` shows what is in ./checkpoints",
        "empty": f"{expected} none in empty",
        "checkpoints": f"{expected} in checkpoints only first; give checkpoints/first",
        str(saved / "step-12"): f"{expected} no manifest.json in {saved}/step-12: a save or a deletion was cut off",
        str(
            saved / "step-11" / STATE_FILE
        ): f"{expected} {saved}/step-11/{STATE_FILE}, a file; `dstrain ckpt list` shows what is in ./checkpoints",
    }.items():
        for command in (["show"], ["verify"], ["export", "-o", "out"], ["prune", "--keep-last", "1"]):
            error = error_of(*command, path)
            assert (str(error), error.exit_code) == (said, 2)
    assert (
        str(error_of("list", "empty"))
        == "DIR: expected checkpoints (step-N) in it or in its folders, found none in empty"
    )
    assert "found no nowhere; " in str(error_of("list", "nowhere"))
    assert str(error_of("prune", saved / "step-3", "--keep-last", "1")) == (
        f"DIR: expected a folder of checkpoints, found one checkpoint, {saved}/step-3; give {saved}"
    )


def test_no_command_imports_torch(saved: Path) -> None:
    commands = [["list"], ["show"], ["verify", "--deep"], ["export", "-o", "out"], ["prune", "--keep-last", "2"]]
    code = (
        "import sys; from typer.testing import CliRunner; from dstrain.launcher.cli import app\n"
        f"for words in {commands}:\n"
        f"    assert CliRunner().invoke(app, ['ckpt', *words, '{saved}']).exit_code == 0, words\n"
        "print(*{'torch', 'rich', 'yaml'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "\n"


def test_the_sizes_of_dtypes_are_torchs() -> None:
    from dstrain.runtime.checkpoint.dtypes import DTYPES

    assert {name: dtype.itemsize for name, dtype in DTYPES.items()} == ITEM_BYTES


@pytest.mark.parametrize(
    ("size", "said"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1424564, "1.4 MB"), (3.2e12, "3.2 TB")]
)
def test_sizes_in_words(size: float, said: str) -> None:
    assert views.in_bytes(size) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(-5, "0 s ago"), (119, "119 s ago"), (7199, "119 min ago"), (90061, "25 h ago"), (1e6, "11 d ago")],
)
def test_ages_in_words(seconds: float, said: str) -> None:
    assert views.ago(seconds) == said


def test_an_export_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    """Eight tensors of 16 MiB: the peak grows by about one, far from all."""
    folder = Path("large/step-1")
    folder.mkdir(parents=True)
    size = 16 << 20
    digest = hashlib.sha256(bytes(size)).hexdigest()
    entries = [
        TensorEntry(f"model.{i}", (size,), "U8", (Piece((0,), (size,), 0, size, "a.bin", 0, size, digest),))
        for i in range(8)
    ]
    with (folder / "a.bin").open("wb") as file:
        file.truncate(size)
    manifest = Manifest(1, {"world_size": 1}, {}, tuple(entries), {"a.bin": size}, {})
    (folder / FILE_NAME).write_text(manifest.to_text())
    assert prod(entries[0].shape) == size
    code = (
        "import resource, sys\nfrom pathlib import Path\n"
        "from dstrain.runtime.checkpoint.export import ExportOptions, export_model, plan_export\n"
        "from dstrain.runtime.checkpoint.manifest import Manifest\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "at = Path('large/step-1'); manifest = Manifest.read(at); before = peak()\n"
        "export_model(at, Path('out'), manifest, plan_export(manifest, ExportOptions()))\n"
        "print(peak() - before)"
    )
    grown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert int(grown) * 1024 < 3 * size
