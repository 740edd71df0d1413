"""A model's training state on this rank, as `zero` and `parallel` ask for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dstrain.runtime.comm import Communicator
from dstrain.runtime.gradients import GradientBucket, GradientReducer, OwnGradients, ReplicatedGradients, sum_dtype
from dstrain.runtime.precision import DTYPES, MasterWeights, cast_buffers, cast_parameters, parameter_dtype
from dstrain.runtime.spec.errors import UsageError
from dstrain.runtime.spec.training_config import ParallelConfig, PrecisionConfig, ZeroConfig
from dstrain.runtime.zero.gradients import ShardedGradients
from dstrain.runtime.zero.grouping import by_size
from dstrain.runtime.zero.plan import plan_unit
from dstrain.runtime.zero.weights import ShardedWeights

Weights = MasterWeights | ShardedWeights

ELEMENTWISE = ("AdamW", "Adam", "SGD", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam", "RMSprop", "ASGD", "Rprop")
"""Optimizers of torch's that treat every element by itself; of all others it is taken that they look at tensors."""

UNSHARDABLE = {"LBFGS": "its history is of all parameters at once", "SparseAdam": "its gradients are sparse"}

COUPLED = ("Prodigy", "DAdapt")
"""Beginnings of the names of optimizers that set one step size by all parameters: a rank would see its own alone."""


def spread(
    model: nn.Module,
    comm: Communicator,
    zero: ZeroConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    whole_tensors: bool,
    fill: Callable[[Tensor], object],
    compiled: bool = False,
) -> tuple[Weights, GradientReducer]:
    """Move the model to this rank's device, rank 0's parameters to all, and make what holds them and their gradients.

    Parameters in fp32 become `precision`'s. whole_tensors: for an optimizer that looks at whole tensors. fill: gives a
    parameter its numbers, on rank 0, just before they are needed. compiled: the model's forward will be. Raises
    UsageError where ranks and groups do not fit.
    """
    dtype = DTYPES[precision.reduce_dtype or "fp32"]
    shard_size = _shard_size(comm, zero, parallel)
    _refuse_complex(model, comm)
    if zero.stage < 3:
        for parameter in model.parameters():
            fill(parameter)
        cast_parameters(model, parameter_dtype(precision))
    else:
        cast_buffers(model, parameter_dtype(precision))
    if zero.stage == 0:
        model.to(comm.device)
        for parameter in model.parameters():
            comm.broadcast(parameter.data)
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        buckets = []
        for group in by_size(trained, zero.bucket_elements):
            shapes = [(name, tuple(parameter.shape)) for name, parameter in group.parameters]
            plan = plan_unit(group.name, shapes, shards=1)
            parameters = [parameter for _, parameter in group.parameters]
            buckets.append(GradientBucket(plan, parameters, sum_dtype(parameters[0].dtype, dtype)))
        if comm.world_size == 1:
            own = OwnGradients(buckets)
            return MasterWeights(trained, own), own
        ranks = comm.everyone()
        ranks.choose(zero.comm)
        gradients = ReplicatedGradients(buckets, ranks)
        return MasterWeights(trained, gradients), gradients
    native = zero.comm == "native" or (zero.comm == "auto" and comm.device.type == "cuda")
    shards, replicas = comm.groups(shard_size, native)
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
    )
    units = [unit for unit in reversed(weights.units) if unit.is_trained]
    accumulate = zero.accumulate or ("local" if zero.stage == 1 else "sharded")
    sharded = accumulate == "sharded"
    offloads = offload is not None and offload.optimizer
    return weights, ShardedGradients(
        units, shards, replicas, dtype, sharded, weights.done_with, offloads, weights.lookout
    )


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


def _shard_size(comm: Communicator, zero: ZeroConfig, parallel: ParallelConfig) -> int:
    ranks = comm.world_size
    replicate = parallel.data_replicate
    shard = parallel.data_shard
    if zero.stage == 0:
        if replicate not in (None, ranks):
            raise UsageError.mismatch("parallel.data_replicate", f"{ranks}, the ranks, at stage 0", str(replicate))
        return 1
    if shard is None:
        shard = ranks // (replicate or 1)
    if shard * (replicate or ranks // shard) != ranks or ranks % shard:
        found = f"{shard} × {replicate}" if replicate else str(shard)
        expected = f"data_shard × data_replicate = {ranks} ranks"
        raise UsageError.mismatch("parallel.data_shard", expected, found)
    return shard


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
