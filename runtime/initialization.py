"""`initialize`: a user's own model, optimizer and data under the engine."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from dstrain.runtime.activation_checkpointing import checkpoint_activations
from dstrain.runtime.checkpoint.resume import folder_of_job, resume_job
from dstrain.runtime.comm import Communicator
from dstrain.runtime.data.datasets import Numbered
from dstrain.runtime.data.epoch_loader import EpochLoader
from dstrain.runtime.engine import Engine, EngineConfig, JobSchedule, OptimizerFactory, Schedule, TorchSchedule
from dstrain.runtime.lr_schedule import LRSchedule
from dstrain.runtime.optimizers import make_optimizer
from dstrain.runtime.spec.config import JobConfig
from dstrain.runtime.spec.errors import UsageError
from dstrain.runtime.spec.load import job_of, load_job, load_resolved
from dstrain.runtime.zero.deferred import build_deferred

UsersOptimizer = torch.optim.Optimizer | Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
UsersScheduler = LRScheduler | Callable[[torch.optim.Optimizer], LRScheduler]


def initialize(
    model: nn.Module | Callable[[], nn.Module],
    config: str | Path | Mapping[str, Any] | JobConfig | None = None,
    optimizer: UsersOptimizer | None = None,
    lr_scheduler: UsersScheduler | None = None,
    training_data: Numbered | None = None,
) -> Engine:
    """An engine that trains `model` on all ranks of this job: under dstrain, under torchrun, or in one plain process.

    model: or what makes it. At zero.stage 3 that is called so that large parameters take no memory until they are
        sharded, one by one: the way to train a model that does not fit.
    config: a job.yaml, its keys as a mapping, or nothing: the launched job's (`dstrain run -c job.yaml script.py`),
        else defaults.
    optimizer: an instance over the model's parameters, or what makes one of them; by default `optimizer` of config.
    lr_scheduler: torch's, or what makes one of the optimizer; by default `schedule` of config if that names
        train.steps or the optimizer is config's, else constant.
    training_data: a dataset of numbered samples; `engine.dataloader` yields this rank's micro-batches of it, on the
        device, until train.steps are done or, without that key, for one epoch.

    Goes on from a checkpoint where checkpoint.resume (`--resume`) says so. Joins the other ranks unless the script has
    done so (torch.distributed.init_process_group), and leaves them when the process ends. Raises UsageError,
    ConfigError, CheckpointError.
    """
    job = _job(config)
    comm = communicator()
    fill: Callable[[Tensor], object] = is_full
    if not isinstance(model, nn.Module):
        make = model
        if job.zero.stage == 3:
            model, deferred = build_deferred(lambda _: make())
            fill = deferred.fill
        else:
            model = make()
    if job.parallel.pipeline > 1:
        fix = "let dstrain run train a job.yaml with model.factory"
        raise UsageError.mismatch("parallel.pipeline", "1 in a script of one's own", str(job.parallel.pipeline), fix)
    accumulation = job.batch.accumulation(comm.world_size) if job.batch else 1
    if job.train.activation_checkpointing is not None:
        checkpoint_activations(model, job.train.activation_checkpointing)
    if isinstance(lr_scheduler, LRScheduler) and lr_scheduler.optimizer is not optimizer:
        raise UsageError("lr_scheduler: expected the very optimizer that it belongs to as `optimizer`, found another")
    engine = Engine(
        model,
        comm,
        engine_config(job, accumulation),
        _optimizer(optimizer, job, model),
        _schedule(lr_scheduler, job, own_optimizer=optimizer is not None),
        fill,
    )
    if job.log.trace is not None:
        atexit.register(engine.close_trace)
    if training_data is not None:
        if job.batch is None:
            raise UsageError("config: expected batch.global and batch.micro for training_data, found none")
        engine.dataloader = EpochLoader(training_data, job, comm, lambda: (engine.global_step, engine.micro_step))
    root = folder_of_job(job)
    if root is not None and job.checkpoint is not None:
        engine.checkpoints = root, job.checkpoint
    resume_job(engine, job, fresh_only=False)
    return engine


def is_full(parameter: Tensor) -> None:
    """A parameter has its numbers already: nothing fills it."""


def engine_config(job: JobConfig, accumulation: int) -> EngineConfig:
    """The engine's share of the job."""
    return EngineConfig(
        zero=job.zero,
        parallel=job.parallel,
        clip=job.train.clip,
        accumulation=accumulation,
        precision=job.precision,
        ema_decay=job.train.ema_decay,
        compile=job.train.compile,
        on_nonfinite=job.train.on_nonfinite,
        check_replicas_every=job.train.check_replicas_every,
        trace=job.log.traced_steps,
    )


def _job(config: str | Path | Mapping[str, Any] | JobConfig | None) -> JobConfig:
    if isinstance(config, JobConfig):
        return config
    if isinstance(config, Mapping):
        return job_of(config)
    if config is not None:
        return load_job(Path(config), for_trainer=False)
    launched = os.environ.get("DSTRAIN_JOB")
    return load_resolved(Path(launched)) if launched else JobConfig()


_joined: list[Communicator] = []
"""The job that this process has joined: there is only one, whatever the number of engines."""


def communicator() -> Communicator:
    """The ranks of this job, which this process joins in the first call, and leaves when it ends."""
    if not _joined:
        stack = ExitStack()
        _joined.append(stack.enter_context(Communicator.connect(meet=False)))
        atexit.register(stack.close)
    return _joined[0]


def _optimizer(
    given: UsersOptimizer | None, job: JobConfig, model: nn.Module
) -> torch.optim.Optimizer | OptimizerFactory:
    if given is None:
        return lambda parameters: make_optimizer(parameters, job.optimizer)
    if isinstance(given, torch.optim.Optimizer):
        own = set(model.parameters())
        if foreign := sum(p not in own for group in given.param_groups for p in group["params"]):
            fix = "the engine makes gradients of the model's alone"
            raise UsageError.mismatch("optimizer", "parameters of the model", f"{foreign} that are not its own", fix)
        return given
    make = given

    def made(parameters: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        return make([parameter for _, parameter in parameters])

    return made


def _schedule(
    given: UsersScheduler | None, job: JobConfig, own_optimizer: bool
) -> Schedule | Callable[[torch.optim.Optimizer], Schedule]:
    if isinstance(given, LRScheduler):
        return TorchSchedule(given)
    if given is not None:
        make = given
        return lambda optimizer: TorchSchedule(make(optimizer))
    if own_optimizer or job.train.steps is None:
        return lambda optimizer: TorchSchedule(None)
    return JobSchedule(job.optimizer.lr, LRSchedule(job.schedule, job.train.steps))
