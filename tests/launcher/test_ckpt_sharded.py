"""`dstrain ckpt` on checkpoints of several files, in pieces, on disks of several hosts."""

from __future__ import annotations

import json
import platform
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_lab import ckpt, entry_of, error_of, flip, random_tensors, same_bits, save_sharded
from safetensors.torch import load_file

from dstrain.runtime.checkpoint import parts
from dstrain.runtime.checkpoint.manifest import FILE_NAME, Manifest
from dstrain.runtime.checkpoint.verify import damages
from dstrain.runtime.spec.errors import CheckpointError


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pieces, in a folder of one's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(parts, "PIECE_BYTES", 64)


FOLDER = Path("checkpoints/job/step-3")


@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize("boxes", [False, True], ids=["flat", "boxes"])
def test_whole_ones_are_whole(ranks: int, boxes: bool) -> None:
    tensors = random_tensors()
    manifest = save_sharded(FOLDER, tensors, ranks, boxes=boxes)
    assert sum(len(entry.pieces) for entry in manifest.tensors) > len(manifest.tensors)
    assert not list(damages(FOLDER, manifest, deep=True))
    said = ckpt("verify", "--deep", "checkpoints/job")
    assert said.startswith(f"{FOLDER}: whole, {len(tensors)} tensors, ")
    ckpt("export", FOLDER, "-o", "out")
    exported = load_file("out/model.safetensors")
    assert {f"model.{name}" for name in exported} == {name for name in tensors if name.startswith("model.")}
    assert all(same_bits(tensor, tensors[f"model.{name}"]) for name, tensor in exported.items())


@pytest.mark.parametrize("boxes", [False, True], ids=["flat", "boxes"])
def test_a_flipped_bit_anywhere_is_found_in_its_file(boxes: bool) -> None:
    """In the headers too, by which other programs read."""
    manifest = save_sharded(FOLDER, random_tensors(), 2, boxes=boxes)
    for name in manifest.files:
        path = FOLDER / name
        data = path.read_bytes()
        for offset in range(0, len(data), 23):
            if data[offset : offset + 1] == b" " or b"format" in data[max(0, offset - 12) : offset + 12]:
                continue  # between words of the header, where nothing changes
            flip(path, offset)
            found = list(damages(FOLDER, manifest, deep=True))
            assert found, offset
            assert all(line.startswith(f"{path}: ") for line in found)
            path.write_bytes(data)


def test_every_file_has_its_lines_in_order() -> None:
    manifest = save_sharded(FOLDER, random_tensors(), 5)
    for name in ("rank-4.safetensors", "rank-1.safetensors"):
        last = max((p for e in manifest.tensors for p in e.pieces if p.file == name), key=lambda p: p.offset)
        flip(FOLDER / name, last.offset)
    found = list(damages(FOLDER, manifest, deep=True))
    assert [line.partition(":")[0] for line in found] == [f"{FOLDER}/rank-{rank}.safetensors" for rank in (1, 4)]
    assert "[" in found[0], "the part of the tensor is named"


def test_pieces_that_overlap_are_no_tensor() -> None:
    """Also where as many elements are there as there should be."""
    manifest = save_sharded(FOLDER, random_tensors(), 2)
    entry = entry_of(FOLDER, "model.embed.weight")
    size = entry.pieces[0].stop
    moved = replace(entry.pieces[1], start=1, stop=1 + entry.pieces[1].stop - entry.pieces[1].start)
    wrong = replace(entry, pieces=(entry.pieces[0], moved, *entry.pieces[2:]))
    entries = tuple(wrong if each.name == entry.name else each for each in manifest.tensors)
    (FOLDER / FILE_NAME).write_text(replace(manifest, tensors=entries).to_text())
    found = list(damages(FOLDER, Manifest.read(FOLDER)))
    assert found == [f"{FOLDER}: model.embed.weight: expected a piece from element {size}, found one from 1"]


def test_show_says_who_has_what() -> None:
    save_sharded(FOLDER, random_tensors(), 3, ["a", "a", "b"])
    for file in FOLDER.glob("rank-2*"):
        file.unlink()
    shown = ckpt("show", FOLDER)
    assert "  layout    ranks 3\n" in shown
    assert "  step      3, saved " in shown
    assert "(2026-11-18T" in shown, "the manifest's own time"
    assert " pieces\n" in shown
    assert "  hosts     a 2 files of " in shown
    assert ", b 1 file of " in shown
    assert "(not here)" in shown
    assert "on b, not here: rank-2.safetensors" in shown
    said = json.loads(ckpt("show", "--json", FOLDER))
    assert said["hosts"]["rank-2.safetensors"] == "b"
    assert said["elsewhere"] == {"b": ["rank-2.safetensors"]}
    assert said["whole"] is False
    assert said["damages"] == []


def test_files_of_other_hosts_are_no_damage() -> None:
    save_sharded(FOLDER, random_tensors(), 4, ["a", "a", "b", "b"])
    for rank in (2, 3):
        (FOLDER / f"rank-{rank}.safetensors").unlink()
    for words in (["verify"], ["verify", "--deep"]):
        first, second = ckpt(*words, FOLDER).splitlines()
        assert first == f"{FOLDER}: on b, not here: rank-2.safetensors, rank-3.safetensors; verify it there"
        assert second.startswith(f"{FOLDER}: no damage in 2 of 4 files, ")
    assert ckpt("list").split("\t")[6] == "on b, not here: rank-2.safetensors, rank-3.safetensors\n"
    flip(FOLDER / "rank-1.safetensors", (FOLDER / "rank-1.safetensors").stat().st_size - 1)
    error = error_of("verify", "--deep", FOLDER)
    assert str(error).startswith(f"{FOLDER}/rank-1.safetensors: ")
    assert error.exit_code == 204
    wanted = f"{FOLDER}: expected all files of the model here, found rank-2.safetensors on b, rank-3.safetensors on b"
    assert str(error_of("export", FOLDER, "-o", "out")) == f"{wanted}; copy them here"


@pytest.mark.parametrize("hosts", [[], ["a", "a", "a", "a"], ["a", "a", "b", "b"], [platform.node(), "a", "b", "b"]])
def test_a_file_that_should_be_here_is_damage(hosts: list[str]) -> None:
    """Without hosts, of one host, of a host with others here, or of this machine."""
    save_sharded(FOLDER, random_tensors(), 4, hosts)
    (FOLDER / "rank-0.safetensors").unlink()
    assert "rank-0.safetensors: expected" in str(error_of("verify", FOLDER))


def test_prune_goes_by_what_is_here() -> None:
    for step in (1, 2, 3):
        save_sharded(FOLDER.with_name(f"step-{step}"), random_tensors(), 2, ["a", "b"])
        (FOLDER.with_name(f"step-{step}") / "rank-1.safetensors").unlink()
    assert ckpt("prune", "checkpoints/job", "--keep-last", "1").splitlines()[-1] == "kept 3"
    assert [path.name for path in FOLDER.parent.iterdir()] == ["step-3"]


def test_files_of_a_damaged_manifest_go_too() -> None:
    for step in (1, 3):
        save_sharded(FOLDER.with_name(f"step-{step}"), random_tensors(), 2)
    flip(FOLDER.with_name("step-1") / FILE_NAME, 40)
    ckpt("prune", "checkpoints/job", "--keep-last", "1")
    assert [path.name for path in FOLDER.parent.iterdir()] == ["step-3"]


def test_an_export_of_damaged_boxes_is_refused() -> None:
    save_sharded(FOLDER, random_tensors(), 4, boxes=True)
    piece = entry_of(FOLDER, "model.embed.weight").pieces[-1]
    flip(FOLDER / piece.file, piece.offset)
    with pytest.raises(CheckpointError, match=r"expected model\.embed\.weight with SHA-256"):
        ckpt("export", FOLDER, "-o", "out")
    assert list(Path("out").iterdir()) == []


def test_a_part_is_readable_by_safetensors() -> None:
    tensors = random_tensors()
    save_sharded(FOLDER, tensors, 2)
    held = load_file(FOLDER / "rank-1.safetensors")
    whole = tensors["model.embed.weight"].reshape(-1)
    assert torch.equal(held["model.embed.weight[28:56]"], whole[28:])
