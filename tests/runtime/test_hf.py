"""Models of transformers: tiny ones, against transformers' own loader."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dstrain.runtime.models import hf_weights
from dstrain.runtime.models.build import build_model, context_of, vocabulary_of
from dstrain.runtime.models.gpt import next_token_loss
from dstrain.runtime.models.language import generate, logits_of
from dstrain.runtime.spec.errors import UsageError
from dstrain.runtime.spec.model_config import HFConfig, ModelConfig
from dstrain.runtime.zero.deferred import build_deferred

_DECODER = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
LLAMA = {"model_type": "llama", **_DECODER, "vocab_size": 300, "max_position_embeddings": 48}
QWEN2 = {"model_type": "qwen2", **_DECODER, "vocab_size": 300, "tie_word_embeddings": True, "num_key_value_heads": 2}
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 300, "n_positions": 40}
NEOX = {"model_type": "gpt_neox", **_DECODER, "vocab_size": 300}
MIXTRAL = {"model_type": "mixtral", **_DECODER, "vocab_size": 300, "num_key_value_heads": 4, "num_local_experts": 11}
BERT = {"model_type": "bert", **_DECODER, "vocab_size": 300, "max_position_embeddings": 40}
VIT = {"model_type": "vit", **_DECODER, "image_size": 8, "patch_size": 4, "num_channels": 1}
CLASSES = {"bert": "AutoModelForMaskedLM", "vit": "AutoModelForImageClassification"}
TOKENS = torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(0))


def section(**hf: Any) -> ModelConfig:
    return ModelConfig(hf=HFConfig(**hf))


def auto_class(config: dict[str, Any]) -> str:
    return CLASSES.get(config["model_type"], "AutoModelForCausalLM")


@pytest.fixture(autouse=True, scope="module")
def quiet() -> None:
    transformers.logging.disable_progress_bar()


def saved(config: dict[str, Any], folder: Path, **options: Any) -> Any:
    """A model with random numbers in all its parameters, saved by transformers; in evaluation mode."""
    torch.manual_seed(1)
    model = getattr(transformers, auto_class(config)).from_config(transformers.AutoConfig.for_model(**config))
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder, **options)
    return model.eval()


def load(folder: Path, config: dict[str, Any]) -> nn.Module:
    return build_model(section(path=folder, auto_class=auto_class(config)))


@pytest.mark.parametrize(
    ("config", "shard"),
    [(LLAMA, "1GB"), (QWEN2, "20KB"), (GPT2, "20KB"), (BERT, "1GB"), (NEOX, "1GB"), (MIXTRAL, "20KB")],
)  # NEOX: files name the head otherwise; MIXTRAL: they hold each expert by itself
def test_a_folder_gives_what_from_pretrained_gives(config: dict[str, Any], shard: str, tmp_path: Path) -> None:
    original = saved(config, tmp_path, max_shard_size=shard)
    assert (
        len(list(tmp_path.glob("*.safetensors"))) > 1 if shard == "20KB" else (tmp_path / "model.safetensors").exists()
    )
    theirs = getattr(transformers, auto_class(config)).from_pretrained(tmp_path, dtype=torch.float32)
    state = torch.get_rng_state()
    model = load(tmp_path, config)
    assert torch.equal(torch.get_rng_state(), state), "no random number is drawn to be overwritten"
    assert model.training
    model.eval()
    assert torch.equal(model(TOKENS).logits, original(TOKENS).logits)
    assert torch.equal(model(TOKENS).logits, theirs(TOKENS).logits)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    ours, expected = dict(model.named_buffers()), dict(theirs.named_buffers())
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


class Reads(Counter[str]):
    """How often each tensor is read from safetensors."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        whole = hf_weights._Stored.read

        def read(stored: hf_weights._Stored) -> Tensor:
            self[stored.name] += 1
            return whole(stored)

        monkeypatch.setattr(hf_weights._Stored, "read", read)


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("config", [LLAMA, MIXTRAL, GPT2], ids=lambda config: config["model_type"])
def test_rank_0_reads_each_tensor_once_and_the_others_none(
    config: dict[str, Any], stage: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = saved(config, tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    for rank in (0, 1):
        reads = Reads(monkeypatch)
        build = partial(build_model, section(path=tmp_path), parameters=rank == 0)
        if stage == 3:
            model, deferred = build_deferred(lambda deferred, build=build: build(deferred.refill_by), 1 << 12)
            if rank == 0:
                assert 0 < len(reads) < len(names), "large parameters are unread"
                for parameter in model.parameters():
                    deferred.fill(parameter)
        else:
            model = build()
        if rank == 0:
            assert reads == Counter(names)
            assert torch.equal(model.eval()(TOKENS).logits, original(TOKENS).logits)
        else:
            assert not reads
        monkeypatch.undo()


def test_a_configuration_gives_random_weights_of_the_seed(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(LLAMA | {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}))

    def model(config: Any) -> nn.Module:
        torch.manual_seed(3)
        return build_model(section(config=config))

    models = [model(LLAMA), model(file), model(tmp_path)]
    states = [model.state_dict() for model in models]
    assert {tensor.dtype for tensor in states[1].values()} == {torch.float32}, "precision.dtype says otherwise"
    for state in states[1:]:
        assert all(torch.equal(state[name], tensor) for name, tensor in states[0].items())
    assert 0.01 < float(states[0]["model.embed_tokens.weight"].std()) < 0.03
    assert models[0].training


@pytest.mark.parametrize(
    ("config", "vocabulary", "context"),
    [(LLAMA, 300, 48), (GPT2, 300, 40), (VIT, None, None)],
    ids=["llama", "gpt2", "vit"],
)
def test_what_is_known_of_a_model(config: dict[str, Any], vocabulary: int | None, context: int | None) -> None:
    model_section = section(config=config, auto_class=auto_class(config))
    model = build_model(model_section)
    assert vocabulary_of(model, model_section) == vocabulary
    assert context_of(model, model_section) == context


def test_a_language_model_learns_and_writes() -> None:
    torch.manual_seed(0)
    model = build_model(section(config=GPT2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    samples = (torch.arange(17) + torch.arange(8).unsqueeze(1)) % 20  # counting, modulo 20
    for _ in range(60):
        loss = next_token_loss(logits_of(model(samples[:, :-1])), samples)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    output = model(samples[:1, :-1])
    assert output.past_key_values is None, "training has no use for a cache"
    text = generate(model, torch.tensor([4, 5, 6]), 6, temperature=0.1, generator=torch.Generator().manual_seed(0))
    assert text.tolist() == [4, 5, 6, 7, 8, 9, 10, 11, 12]


def test_bf16_files_become_fp32_parameters(tmp_path: Path) -> None:
    original = saved(LLAMA, tmp_path).to(torch.bfloat16)
    original.save_pretrained(tmp_path)
    model = load(tmp_path, LLAMA)
    weights = dict(original.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, weights[name].float())


def test_a_bare_models_file_and_old_names_fit(tmp_path: Path) -> None:
    """GPT-2's file has no prefix and has masks; BERT's has names of TensorFlow's time."""
    original = saved(GPT2, tmp_path / "gpt2")
    rewrite(
        tmp_path / "gpt2",
        lambda t: {n.removeprefix("transformer."): v for n, v in t.items()} | {"h.0.attn.bias": torch.ones(1)},
    )
    model = load(tmp_path / "gpt2", GPT2).eval()
    assert torch.equal(model(TOKENS).logits, original(TOKENS).logits)

    original = saved(BERT, tmp_path / "bert")
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

    def to_old(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {next((n.replace(new, o) for new, o in old.items() if new in n), n): v for n, v in tensors.items()}

    rewrite(tmp_path / "bert", to_old)
    assert any("gamma" in name for name in load_file(tmp_path / "bert/model.safetensors"))
    model = load(tmp_path / "bert", BERT).eval()
    assert torch.equal(model(TOKENS).logits, original(TOKENS).logits)


def rewrite(folder: Path, change: Any) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def without(name: str) -> Any:
    return lambda tensors: {n: t for n, t in tensors.items() if n != name}


EMBEDDING = "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("config", "change", "found"),
    [
        (LLAMA, without("model.norm.weight"), "1 missing (model.norm.weight)"),
        (LLAMA, lambda t: t | {"x": torch.ones(1), "y.z": torch.ones(1)}, "2 superfluous (x, y.z)"),
        (LLAMA, lambda t: t | {EMBEDDING: torch.ones(3, 2)}, "1 mismatched (model.embed_tokens.weight [3, 2] in "
         "place of [300, 32])"),
        (QWEN2, without(EMBEDDING), f"2 missing ({EMBEDDING}, lm_head.weight)"),
        (QWEN2, lambda t: t | {"lm_head.weight": t[EMBEDDING] + 1}, "weight unlike the tensor that it is tied to)"),
        (MIXTRAL, without("model.layers.0.block_sparse_moe.experts.3.w2.weight"), "1 mismatched (model.layers.0.mlp."
         "experts.down_proj [10, 32, 64] in place of [11, 32, 64])"),
        (LLAMA, lambda t: {}, "21 missing (model.embed_tokens.weight, model.layers.0.self_attn.q_proj.weight, "),
    ],
)  # fmt: skip
def test_files_that_do_not_fit(config: dict[str, Any], change: Any, found: str, tmp_path: Path) -> None:
    saved(config, tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(
        UsageError, match=r"model\.hf\.path: expected the tensors of \w+ForCausalLM in .*" + re.escape(found)
    ):
        load(tmp_path, config)
    with pytest.raises(UsageError, match=re.escape(found)):  # on the other ranks
        build_model(section(path=tmp_path, auto_class=auto_class(config)), parameters=False)


def test_tied_tensors_may_both_be_there_if_equal_and_either_may_be_missing(tmp_path: Path) -> None:
    original = saved(QWEN2, tmp_path)
    rewrite(tmp_path, lambda t: t | {"lm_head.weight": t[EMBEDDING].clone()})
    for name in ("", EMBEDDING):
        rewrite(tmp_path, without(name))
        model = load(tmp_path, QWEN2).eval()
        assert torch.equal(model(TOKENS).logits, original(TOKENS).logits)
        assert model.get_parameter("lm_head.weight") is model.get_parameter(EMBEDDING)


def test_never_a_pickle(tmp_path: Path) -> None:
    saved(LLAMA, tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"expected safetensors in .*, found pytorch_model\.bin, a pickle"):
        load(tmp_path, LLAMA)


def test_a_folder_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"model\.hf\.path: expected .*config\.json, found No such file or directory"):
        load(tmp_path / "absent", LLAMA)
    saved(LLAMA, tmp_path, max_shard_size="20KB")
    second = sorted(tmp_path.glob("*.safetensors"))[1]
    content = second.read_bytes()
    second.write_bytes(content[: len(content) // 2])
    with pytest.raises(UsageError, match=rf"expected tensors in .*{second.name}, found"):
        load(tmp_path, LLAMA)
    second.unlink()
    with pytest.raises(UsageError, match=rf"expected safetensors in .*, found no {second.name}"):
        load(tmp_path, LLAMA)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../elsewhere.safetensors"}}))
    with pytest.raises(UsageError, match=r"expected names of files beside it, found \.\./elsewhere\.safetensors"):
        load(tmp_path, LLAMA)
    index.write_text("{")
    with pytest.raises(UsageError, match=r"expected JSON in .*index\.json"):
        load(tmp_path, LLAMA)


def test_code_in_a_folder_is_not_run(tmp_path: Path) -> None:
    saved(LLAMA, tmp_path)
    (tmp_path / "code.py").write_text("raise SystemExit('run')\n")
    values = json.loads((tmp_path / "config.json").read_text())
    values["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert type(load(tmp_path, LLAMA)) is transformers.LlamaForCausalLM


@pytest.mark.parametrize(
    ("hf", "line"),
    [
        ({"config": {"model_type": "lama"}}, "model.hf.config: expected a model_type that transformers knows, found "
         "lama; did you mean"),
        ({"config": {"n_layer": 2}}, "model.hf.config: expected a model_type that transformers knows, found None"),
        ({"config": LLAMA | {"num_hiden_layers": 2}}, "model.hf.config: expected keys of llama, found "
         "num_hiden_layers; did you mean num_hidden_layers?"),
        ({"config": LLAMA | {"num_hidden_layers": "two"}}, "model.hf.config: expected a configuration of llama for "
         "AutoModelForCausalLM, found one that transformers refuses (Validation error for field 'num_hidden_layers': "
         "TypeError: Field 'num_hidden_layers' expected int, got str (value: 'two'))"),
        ({"config": VIT}, "model.hf.config: expected a configuration of vit for AutoModelForCausalLM, found one that "
         "transformers refuses (Unrecognized configuration class"),
        ({"config": LLAMA, "auto_class": "AutoModelForCausal"}, "model.hf.auto_class: expected an AutoModel class of "
         "transformers, found AutoModelForCausal; such as AutoModelForCausalLM"),
    ],
)  # fmt: skip
def test_a_configuration_that_cannot_be(hf: dict[str, Any], line: str) -> None:
    with pytest.raises(UsageError, match=re.escape(line)) as caught:
        build_model(section(**hf))
    assert "\n" not in str(caught.value)


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match=r"model\.hf: expected the package transformers, .*'dstrain\[hf\]'"):
        build_model(section(config=LLAMA))
