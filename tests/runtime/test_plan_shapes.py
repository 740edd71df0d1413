"""The shapes of any model, found on the meta device."""

from __future__ import annotations

import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dstrain.launcher.planning import find_shapes as finding
from dstrain.launcher.planning.find_shapes import find_shapes
from dstrain.runtime.models.build import build_model
from dstrain.runtime.pipeline.shapes import shapes_of
from dstrain.runtime.spec.config import JobConfig
from dstrain.runtime.spec.errors import UsageError
from dstrain.runtime.spec.gpt_shapes import gpt_shapes
from dstrain.runtime.spec.load import job_of
from dstrain.runtime.spec.model_shapes import ModelShapes

GPT = {"layers": 3, "width": 96, "heads": 4, "context": 32, "vocabulary": 300}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 32,
}


def job(model: dict[str, Any], **sections: Any) -> JobConfig:
    return job_of({"model": model, "batch": {"global": 2, "micro": 1}, "train": {"steps": 1}} | sections)


def make_sequential() -> nn.Module:
    layers = [(str(number), nn.Sequential(nn.Linear(16, 16), nn.ReLU())) for number in range(3)]
    return nn.Sequential(OrderedDict([*layers, ("out", nn.Linear(16, 4))]))


def make_samples() -> list[tuple[Tensor, int]]:
    return [(torch.zeros(16), 0)] * 4


def make_stubborn() -> nn.Module:
    """Its forward needs numbers."""

    class Stubborn(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * float(x.sum())

    return Stubborn(16, 4)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_gpts_formulas_are_what_its_forward_does(dtype: str) -> None:
    config = job({"gpt": GPT}, precision={"dtype": dtype})
    found = shapes_of(config)
    assert config.gpt is not None
    expected = gpt_shapes(config.gpt, 32, 4 if dtype == "fp32" else 2)
    assert not found.unknown
    assert found.blocks == expected.blocks
    assert [(one.name, one.shape) for one in found.parameters] == [(one.name, one.shape) for one in expected.parameters]
    for ours, theirs in zip(expected.layers, found.layers, strict=True):
        assert ours.name == theirs.name
        assert sorted(ours.parameters) == sorted(theirs.parameters)
        assert ours.weight_flops == pytest.approx(theirs.weight_flops)
        assert ours.other_flops == pytest.approx(theirs.other_flops)
        if ours.name != "token":
            assert ours.saved_bytes == pytest.approx(theirs.saved_bytes, rel=0.03)
            assert ours.input_bytes == pytest.approx(theirs.input_bytes, rel=0.1)
        assert ours.left_bytes == pytest.approx(theirs.left_bytes, rel=0.01)
        assert ours.ready_bytes == pytest.approx(theirs.ready_bytes)
        assert ours.rebuilt_bytes == pytest.approx(theirs.rebuilt_bytes)
        if ours.name != "head":
            assert ours.output_bytes == pytest.approx(theirs.output_bytes)


def test_a_model_of_transformers_is_a_chain() -> None:
    pytest.importorskip("transformers")
    config = job({"hf": {"config": LLAMA}})
    found = shapes_of(config)
    assert not found.unknown
    assert not found.uncut
    assert [layer.name for layer in found.layers] == [
        "model.embed_tokens",
        *(f"model.layers.{number}" for number in range(3)),
        "lm_head",
    ]
    assert config.model is not None
    real = build_model(config.model)
    assert found.elements == sum(parameter.numel() for parameter in real.parameters())
    written_out = sdpa_kernel(SDPBackend.MATH)  # torch does not count its fused kernel for CPUs
    with FlopCounterMode(display=False) as counter, torch.no_grad(), written_out:
        real(torch.zeros(1, 32, dtype=torch.int64))
    flops = sum(layer.weight_flops + layer.other_flops for layer in found.layers)
    assert flops == pytest.approx(counter.get_total_flops(), rel=0.05)
    first, *blocks = found.layers[1:-1]
    assert len({layer.saved_bytes for layer in blocks}) == 1
    tables = 2 * 32 * 16 * 4  # cosines and sines, which all blocks keep together, of both samples
    assert first.saved_bytes - blocks[0].saved_bytes == tables / 2
    assert all(layer.output_bytes == 32 * 64 * 4 for layer in blocks)


def factory(name: str, **sections: Any) -> JobConfig:
    module = "plan_models"
    data = {"factory": f"{module}:make_samples"}
    return job({"factory": f"{module}:{name}"}, data=data, **sections)


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> None:
    """The factories of this file, under a name that a job may give."""
    monkeypatch.setitem(sys.modules, "plan_models", sys.modules[__name__])


def test_a_sequential_is_cut_between_its_modules(models: None) -> None:
    found = shapes_of(factory("make_sequential", train={"steps": 1, "loss": "torch.nn.functional:cross_entropy"}))
    assert not found.unknown
    assert [layer.name for layer in found.layers] == ["0", "1", "2", "out"]
    assert [layer.weight_flops for layer in found.layers] == [2 * 16 * 16] * 3 + [2 * 16 * 4]


def test_a_model_that_is_no_chain_is_one_layer(models: None) -> None:
    """And one whose forward needs numbers still has its parameters."""
    found = shapes_of(factory("make_stubborn", train={"steps": 1, "loss": "torch.nn.functional:cross_entropy"}))
    assert len(found.layers) == 1
    assert found.uncut
    assert "on the meta device" in found.unknown[0]
    assert found.elements == 16 * 4 + 4


def test_shapes_come_back_from_json() -> None:
    found = shapes_of(job({"gpt": GPT}))
    assert ModelShapes.from_json(found.to_json()) == found


def test_shapes_are_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of its own, cached by the configuration's hash."""
    pytest.importorskip("transformers")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = job({"hf": {"config": LLAMA}})
    first = find_shapes(config)
    assert len(list((tmp_path / "dstrain" / "shapes").iterdir())) == 1
    monkeypatch.setattr(finding, "_looked_at", lambda _: pytest.fail("it is in the cache"))
    assert find_shapes(config) == first
    with pytest.raises(pytest.fail.Exception):
        find_shapes(job({"hf": {"config": LLAMA | {"num_hidden_layers": 2}}}))


def test_a_model_that_cannot_be_made_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UsageError, match=r"model\.factory: expected package\.module:name that can be imported"):
        find_shapes(job({"factory": "no_such_module:make"}))
