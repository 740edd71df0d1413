"""bf16 and fp16 with fp32 master weights, loss scaling that all ranks share, autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dstrain.runtime.comm import Communicator
from dstrain.runtime.engine import Engine, EngineConfig, StepResult, TorchSchedule
from dstrain.runtime.precision import cast_parameters
from dstrain.runtime.spec.training_config import LossScaleConfig, PrecisionConfig

RunRanks = Callable[..., list[Any]]
LR = 0.05


def mlp(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))


def samples(step: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 6, generator=generator)
    return x[rows], x.sin().sum(1, keepdim=True)[rows]


def engine_of(model: nn.Module, comm: Communicator, precision: PrecisionConfig, **config: Any) -> Engine:
    return Engine(
        model,
        comm,
        EngineConfig(precision=precision, clip=1.0, **config),
        lambda parameters: torch.optim.SGD([p for _, p in parameters], lr=LR, momentum=0.9),
        TorchSchedule(None),
    )


def single() -> Communicator:
    return Communicator(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


def train(engine: Engine, steps: int) -> list[StepResult]:
    results = []
    comm = engine.comm
    for step in range(steps):
        x, y = samples(step, slice(comm.rank, None, comm.world_size))
        dtype = next(engine.module.parameters()).dtype
        loss = nn.functional.mse_loss(engine(x.to(dtype)).float(), y)
        engine.backward(loss, len(x))
        result = engine.step()
        assert result is not None
        results.append(result)
    return results


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_masters_are_what_a_plain_loop_with_fp32_copies_gives(dtype: str) -> None:
    """The oracle: forward and backward in low precision, clipping and SGD on fp32 copies."""
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    scale = LossScaleConfig(value=1.0)
    engine = engine_of(mlp(), single(), PrecisionConfig(dtype=dtype, loss_scale=scale))
    results = train(engine, 10)

    model = mlp()
    masters = [p.detach().to(torch_dtype).float().requires_grad_() for p in model.parameters()]
    model.to(torch_dtype)
    optimizer = torch.optim.SGD(masters, lr=LR, momentum=0.9)
    for step, result in enumerate(results):
        x, y = samples(step)
        loss = nn.functional.mse_loss(model(x.to(torch_dtype)).float(), y)
        model.zero_grad()
        loss.backward()
        for master, parameter in zip(masters, model.parameters(), strict=True):
            master.grad = parameter.grad.float()
        norm = nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(masters, model.parameters(), strict=True):
                parameter.copy_(master)
        # the engine's backward runs on the sum over 8 samples, exactly 8 times as much but for subnormal numbers
        assert result.loss == pytest.approx(loss.item(), rel=1e-5)
        assert result.grad_norm == pytest.approx(norm.item(), rel=1e-3)
    for (_, found), wanted in zip(engine.trained, masters, strict=True):
        torch.testing.assert_close(found.detach(), wanted.detach(), rtol=1e-3, atol=1e-5)
    assert {p.dtype for p in engine.module.parameters()} == {torch_dtype}
    for parameter, (_, master) in zip(engine.module.parameters(), engine.trained, strict=True):
        assert master.dtype == torch.float32
        assert torch.equal(parameter, master.to(torch_dtype))


def test_fp32_learns_alike_with_low_precision() -> None:
    exact = train(engine_of(mlp(), single(), PrecisionConfig()), 30)
    for dtype in ("bf16", "fp16"):
        scale = LossScaleConfig(initial_power=8)
        found = train(engine_of(mlp(), single(), PrecisionConfig(dtype=dtype, loss_scale=scale)), 30)
        assert not any(result.skipped for result in found)
        assert found[-1].loss == pytest.approx(exact[-1].loss, rel=0.2)
    assert exact[-1].loss < exact[0].loss / 3


class Overflowing(nn.Module):
    """A model whose gradient is infinite in fp16 when asked."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()
        self.factor = 1.0

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return _scale_gradient(out, self.factor)


def _scale_gradient(x: Tensor, factor: float) -> Tensor:
    if factor != 1.0:
        x.register_hook(lambda gradient: gradient * factor)
    return x


def test_overflow_on_one_rank_is_skipped_by_all(run_ranks: RunRanks) -> None:
    precision = PrecisionConfig(dtype="fp16", loss_scale=LossScaleConfig(initial_power=8, hysteresis=1, window=3))

    def work(rank: int) -> tuple[list[bool], list[float], list[bool], dict[str, Tensor]]:
        with Communicator.connect() as comm:
            model = Overflowing()
            engine = engine_of(model, comm, precision)
            skipped, scales, changed = [], [], []
            for step in range(6):
                model.factor = 1e9 if (rank, step) == (1, 1) else 1.0
                before = [master.detach().clone() for _, master in engine.trained]
                skipped.append(train_one(engine, step).skipped)
                scales.append(engine.scaler.value)
                changed.append(any(not torch.equal(a, b) for a, (_, b) in zip(before, engine.trained, strict=True)))
            return skipped, scales, changed, {name: master.detach().clone() for name, master in engine.trained}

    first, second = run_ranks(2, work)
    assert first[:3] == second[:3]
    skipped, scales, changed, _ = first
    assert skipped == [False, True, False, False, False, False]
    assert changed == [not one for one in skipped]
    assert scales == [256.0, 128.0, 128.0, 128.0, 256.0, 256.0]
    for name, tensor in first[3].items():
        assert torch.equal(tensor, second[3][name])


def train_one(engine: Engine, step: int) -> StepResult:
    comm = engine.comm
    x, y = samples(step, slice(comm.rank, None, comm.world_size))
    engine.backward(nn.functional.mse_loss(engine(x.half()).float(), y), len(x))
    result = engine.step()
    assert result is not None
    assert engine.global_step == step + 1
    return result


def test_the_scale_means_a_mean_whatever_the_number_of_tokens() -> None:
    """The backward runs on a sum; in fp16 that must not overflow sooner than the mean would."""
    for tokens in (1, 1 << 20):
        scale = LossScaleConfig(initial_power=12)
        engine = engine_of(mlp(), single(), PrecisionConfig(dtype="fp16", loss_scale=scale))
        x, y = samples(0)
        engine.backward(nn.functional.mse_loss(engine(x.half()).float(), y), tokens)
        result = engine.step()
        assert result is not None
        assert not result.skipped
        assert result.tokens == tokens


def test_autocast_keeps_parameters_in_fp32() -> None:
    engine = engine_of(mlp(), single(), PrecisionConfig(dtype="bf16", autocast=True))
    x, _ = samples(0)
    output = engine(x)
    assert output.dtype == torch.bfloat16
    assert {p.dtype for p in engine.module.parameters()} == {torch.float32}
    assert not engine.weights.exist
    with torch.autocast("cpu", torch.bfloat16):
        wanted = mlp()(x)
    assert torch.equal(output, wanted)
    with engine.autocast():
        assert (x @ x.T).dtype == torch.bfloat16


def test_gradients_are_summed_in_the_dtype_of_reduce_dtype(run_ranks: RunRanks) -> None:
    def work(rank: int) -> list[int]:
        with Communicator.connect() as comm:
            traffic = []
            for reduce_dtype in (None, "bf16"):
                engine = engine_of(mlp(), comm, PrecisionConfig(dtype="bf16", reduce_dtype=reduce_dtype))
                comm.take_traffic()
                train(engine, 1)
                traffic.append(comm.take_traffic())
            return traffic

    elements = sum(p.numel() for p in mlp().parameters())
    for full, half in run_ranks(2, work):
        assert (full, half) == (4 * elements + 64, 2 * elements + 64)


def test_buffers_keep_their_dtype_but_those_of_batch_norms() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model.register_buffer("table", torch.ones(3))
    cast_parameters(model, torch.bfloat16)
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert dtypes["table"] == torch.float32
    assert dtypes["1.running_mean"] == dtypes["0.weight"] == torch.bfloat16
    model(torch.randn(5, 4).bfloat16())
