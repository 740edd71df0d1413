"""DeepSpeed's interface over our engine: `from dstrain.runtime.compat import deepspeed`.

What DeepSpeed's documentation teaches works as it says there: `initialize` and its four-tuple, backward and step for
each micro-batch, the loss averaged over micro-batches and ranks, its loader, its warm-up schedules, checkpoints with a
tag. What has no counterpart raises UsageError with what to write instead; nothing is ignored in silence.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from dstrain.runtime.comm import Communicator
from dstrain.runtime.compat import zero as zero
from dstrain.runtime.compat.deepspeed_elsewhere import refuse_imports, words
from dstrain.runtime.compat.deepspeed_engine import DeepSpeedEngine
from dstrain.runtime.compat.deepspeed_groups import factory_of_groups, job_of_groups, trained_items
from dstrain.runtime.compat.deepspeed_schedules import schedule_of
from dstrain.runtime.initialization import UsersOptimizer, UsersScheduler, communicator
from dstrain.runtime.initialization import initialize as _initialize
from dstrain.runtime.spec.config import JobConfig
from dstrain.runtime.spec.data_config import BatchConfig
from dstrain.runtime.spec.deepspeed.importer import import_deepspeed, read_deepspeed
from dstrain.runtime.spec.errors import UsageError
from dstrain.runtime.spec.load import job_of

__all__ = ["DeepSpeedEngine", "add_config_arguments", "init_distributed", "initialize", "zero"]

__path__: list[str] = []
"""As of a package without files, so that Python looks for `from …deepspeed.ops.adam import FusedAdam` here."""

refuse_imports(__name__)


def __getattr__(name: str) -> NoReturn:
    raise AttributeError(words(__name__, name))


_OWN = ("scheduler", "dataloader_drop_last")
"""Keys that this module honours by itself, where a job cannot."""

Collate = Callable[[list[Any]], Any]
DeepSpeedConfig = str | Path | Mapping[str, Any]


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: UsersOptimizer | None = None,
    model_parameters: Iterable[Any] | None = None,
    training_data: Dataset[Any] | None = None,
    lr_scheduler: UsersScheduler | None = None,
    distributed_port: int | None = None,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Collate | None = None,
    config: DeepSpeedConfig | None = None,
    mesh_param: Any = None,
    config_params: DeepSpeedConfig | None = None,
) -> tuple[DeepSpeedEngine, Any, DataLoader[Any] | None, Any]:
    """(engine, optimizer, training_dataloader, lr_scheduler), as DeepSpeed's own.

    config: DeepSpeed's keys or the path of their JSON; also as args.deepspeed_config or config_params.
    model_parameters: what the configured optimizer moves: all parameters that are trained, or groups of them with lr
    and weight_decay; a factory of optimizers is called with them, whatever the groups say.
    training_data: each rank's micro-batches of it, in DeepSpeed's order.
    distributed_port, dist_init_required: the launcher has said where the ranks meet.

    Collectives: those of our engine. Raises UsageError; with a line for each key of config that has no counterpart and
    would change the training. Those that change no number are told on stderr by rank 0.
    """
    if model is None:
        raise UsageError.mismatch("deepspeed.initialize", "a model", "none")
    for name, value in {"mpu": mpu, "mesh_param": mesh_param}.items():
        if value is not None:
            fix = "there is no tensor parallelism"
            raise UsageError.mismatch(f"deepspeed.initialize: {name}", "none", type(value).__name__, fix)
    comm = communicator()
    keys = _keys(args, config if config is not None else config_params, in_call=config is not None)
    passed = {"optimizer": optimizer, "scheduler": lr_scheduler}
    job, batch = _job(keys, comm, {name for name, value in passed.items() if value is not None})
    if optimizer is None:
        if "optimizer" not in keys:
            fix = "write the section optimizer, or pass an optimizer"
            raise UsageError.mismatch("deepspeed.initialize", "an optimizer", "none", fix)
        if model_parameters is not None:
            job = job_of_groups(job, model, trained_items(model, model_parameters))
    elif not isinstance(optimizer, torch.optim.Optimizer) and model_parameters is not None:
        optimizer = factory_of_groups(optimizer, model, trained_items(model, model_parameters))
    if lr_scheduler is None and "scheduler" in keys:
        lr_scheduler = schedule_of(keys["scheduler"])
    engine = _initialize(model, job, optimizer, lr_scheduler)
    zero.engines.add(engine)
    loader = None
    if training_data is not None:
        drop_last = keys.get("dataloader_drop_last") is True
        loader = _loader(training_data, comm, batch.micro, collate_fn, drop_last)
    if args is not None and "local_rank" in vars(args):
        args.local_rank = comm.local_rank
    wrapped = DeepSpeedEngine(engine, job, loader, keys.get("steps_per_print"))
    return wrapped, wrapped.optimizer, loader, wrapped.lr_scheduler


def init_distributed(dist_backend: str | None = None, **settings: Any) -> None:
    """Join the other ranks, which `initialize` does too. settings: DeepSpeed's others; the launcher has said those."""
    device = communicator().device.type
    ours = "nccl" if device == "cuda" else "gloo"
    if dist_backend not in (None, ours):
        raise UsageError.mismatch("deepspeed.init_distributed", f"{ours} on {device}", repr(dist_backend))


def add_config_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """--deepspeed and --deepspeed_config, as DeepSpeed's own."""
    group = parser.add_argument_group("DeepSpeed", "DeepSpeed configurations")
    group.add_argument("--deepspeed", action="store_true", help="For the script's own use.")
    group.add_argument("--deepspeed_config", default=None, help="DeepSpeed json configuration file.")
    return parser


def _keys(args: Any, config: Any, *, in_call: bool) -> dict[str, Any]:
    """The configuration as a mapping, from wherever it is given."""
    named = vars(args).get("deepspeed_config") if args is not None else None
    if named is not None and config is not None:
        where = "config" if in_call else "config_params"
        raise UsageError(f"deepspeed.initialize: expected args.deepspeed_config or {where}, found both")
    config = named if config is None else config
    if config is None:
        fix = "pass config=…, or start the script with --deepspeed_config ds.json"
        raise UsageError.mismatch("deepspeed.initialize: config", "a path or a mapping", "none", fix)
    if isinstance(config, str | os.PathLike):
        return read_deepspeed(Path(config))
    if isinstance(config, Mapping):
        return dict(config)
    kind = type(config).__name__
    fix = f"write config=dict(…) with the same keywords, also for sections, or config=vars(…) of the {kind}"
    raise UsageError.mismatch("deepspeed.initialize: config", "a path or a mapping", f"an object of {kind}", fix)


def _job(keys: Mapping[str, Any], comm: Communicator, passed: set[str]) -> tuple[JobConfig, BatchConfig]:
    """The job of those keys. Raises UsageError with a line for each that is refused; rank 0 tells of harmless ones.

    passed: sections in whose place the script has passed an object.
    """
    own = {*_OWN, *passed}
    imported = import_deepspeed({key: value for key, value in keys.items() if key not in own}, comm.world_size)
    if problems := imported.refused(harmless=False):
        lines = [f"  {entry.key}: {entry.found}: {entry.verdict.note}" for entry in problems]
        raise UsageError("\n".join(["deepspeed.initialize: config: expected keys that can be kept, found", *lines]))
    job = job_of(imported.values)
    if job.batch is None:
        raise UsageError("deepspeed.initialize: config: expected train_batch_size or train_micro_batch_size_per_gpu")
    if comm.rank == 0:
        for entry in imported.refused(harmless=True):
            _tell(f"{entry.key}: not used, and no number changes without it: {entry.verdict.note}")
        for section in sorted(passed & keys.keys()):
            _tell(f"{section}: not used: the script has passed its own to initialize")
        for tracker in job.log.trackers:
            _tell(f"{tracker}: our trainer logs there by itself; in a script, log what engine.step() did")
    return job, job.batch


def _tell(line: str) -> None:
    print(f"dstrain: deepspeed config: {line}", file=sys.stderr, flush=True)


def _loader(
    dataset: Dataset[Any],
    comm: Communicator,
    micro: int,
    collate_fn: Callable[[list[Any]], Any] | None,
    drop_last: bool,
) -> DataLoader[Any]:
    """DeepSpeed's: torch's DistributedSampler in its first order, the same in every epoch; batches are not moved."""
    sampler: DistributedSampler[Any] = DistributedSampler(dataset, comm.world_size, comm.rank)
    return DataLoader(dataset, micro, sampler=sampler, collate_fn=collate_fn, drop_last=drop_last)
