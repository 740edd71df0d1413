"""`dstrain ckpt import` of DeepSpeed's ZeRO checkpoints, of folders that a generator writes as DeepSpeed does."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_lab import ckpt, error_of, same_bits
from deepspeed_lab import Training, save_deepspeed
from safetensors.torch import load_file
from torch import Tensor

from dstrain.runtime.checkpoint.manifest import Manifest


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def imported(folder: Path = Path("made/step-6")) -> dict[str, Tensor]:
    assert "whole" in ckpt("verify", "--deep", folder)
    return load_file(folder / "rank-0.safetensors")


def check(training: Training) -> None:
    found, expected = imported(), training.expected()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert same_bits(found[name], tensor), name
    assert Manifest.read(Path("made/step-6")).state["model"]["tied"] == training.tied


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_shards_become_whole(stage: int, ranks: int) -> None:
    """By the folder above, whose `latest` is followed, and by the tag's own; 8: some ranks have nothing but padding."""
    training = Training.random()
    tag = save_deepspeed(Path("given"), training, stage, ranks)
    said = ckpt("import", "given", "-o", "made")
    count = 5 + 3 + 15
    assert said.startswith(f"made made/step-6: {count} tensors, ")
    assert said.endswith(f" of {tag} (DeepSpeed 0.19.8, ZeRO stage {stage}, {ranks} ranks)\n")
    check(training)
    assert "made other/step-9: " in ckpt("import", tag, "-o", "other", "--step", "9")
    assert "deepspeed" not in sys.modules


@pytest.mark.parametrize(
    "options",
    [
        {"prefix": "bf16_", "bf16_optimizer": True},
        {"elastic": True},
        {"alignment": 8},
        {"alignment": 8, "elastic": True},
        {"zip_files": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_other_ways_of_stages_1_and_2(options: dict[str, Any], ranks: int) -> None:
    def with_step(name: str, held: dict[str, Any]) -> None:
        if options.get("elastic") and "optim" in name:
            held["optimizer_state_dict"]["base_optimizer_state_step"] = 6
            for state in held["optimizer_state_dict"]["base_optimizer_state"]:
                del state["step"]

    training = Training.random()
    save_deepspeed(Path("given"), training, 2, ranks, change=with_step, **options)
    ckpt("import", "given", "-o", "made")
    check(training)


@pytest.mark.parametrize("stage", [2, 3])
def test_what_was_trained_with(stage: int) -> None:
    save_deepspeed(Path("given"), Training.random(), stage, 2)
    ckpt("import", "given", "-o", "made")
    group = {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01}
    optimizer = Manifest.read(Path("made/step-6")).state["optimizer"]
    assert optimizer == {"class": "Adam", "scalars": {}, "groups": [group, group]}
    assert "  optimizer class Adam, lr 0.001, 0.001\n" in ckpt("show", "made")


@pytest.mark.parametrize("stage", [1, 3])
def test_another_optimizer_leaves_the_model_alone(stage: int) -> None:
    training = Training.random()
    training.moments = {"momentum_buffer": training.moments["exp_avg"]}
    save_deepspeed(Path("given"), training, stage, 2)
    said = ckpt("import", "given", "-o", "made").splitlines()
    assert said[0] == "left out the optimizer's state: it is not Adam's (momentum_buffer, step)"
    training.moments = {}
    check(training)


def test_a_compiled_model_has_its_own_names() -> None:
    training = Training.random()
    wrapped = {f"_orig_mod.{name}": tensor for name, tensor in training.parameters.items()}
    compiled = replace(
        training,
        parameters=wrapped,
        groups=[[f"_orig_mod.{name}" for name in group] for group in training.groups],
        frozen={},
        buffers={},
        tied={"_orig_mod.out.weight": "_orig_mod.embed.weight"},
        moments={key: {f"_orig_mod.{n}": t for n, t in kind.items()} for key, kind in training.moments.items()},
    )
    save_deepspeed(Path("given"), compiled, 3, 2)
    assert "took _orig_mod. off the names of all tensors" in ckpt("import", "given", "-o", "made")
    check(replace(training, frozen={}, buffers={}))


def test_a_config_beside_the_tags_is_taken() -> None:
    save_deepspeed(Path("given"), Training.random(), 2, 2)
    Path("given/config.json").write_text('{"model_type": "llama"}')
    ckpt("import", "given", "-o", "made")
    assert Manifest.read(Path("made/step-6")).state["model"]["config"] == {"model_type": "llama"}


# --- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("kind", ["optim", "model"])
def test_a_missing_file_is_named(stage: int, kind: str) -> None:
    tag = save_deepspeed(Path("given"), Training.random(), stage, 3)
    for path in sorted(tag.glob(f"*{kind}_states.pt")):
        if kind == "optim" and "rank_2" in path.name:
            continue  # the last one: only the others know of it
        path.rename("aside")
        error = error_of("import", "given", "-o", "made")
        assert str(error) == f"{tag}: expected {path.name}, found no such file"
        assert error.exit_code == 204
        Path("aside").rename(path)
    (tag / "zero_pp_rank_2_mp_rank_00_optim_states.pt").unlink()
    said = f"{tag}: expected optimizer files of 3 ranks, found 2; is one missing?"
    assert str(error_of("import", "given", "-o", "made")) == said


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_file_that_is_cut_off_is_named(stage: int) -> None:
    tag = save_deepspeed(Path("given"), Training.random(), stage, 2)
    for path in tag.iterdir():
        data = path.read_bytes()
        for size in (0, 100, len(data) // 2, len(data) - 1):
            path.write_bytes(data[:size])
            assert str(error_of("import", "given", "-o", "made")).startswith(f"{path}: expected ")
        path.write_bytes(data)
    assert not Path("made").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mp_rank_01_model_states.pt", "found the parts of several tensor parallel ranks, mp_rank_01_model_states.pt"),
        ("zero_pp_rank_0_mp_rank_01_optim_states.pt", "found the parts of several tensor parallel ranks"),
        ("layer_03-model_00-model_states.pt", "found the layers of a pipeline, layer_03"),
        ("layer_1_expert_0_mp_rank_00_model_states.pt", "found experts in files of their own"),
        ("zero", "found a universal checkpoint, zero"),
        ("bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "expected one optimizer file of rank 0, found bf16_zero_pp"),
    ],
)
def test_other_layouts_are_refused(name: str, said: str) -> None:
    tag = save_deepspeed(Path("given"), Training.random(), 2, 2)
    (tag / name).touch()
    assert said in str(error_of("import", "given", "-o", "made"))


def in_model(**changes: Any) -> Any:
    return lambda name, held: held.update(changes) if "model" in name else None


def in_optimizer(**changes: Any) -> Any:
    return lambda name, held: held["optimizer_state_dict"].update(changes) if "optim" in name else None


OTHER_SHAPES = [{"block.weight": (400, 5), "embed.weight": (), "scale": ()}, {"head.weight": (3,), "block.bias": (7,)}]


@pytest.mark.parametrize(
    ("stage", "change", "said"),
    [
        (2, in_model(param_shapes=OTHER_SHAPES), "expected 2002 elements in the fp32 parts, found 91"),
        (3, in_model(param_shapes=[{"embed.weight": (11, 5)}]), "expected 28 elements in the fp32 parts, found 53"),
        (3, in_model(param_shapes=None), "expected param_shapes, the names of the parameters, found none"),
        (2, in_model(param_shapes=3), "expected files as DeepSpeed writes them, found TypeError"),
        (2, in_model(module=None), "expected a module's state_dict of DeepSpeed, found none"),
        (2, in_optimizer(single_partition_of_fp32_groups=None), "expected files as DeepSpeed writes them, found"),
        (2, in_optimizer(zero_stage="two"), "expected files as DeepSpeed writes them, found ValueError"),
        (2, in_optimizer(zero_stage=None), "expected files as DeepSpeed writes them, found TypeError"),
        (3, in_optimizer(fp32_flat_groups=[torch.zeros(2)]), "elements in the fp32 parts, found"),
        (3, in_model(frozen_param_fragments=None), "expected files as DeepSpeed writes them, found"),
        (2, lambda name, held: held.pop("optimizer_state_dict", None), "expected optimizer_state_dict of DeepSpeed"),
    ],
)
def test_files_that_do_not_fit_each_other(stage: int, change: Any, said: str) -> None:
    save_deepspeed(Path("given"), Training.random(), stage, 2, change=change)
    error = error_of("import", "given", "-o", "made")
    assert said in str(error)
    assert not Path("made").exists()


def test_without_names_the_modules_own_numbers_are_taken() -> None:
    """As BF16_Optimizer saves without ZeRO."""
    training = Training.random()
    change = in_model(param_shapes=None, shared_params=None)
    save_deepspeed(Path("given"), training, 1, 2, prefix="bf16_", bf16_optimizer=True, change=change)
    assert "took the module's own numbers" in ckpt("import", "given", "-o", "made")
    assert same_bits(imported()["model.embed.weight"], training.parameters["embed.weight"].bfloat16())


@pytest.mark.parametrize("tag", ["", "nowhere", ".", "..", "../given/global_step6", "global_step6/.."])
def test_a_latest_that_leads_nowhere(tag: str) -> None:
    save_deepspeed(Path("given"), Training.random(), 2, 1)
    Path("given/latest").write_text(tag)
    said = f"given/latest: expected the name of a folder beside it, found {tag!r}; give a folder itself"
    assert str(error_of("import", "given", "-o", "made")) == said


class Runs:
    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


@pytest.mark.parametrize("kind", ["model", "optim"])
def test_code_in_a_file_is_not_run(kind: str) -> None:
    def change(name: str, held: dict[str, Any]) -> None:
        if kind in name:
            held["client"] = Runs()

    save_deepspeed(Path("given"), Training.random(), 2, 2, change=change)
    error = error_of("import", "given", "-o", "made")
    assert "expected tensors and plain values, found an object of posix.system; no code of a file is run" in str(error)
    assert not Path("ran").exists()
