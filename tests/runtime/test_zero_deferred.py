"""Models whose parameters are computed again: the same numbers, in the memory of one parameter."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from dstrain.runtime import initialize, trainer
from dstrain.runtime.comm import Communicator
from dstrain.runtime.engine import StepResult
from dstrain.runtime.models.gpt import GPT
from dstrain.runtime.spec.event import EventWriter
from dstrain.runtime.spec.load import load_job
from dstrain.runtime.spec.model_config import GPTConfig
from dstrain.runtime.zero import deferred
from dstrain.runtime.zero.deferred import Deferred, build_deferred

from .conftest import RunRanks

SMALL = 1 << 14


class Odd(nn.Module):
    """What constructors do: views, reads of what was made before, temporaries, orthogonal and truncated draws."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 64, padding_idx=3)
        self.square = nn.Linear(80, 80)
        self.made = nn.Parameter(torch.randn(90, 70) * 0.02 + 1)
        nn.init.orthogonal_(self.square.weight)
        nn.init.trunc_normal_(self.embedding.weight, std=0.3)
        self.embedding.weight.data[3].zero_()
        self.copy = nn.Parameter(self.made.detach().clone())
        with torch.no_grad():
            self.made.mul_(2)
            self.made[:10] += self.square.weight[:10, :70]
        self.register_buffer("table", torch.arange(10000.0).sqrt())
        self.tied = nn.Linear(64, 100, bias=False)
        self.tied.weight = self.embedding.weight
        self.lstm = nn.LSTM(40, 40)


class Rows(nn.Module):
    """Parameters filled row by row from small tensors that change in between."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.sums = nn.Linear(90, 90), nn.Linear(90, 90)
        row, scale = torch.empty(90), torch.ones(1)
        with torch.no_grad():
            for number in range(90):
                self.rows.weight[number].copy_(row.normal_())
                self.sums.weight[number].mul_(scale.add_(1))


class Keeper(nn.Module):
    """Large tensors that are neither parameters nor buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = torch.tril(torch.ones(90, 90))
        self.rotary = [torch.outer(torch.arange(90.0), torch.arange(90.0)).cos()]
        self.teachers = [nn.Linear(90, 90)]
        self.tail = torch.arange(8100.0)[100:]
        self.own = nn.Linear(90, 90)
        self.alias = self.own.weight.data


def gpt() -> nn.Module:
    return GPT(GPTConfig(vocabulary=300, context=64, width=64, layers=2, heads=2))


@pytest.mark.parametrize("build", [Odd, Rows, Keeper, gpt])
def test_filled_parameters_are_those_of_an_eager_construction(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(1)
    eager = build()
    drawn = torch.rand(3)
    torch.manual_seed(1)
    late, fills = build_deferred(lambda _: build(), SMALL)
    assert torch.equal(torch.rand(3), drawn)  # as many random numbers as before
    assert all(torch.equal(a, b) for a, b in zip(eager.buffers(), late.buffers(), strict=True))
    large = [p for p in late.parameters() if p.nbytes > 4 * SMALL]
    unfilled = [p for p in large if (p == 0).float().mean() > 0.5]  # all but the edges of its pages
    assert len(unfilled) >= len(large) - 1
    for wanted, found in zip(eager.parameters(), late.parameters(), strict=True):
        fills.fill(found)
        assert torch.equal(wanted, found)


def test_what_stays_beside_parameters_and_buffers_is_whole() -> None:
    torch.manual_seed(1)
    eager = Keeper()
    torch.manual_seed(1)
    late, _ = build_deferred(lambda _: Keeper(), SMALL)
    assert isinstance(late, Keeper)
    assert torch.equal(late.mask, eager.mask)
    assert torch.equal(late.rotary[0], eager.rotary[0])
    assert torch.equal(late.teachers[0].weight, eager.teachers[0].weight)
    assert torch.equal(late.tail, eager.tail)
    assert not torch.equal(late.alias, eager.alias), "a parameter's memory"


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1024, 1024) * 0.02)


@pytest.mark.parametrize("layer", [lambda: nn.Linear(1024, 1024), Scaled], ids=["in place", "of a temporary"])
def test_memory_is_that_of_one_parameter(layer: Callable[[], nn.Module]) -> None:
    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) / 256

    def build(_: Deferred) -> nn.Module:
        return nn.Sequential(*(layer() for _ in range(64)))  # 256 MiB

    before = resident()
    model, fills = build_deferred(build)
    assert resident() - before < 40
    fills.fill(next(model.parameters()))
    assert resident() - before < 40
    assert next(model.parameters()).std() > 0.01


JOB = """
model: {model}
data: {{path: {text}, sequence_length: 32}}
batch: {{global: 4, micro: 2}}
optimizer: {{lr: 0.01}}
train: {{steps: 3, sample_bytes: 20}}
zero: {{stage: {stage}, resident_elements: 100}}
precision: {{dtype: {dtype}}}
log: {{every: 1}}
"""
GPT_MODEL = "{gpt: {vocabulary: 256, context: 32, width: 64, layers: 2, heads: 2}}"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["gpt", "hf"])
def test_a_job_at_stage_3_is_that_of_stage_0(
    run_ranks: RunRanks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, dtype: str
) -> None:
    """The model is built unfilled at stage 3 alone; pretrained weights are streamed into the shards."""
    monkeypatch.setattr(deferred, "SMALLEST_BYTES", SMALL)
    monkeypatch.setattr(trainer, "build_deferred", partial(build_deferred, smallest_bytes=SMALL))
    (tmp_path / "text").write_bytes(bytes(range(32, 127)) * 300)
    model = GPT_MODEL
    if kind == "hf":
        llama = transformers.LlamaConfig(
            vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=32,
        )  # fmt: skip
        transformers.LlamaForCausalLM(llama).save_pretrained(tmp_path / "llama")
        model = f"{{hf: {{path: {tmp_path / 'llama'}}}}}"

    def note(losses: list[float], result: StepResult, **_: float) -> None:
        losses.append(result.loss)

    def work(rank: int) -> list[list[float]]:
        with Communicator.connect() as comm:
            found = []
            for stage in (0, 3):
                path = tmp_path / f"job-{stage}-{rank}.yaml"
                path.write_text(JOB.format(model=model, text=tmp_path / "text", stage=stage, dtype=dtype))
                job = trainer.Trainer(load_job(path), comm, EventWriter(None, "", 0, rank))
                losses: list[float] = []
                monkeypatch.setattr(job.report, "step", partial(note, losses))
                assert job.train()
                found.append(losses)
            return found

    for replicated, sharded in run_ranks(2, work):
        assert sharded == pytest.approx(replicated, rel=1e-5 if dtype == "fp32" else 2e-2)


def test_a_script_gives_what_makes_its_model(run_ranks: RunRanks) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(700, 700), nn.Linear(700, 700))  # 1.9 MiB each

    def work(rank: int) -> list[float]:
        found = []
        for stage, model in ((0, make()), (0, make), (3, make)):
            engine = initialize(model, {"zero": {"stage": stage, "resident_elements": 0}})
            for _ in range(2):
                engine.backward(engine(torch.ones(2, 700)).square().mean())
                result = engine.step()
                assert result is not None
            found.append(result.loss)
        return found

    for whole, made, sharded in run_ranks(2, work):
        assert whole == made
        assert sharded == pytest.approx(whole, rel=1e-5)
