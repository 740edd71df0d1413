"""The engine against torch's DDP, against one process, and against ranks that disagree."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_pre_hook

from dstrain.runtime.comm import Communicator, Pending
from dstrain.runtime.comm_group import CommGroup
from dstrain.runtime.engine import Engine, EngineConfig, StepResult, TorchSchedule
from dstrain.runtime.models.gpt import GPT, next_token_loss
from dstrain.runtime.optimizers import make_optimizer
from dstrain.runtime.spec.errors import NonFiniteError, UsageError
from dstrain.runtime.spec.model_config import GPTConfig
from dstrain.runtime.spec.training_config import OptimizerConfig, ZeroConfig

RunRanks = Callable[..., list[Any]]

MODEL = GPTConfig(layers=2, width=32, heads=4, context=16)
OPTIMIZER = OptimizerConfig(lr=1e-3, eps=1e-6)
LR = 1e-3
CLIP = 0.2  # below the norms of these models: every step clips
GLOBAL = 12
STEPS = 5


class Tolerance(NamedTuple):
    """As torch.testing.assert_close has it."""

    rtol: float
    atol: float


# Two sums of the same float32 numbers in another order differ by some 1e-7 of their parts. Adam divides a
# gradient by its size, so a parameter moves by up to LR a step; where the parts of a gradient nearly cancel, a
# difference d shows as LR·d/eps at most: with parts below 0.1 that is 1e-2·LR.
SAME_LOSS = 1e-5
SAME_GRADIENT = Tolerance(rtol=1e-4, atol=1e-6)
SAME_PARAMETER = Tolerance(rtol=0.0, atol=STEPS * LR * 1e-2)
BITWISE = Tolerance(rtol=0.0, atol=0.0)


def single() -> Communicator:
    return Communicator(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


def gpt(seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    return GPT(MODEL)


def engine_of(model: nn.Module, comm: Communicator, accumulation: int = 1, **config: Any) -> Engine:
    config = {"clip": CLIP} | config
    zero = ZeroConfig(bucket_elements=config.pop("bucket_elements", 5000))
    return Engine(
        model,
        comm,
        EngineConfig(zero=zero, accumulation=accumulation, **config),
        lambda parameters: make_optimizer(parameters, OPTIMIZER),
        TorchSchedule(None),
    )


def batch(step: int) -> Tensor:
    """The global batch of a step: the same on every rank."""
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randint(256, (GLOBAL, MODEL.context + 1), generator=generator)


def train(engine: Engine, comm: Communicator, micro: int, steps: int = STEPS) -> list[StepResult]:
    accumulation = -(-GLOBAL // comm.world_size // micro)
    engine.config = replace(engine.config, accumulation=accumulation)
    results = []
    for step in range(steps):
        mine = batch(step)[comm.rank :: comm.world_size]
        for piece in mine.split(micro):  # type: ignore[no-untyped-call]
            loss = next_token_loss(engine(piece[:, :-1]), piece)
            engine.backward(loss, piece[:, 1:].numel())
            results.append(engine.step())
    done = [result for result in results if result is not None]
    assert len(done) == steps
    return done


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


class recorded_gradients:
    """The gradients that optimizers in this block are given: for each step, by parameter name."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.steps: list[dict[str, Tensor]] = []

    def __enter__(self) -> list[dict[str, Tensor]]:
        self._handle = register_optimizer_step_pre_hook(self._record)
        return self.steps

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _record(self, *_: object) -> None:
        named = self._model.named_parameters()
        self.steps.append({name: p.grad.clone() for name, p in named if p.grad is not None})


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: Tolerance) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        rtol, atol = tolerance
        torch.testing.assert_close(value, expected[name], rtol=rtol, atol=atol, msg=f"{name} differs")


def ddp_training(model: nn.Module, comm: Communicator) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step by torch's DDP."""
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=LR,
        betas=OPTIMIZER.betas,
        eps=OPTIMIZER.eps,
        weight_decay=OPTIMIZER.weight_decay,
    )
    results = []
    for step in range(STEPS):
        mine = batch(step)[comm.rank :: comm.world_size]
        loss = next_token_loss(ddp(mine[:, :-1]), mine)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach()
        comm.all_reduce(mean)
        results.append((mean.item() / comm.world_size, norm.item()))
    return results


@pytest.mark.parametrize("ranks", [2, 3])
def test_equals_ddp(run_ranks: RunRanks, ranks: int) -> None:
    def work(rank: int) -> None:
        with Communicator.connect() as comm:
            ours, theirs = gpt(seed=rank), gpt(seed=rank)  # rank 0's parameters win in both
            with recorded_gradients(ours) as our_gradients:
                our_results = train(engine_of(ours, comm), comm, micro=GLOBAL)
            with recorded_gradients(theirs) as their_gradients:
                their_results = ddp_training(theirs, comm)
            for result, (loss, norm) in zip(our_results, their_results, strict=True):
                assert result.loss == pytest.approx(loss, abs=SAME_LOSS)
                assert result.grad_norm == pytest.approx(norm, rel=1e-4)
                assert result.grad_norm > CLIP
            assert len(our_gradients) == len(their_gradients) == STEPS
            for found, expected in zip(our_gradients, their_gradients, strict=True):
                assert_close(found, expected, SAME_GRADIENT)
            assert_close(state(ours), state(theirs), SAME_PARAMETER)

    run_ranks(ranks, work)


@pytest.mark.parametrize(("ranks", "micro"), [(1, 5), (2, 6), (2, 2), (3, 3), (4, 1)])
def test_equals_one_process(run_ranks: RunRanks, ranks: int, micro: int) -> None:
    """Also with a last micro-batch that is smaller: the mean is over tokens, not over micro-batches."""
    model = gpt()
    expected = train(engine_of(model, single()), single(), micro=GLOBAL)

    def work(rank: int) -> tuple[list[StepResult], dict[str, Tensor]]:
        with Communicator.connect() as comm:
            replica = gpt(seed=rank)
            return train(engine_of(replica, comm), comm, micro), state(replica)

    replies = run_ranks(ranks, work)
    for results, parameters in replies:
        for found, wanted in zip(results, expected, strict=True):
            assert found.loss == pytest.approx(wanted.loss, abs=SAME_LOSS)
            assert found.tokens == wanted.tokens == GLOBAL * MODEL.context
        assert_close(parameters, state(model), SAME_PARAMETER)
        assert_close(parameters, replies[0][1], BITWISE)  # the ranks agree bitwise


class Branches(nn.Module):
    """Each rank uses its own branch, and nobody the last."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(4, 4)
        self.branches = nn.ModuleList(nn.Linear(4, 1) for _ in range(3))

    def forward(self, x: Tensor, branch: int) -> Tensor:
        loss: Tensor = self.branches[branch](self.shared(x)).square().mean()
        return loss


def test_unused_parameters_count_as_zero(run_ranks: RunRanks) -> None:
    def work(rank: int) -> list[dict[str, Tensor]]:
        with Communicator.connect() as comm:
            torch.manual_seed(0)
            model = Branches()
            engine = engine_of(model, comm, bucket_elements=6, clip=None)
            with recorded_gradients(model) as gradients:
                for branch in (rank, 1 - rank):  # what one step used, the next does not
                    engine.backward(model(torch.full((3, 4), 1.0 + rank), branch), 3)
                    assert engine.step() is not None
            return gradients

    first, second = run_ranks(2, work)
    torch.manual_seed(0)
    model = Branches()
    (model(torch.full((3, 4), 1.0), 0) / 2 + model(torch.full((3, 4), 2.0), 1) / 2).backward()
    wanted = {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in model.named_parameters()}
    assert_close(first[0], wanted, SAME_GRADIENT)
    assert wanted["branches.0.weight"].abs().sum() > 0
    assert not first[0]["branches.2.weight"].any()
    for found, other in zip(first, second, strict=True):
        assert_close(found, other, BITWISE)


def test_accumulation_communicates_once(run_ranks: RunRanks) -> None:
    def work(rank: int) -> list[int]:
        with Communicator.connect() as comm:
            traffic = []
            for micro in (6, 1):
                engine = engine_of(gpt(), comm)
                comm.take_traffic()
                train(engine, comm, micro, steps=1)
                traffic.append(comm.take_traffic())
            return traffic

    elements = sum(parameter.numel() for parameter in gpt().parameters())
    for once, six_micro_batches in run_ranks(2, work):
        assert once == six_micro_batches == 4 * elements + 64  # 2·(N−1)/N = 1; eight doubles of the step


class Recording(Communicator):
    """One of two ranks, that notes when collectives start, in place of doing them."""

    def __init__(self, notes: list[str]) -> None:
        super().__init__(0, 2, 0, torch.device("cpu"))
        self.notes = notes

    def broadcast(self, tensor: Tensor) -> None:
        self.notes.append(f"broadcast {tensor.numel()}")

    def everyone(self) -> CommGroup:
        return cast(CommGroup, self)

    def choose(self, wish: str) -> None:
        assert wish == "auto"

    def start_all_reduce(self, tensor: Tensor) -> Pending:
        self.notes.append(f"all_reduce {tensor.numel()}")
        return single().start_all_reduce(tensor)


def test_collectives_overlap_the_backward_in_a_fixed_order() -> None:
    notes: list[str] = []
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 2, bias=False), nn.Linear(2, 1, bias=False))
    engine = engine_of(model, Recording(notes), bucket_elements=1, accumulation=2)
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda _, name=name: notes.append(f"gradient {name}"))  # type: ignore[no-untyped-call]
    notes.clear()
    for _ in range(2):
        engine.backward(model(torch.ones(2, 3)).mean(), 2)
    gradients = ["gradient 2.weight", "gradient 1.weight", "gradient 0.weight"]
    assert notes[:3] == gradients
    assert notes[3:] == [
        "gradient 2.weight",
        "all_reduce 2",
        "gradient 1.weight",
        "all_reduce 6",
        "gradient 0.weight",
        "all_reduce 9",
    ]


def test_buckets_hold_up_to_their_size_and_larger_parameters_alone() -> None:
    notes: list[str] = []
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 1))  # from the back: 1, 10, 10, 100 elements
    engine = engine_of(model, Recording(notes), bucket_elements=15)
    notes.clear()
    engine.backward(model(torch.ones(1, 10)).mean())
    assert notes == ["all_reduce 11", "all_reduce 10", "all_reduce 100"]


def test_the_norm_of_many_gradients_is_exact() -> None:
    """Squares that are added in fp32 one after the other lose 1e-4 of a sum of 4 Mi, 1e-3 of 30 Mi."""
    model = nn.Linear(1 << 11, 1 << 11, bias=False)
    engine = engine_of(model, single(), bucket_elements=1 << 22, clip=None)
    inputs = torch.randn(8, 1 << 11, generator=torch.Generator().manual_seed(0))
    engine.backward(model(inputs).square().mean())
    expected = (
        torch.cat([gradient.double().flatten() for _, _, gradient in engine.weights.with_gradients()]).norm().item()
    )
    result = engine.step()
    assert result is not None
    assert result.grad_norm == pytest.approx(expected, rel=5e-6)


def test_buffers_and_frozen_parameters_start_as_rank_zero_has_them(run_ranks: RunRanks) -> None:
    def work(rank: int) -> dict[str, Tensor]:
        with Communicator.connect() as comm:
            torch.manual_seed(rank)
            linear, norm = nn.Linear(2, 2), nn.BatchNorm1d(2)
            linear.bias.requires_grad_(False)
            assert norm.running_mean is not None
            norm.running_mean.fill_(rank + 1)
            model = nn.Sequential(linear, norm)
            engine_of(model, comm)
            return {name: value.clone() for name, value in model.state_dict().items()}

    first, second = run_ranks(2, work)
    assert_close(second, first, BITWISE)


def broken(model: nn.Module, where: str) -> Tensor:
    loss: Tensor = model(torch.ones(2, 4)).mean()
    if where == "loss":
        loss = loss * float("nan")
    if where == "gradient":  # the square root of 0 is finite, its slope is not
        loss = loss + torch.sqrt(next(model.parameters())[0, 0] * 0)
    return loss


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_non_finite_on_one_rank_stops_all_at_the_same_step(run_ranks: RunRanks, where: str) -> None:
    def work(rank: int) -> tuple[str, bool]:
        with Communicator.connect() as comm:
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
            engine = engine_of(model, comm)
            engine.backward(broken(model, "nowhere"), 2)
            engine.step()
            before = state(model)
            engine.backward(broken(model, where if rank == 1 else "nowhere"), 2)
            with pytest.raises(NonFiniteError) as caught:
                engine.step()
            same = all(torch.equal(before[name], after) for name, after in state(model).items())
            return str(caught.value), same

    (first, unchanged), other = run_ranks(2, work)
    assert other == (first, unchanged)
    assert unchanged, "no parameter changes in the step that fails"
    assert first.startswith(f"step 2: expected a finite {where}, found ")
    if where == "gradient":
        assert "(in 0.weight)" in first


def uneven(step: int) -> list[Tensor]:
    """The samples of a step, each of another length."""
    generator = torch.Generator().manual_seed(7000 + step)
    lengths = [1 + (step + sample) % MODEL.context for sample in range(GLOBAL)]
    return [torch.randint(8, (1, length + 1), generator=generator) for length in lengths]


@pytest.mark.parametrize(
    ("ranks", "steps"), [(2, 10), *(pytest.param(ranks, 50, marks=pytest.mark.slow) for ranks in (2, 3, 4))]
)
def test_steps_of_uneven_samples_are_the_same_in_every_layout(run_ranks: RunRanks, ranks: int, steps: int) -> None:
    """Each micro-batch has another number of tokens; with accumulation and clipping the losses agree to 1e-5."""

    def losses_of(comm: Communicator) -> list[float]:
        engine = engine_of(gpt(), comm, accumulation=GLOBAL // comm.world_size, clip=CLIP)
        found = []
        for step in range(steps):
            for sample in uneven(step)[comm.rank :: comm.world_size]:
                engine.backward(next_token_loss(engine(sample[:, :-1]), sample), sample[:, 1:].numel())
                result = engine.step()
            assert result is not None
            found.append(result.loss)
        return found

    def work(rank: int) -> list[float]:
        with Communicator.connect() as comm:
            return losses_of(comm)

    expected = losses_of(single())
    assert expected[-1] < expected[0]
    for found in run_ranks(ranks, work):
        assert found == pytest.approx(expected, abs=SAME_LOSS)


def test_a_second_backward_needs_a_step() -> None:
    model = nn.Linear(2, 1)
    engine = engine_of(model, single())
    engine.backward(model(torch.ones(1, 2)).sum())
    with pytest.raises(UsageError, match=r"engine.backward: expected engine.step\(\) behind every backward"):
        engine.backward(model(torch.ones(1, 2)).sum())


def test_a_step_needs_a_backward() -> None:
    model = nn.Linear(2, 1)
    engine = engine_of(model, single(), accumulation=2)
    model(torch.ones(1, 2)).sum().backward()  # torch's alone: the engine would wait for its own for ever
    for finished in (None, False, True):
        if finished is not None:
            engine.backward(model(torch.ones(1, 2)).sum())
            assert (engine.step() is not None) == finished
        with pytest.raises(UsageError, match=r"engine.step: expected engine.backward\(loss\) before every step\(\)"):
            engine.step()
    assert engine.global_step == 1


def test_a_backward_of_somebody_else_counts_for_nothing() -> None:
    def norm(disturbed: bool) -> float:
        torch.manual_seed(0)
        model = nn.Linear(2, 1)
        engine = engine_of(model, single())
        if disturbed:
            (100 * model(torch.ones(1, 2)).sum()).backward()
        engine.backward(model(torch.ones(1, 2)).sum())
        result = engine.step()
        assert result is not None
        return result.grad_norm

    assert norm(disturbed=True) == norm(disturbed=False)


def test_a_micro_batch_of_padding_alone_counts_for_nothing() -> None:
    model = nn.Linear(2, 1)
    engine = engine_of(model, single(), accumulation=2)
    engine.backward(model(torch.ones(1, 2)).sum(), 3)
    assert engine.step() is None
    engine.backward(model(torch.ones(1, 2)).sum() * float("nan"), 0)
    result = engine.step()
    assert result is not None
    assert result.tokens == 3
    assert result.grad_norm == pytest.approx(3**0.5, rel=1e-5)


def test_parameters_that_the_optimizer_does_not_move_do_not_pile_up() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    head = torch.optim.SGD(model[1].parameters(), lr=0.0)
    engine = Engine(model, single(), EngineConfig(), head, TorchSchedule(None))
    norms = set()
    for _ in range(3):
        engine.backward(model(torch.ones(1, 2)).sum())
        result = engine.step()
        assert result is not None
        norms.add(result.grad_norm)
    assert len(norms) == 1


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_steps_that_are_not_finite_are_left_out_where_the_job_says_so(run_ranks: RunRanks, stage: int) -> None:
    """Ten in a row, whichever rank has them; the parameters stay as they are meanwhile."""

    def work(rank: int) -> list[bool]:
        with Communicator.connect() as comm:
            torch.manual_seed(0)
            config = EngineConfig(zero=ZeroConfig(stage=stage, resident_elements=0), on_nonfinite="skip")
            model = nn.Linear(2, 1)
            engine = Engine(
                model, comm, config, lambda named: torch.optim.SGD([p for _, p in named], 0.1), TorchSchedule(None)
            )
            skipped = []
            for step in range(14):
                bad = rank == 1 and (step == 1 or step > 2)
                engine.backward(engine(torch.ones(1, 2)).sum() * (float("nan") if bad else 1.0))
                if step == 13:
                    with pytest.raises(NonFiniteError):
                        engine.step()
                    break
                result = engine.step()
                assert result is not None
                skipped.append(result.skipped)
            with engine.whole(model.parameters()):
                assert all(parameter.isfinite().all() for parameter in model.parameters())
            return skipped

    for skipped in run_ranks(2, work):
        assert skipped == [False, True, False] + [True] * 10


def test_a_finite_step_follows_one_that_was_not_when_the_engine_is_rolled_back(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    engine = engine_of(model, single())
    engine.save_checkpoint(tmp_path)
    engine.backward(model(torch.ones(1, 2)).sum() * float("inf"))
    with pytest.raises(NonFiniteError):
        engine.step()
    engine.load_checkpoint(tmp_path)
    engine.backward(model(torch.ones(1, 2)).sum())
    assert engine.step() is not None


def test_a_parameter_that_came_later_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    engine = engine_of(model, single())
    model[1].weight = nn.Parameter(torch.zeros(3, 2))
    model[1].bias = nn.Parameter(torch.zeros(3))
    engine.backward(model(torch.ones(1, 2)).mean())
    with pytest.raises(UsageError, match=r"parameter 1\.weight: expected the one .* of shape \(3, 2\)"):
        engine.step()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("trained", [True, False])
def test_a_parameter_that_is_frozen_or_trained_later_is_refused(stage: int, trained: bool) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(trained)
    config = EngineConfig(zero=ZeroConfig(stage=stage, resident_elements=0))
    factory = lambda parameters: make_optimizer(parameters, OPTIMIZER)  # noqa: E731
    engine = Engine(model, single(), config, factory, TorchSchedule(None))
    for _ in range(6):
        engine.backward(engine(torch.ones(1, 2)).mean())
        engine.step()
    model[0].weight.requires_grad_(not trained)
    engine.backward(engine(torch.ones(1, 2)).mean())
    expected = f"parameter 0.weight: expected requires_grad={trained} and shape (2, 2), as initialize saw it, found "
    with pytest.raises(UsageError, match=re.escape(f"{expected}requires_grad={not trained}")):
        engine.step()


def test_a_parameter_of_another_shape_is_refused() -> None:
    model = nn.Linear(2, 2)
    engine = engine_of(model, single())
    engine.backward(engine(torch.ones(1, 2)).mean())
    model.weight.data = torch.zeros(3, 2)
    with pytest.raises(UsageError, match=r"parameter weight: .* found requires_grad=True and shape \(3, 2\)"):
        engine.step()


def test_a_loss_that_is_not_finite_names_its_rank(run_ranks: RunRanks) -> None:
    def work(rank: int) -> str:
        with Communicator.connect() as comm:
            engine = engine_of(nn.Linear(2, 2), comm)
            engine.backward(engine(torch.full((1, 2), torch.nan if rank == 1 else 1.0)).mean())
            with pytest.raises(NonFiniteError) as error:
                engine.step()
            return str(error.value)

    for said in run_ranks(3, work):
        assert "found nan on rank 1; " in said
