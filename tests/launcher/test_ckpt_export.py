"""`dstrain ckpt export`: transformers' layout, other dtypes, averages, and what a kill leaves."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from checkpoint_lab import bytes_of, ckpt, error_of, random_tensors, same_bits, save_sharded
from safetensors.torch import load_file
from torch import Tensor, nn

from dstrain.launcher.checkpoint_views import bytes_of as size_of
from dstrain.runtime import trainer
from dstrain.runtime.checkpoint.casts import FLOATS, cast
from dstrain.runtime.checkpoint.dtypes import DTYPES
from dstrain.runtime.checkpoint.manifest import FILE_NAME, Manifest
from dstrain.runtime.checkpoint.transformers_layout import in_shards
from dstrain.runtime.spec.errors import CheckpointError

FOLDER = Path("checkpoints/job/step-2")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "DSTRAIN_JOB", "DSTRAIN_EVENT_FD"):
        monkeypatch.delenv(name, raising=False)


# --- dtypes --------------------------------------------------------------------------------------------------


def numbers(dtype: torch.dtype) -> Tensor:
    """Random bits, those of 16 bits all, and ties, ends and what is no number."""
    generator = torch.Generator().manual_seed(0)
    if dtype.itemsize == 2:
        return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)
    bits = torch.randint(-(1 << 31), 1 << 31, (20_000,), generator=generator, dtype=torch.int64)
    singles = bits.to(torch.int32).view(torch.float32)
    ties = (torch.arange(1 << 16, dtype=torch.int32) << 16 | 0x8000).view(torch.float32)  # between two of BF16
    small = torch.randn(20_000, generator=generator) * 10.0 ** torch.randint(-9, 6, (20_000,), generator=generator)
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 65504.0, 65520.0, 1e-45, 3.4e38])
    return torch.cat([singles, ties, small, special]).to(dtype)


@pytest.mark.parametrize("found", FLOATS)
@pytest.mark.parametrize("wanted", FLOATS)
def test_numbers_are_cast_as_torch_does(found: str, wanted: str) -> None:
    given = numbers(DTYPES[found])
    items = np.frombuffer(bytes_of(given), dtype=f"V{given.itemsize}")
    made = torch.frombuffer(bytearray(cast(items, found, wanted)), dtype=DTYPES[wanted])
    expected = given.to(DTYPES[wanted])
    assert torch.equal(made.isnan(), expected.isnan())
    assert torch.equal(made[~made.isnan()], expected[~made.isnan()])
    assert torch.equal(made.signbit()[~made.isnan()], expected.signbit()[~made.isnan()])


@pytest.mark.parametrize(
    ("options", "kind", "dtype"),
    [
        ([], "model", torch.bfloat16),
        (["--dtype", "saved"], "model", torch.bfloat16),
        (["--dtype", "bf16"], "model", torch.bfloat16),
        (["--dtype", "fp32"], "master", torch.float32),
        (["--dtype", "fp16"], "master", torch.float16),
        (["--average"], "average", torch.bfloat16),
        (["--average", "--dtype", "fp32"], "average", torch.float32),
    ],
    ids=str,
)
def test_the_most_precise_numbers_are_taken(options: list[str], kind: str, dtype: torch.dtype) -> None:
    tensors = random_tensors()
    save_sharded(FOLDER, tensors, 3)
    ckpt("export", FOLDER, "-o", "out", *options)
    exported = load_file("out/model.safetensors")
    assert same_bits(exported.pop("count"), tensors["model.count"])
    assert exported.pop("none").dtype == dtype
    for name, tensor in exported.items():
        assert same_bits(tensor, tensors[f"{kind}.{name}"].to(dtype))


def test_without_averages_there_is_no_average() -> None:
    tensors = {name: tensor for name, tensor in random_tensors().items() if not name.startswith("average.")}
    save_sharded(FOLDER, tensors)
    error = error_of("export", FOLDER, "-o", "out", "--average")
    wanted = "--average: expected a checkpoint with averaged weights, found no average.…"
    assert str(error) == f"{wanted}; train.ema_decay keeps an average"
    assert error.exit_code == 2
    save_sharded(FOLDER.with_name("step-3"), {"rng.0.torch": torch.zeros(3)})
    assert "expected a checkpoint of a model, found no model.…" in str(
        error_of("export", "checkpoints/job", "-o", "out")
    )


# --- shards --------------------------------------------------------------------------------------------------


def test_shards_are_filled_in_order() -> None:
    sizes = {"a": 4, "b": 4, "c": 9, "d": 1, "e": 3, "f": 5}
    names = [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)]
    assert in_shards(sizes, 8) == dict(zip(names, (["a", "b"], ["c"], ["d", "e"], ["f"]), strict=True))
    assert in_shards(sizes, 26) == {"model.safetensors": list(sizes)}
    assert list(in_shards({"large": 9, "a": 1}, 8).values()) == [["large"], ["a"]]


def test_an_index_says_where_tensors_are() -> None:
    tensors = random_tensors()
    save_sharded(FOLDER, tensors, 2)
    said = ckpt("export", FOLDER, "-o", "out", "--max-shard-size", "100", "--dtype", "fp32")
    assert said == f"wrote out: 5 tensors in 3 files, 412 B, of {FOLDER}\n"
    index = json.loads(Path("out/model.safetensors.index.json").read_text())
    total = sum(t.nbytes for file in Path("out").glob("*.safetensors") for t in load_file(file).values())
    assert index["metadata"] == {"total_size": total}
    assert set(index["weight_map"]) == {name.removeprefix("model.") for name in tensors if name.startswith("model.")}
    for name, file in index["weight_map"].items():
        assert name in load_file(Path("out") / file)
    assert sorted(path.name for path in Path("out").iterdir()) == [
        *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
        "model.safetensors.index.json",
    ]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("500 MB", 5 * 10**8),
        ("1.5KiB", 1536),
        ("2kB", 2000),
        ("77", 77),
        ("GB", None),
        ("-1", None),
    ],
)
def test_sizes_are_read(text: str, size: int | None) -> None:
    assert size_of(text) == size


def test_bad_sizes_are_one_line() -> None:
    save_sharded(FOLDER, random_tensors())
    for text in ("much", "0"):
        error = error_of("export", FOLDER, "-o", "out", "--max-shard-size", text)
        assert str(error) == f"--max-shard-size: expected a size such as 5GB or 500MB, found {text}"


def test_without_a_path_the_only_job_is_meant() -> None:
    save_sharded(FOLDER, random_tensors())
    assert f" of {FOLDER}\n" in ckpt("export", "-o", "out")
    save_sharded(Path("checkpoints/other/step-1"), random_tensors())
    said = "PATH: expected one folder of checkpoints in checkpoints, found 2: job, other; give checkpoints/job"
    assert str(error_of("export", "-o", "out2")) == said


# --- files that are there ------------------------------------------------------------------------------------


def model_in(folder: Path) -> dict[str, Tensor] | None:
    """As transformers finds it: the single file, else all shards of the index."""
    if (folder / "model.safetensors").exists():
        return load_file(folder / "model.safetensors")
    if not (folder / "model.safetensors.index.json").exists():
        return None
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return {name: load_file(folder / file)[name] for name, file in index["weight_map"].items()}


def test_what_would_hide_the_new_weights_is_in_the_way() -> None:
    """And is gone with --force."""
    save_sharded(FOLDER, random_tensors())
    ckpt("export", FOLDER, "-o", "out")
    error = error_of("export", FOLDER, "-o", "out", "--max-shard-size", "100")
    assert "expected no file of that name, found out/model.safetensors; " in str(error)
    Path("out/notes.txt").write_text("mine")
    ckpt("export", FOLDER, "-o", "out", "--max-shard-size", "100", "--force")
    assert not Path("out/model.safetensors").exists()
    assert len(list(Path("out").iterdir())) == 4
    assert "model-00001-of-00002.safetensors; give" in str(error_of("export", FOLDER, "-o", "out"))
    ckpt("export", FOLDER, "-o", "out", "--force")
    assert sorted(path.name for path in Path("out").iterdir()) == ["model.safetensors", "notes.txt"]


@pytest.mark.parametrize("size", ["100", "5GB"])
@pytest.mark.parametrize("before", ["100", "5GB"])
def test_a_kill_leaves_no_mix_of_two_models(size: str, before: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every rename and every deletion."""
    old = {name: tensor for name, tensor in random_tensors().items() if name.startswith("model.")}
    new = {name: tensor + 1 for name, tensor in old.items()}
    save_sharded(FOLDER, old)
    save_sharded(FOLDER.with_name("step-3"), new)
    ckpt("export", FOLDER, "-o", "before", "--max-shard-size", before)
    original = {name: getattr(Path, name) for name in ("rename", "unlink")}
    seen = set()
    for last in range(12):
        shutil.copytree("before", "out")
        calls: Iterator[int] = iter(range(99))

        def counted(name: str, calls: Iterator[int] = calls, last: int = last) -> Any:
            def call(self: Path, *args: Any, **kwargs: Any) -> Any:
                if next(calls) >= last:
                    raise OSError(5, "killed", str(self))
                return original[name](self, *args, **kwargs)

            return call

        with monkeypatch.context() as patched:
            for name in original:
                patched.setattr(Path, name, counted(name))
            with contextlib.suppress(CheckpointError):
                ckpt("export", "checkpoints/job", "-o", "out", "--max-shard-size", size, "--force")
        found = model_in(Path("out"))
        states = [all(same_bits(found[name.removeprefix("model.")], t) for name, t in each.items()) if found else None
                  for each in (old, new)]  # fmt: skip
        assert found is None or any(states), f"a mix behind call {last}"
        seen.add(tuple(states))
        shutil.rmtree("out")
    assert (True, False) in seen
    assert (False, True) in seen


# --- models of transformers ----------------------------------------------------------------------------------

_DECODER = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
HF = {
    "llama": {"model_type": "llama", **_DECODER, "vocab_size": 256, "max_position_embeddings": 48},
    "tied": {"model_type": "llama", **_DECODER, "vocab_size": 256, "tie_word_embeddings": True},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 256, "n_positions": 40},
}
YAML = """
name: tiny
model: {hf: {config: %s}}
data: {path: text, validation_fraction: 0.1, sequence_length: 8}
batch: {global: 4, micro: 2}
optimizer: {lr: 1e-2}
precision: {dtype: %s}
train: {steps: 2, sample_bytes: 3}
checkpoint: {dir: checkpoints/job}
"""


def trained(kind: str, dtype: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """Two steps; the model as transformers makes it, with what the checkpoint holds, and the checkpoint's tensors."""
    transformers.logging.disable_progress_bar()
    Path("text").write_bytes(b"the quick brown fox jumps over the lazy dog\n" * 20)
    Path("job.yaml").write_text(YAML % (json.dumps(HF[kind]), dtype))
    assert trainer.main(["job.yaml"]) == 0
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**HF[kind]))
    tensors = {name: tensor for file in FOLDER.glob("*.safetensors") for name, tensor in load_file(file).items()}
    _check_description(kind)
    return model.eval(), tensors


def _check_description(kind: str) -> None:
    """What the save has said of the model; a configuration for generation is added, which it does not know."""
    manifest = Manifest.read(FOLDER)
    described = manifest.state["model"]
    embedding = "transformer.wte.weight" if kind == "gpt2" else "model.embed_tokens.weight"
    assert described["kind"] == "hf"
    assert described["tied"] == ({} if kind == "llama" else {"lm_head.weight": embedding})
    assert described["config"]["use_cache"] is False
    state = {**manifest.state, "model": {**described, "generation_config": {"max_length": 7}}}
    (FOLDER / FILE_NAME).write_text(replace(manifest, state=state).to_text())


def logits_of(model: Any) -> Tensor:
    tokens = torch.randint(256, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits: Tensor = model.eval()(tokens).logits
    return logits


@pytest.mark.parametrize("kind", HF)
def test_from_pretrained_gives_the_same_logits(kind: str) -> None:
    model, tensors = trained(kind, "fp32")
    held = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    missing, unexpected = model.load_state_dict(held, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"] if kind != "llama" else [], [])
    expected = logits_of(model)
    ckpt("export", FOLDER, "-o", "single")
    total = sum(tensor.nbytes for tensor in held.values())
    ckpt("export", FOLDER, "-o", "shards", "--max-shard-size", str(int(total / 2.5)))
    assert len(list(Path("shards").glob("model-*-of-00003.safetensors"))) == 3
    for folder in ("single", "shards"):
        loaded, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        assert loaded.dtype == torch.float32
        assert loaded.config.use_cache
        assert loaded.generation_config.max_length == 7
        is_tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
        assert is_tied == (kind != "llama")
        assert same_bits(logits_of(loaded), expected)
    if kind == "llama":
        ckpt("export", FOLDER, "-o", "half", "--dtype", "bf16")
        loaded = transformers.AutoModelForCausalLM.from_pretrained("half")
        assert loaded.dtype == torch.bfloat16, "config.json says what was exported"
        assert same_bits(loaded.lm_head.weight, tensors["model.lm_head.weight"].bfloat16())


def test_the_master_weights_of_a_model_in_bf16() -> None:
    _, tensors = trained("gpt2", "bf16")
    ckpt("export", FOLDER, "-o", "out", "--dtype", "fp32")
    loaded = transformers.AutoModelForCausalLM.from_pretrained("out")
    assert loaded.dtype == torch.float32
    for name, parameter in loaded.named_parameters():
        assert same_bits(parameter.detach(), tensors[f"master.{name}"])
    ckpt("export", FOLDER, "-o", "saved")
    assert transformers.AutoModelForCausalLM.from_pretrained("saved").dtype == torch.bfloat16


def test_a_checkpoint_that_says_nothing_of_its_model_has_no_config() -> None:
    for number, model in enumerate([None, "text", {"kind": "hf"}, {"kind": "gpt", "config": {"layers": 3}}], 1):
        save_sharded(FOLDER.with_name(f"step-{number}"), random_tensors(), state={"model": model} if model else {})
        ckpt("export", FOLDER.with_name(f"step-{number}"), "-o", f"out-{number}")
        assert [path.name for path in Path(f"out-{number}").iterdir()] == ["model.safetensors"]
