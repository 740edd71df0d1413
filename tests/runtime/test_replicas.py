"""A rank whose memory has changed is found within one rotation and named; ranks that are right never are."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from dstrain.runtime import replicas, trainer
from dstrain.runtime.checkpoint.manifest import steps_in
from dstrain.runtime.comm import Communicator
from dstrain.runtime.engine import Engine, EngineConfig, TorchSchedule
from dstrain.runtime.optimizers import make_optimizer
from dstrain.runtime.spec.errors import ReplicasDifferError
from dstrain.runtime.spec.training_config import (
    OffloadConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    ZeroConfig,
)
from dstrain.runtime.zero import spread
from dstrain.runtime.zero.gradients import ShardedGradients
from dstrain.runtime.zero.weights import ShardedWeights

from .conftest import RunRanks

VOCABULARY = 37
PARTS = 4
SPOILT_AT = 5  # steps done before
BIT = 12  # of the 23 of a mantissa


class Everything(nn.Module):
    """Dropout, a tied head, frozen and unused parameters, a batch norm, sizes that do not divide."""

    def __init__(self, width: int = 11) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.norm = nn.BatchNorm1d(width)
        self.unused = nn.Linear(3, 3)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.token.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens)
        for block in self.blocks:
            x = x + F.dropout(torch.tanh(block(x)), 0.1)
        logits: Tensor = self.head(self.norm(self.frozen(x).flatten(0, 1)))
        return logits


def engine_of(
    comm: Communicator, zero: dict[str, Any], optimizer: OptimizerConfig | None = None, **config: Any
) -> Engine:
    torch.manual_seed(0)
    model = Everything()
    torch.manual_seed(1 + comm.rank)  # dropout differs between ranks
    chosen = optimizer or OptimizerConfig(lr=1e-3)
    return Engine(
        model,
        comm,
        EngineConfig(zero=ZeroConfig(**zero), clip=0.5, **{"check_replicas_every": 1, **config}),
        lambda parameters: make_optimizer(parameters, chosen),
        TorchSchedule(None),
    )


def train_step(engine: Engine, spoil: Callable[[], object] = lambda: None) -> None:
    generator = torch.Generator().manual_seed(engine.global_step * 100 + engine.rank)
    tokens = torch.randint(VOCABULARY, (2, 5), generator=generator)
    loss = F.cross_entropy(engine(tokens[:, :-1]).float(), tokens[:, 1:].flatten())
    engine.backward(loss, 8)
    spoil()
    engine.step()


def flip(tensor: Tensor, bit: int = BIT) -> None:
    """One bit of its middle element."""
    flat = tensor.detach().view(-1)
    words = flat.view({2: torch.int16, 4: torch.int32}[flat.itemsize])
    words[words.numel() // 2] ^= 1 << bit


def parameter(engine: Engine, name: str) -> Tensor:
    return dict(engine.module.named_parameters())[name].data


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "PARTS", PARTS)
    monkeypatch.setattr(replicas, "SLICE_ELEMENTS", 1)


class Found(NamedTuple):
    """On one rank: in which step, and what was said."""

    step: int
    said: str
    ranks: tuple[int, ...]


def find(
    run_ranks: RunRanks,
    ranks: int,
    guilty: int,
    spoil: Callable[[Engine], object],
    zero: dict[str, Any],
    again: bool = False,
    **config: Any,
) -> Found:
    """Spoil rank `guilty` once, or in each step from then on; all ranks must find the same, within a rotation."""
    every = config.get("check_replicas_every", 1)
    rotation = 2 * PARTS * every

    def work(rank: int) -> Found:
        with Communicator.connect() as comm:
            engine = engine_of(comm, zero, **config)
            while engine.global_step < SPOILT_AT + rotation:
                step = engine.global_step
                is_spoilt = rank == guilty and (step == SPOILT_AT or (again and step > SPOILT_AT))
                try:
                    train_step(engine, lambda now=is_spoilt: now and spoil(engine))
                except ReplicasDifferError as error:
                    return Found(engine.global_step + 1, str(error), error.ranks)
        raise AssertionError("not found")

    first, *others = run_ranks(ranks, work)
    assert all(other == first for other in others)
    found: Found = first
    assert found.step > SPOILT_AT
    assert f"step {found.step}: expected " in found.said
    return found


NAMES = ["token.weight", "blocks.1.weight", "frozen.weight", "norm.bias", "unused.weight"]


@pytest.mark.parametrize(("ranks", "name"), [*((2, name) for name in NAMES), (3, "token.weight"), (4, "norm.bias")])
def test_a_flipped_bit_of_a_replicated_parameter_is_named(
    run_ranks: RunRanks, small_slices: None, ranks: int, name: str
) -> None:
    found = find(run_ranks, ranks, 1, lambda engine: flip(parameter(engine, name)), {"stage": 0})
    everyone = ", ".join(map(str, range(ranks)))
    assert f"expected {name} to be the same on ranks {everyone}, found " in found.said
    others = {2: "", 3: "ranks 0, 2", 4: "ranks 0, 2, 3"}[ranks]
    blamed = f"rank 1 to differ from {others}; " if others else "rank 0 against rank 1; "
    assert f"found {blamed}memory or a processor there may be faulty" in found.said
    assert found.ranks == ((1,) if ranks > 2 else (0, 1))


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("name", ["token.weight", "blocks.1.weight", "unused.weight"])
def test_a_bad_cell_below_a_gathered_parameter_is_named(
    run_ranks: RunRanks, small_slices: None, ranks: int, stage: int, name: str
) -> None:
    """What is gathered anew in each step heals; a cell that loses its bit again and again does not."""
    zero = {"stage": stage, "bucket_elements": 300}
    found = find(run_ranks, ranks, ranks - 1, lambda engine: flip(parameter(engine, name)), zero, again=True)
    assert f"expected {name}" in found.said
    assert ranks - 1 in found.ranks
    assert len(found.ranks) == (1 if ranks == 3 else 2)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_slice_every_third_step_finds_a_frozen_parameter(run_ranks: RunRanks, small_slices: None, stage: int) -> None:
    spoil: Callable[[Engine], object] = lambda engine: flip(parameter(engine, "frozen.weight"))  # noqa: E731
    found = find(run_ranks, 3, 0, spoil, {"stage": stage}, check_replicas_every=3)
    assert "expected frozen.weight to be" in found.said
    assert found.ranks == (0,)
    assert found.step % 3 == 0


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_shard_is_compared_with_its_replica(run_ranks: RunRanks, small_slices: None, stage: int) -> None:
    def spoil(engine: Engine) -> None:
        shard = engine.weights.shard_of("token.weight")
        assert shard is not None
        flip(shard)

    zero = {"stage": stage, "bucket_elements": 300, "resident_elements": 0}
    found = find(run_ranks, 4, 3, spoil, zero, parallel=ParallelConfig(data_shard=2))
    assert "expected token.weight to be" in found.said
    assert 3 in found.ranks
    if stage == 3:
        assert "expected token.weight to be the same on ranks 1, 3, found rank 1 against rank 3" in found.said


@pytest.mark.parametrize("stage", [0, 3])
def test_the_optimizers_state_is_compared(run_ranks: RunRanks, small_slices: None, stage: int) -> None:
    """With a learning rate that moves nothing, no parameter shows it."""

    def spoil(engine: Engine) -> None:
        flip(engine.optimizer.state[dict(engine.trained)["blocks.1.weight"]]["exp_avg"], bit=22)

    zero, parallel = {"stage": stage, "resident_elements": 0}, ParallelConfig(data_shard=1 if stage else None)
    found = find(run_ranks, 3, 2, spoil, zero, optimizer=OptimizerConfig(lr=1e-30), parallel=parallel)
    assert "expected exp_avg of blocks.1.weight to be the same on ranks 0, 1, 2, found rank 2 to differ" in found.said


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_master_is_compared_where_its_parameter_does_not_show_it(
    run_ranks: RunRanks, small_slices: None, dtype: str
) -> None:
    def spoil(engine: Engine) -> None:
        flip(dict(engine.trained)["blocks.1.weight"], bit=2)

    found = find(run_ranks, 3, 0, spoil, {"stage": 0}, precision=PrecisionConfig(dtype=dtype))  # type: ignore[arg-type]
    assert "blocks.1.weight" in found.said
    assert found.ranks == (0,)


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "0": (3, {"zero": {"stage": 0}}),
    "1": (2, {"zero": {"stage": 1, "bucket_elements": 300}}),
    "2": (3, {"zero": {"stage": 2, "bucket_elements": 300}}),
    "3": (2, {"zero": {"stage": 3, "resident_elements": 50}}),
    "2, hybrid": (4, {"zero": {"stage": 2}, "parallel": ParallelConfig(data_shard=2)}),
    "3, hybrid": (4, {"zero": {"stage": 3, "resident_elements": 50}, "parallel": ParallelConfig(data_shard=2)}),
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_false_alarm_in_200_steps(run_ranks: RunRanks, small_slices: None, layout: str, dtype: str) -> None:
    ranks, config = LAYOUTS[layout]

    def work(rank: int) -> int:
        with Communicator.connect() as comm:
            precision = PrecisionConfig(dtype=dtype)  # type: ignore[arg-type]
            engine = engine_of(comm, precision=precision, ema_decay=0.9, **config)
            for step in range(200):
                train_step(engine)
                if step % 50 == 0:
                    engine.check_replicas()
            return engine.global_step

    assert run_ranks(ranks, work) == [200] * ranks


@pytest.mark.parametrize("name", ["sgd", "adafactor", "muon"])
@pytest.mark.parametrize("layout", ["0", "2, hybrid"])
def test_no_false_alarm_with_other_optimizers(run_ranks: RunRanks, small_slices: None, layout: str, name: str) -> None:
    ranks, config = LAYOUTS[layout]

    def work(rank: int) -> None:
        with Communicator.connect() as comm:
            engine = engine_of(comm, optimizer=OptimizerConfig(name=name), **config)  # type: ignore[arg-type]
            for _ in range(50):
                train_step(engine)
            engine.check_replicas()

    run_ranks(ranks, work)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_no_false_alarm_with_offload(run_ranks: RunRanks, small_slices: None, stage: int) -> None:
    """As on a GPU; both memories are the CPU's here."""
    offload = OffloadConfig(optimizer=True, parameters=stage == 3)

    def weights(*args: Any, **kwargs: Any) -> ShardedWeights:
        return ShardedWeights(*args, **{**kwargs, "offload": offload})

    def gradients(*args: Any) -> ShardedGradients:
        return ShardedGradients(*args[:-2], True, args[-1])

    def work(rank: int) -> None:
        with (
            Communicator.connect() as comm,
            patch.object(spread, "ShardedWeights", weights),
            patch.object(spread, "ShardedGradients", gradients),
        ):
            engine = engine_of(comm, {"stage": stage, "resident_elements": 50}, parallel=ParallelConfig(data_shard=1))
            for _ in range(200):
                train_step(engine)
            engine.check_replicas()

    run_ranks(2, work)


def test_ranks_on_unlike_processors_compare_only_what_was_copied(
    run_ranks: RunRanks, small_slices: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(replicas, "_processor", lambda device: os.environ["RANK"])

    def work(rank: int) -> list[int]:
        with Communicator.connect() as comm:
            return [reached(engine_of(comm, {"stage": stage}), rank) for stage in (0, 1)]

    def reached(engine: Engine, rank: int) -> int:
        try:
            for step in range(20):
                is_spoilt = rank == 1 and step == 5
                train_step(engine, lambda now=is_spoilt: now and flip(parameter(engine, "frozen.weight")))
        except ReplicasDifferError:
            pass
        return engine.global_step

    for stage_0, stage_1 in run_ranks(2, work):
        assert stage_0 == 20
        assert 5 <= stage_1 < 20
    said = "dstrain: train.check_replicas_every: ranks have other processors or numbers of threads, "
    assert [line.startswith(said) for line in capfd.readouterr().err.splitlines()] == [True, True]


# --- the trainer -------------------------------------------------------------------------------------------------

YAML = """
name: tiny
model: {{gpt: {{layers: 1, width: 16, heads: 2, context: 16}}}}
data: {{path: {folder}/text, validation_fraction: 0.1}}
batch: {{global: 12, micro: 2}}
train: {{steps: 20, eval_samples: 7, sample_bytes: 0, check_replicas_every: 1}}
checkpoint: {{dir: {folder}/saved, every_steps: 5, keep_last: null}}
log: {{every: 100}}
"""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("DSTRAIN_JOB", "DSTRAIN_EVENT_FD", "DSTRAIN_ATTEMPT"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "text").write_bytes(random.Random(0).randbytes(8000))
    (tmp_path / "job.yaml").write_text(YAML.format(folder=tmp_path))
    return tmp_path / "job.yaml"


@pytest.fixture
def spoilt(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`spoilt(times)`: in the step after the 12th, rank 1 loses a bit, the first times that it is trained."""
    backward = Engine.backward

    def begin(times: int) -> None:
        left = iter(range(times))

        def faulty(engine: Engine, loss: Any, tokens: int | None = None) -> None:
            is_there = engine.rank == 1 and engine.global_step == 12 and engine.micro_step == 0
            if is_there and next(left, None) is not None:
                flip(parameter(engine, "blocks.0.mlp.0.weight"))
            backward(engine, loss, tokens)

        monkeypatch.setattr(Engine, "backward", faulty)

    return begin


def train(run_ranks: RunRanks, job: Path, *settings: str) -> list[int]:
    words = [word for setting in settings for word in ("--set", setting)]
    codes: list[int] = run_ranks(2, lambda rank: trainer.main([str(job), *words]))
    return codes


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".safetensors"}


def test_a_rank_that_differs_stops_all_with_209(
    run_ranks: RunRanks, job: Path, spoilt: Callable[[int], None], capfd: pytest.CaptureFixture[str]
) -> None:
    spoilt(1)
    assert train(run_ranks, job) == [209, 209]
    (said,) = capfd.readouterr().err.splitlines()
    assert said.startswith("dstrain: step 14: expected blocks.0.mlp.0.weight to be the same on ranks 0, 1, found ")


def test_what_is_poisoned_is_not_saved(
    run_ranks: RunRanks, job: Path, tmp_path: Path, spoilt: Callable[[int], None], capfd: pytest.CaptureFixture[str]
) -> None:
    spoilt(1)
    assert train(run_ranks, job, "train.check_replicas_every=1000") == [209, 209]
    assert "dstrain: behind step 15: expected blocks.0.mlp.0.weight to be" in capfd.readouterr().err
    assert steps_in(tmp_path / "saved") == [10, 5]


def test_unless_it_is_told_not_to_look(
    run_ranks: RunRanks, job: Path, tmp_path: Path, spoilt: Callable[[int], None]
) -> None:
    spoilt(1)
    assert train(run_ranks, job, "train.check_replicas_every=0") == [0, 0]
    assert steps_in(tmp_path / "saved") == [20, 15, 10, 5]


def test_a_rank_that_differs_is_rewound_once(
    run_ranks: RunRanks, job: Path, tmp_path: Path, spoilt: Callable[[int], None], capfd: pytest.CaptureFixture[str]
) -> None:
    assert train(run_ranks, job, f"checkpoint.dir={tmp_path}/straight") == [0, 0]
    spoilt(1)
    assert train(run_ranks, job, "train.on_nonfinite=rewind") == [0, 0]
    said = capfd.readouterr().out
    assert "warning: step 14: expected blocks.0.mlp.0.weight to be the same" in said
    assert "resumed from step 10: " in said
    assert files(tmp_path / "saved" / "step-20") == files(tmp_path / "straight" / "step-20")
    spoilt(2)
    assert train(run_ranks, job, "train.on_nonfinite=rewind", f"checkpoint.dir={tmp_path}/twice") == [209, 209]
    assert steps_in(tmp_path / "twice") == [10, 5]


# --- the parts that need no ranks ----------------------------------------------------------------------------------


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_every_flipped_bit_shows(dtype: torch.dtype, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 40))
    raw = data.draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))
    if dtype is torch.bool:
        raw = bytes(byte & 1 for byte in raw)
    tensor = torch.frombuffer(bytearray(raw), dtype=dtype)
    cpu = torch.device("cpu")
    before = int(replicas.checksum([tensor], cpu))
    assert 0 <= before < replicas.PRIME < 2**53
    position, bit = data.draw(st.integers(0, len(raw) - 1)), data.draw(st.integers(0, 7))
    tensor.view(torch.uint8)[position] ^= 1 << bit
    assert int(replicas.checksum([tensor], cpu)) != before


@given(
    sizes=st.lists(st.integers(0, 60), max_size=8),
    parts=st.integers(1, 9),
    smallest=st.integers(1, 50),
    first=st.integers(0, 100),
)
def test_slices_of_one_rotation_are_all_of_it(sizes: list[int], parts: int, smallest: int, first: int) -> None:
    numbers: Iterator[int] = iter(range(sum(sizes)))
    tensors = [(str(size), torch.tensor([next(numbers) for _ in range(size)])) for size in sizes]
    with patch.object(replicas, "PARTS", parts), patch.object(replicas, "SLICE_ELEMENTS", smallest):
        turns = [replicas.slice_of(tensors, first + turn) for turn in range(parts)]
        count = min(parts, max(1, sum(sizes) // smallest))
    seen = [int(value) for pieces in turns[:count] for piece in pieces for value in piece]
    assert sorted(seen) == list(range(sum(sizes)))


def test_where_memory_lies_changes_no_checksum() -> None:
    cpu, numbers = torch.device("cpu"), torch.arange(10, dtype=torch.float32)
    shifted = torch.cat([torch.zeros(1), numbers])[1:]
    assert int(replicas.checksum([numbers], cpu)) == int(replicas.checksum([shifted], cpu))
