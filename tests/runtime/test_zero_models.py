"""Models of transformers, and modules of torch's that use their parameters in ways of their own, at every stage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from zero_oracle import STAGES, RunRanks, Training, compare, only, samples_of

from dstrain.runtime import trainer
from dstrain.runtime.engine import Engine
from dstrain.runtime.models.build import build_model
from dstrain.runtime.models.gpt import next_token_loss
from dstrain.runtime.models.language import logits_of
from dstrain.runtime.spec.model_config import HFConfig, ModelConfig
from dstrain.runtime.spec.training_config import PrecisionConfig

pytestmark = pytest.mark.slow  # three steps of each at every stage

_DECODER = {"hidden_size": 20, "intermediate_size": 36, "num_attention_heads": 2, "num_hidden_layers": 3}
HF: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_DECODER, "vocab_size": 37, "max_position_embeddings": 16},
    "qwen2": {
        "model_type": "qwen2",
        **_DECODER,
        "vocab_size": 37,
        "tie_word_embeddings": True,
        "num_key_value_heads": 1,
    },
    "gpt2": {"model_type": "gpt2", "n_embd": 20, "n_layer": 3, "n_head": 2, "vocab_size": 37, "n_positions": 16},
    "bert": {"model_type": "bert", **_DECODER, "vocab_size": 37, "max_position_embeddings": 16},
}


def hf(kind: str) -> nn.Module:
    torch.manual_seed(0)
    auto_class = "AutoModelForMaskedLM" if kind == "bert" else "AutoModelForCausalLM"
    config = HF[kind] | ({"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0} if kind == "gpt2" else {})
    config |= {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0} if kind == "bert" else {}
    return build_model(ModelConfig(hf=HFConfig(config=config, auto_class=auto_class)))


def hf_language(engine: Engine, samples: Tensor) -> Tensor:
    return next_token_loss(logits_of(engine(samples[:, :-1])), samples)


@pytest.mark.parametrize("checkpointing", [None, "all"])
@pytest.mark.parametrize("kind", list(HF))
def test_models_of_transformers(run_ranks: RunRanks, kind: str, checkpointing: Any) -> None:
    training = Training(lambda: hf(kind), hf_language, checkpointing=checkpointing, steps=3)
    stages = STAGES if checkpointing is None else only("3")
    outcome = compare(run_ranks, 2, training, stages)[0]
    assert outcome.results[0].grad_norm > 0.2


def test_a_models_own_checkpointing(run_ranks: RunRanks) -> None:
    def model() -> nn.Module:
        made: Any = hf("llama")
        made.activation_checkpointing_enable()
        return made  # type: ignore[no-any-return]

    compare(run_ranks, 2, Training(model, hf_language, steps=3), only("2", "3"))


YAML = """
name: tiny
model: {hf: {config: %s}}
data: {path: %s, validation_fraction: 0.1, sequence_length: 8}
batch: {global: 8, micro: 2}
optimizer: {lr: 1e-2, eps: 1e-6}
train: {steps: 3, eval_every: 2, eval_samples: 4, sample_bytes: 3}
log: {every: 1}
"""


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_a_job_of_transformers_model(
    run_ranks: RunRanks, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers.logging.disable_progress_bar()
    (tmp_path / "text").write_bytes(b"the quick brown fox jumps over the lazy dog\n" * 20)
    job = tmp_path / "job.yaml"
    job.write_text(YAML % (json.dumps(HF[kind] | {"vocab_size": 256}), tmp_path / "text"))

    def losses(rank: int, stage: int) -> list[float]:
        events = tmp_path / f"{stage}-{rank}"
        with events.open("wb") as file:
            monkeypatch.setenv("DSTRAIN_EVENT_FD", str(file.fileno()))
            assert trainer.main([str(job), "--set", f"zero.stage={stage}", "--set", "zero.resident_elements=0"]) == 0
        said = [json.loads(line) for line in events.read_text().splitlines()]
        return [event[f] for event in said for f in ("loss", "val_loss") if f in event]

    expected = run_ranks(2, lambda rank: losses(rank, 0))[0]
    assert len(expected) == 6
    for stage in (1, 2, 3):
        for found in run_ranks(2, lambda rank, stage=stage: losses(rank, stage)):
            assert found == pytest.approx(expected, abs=1e-4)


# --- LoRA ------------------------------------------------------------------------------------------------------


class LoRA(nn.Module):
    """As peft has it: a frozen module, and two trained matrices of low rank beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.A = nn.Linear(base.in_features, 2, bias=False)
        self.B = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + self.B(self.A(x))
        return y


def lora() -> nn.Module:
    model: Any = hf("llama")
    model.requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.q_proj = LoRA(layer.self_attn.q_proj)
        layer.self_attn.v_proj = LoRA(layer.self_attn.v_proj)
    return model  # type: ignore[no-any-return]


@pytest.mark.parametrize("checkpointing", [None, "all"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_lora(run_ranks: RunRanks, checkpointing: Any, dtype: Any) -> None:
    training = Training(
        lora, hf_language, checkpointing=checkpointing, precision=PrecisionConfig(dtype=dtype), clip=None
    )
    compare(run_ranks, 2, training, atol=0.0)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's
def test_lora_by_peft(run_ranks: RunRanks) -> None:
    import peft

    def model() -> nn.Module:
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
        made: nn.Module = peft.get_peft_model(hf("llama"), config)
        return made

    compare(run_ranks, 2, Training(model, hf_language, checkpointing="all"))


# --- modules of torch's ----------------------------------------------------------------------------------------


def mean_square(engine: Engine, samples: Tensor) -> Tensor:
    return F.mse_loss(engine(samples), samples[:, :1].float() / 37)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.token = nn.Embedding(37, 7)
        self.memory = kind(7, 9, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(18, 1)

    def forward(self, samples: Tensor) -> Tensor:
        y: Tensor = self.head(self.memory(self.token(samples))[0][:, -1])
        return y


def gru() -> nn.Module:
    return Recurrent(nn.GRU)


class Transformer(nn.Module):
    """torch's own layers, whose attention reads its parameters itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.token = nn.Embedding(37, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 1)

    def forward(self, samples: Tensor) -> Tensor:
        x = self.encoder(self.token(samples))
        y: Tensor = self.head(self.attention(x, x, x)[0].mean(1))
        return y


class Convolutions(nn.Module):
    """Residual blocks of convolutions and batch norms, of which ranks have their own statistics."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv1d(1, 6, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv1d(6, 6, 3, padding=1, bias=False), nn.BatchNorm1d(6), nn.ReLU()) for _ in range(3)
        )
        self.up = weight_norm(nn.ConvTranspose1d(6, 5, 2))
        self.head = nn.Linear(5, 1)

    def forward(self, samples: Tensor) -> Tensor:
        x = self.stem(samples.unsqueeze(1).to(self.stem.weight.dtype) / 37)
        for block in self.blocks:
            x = x + block(x)
        y: Tensor = self.head(self.up(x).mean(2))
        return y


def validated(engine: Engine) -> None:
    """A forward without gradients, in which some modules take other ways."""
    engine.module.eval()
    engine.share_buffers()
    with torch.no_grad():
        first = engine(samples_of(engine, 2))
        assert torch.equal(first, engine.module(samples_of(engine, 2)))
        assert first.isfinite().all()
    engine.module.train()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("model", [Recurrent, gru, Transformer, Convolutions])
def test_modules_of_torch(run_ranks: RunRanks, model: Callable[[], nn.Module], dtype: Any) -> None:
    training = Training(
        model, mean_square, rows=4, clip=None, between=validated, precision=PrecisionConfig(dtype=dtype)
    )
    compare(run_ranks, 2, training, atol=0.0)
