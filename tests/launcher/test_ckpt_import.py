"""`dstrain ckpt import` of safetensors and of files of torch: read back, or refused by one clear line."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import resource
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from checkpoint_lab import ckpt, error_of, same_bits
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dstrain.runtime.checkpoint.load import load
from dstrain.runtime.checkpoint.manifest import Manifest
from dstrain.runtime.checkpoint.torch_files import STAND_INS
from dstrain.runtime.comm import Communicator
from dstrain.runtime.engine import Engine, EngineConfig, TorchSchedule
from dstrain.runtime.optimizers import make_optimizer
from dstrain.runtime.spec.training_config import OptimizerConfig, PrecisionConfig

PROGRAM = [sys.executable, "-c", "from dstrain.launcher.cli import main; main()", "ckpt"]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def tensors() -> dict[str, Tensor]:
    """All dtypes that a checkpoint can hold, a scalar, and one without elements."""
    torch.manual_seed(0)
    made = {
        "a.weight": torch.randn(5, 7),
        "a.half": torch.randn(3, 3).half(),
        "b.weight": torch.randn(40, 3).bfloat16(),
        "b.double": torch.randn(4, dtype=torch.float64),
        "scalar": torch.tensor(3.5),
        "none": torch.zeros(0, 4),
        "mask": torch.tensor([True, False, True]),
    }
    for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        made[f"count.{str(dtype)[6:]}"] = torch.arange(9).to(dtype)
    return made


def imported(folder: Path) -> dict[str, Tensor]:
    """What an import has made, which must be whole, without the kind."""
    assert "whole" in ckpt("verify", "--deep", folder)
    held = load_file(folder / "rank-0.safetensors")
    assert all(name.startswith("model.") for name in held)
    return {name.removeprefix("model."): tensor for name, tensor in held.items()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(same_bits(found[name], t) for name, t in expected.items())


# --- safetensors ---------------------------------------------------------------------------------------------


def test_a_file_of_safetensors() -> None:
    save_file(tensors(), "given.safetensors", metadata={"format": "pt"})
    said = ckpt("import", "given.safetensors", "-o", "made")
    assert said.startswith("made made/step-0: 12 tensors, ")
    assert said.endswith(" of given.safetensors (safetensors)\n")
    assert same(imported(Path("made/step-0")), tensors())
    manifest = Manifest.read(Path("made/step-0"))
    assert manifest.state["kind"] == "model"
    assert manifest.state["imported_from"] == str(Path("given.safetensors").absolute())
    assert manifest.state["model"] == {"kind": None, "config": None, "tied": {}}
    assert "\twhole\n" in ckpt("list", "made")
    assert f"  from      {Path('given.safetensors').absolute()}\n" in ckpt("show", "made")
    ckpt("export", "made", "-o", "out")
    assert same(load_file("out/model.safetensors"), tensors())


def in_shards(folder: Path, held: dict[str, Tensor]) -> None:
    folder.mkdir()
    weight_map = {}
    for number, (name, tensor) in enumerate(held.items()):
        weight_map[name] = f"model-{number}.safetensors"
        save_file({name: tensor}, folder / weight_map[name])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": 3, "torch_dtype": "float32"}')
    (folder / "generation_config.json").write_text('{"max_length": 9}')


def test_a_folder_of_transformers_goes_in_and_out() -> None:
    in_shards(Path("given"), tensors())
    assert "(safetensors in 12 files)" in ckpt("import", "given", "-o", "made", "--step", "30")
    assert same(imported(Path("made/step-30")), tensors())
    model = Manifest.read(Path("made/step-30")).state["model"]
    assert (model["kind"], model["config"]["hidden_size"]) == ("hf", 3)
    assert "  model     kind hf, model_type llama\n" in ckpt("show", "made")
    ckpt("export", "made", "-o", "out", "--dtype", "bf16")
    assert json.loads(Path("out/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert json.loads(Path("out/generation_config.json").read_text()) == {"max_length": 9}


def test_safetensors_need_no_torch() -> None:
    save_file(tensors(), "given.safetensors")
    code = (
        "import sys; from typer.testing import CliRunner; from dstrain.launcher.cli import app\n"
        "result = CliRunner().invoke(app, ['ckpt', 'import', 'given.safetensors', '-o', 'made'])\n"
        "assert result.exit_code == 0, result.output\n"
        "print(*{'torch', 'rich', 'yaml'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "\n"


def test_a_file_of_safetensors_that_is_cut_off_anywhere() -> None:
    save_file(tensors(), "whole.safetensors")
    data = Path("whole.safetensors").read_bytes()
    for size in [*range(0, len(data), 97), len(data) - 1]:
        Path("given.safetensors").write_bytes(data[:size])
        error = error_of("import", "given.safetensors", "-o", "made")
        assert str(error).startswith("given.safetensors: expected ")
        assert error.exit_code == 204
    assert not Path("made").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}, "found F8_E4M3"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "expected 8 bytes of x, found 4"),
        ({"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}, "of x, found 4"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}, "of x, found 4"),
        ({"dtype": "F32", "shape": "x", "data_offsets": [0, 4]}, "expected dtype, shape and data_offsets of x"),
        ([], "expected dtype, shape and data_offsets of x, found []"),
    ],
    ids=str,
)
def test_a_header_that_cannot_be(change: Any, said: str) -> None:
    text = json.dumps({"x": change}).encode()
    Path("given.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    assert said in str(error_of("import", "given.safetensors", "-o", "made"))


def test_an_index_that_is_wrong() -> None:
    in_shards(Path("given"), tensors())
    Path("given/model-3.safetensors").rename("given/other")
    said = "given: expected model-3.safetensors, which model.safetensors.index.json names, found no such file"
    assert str(error_of("import", "given", "-o", "made")) == said
    Path("given/other").rename("given/model-3.safetensors")
    index = Path("given/model.safetensors.index.json")
    text = index.read_text()
    for change, found in {
        text.replace('"scalar"', '"elsewhere"'): "expected elsewhere, which model.safetensors.index.json says is there",
        text.replace("model-3.", "../model-3."): "expected the names of files beside it, found ['../model-3.safe",
        '{"weight_map": []}': "expected the names of files beside it",
        "[]": "expected an object of JSON, found a list",
        "{": "expected JSON, found damaged text",
    }.items():
        index.write_text(change)
        assert found in str(error_of("import", "given", "-o", "made"))
    index.write_text(text)
    save_file({"scalar": torch.zeros(1), "mask": tensors()["mask"]}, "given/model-6.safetensors")
    assert "found scalar again" in str(error_of("import", "given", "-o", "made"))


# --- files of torch ------------------------------------------------------------------------------------------


class Pair(nn.Module):
    """Two names of one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(3, 4)
        self.last.weight = self.first.weight


def test_a_state_dict_with_names_that_mean_one_tensor() -> None:
    model = Pair()
    torch.save(model.state_dict(), "given.pt")
    said = ckpt("import", "given.pt", "-o", "made").splitlines()
    assert said[0] == "one tensor, stored once: last.weight is first.weight"
    assert said[1].endswith(" of given.pt (a state_dict of torch)")
    expected = {name: tensor for name, tensor in model.state_dict().items() if name != "last.weight"}
    assert same(imported(Path("made/step-0")), expected)
    assert Manifest.read(Path("made/step-0")).state["model"]["tied"] == {"last.weight": "first.weight"}
    assert "  model     kind -, tied last.weight\n" in ckpt("show", "made")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_training_begins_with_what_was_imported(dtype: Literal["fp32", "bf16"]) -> None:
    given = Pair()
    torch.save({"model": given.state_dict()}, "given.pt")
    ckpt("import", "given.pt", "-o", "made")
    comm = Communicator(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    config = EngineConfig(precision=PrecisionConfig(dtype=dtype))
    engine = Engine(Pair(), comm, config, lambda p: make_optimizer(p, OptimizerConfig()), TorchSchedule(None))
    load(engine, Path("made"), model_only=True)
    for name, parameter in given.named_parameters():
        own = dict(engine.module.named_parameters())[name]
        assert torch.equal(own, parameter.to(own.dtype))
    for name, trained in engine.trained:
        assert torch.equal(trained, dict(given.named_parameters())[name]), "fp32, also the master weights"


@pytest.mark.parametrize("new", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize(
    ("wrap", "said"),
    [
        (lambda held: held, ""),
        (lambda held: {"state_dict": held, "epoch": 3}, "took the state_dict under 'state_dict', and left out epoch"),
        (lambda held: {"model_state_dict": held}, "took the state_dict under 'model_state_dict'"),
        (lambda held: {"model": held, "optimizer": {}, "args": argparse.Namespace(lr=1)}, "left out optimizer, args"),
        (lambda held: {"module": held, "best": np.float64(3), "rng": np.arange(3)}, "left out best, rng"),
        (lambda held: {**held, "version": 7, "names": ["a"]}, "left out what is no tensor: version, names"),
        (lambda held: {f"module.{name}": t for name, t in held.items()}, "took module. off the names of all tensors"),
        (lambda held: {f"_orig_mod.module.{name}": t for name, t in held.items()}, "took _orig_mod. off the names"),
        (lambda held: {name.replace(".", "._orig_mod."): t for name, t in held.items()}, "took _orig_mod. out of"),
    ],
)
def test_state_dicts_in_other_things(wrap: Any, said: str, new: bool) -> None:
    torch.save(wrap(tensors()), "given.pth", _use_new_zipfile_serialization=new)
    assert said in ckpt("import", "given.pth", "-o", "made")
    assert same(imported(Path("made/step-0")), tensors())


def test_a_parameter_and_a_view_are_tensors() -> None:
    whole = torch.arange(12.0).view(3, 4)
    torch.save({"turned": whole.t(), "row": whole[1], "parameter": nn.Parameter(whole)}, "given.pt")
    ckpt("import", "given.pt", "-o", "made")
    expected = {"turned": whole.t().contiguous(), "row": whole[1], "parameter": whole}
    assert same(imported(Path("made/step-0")), expected)


def test_a_folder_of_torch_files() -> None:
    Path("given").mkdir()
    names = list(tensors())
    weight_map = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        torch.save({name: tensors()[name] for name in names if weight_map[name] == file}, Path("given") / file)
    Path("given/pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "(a state_dict of torch in 2 files)" in ckpt("import", "given", "-o", "made")
    assert same(imported(Path("made/step-0")), tensors())
    Path("given/pytorch_model-1.bin").unlink()
    assert "expected pytorch_model-1.bin, which" in str(error_of("import", "given", "-o", "made2"))


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ([torch.zeros(3)], "expected a state_dict: names and tensors, found a list"),
        ({"epoch": 3, "lr": 0.1}, "found the keys epoch, lr; it is looked for at the top and under state_dict, model"),
        ({}, "found the keys nothing"),
        ({"x": torch.zeros(3, dtype=torch.complex64)}, "found torch.complex64"),
        ({"x": torch.zeros(3).to(torch.float8_e4m3fn)}, "found torch.float8_e4m3fn"),
        ({"x": torch.eye(3).to_sparse()}, "expected x as a dense tensor, found one of Tensor, torch.sparse_coo"),
        ({"x": torch.zeros(3, device="meta")}, "expected x as a dense tensor, found one of Tensor, torch.strided, on"),
    ],
    ids=str,
)
def test_what_is_no_state_dict(held: Any, said: str) -> None:
    torch.save(held, "given.pt")
    error = error_of("import", "given.pt", "-o", "made")
    assert said in str(error)
    assert error.exit_code == 2
    assert not Path("made").exists()


# --- files that want more than to be read --------------------------------------------------------------------


class Runs:
    """Unpickled freely, it calls any function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    ("kind", "protocol"), [("zip", 2), ("zip", 4), ("old", 2), ("old", 4), ("bare", 0), ("bare", 2), ("bare", 4)]
)
@pytest.mark.parametrize(
    ("call", "name"),
    [
        (Runs(os.system, "touch ran"), "posix.system"),
        (Runs(eval, "open('ran', 'w')"), "eval"),
        (Runs(Path.touch, Path("ran")), "getattr"),
        (Runs(subprocess.check_output, ["touch", "ran"]), ".check_output"),
        (Runs(np.load, "ran"), "numpy"),
    ],
    ids=["system", "eval", "method", "subprocess", "numpy"],
)
def test_code_in_a_file_is_not_run(
    call: Runs, name: str, kind: str, protocol: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the environment says of torch.load."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    held = {"weight": torch.zeros(3), "payload": call}
    if kind == "bare":
        Path("given.pt").write_bytes(pickle.dumps({"payload": call}, protocol=protocol))
    else:
        torch.save(held, "given.pt", pickle_protocol=protocol, _use_new_zipfile_serialization=kind == "zip")
    error = error_of("import", "given.pt", "-o", "made")
    assert not Path("ran").exists()
    assert not Path("made").exists()
    assert "given.pt" in str(error)
    if protocol == 2 and kind == "zip":
        wanted = "SOURCE: given.pt: expected tensors and plain values, found an object of "
        assert str(error).startswith(wanted)
        assert name in str(error)
        assert error.exit_code == 2


def test_stand_ins_are_inert(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their names may be in a file; the real things are neither imported nor called."""
    for name in STAND_INS:
        pickled = pickle.PROTO + b"\x02" + b"}X\x01\x00\x00\x00x" + pickle.GLOBAL + b"\n".join(
            part.encode() for part in name.rsplit(".", 1)
        ) + b"\nX\x03\x00\x00\x00ran\x85R}b" + pickle.SETITEM + pickle.STOP  # fmt: skip
        with_tensor("given.pt", pickled)
        error = error_of("import", "given.pt", "-o", "made")
        assert "expected a state_dict: names and tensors, found the keys x" in str(error), name
    assert "deepspeed" not in sys.modules
    assert not Path("ran").exists()


def with_tensor(path: str, pickled: bytes) -> None:
    """A file of torch.save whose pickle is another."""
    buffer = io.BytesIO()
    torch.save({}, buffer)
    with zipfile.ZipFile(buffer) as given, zipfile.ZipFile(path, "w") as made:
        for name in given.namelist():
            made.writestr(name, pickled if name.endswith("data.pkl") else given.read(name))


@pytest.mark.parametrize("new", [True, False], ids=["zip", "old"])
def test_a_file_of_torch_that_is_cut_off_anywhere(new: bool) -> None:
    torch.save({name: t for name, t in tensors().items() if t.numel()}, "whole.pt", _use_new_zipfile_serialization=new)
    data = Path("whole.pt").read_bytes()
    for size in [*range(0, len(data), 331), len(data) - 1]:
        Path("given.pt").write_bytes(data[:size])
        error = error_of("import", "given.pt", "-o", "made")
        assert str(error).startswith("given.pt: expected "), size
        assert error.exit_code == 204
    assert not Path("made").exists()


@pytest.mark.parametrize(
    "data", [b"", b"\x80\x02", b"PK\x03\x04", bytes(300), b"hello, this is text\n" * 9, b"\xff" * 50]
)
def test_any_bytes_are_one_line(data: bytes) -> None:
    Path("given.pt").write_bytes(data)
    assert str(error_of("import", "given.pt", "-o", "made")).startswith(
        "given.pt: expected a file of torch.save, found"
    )


# --- what is made --------------------------------------------------------------------------------------------


def test_nothing_is_written_over() -> None:
    save_file(tensors(), "given.safetensors")
    ckpt("import", "given.safetensors", "-o", "made", "--step", "4")
    error = error_of("import", "given.safetensors", "-o", "made", "--step", "4")
    said = "--output: expected no step-4 in made, found made/step-4; give another folder or --step"
    assert str(error) == said
    ckpt("import", "given.safetensors", "-o", "made", "--step", "5")
    assert [line.split("\t")[1] for line in ckpt("list", "made").splitlines()] == ["5", "4"]


def test_a_full_disk_leaves_nothing() -> None:
    save_file({"x": torch.zeros(10_000)}, "given.safetensors")

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    command = [*PROGRAM, "import", "given.safetensors", "-o", "made"]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=small_files, check=False)
    assert done.returncode == 204
    assert done.stderr.startswith("dstrain: made/step-0: expected to write the checkpoint, found File too large: ")
    assert len(done.stderr.splitlines()) == 1
    assert list(Path("made").iterdir()) == []


def test_what_cannot_be_imported_is_one_line() -> None:
    save_file(tensors(), "given.safetensors")
    ckpt("import", "given.safetensors", "-o", "made")
    Path("empty").mkdir()
    Path("dcp").mkdir()
    Path("dcp/__0_0.distcp").touch()
    Path("some").mkdir()
    Path("some/weights.pt").touch()
    save_file({}, "none.safetensors")
    for path, said in {
        "nowhere": "found no nowhere",
        "made/step-0": "found a checkpoint of dstrain, made/step-0; it needs no import",
        "empty": "found none of these in empty",
        "dcp": "found a distributed checkpoint of torch, dcp; python -m torch.distributed.checkpoint.format_utils",
        "some": "found none of these in some; give the file, such as some/weights.pt",
        "none.safetensors": "expected tensors, found none in none.safetensors",
    }.items():
        error = error_of("import", path, "-o", "out")
        assert said in str(error)
        assert error.exit_code == 2
    assert not Path("out").exists()
