"""What `dstrain plan` says of memory, against the tensors that a training really holds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zero_oracle import LANGUAGE, RunRanks, Training, engine_of, samples_of, train_step

from dstrain.launcher.planning.activations import kept_by
from dstrain.launcher.planning.memory import Memory, StateMemory
from dstrain.launcher.planning.parts import Part, parts_of
from dstrain.runtime.activation_checkpointing import checkpoint_activations
from dstrain.runtime.comm import Communicator
from dstrain.runtime.engine import Engine
from dstrain.runtime.gradients import OwnGradients, ReplicatedGradients
from dstrain.runtime.models.gpt import GPT, next_token_loss
from dstrain.runtime.precision import cast_parameters
from dstrain.runtime.spec.config import JobConfig
from dstrain.runtime.spec.gpt_shapes import gpt_shapes
from dstrain.runtime.spec.load import job_of
from dstrain.runtime.spec.model_config import GPTConfig
from dstrain.runtime.spec.model_shapes import ModelShapes
from dstrain.runtime.spec.parallel_dims import parallel_dims
from dstrain.runtime.spec.training_config import OptimizerConfig, PrecisionConfig, ZeroConfig
from dstrain.runtime.zero.gradients import ShardedGradients
from dstrain.runtime.zero.weights import ShardedWeights

MODEL = GPTConfig(layers=4, width=96, heads=4, context=8, vocabulary=300)
ENTRY = {"layers": 4, "width": 96, "heads": 4, "context": 8, "vocabulary": 300}
WITHIN = 0.05
"""The issue's own bound; small things (steps of Adam, placeholders, samples of gradients) are not planned."""


def model() -> GPT:
    torch.manual_seed(0)
    return GPT(MODEL)


def job(zero: dict[str, Any], dtype: str, optimizer: str, accumulation: int) -> JobConfig:
    return job_of(
        {
            "model": {"gpt": ENTRY},
            "batch": {"global": 2 * accumulation, "micro": 1},
            "zero": zero,
            "precision": {"dtype": dtype},
            "optimizer": {"name": optimizer},
            "train": {"steps": 1},
        }
    )


def planned(zero: dict[str, Any], dtype: str, optimizer: str, accumulation: int, ranks: int) -> Memory:
    config = job(zero, dtype, optimizer, accumulation)
    shapes = shapes_of(dtype)
    whole = parts_of(shapes, [len(shapes.layers)], (0,), [(0,)])[0]
    dims = parallel_dims(ranks, zero["stage"])
    return StateMemory(config, shapes).of(whole, dims, config.zero, accumulation)


def shapes_of(dtype: str) -> ModelShapes:
    return gpt_shapes(MODEL, MODEL.context, 4 if dtype == "fp32" else 2)


# --- what there is ---------------------------------------------------------------------------------------------


def storages(tensors: Iterable[Tensor | None]) -> dict[int, int]:
    """Bytes by address."""
    found = [tensor.untyped_storage() for tensor in tensors if tensor is not None]
    return {storage.data_ptr(): storage.nbytes() for storage in found if storage.nbytes()}


def held(engine: Engine) -> dict[str, int]:
    """Bytes of the tensors of each kind, in the middle of a step."""
    weights, gradients = engine.weights, engine.gradients
    kinds: dict[str, list[Tensor | None]] = {"live": [], "buckets": []}
    if isinstance(weights, ShardedWeights):
        units = weights.units
        kinds["live"] = [slot.memory for slot in weights.gatherer._slots]
        kinds["parameters"] = [unit.full if unit.resident else unit.shard for unit in units]
        kinds["gradients"] = [unit.grad for unit in units]
        assert isinstance(gradients, ShardedGradients)
        kinds["buckets"] = [*gradients._free, *gradients._memory_of.values()]
        masters = list(weights._masters.values())
    else:
        kinds["parameters"] = [parameter.data for parameter in engine.module.parameters()]
        assert isinstance(gradients, OwnGradients | ReplicatedGradients)
        kinds["gradients"] = [gradient for _, gradient in gradients.of_parameters()]
        own = storages(kinds["parameters"])
        masters = [master.data for _, master in weights.trained if master.data_ptr() not in own]
    states = [value for state in engine.optimizer.state.values() for value in state.values()]
    kinds["optimizer"] = [*masters, *(value for value in states if isinstance(value, Tensor) and value.dim())]
    seen: set[int] = set()
    sizes = {}
    for kind, tensors in kinds.items():
        found = storages(tensors)
        sizes[kind] = sum(size for place, size in found.items() if place not in seen)
        seen |= found.keys()
    return sizes


def measured(comm: Communicator, training: Training, zero: dict[str, Any]) -> dict[str, int]:
    engine = engine_of(training, comm, zero)
    train_step(engine, training)
    for micro in range(training.accumulation):
        samples = samples_of(engine, training.rows)
        engine.backward(training.forward(engine, samples), training.tokens(engine, samples))
        if micro == training.accumulation - 1:
            return held(engine)
        engine.step()
    raise AssertionError("a step has a micro-batch")


ZEROS: dict[str, dict[str, Any]] = {
    "0": {"stage": 0},
    "1": {"stage": 1, "bucket_elements": 100_000},
    "2": {"stage": 2, "bucket_elements": 100_000},
    "3": {"stage": 3, "resident_elements": 1_000},
    "3, kept": {"stage": 3, "resident_elements": 1_000, "reshard": "step"},
}


def differences(found: dict[str, int], expected: Memory) -> list[str]:
    """Kinds, and the sum, that are not within 5 %."""
    both = {kind: (size, getattr(expected, kind)) for kind, size in found.items()}
    both["sum"] = (sum(found.values()), expected.total)
    return [
        f"{kind}: {size:,} bytes, planned {plan:,}"
        for kind, (size, plan) in both.items()
        if abs(size - plan) > WITHIN * max(size, 1)
    ]


SOME, OTHERS = [(1, "fp32"), (2, "bf16")], [(1, "bf16"), (2, "fp32")]


@pytest.mark.parametrize(("ranks", "dtype"), [*SOME, *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS)])
def test_state_is_as_planned(run_ranks: RunRanks, ranks: int, dtype: str) -> None:
    cases = [(name, "adamw", accumulation) for name in ZEROS for accumulation in (1, 2)]
    cases += [(name, optimizer, 1) for name in ("0", "2", "3") for optimizer in ("sgd", "muon", "adafactor")]

    def work(rank: int) -> list[dict[str, int]]:
        with Communicator.connect() as comm:
            return [
                measured(
                    comm,
                    replace(
                        LANGUAGE,
                        model=model,
                        precision=PrecisionConfig(dtype=dtype),
                        accumulation=accumulation,
                        optimizer=OptimizerConfig(name=optimizer),
                    ),
                    ZEROS[name],
                )
                for name, optimizer, accumulation in cases
            ]

    ranks_found = run_ranks(ranks, work)
    wrong = []
    for number, (name, optimizer, accumulation) in enumerate(cases):
        fullest = max((found[number] for found in ranks_found), key=lambda kinds: sum(kinds.values()))
        expected = planned(ZEROS[name], dtype, optimizer, accumulation, ranks)
        case = f"stage {name}, {optimizer}, {accumulation} micro-batches"
        wrong += [f"{case}: {line}" for line in differences(fullest, expected)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("stage", [2, 3])
def test_units_are_the_runtimes_own(run_ranks: RunRanks, stage: int, whole: bool) -> None:
    """Element for element, padding included."""
    optimizer = "adafactor" if whole else "adamw"
    zero = ZEROS[str(stage)]

    def work(rank: int) -> list[tuple[int, int]]:
        with Communicator.connect() as comm:
            training = replace(LANGUAGE, model=model, optimizer=OptimizerConfig(name=optimizer))
            weights = engine_of(training, comm, zero).weights
            assert isinstance(weights, ShardedWeights)
            return sorted((unit.plan.size, unit.shard.numel()) for unit in weights.units)

    found = run_ranks(3, work)
    config = job(zero, "fp32", optimizer, 1)
    shapes = shapes_of("fp32")
    part = parts_of(shapes, [len(shapes.layers)], (0,), [(0,)])[0]
    units = StateMemory(config, shapes).units(part, parallel_dims(3, stage), config.zero)
    fullest = max(found, key=lambda sizes: sum(own for _, own in sizes))
    assert sorted((unit.size, unit.own) for unit in units) == fullest


# --- activations -----------------------------------------------------------------------------------------------


def saved(dtype: torch.dtype, spec: Any, rows: int) -> int:
    """Bytes that autograd keeps of one forward and its loss, without parameters, buffers and samples."""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(layers=3, width=96, heads=4, context=32, vocabulary=300))
    cast_parameters(gpt, dtype)
    if spec is not None:
        checkpoint_activations(gpt, spec)
    samples = torch.randint(300, (rows, 33))
    own = storages([*gpt.parameters(), *gpt.buffers(), samples])
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = next_token_loss(gpt(samples[:, :-1]), samples)
    assert loss.requires_grad
    return sum(size for place, size in storages(kept.values()).items() if place not in own)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_as_planned(dtype: torch.dtype, rows: int) -> None:
    config = GPTConfig(layers=3, width=96, heads=4, context=32, vocabulary=300)
    shapes = gpt_shapes(config, 32, dtype.itemsize)
    expected = rows * kept_by(shapes.layers, frozenset()).held
    assert saved(dtype, None, rows) == pytest.approx(expected, rel=WITHIN)


def test_a_checkpointed_model_keeps_inputs() -> None:
    """Of its blocks; the rest as ever."""
    config = GPTConfig(layers=3, width=96, heads=4, context=32, vocabulary=300)
    shapes = gpt_shapes(config, 32, 4)
    expected = 4 * kept_by(shapes.layers, frozenset(shapes.blocks)).held
    assert saved(torch.float32, "all", 4) == pytest.approx(expected, rel=WITHIN)


# --- shapes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["tiny", "124m"])
def test_the_gpts_parameters_are_those_of_the_formulas(size: str) -> None:
    config = GPTConfig(size=size)  # type: ignore[call-arg] # the others follow from it
    shapes = gpt_shapes(config, config.context, 4)
    with torch.device("meta"):
        real = GPT(config)
    assert [(one.name, one.shape) for one in shapes.parameters] == [
        (name, tuple(parameter.shape)) for name, parameter in real.named_parameters()
    ]


def parts(stages: int) -> list[Part]:
    shapes = shapes_of("fp32")
    counts = [len(shapes.layers) // stages] * (stages - 1)
    return parts_of(
        shapes, [*counts, len(shapes.layers) - sum(counts)], range(stages), [(stage,) for stage in range(stages)]
    )


def test_a_tied_embedding_is_on_the_first_and_the_last_rank() -> None:
    first, middle, last = parts(3)
    assert first.tied == last.tied == {"token.weight": (0, 2)}
    assert not middle.tied
    assert frozenset(["token.weight"]) in first.sections
    names = [name for part in (first, middle, last) for name, _ in part.parameters]
    assert sorted(set(names)) == sorted(name for name, _ in nn.Module.named_parameters(model()))
    assert ZeroConfig(stage=1).bucket_elements
