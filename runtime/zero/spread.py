"""A model's training state on this rank, as `zero` and `parallel` ask for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dstrain.runtime.comm import Communicator
from dstrain.runtime.gradients import GradientBucket, GradientReducer, OwnGradients, ReplicatedGradients, sum_dtype
from dstrain.runtime.pipeline.gradients import StagedGradients
from dstrain.runtime.pipeline.holding import sections_of
from dstrain.runtime.pipeline.part import ModelPart
from dstrain.runtime.precision import DTYPES, MasterWeights, cast_buffers, cast_parameters, parameter_dtype
from dstrain.runtime.spec.errors import UsageError
from dstrain.runtime.spec.parallel_dims import ParallelDims
from dstrain.runtime.spec.training_config import PrecisionConfig, ZeroConfig
from dstrain.runtime.zero.gradients import ShardedGradients
from dstrain.runtime.zero.grouping import by_size
from dstrain.runtime.zero.plan import plan_unit
from dstrain.runtime.zero.unit import ZeroUnit
from dstrain.runtime.zero.weights import ShardedWeights

Weights = MasterWeights | ShardedWeights
Gradients = GradientReducer | StagedGradients

ELEMENTWISE = ("AdamW", "Adam", "SGD", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam", "RMSprop", "ASGD", "Rprop")
"""Optimizers of torch's that treat every element by itself; of all others it is taken that they look at tensors."""

UNSHARDABLE = {"LBFGS": "its history is of all parameters at once", "SparseAdam": "its gradients are sparse"}

COUPLED = ("Prodigy", "DAdapt")
"""Beginnings of the names of optimizers that set one step size by all parameters: a rank would see its own alone."""


def spread(
    model: nn.Module,
    comm: Communicator,
    dims: ParallelDims,
    zero: ZeroConfig,
    precision: PrecisionConfig,
    whole_tensors: bool,
    fill: Callable[[Tensor], object],
    compiled: bool = False,
    part: ModelPart | None = None,
) -> tuple[Weights, Gradients]:
    """Move the model to this rank's device, rank 0's parameters to all, and make what holds them and their gradients.

    comm: of the ranks that hold the same part of the model. Parameters in fp32 become `precision`'s. whole_tensors: for
    an optimizer that looks at whole tensors. fill: gives a parameter its numbers, on rank 0, just before they are
    needed. compiled: the model's forward will be. part: the model is some stages of a pipeline.
    """
    _refuse_complex(model, comm)
    if zero.stage < 3:
        for parameter in model.parameters():
            fill(parameter)
        cast_parameters(model, parameter_dtype(precision))
    else:
        cast_buffers(model, parameter_dtype(precision))
    if zero.stage == 0:
        return _replicated(model, comm, dims, zero, precision, part)
    return _sharded(model, comm, dims, zero, precision, whole_tensors, fill, compiled, part)


def _replicated(
    model: nn.Module,
    comm: Communicator,
    dims: ParallelDims,
    zero: ZeroConfig,
    precision: PrecisionConfig,
    part: ModelPart | None,
) -> tuple[Weights, Gradients]:
    dtype = DTYPES[precision.reduce_dtype or "fp32"]
    model.to(comm.device)
    for parameter in model.parameters():
        comm.broadcast(parameter.data)
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    buckets = []
    for group in by_size(trained, zero.bucket_elements, _sections(part)):
        shapes = [(name, tuple(parameter.shape)) for name, parameter in group.parameters]
        plan = plan_unit(group.name, shapes, shards=1)
        parameters = [parameter for _, parameter in group.parameters]
        buckets.append(GradientBucket(plan, parameters, sum_dtype(parameters[0].dtype, dtype)))
    gradients: Gradients
    if comm.world_size == 1 and part is None:
        gradients = OwnGradients(buckets)
    else:
        ranks = comm.everyone()
        ranks.choose(zero.comm)
        gradients = _staged(buckets, lambda some: ReplicatedGradients(some, ranks), comm, dims, part)
    return MasterWeights(trained, gradients), gradients


def _sharded(
    model: nn.Module,
    comm: Communicator,
    dims: ParallelDims,
    zero: ZeroConfig,
    precision: PrecisionConfig,
    whole_tensors: bool,
    fill: Callable[[Tensor], object],
    compiled: bool,
    part: ModelPart | None,
) -> tuple[Weights, Gradients]:
    native = zero.comm == "native" or (zero.comm == "auto" and comm.device.type == "cuda")
    shards, replicas = comm.groups(dims.data_shard, native)
    replicas.choose("native" if native else "auto")
    _move_unsharded(model, comm, stage=zero.stage)
    offload = zero.offload if comm.device.type != "cpu" else None
    weights = ShardedWeights(
        model,
        comm,
        shards,
        zero.stage,
        zero.bucket_elements,
        resident_elements=zero.resident_elements,
        keep_whole=zero.reshard == "step",
        whole_tensors=whole_tensors,
        dtype=parameter_dtype(precision),
        comm_wish=zero.comm,
        offload=offload,
        fill=fill,
        watched=not compiled,
        sections=_sections(part),
    )
    accumulate = zero.accumulate or ("local" if zero.stage == 1 else "sharded")
    offloads = offload is not None and offload.optimizer
    dtype = DTYPES[precision.reduce_dtype or "fp32"]

    def make(units: Sequence[ZeroUnit]) -> GradientReducer:
        sharded = accumulate == "sharded"
        return ShardedGradients(units, shards, replicas, dtype, sharded, weights.done_with, offloads, weights.lookout)

    units = [unit for unit in reversed(weights.units) if unit.is_trained]
    return weights, _staged(units, make, comm, dims, part)


HasParameters = TypeVar("HasParameters", GradientBucket, ZeroUnit)


def _staged(
    buckets: Sequence[HasParameters],
    make: Callable[[Sequence[HasParameters]], GradientReducer],
    comm: Communicator,
    dims: ParallelDims,
    part: ModelPart | None,
) -> Gradients:
    """One reducer, or one for each stage of this rank."""
    if part is None:
        return make(buckets)
    names = {parameter: name for name, parameter in part.model.named_parameters()}
    of_stage = {
        stage: make([one for one in buckets if part.stage_of(names[one.parameters[0]]) == stage]) for stage in part.own
    }
    tied = []
    for name, ranks in part.tied_ranks.items():
        columns = [dims.pipeline_ranks(place) for place in range(dims.data)]
        group = comm.whole.some([[column[rank] for rank in ranks] for column in columns])
        parameter = next((p for p, known in names.items() if known == name), None)
        if group is not None and parameter is not None and parameter.requires_grad:
            reducer = of_stage[part.stage_of(name)]
            tied.append((parameter, reducer, group))
            if not part.is_counted(name):
                reducer.uncounted.add(parameter)
    return StagedGradients(of_stage, tied)


def _sections(part: ModelPart | None) -> list[frozenset[str]]:
    """Names of parameters that share no bucket with others: those of each stage, and each that is tied."""
    if part is None:
        return []
    names = [name for name, _ in part.model.named_parameters()]
    return sections_of(names, part.own, part.tied_ranks, part.stage_of)


def needs_whole_tensors(
    optimizer: torch.optim.Optimizer | Callable[..., Any], parameters: Sequence[tuple[str, nn.Parameter]]
) -> bool:
    """Whether an optimizer of these parameters must see whole tensors. Raises UsageError for one that cannot work on
    shards at all.

    A factory is asked for one over parameters of the same names, of a single element each, which is thrown away.
    """
    made = optimizer
    if not isinstance(made, torch.optim.Optimizer):
        try:
            made = made([(name, _single(parameter)) for name, parameter in parameters])
        except Exception:  # it fails again, and says why, with the parameters themselves
            return True
    names = [kind.__name__ for kind in type(made).__mro__ if kind.__module__.startswith("torch.optim")]
    if reason := next((UNSHARDABLE[name] for name in names if name in UNSHARDABLE), None):
        raise UsageError.mismatch("zero.stage", f"0 with {names[0]} ({reason})", "a stage that shards")
    if any(kind.__name__.startswith(COUPLED) for kind in type(made).__mro__):
        reason = "its step size is set by all parameters at once"
        raise UsageError.mismatch("zero.stage", f"0 with {type(made).__name__} ({reason})", "a stage that shards")
    stepping = next(kind for kind in type(made).__mro__ if "step" in vars(kind))
    return not (stepping.__module__.startswith("torch.optim") and stepping.__name__ in ELEMENTWISE)


def _refuse_complex(model: nn.Module, comm: Communicator) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_complex() and comm.world_size > 1:
            fix = "keep two real numbers for each, and torch.view_as_complex them in the forward"
            found = str(parameter.dtype).removeprefix("torch.")
            raise UsageError.mismatch(f"parameter {name}", "real numbers on more than one rank", found, fix)


def _single(parameter: nn.Parameter) -> nn.Parameter:
    """A stand-in with as many dimensions."""
    single = nn.Parameter(torch.zeros([1] * parameter.dim(), dtype=parameter.dtype))
    single.whole_shape = parameter.shape  # type: ignore[attr-defined] # rules of groups look at it
    return single


def _move_unsharded(model: nn.Module, comm: Communicator, stage: int) -> None:
    """Buffers, and below stage 3 frozen parameters too, whole on every rank."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(comm.device)
    if stage < 3:
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(comm.device)
                comm.broadcast(parameter.data)
