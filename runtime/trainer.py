"""The trainer of a declared job, one process for each rank.

    python -m dstrain.runtime.trainer                             the job that the launcher put in DSTRAIN_JOB
    torchrun … -m dstrain.runtime.trainer job.yaml [--set k=v …]  many ranks
    python -m dstrain.runtime.trainer job.yaml [--set k=v …]      one rank

A user's error is one line on stderr and the exit code of its class, said once if all ranks have it; nothing else is
caught.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from dstrain.runtime.activation_checkpointing import checkpoint_activations
from dstrain.runtime.checkpoint.load import load
from dstrain.runtime.checkpoint.manifest import steps_in
from dstrain.runtime.checkpoint.resume import folder_of_job, resume_job
from dstrain.runtime.checkpoint.save import Saver
from dstrain.runtime.comm import Communicator
from dstrain.runtime.data.data import open_data
from dstrain.runtime.data.loader import Loader, to_device
from dstrain.runtime.data.sampler import BatchLayout
from dstrain.runtime.data.samples import Batch, in_step
from dstrain.runtime.engine import Engine, JobSchedule, StepResult
from dstrain.runtime.first_batch import explained
from dstrain.runtime.initialization import engine_config, is_full
from dstrain.runtime.last_words import say
from dstrain.runtime.lr_schedule import LRSchedule
from dstrain.runtime.models.build import build_model, context_of, vocabulary_of
from dstrain.runtime.models.language import generate
from dstrain.runtime.optimizers import make_optimizer
from dstrain.runtime.pipeline.feed import ValidationFeed
from dstrain.runtime.pipeline.making import make_pipeline
from dstrain.runtime.pipeline.pipeline import Pipeline
from dstrain.runtime.reporting import ModelSize, Reporter
from dstrain.runtime.spec.config import JobConfig
from dstrain.runtime.spec.errors import (
    CheckpointError,
    ConfigError,
    DstrainError,
    NonFiniteError,
    ReplicasDifferError,
    UsageError,
)
from dstrain.runtime.spec.event import EventWriter
from dstrain.runtime.spec.exit_codes import ExitCode
from dstrain.runtime.spec.job_layout import dims_of, micro_batches_of
from dstrain.runtime.spec.load import load_job, load_resolved
from dstrain.runtime.spec.trace import Category
from dstrain.runtime.task import LanguageTask, task_of
from dstrain.runtime.zero.deferred import build_deferred

ALIVE_S = 20.0
"""A validation says so often that it goes on: the launcher takes silence for a hang, whatever its reason."""

SAMPLE_TEMPERATURE = 0.8
"""Of the text at the end: below 1, so that a small model's rare nonsense stays rare."""

SAMPLE_PROMPT = 10
"""The token of a line's end in bytes."""


class Trainer:
    """All state of one rank: job, ranks, batch layout, data, model, engine, what is reported."""

    def __init__(self, job: JobConfig, comm: Communicator, events: EventWriter) -> None:
        """Raises UsageError (also ConfigError) where job, ranks and corpus do not fit together."""
        assert job.model is not None
        assert job.batch is not None
        assert job.train.steps is not None
        self.job, self.comm, self.steps, self.micro = job, comm, job.train.steps, job.batch.micro
        dims = dims_of(job, comm.world_size)
        self.accumulation = micro_batches_of(job.batch, dims)
        self.layout = BatchLayout(dims.data_rank(comm.rank), dims.data, self.micro, self.accumulation)

        torch.manual_seed(job.train.seed)  # the same parameters whatever the number of ranks
        fill: Callable[[Tensor], object] = is_full
        gives = self.layout.rank == 0
        build = partial(build_model, job.model, parameters=gives)  # of files; the others get that rank's
        if job.zero.stage == 3 or dims.pipeline > 1:
            model, deferred = build_deferred(lambda deferred: build(deferred.refill_by))
            fill = deferred.fill
        else:
            model = build()
        seed_all(job.train.seed + 1 + comm.rank)  # what is random in training differs between ranks
        if job.train.activation_checkpointing is not None:
            checkpoint_activations(model, job.train.activation_checkpointing)
        self.sequence_length = job.data.sequence_length or context_of(model, job.model)
        self.data = open_data(job.data, self.sequence_length, comm)
        _check_vocabulary(job, self.data.vocabulary, vocabulary_of(model, job.model))
        if job.train.eval_every and self.data.validation is None:
            fix = "let data.factory return a pair (training, validation), or leave the key out"
            raise UsageError.mismatch("train.eval_every", "data to validate on", "none", fix)
        self.checkpoints = folder_of_job(job)
        self.task = task_of(self.data.training.batch(range(1)), job.train.loss)
        size = ModelSize.of(model, job, self.sequence_length if self.task.unit == "tokens" else None)
        pipeline = None
        if dims.pipeline > 1:
            pipeline = make_pipeline(
                job,
                model,
                comm,
                dims,
                self.accumulation,
                lambda: self.data.training.batch(self.layout.samples(0, 0)),
                self.checkpoints,
            )
        self.engine = Engine(
            model,
            comm,
            engine_config(job, self.accumulation),
            lambda parameters: make_optimizer(parameters, job.optimizer),
            JobSchedule(job.optimizer.lr, LRSchedule(job.schedule, self.steps)),
            fill,
            pipeline,
        )
        self.report = Reporter(job, comm, events, self.engine, size, self.data.description, self.task.unit)
        self.saved_at = time.monotonic()
        self.unsaved = ""  # why the last save has failed
        self.has_reserved = False
        self.val_loss: float | None = None  # the last
        self.rewound_for: set[object] = set()  # steps whose numbers were not finite, and ranks that differed
        self.has_begun = False  # the model has taken a batch
        self.has_validated = False  # and one of validation

    def train(self) -> bool:
        """Train all steps, validating and saving in between and at the end, then show what was learnt.

        Returns False when it was asked to end before; the state is saved then. Raises CheckpointError before the first
        step where checkpoints cannot be written.
        """
        if self.checkpoints is not None:
            self._open_saver(self.checkpoints)
        loaded = resume_job(self.engine, self.job, fresh_only=True)
        if loaded is not None:
            self.report.resumed(loaded)
        self.report.start(self.sequence_length)
        is_over = False
        while not is_over:
            try:
                is_whole = self._train_from_here()
                is_over = True
            except (NonFiniteError, ReplicasDifferError) as error:  # of all ranks, at the same step
                self._finish_save()
                self._rewind(error)
        self._finish_save(must_stand=True)
        self.engine.finish_trace()
        if not is_whole:
            self.report.stopped(self.engine.global_step)
            return False
        self._show_sample()
        self.report.end(self.val_loss)
        return True

    def _train_from_here(self) -> bool:
        """All steps that are left; False when it was asked to end before."""
        every, prefetch = self.job.train.eval_every, self.job.data.prefetch
        with Loader(self.data.training, self.layout, self.engine.global_step, prefetch, self.comm.device) as loader:
            while self.engine.global_step < self.steps:
                self._ask_by_the_clock()
                result = self.train_step(loader)
                self._report_saves()
                if self.engine.saver is not None and not self.has_reserved:
                    self.engine.saver.reserve()
                    self.has_reserved = True
                step = self.engine.global_step
                if self.data.validation is not None and (step == self.steps or (every and step % every == 0)):
                    with self.engine.trace.whole(Category.VALIDATION, "validation"):
                        self.val_loss = self.validate()
                if self._is_time_to_save(step, asked=result.save or result.stop):
                    self.save()
                if result.stop and step < self.steps:
                    return False
        return True

    def _rewind(self, error: NonFiniteError | ReplicasDifferError) -> None:
        """Go on from the newest checkpoint, where `train.on_nonfinite` says so, or raise `error`: also where there is
        none, or where the same step fails or the same ranks differ again, for they will for ever. The ranks decide
        alike."""
        cause: object = error.ranks if isinstance(error, ReplicasDifferError) else self.engine.global_step + 1
        if self.job.train.on_nonfinite != "rewind" or self.checkpoints is None or cause in self.rewound_for:
            raise error
        if not any(self.comm.all_gather_object(bool(steps_in(self.checkpoints)))):
            raise error
        self.rewound_for.add(cause)
        self.report.rewound(load(self.engine, self.checkpoints), str(error))

    def train_step(self, loader: Loader) -> StepResult:
        """One optimizer step over this rank's micro-batches. May raise NonFiniteError and
        ReplicasDifferError; the first one UsageError."""
        self.engine.enter_step()
        begun = time.perf_counter()
        result = self._train_batch(loader) if self.engine.pipeline is not None else None
        while result is None:
            with self.engine.trace.span(Category.DATA, "batch"):
                batch = loader.next()
            with contextlib.nullcontext() if self.has_begun else explained(batch, self.comm.device):
                loss, count = self.task.loss(self.engine, batch)
            self.has_begun = True
            self.engine.backward(loss, count)
            result = self.engine.step()
        self.report.step(result, step_s=time.perf_counter() - begun, data_wait_s=loader.take_wait_s())
        return result

    def _train_batch(self, loader: Loader) -> StepResult:
        """A step of a pipeline."""
        with self.engine.trace.span(Category.DATA, "batches"):
            batches = [loader.next() for _ in range(self.accumulation)]
        if not self.has_begun:
            self._compare(batches)
        with contextlib.nullcontext() if self.has_begun else explained(batches[0], self.comm.device):
            result = self.engine.train_batch(self.task, batches)
        self.has_begun = True
        return result

    def _compare(self, batches: Sequence[Any]) -> None:
        """The first stage takes the inputs, the last one the targets, each of its own. Raises UsageError."""
        assert self.engine.pipeline is not None
        tensors = [leaf for leaf in tree_leaves(batches) if isinstance(leaf, Tensor)]
        own = [zlib.crc32(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()) for tensor in tensors]
        if len(set(map(tuple, self.engine.pipeline.column.all_gather_object(own)))) > 1:
            expected, fix = "the same samples on all ranks of a pipeline", "draw what is random by the sample's number"
            raise UsageError.mismatch("data with parallel.pipeline", expected, "others", fix)

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss over the validation samples; one all-reduce of the ranks' shares."""
        engine, comm = self.engine, self.comm
        totals = torch.zeros(2, dtype=torch.float64)  # sum of the loss, what was counted
        said_at = time.monotonic()
        engine.module.eval()
        engine.share_buffers()
        with engine.averaged():
            for on_cpu, counts in self._validation_batches() if engine.pipeline is None else ():
                batch, what = to_device(on_cpu, comm.device), "the first batch of validation"
                with contextlib.nullcontext() if self.has_validated else explained(batch, comm.device, what):
                    loss, count = self.task.loss(engine, batch)
                self.has_validated = True
                if counts:
                    totals += torch.tensor([loss.item() * count, count])
                if time.monotonic() - said_at > ALIVE_S:
                    self.report.alive()
                    said_at = time.monotonic()
            if engine.pipeline is not None:
                totals += self._validate_batches(engine.pipeline)
        engine.module.train()
        totals = totals.to(comm.device)
        comm.all_reduce(totals)
        loss_sum, count = totals.tolist()
        if not count:
            raise UsageError.mismatch("data", "samples to validate on", "none", "look at what data.factory returns")
        val_loss = float(loss_sum / count)
        engine.observe_validation(val_loss)
        self.report.validation(val_loss)
        return val_loss

    def _validate_batches(self, pipeline: Pipeline) -> Tensor:
        """The sum of the loss and what was counted, where the last stage is; so many at a time as in a step."""
        totals, taken = torch.zeros(2, dtype=torch.float64), self._validation_batches()
        said_at = time.monotonic()
        while some := list(islice(taken, self.accumulation)):
            batches = [to_device(batch, self.comm.device) for batch, _ in some]
            feed = ValidationFeed(self.task, batches, [counts for _, counts in some])
            what = "the first batch of validation"
            with contextlib.nullcontext() if self.has_validated else explained(batches[0], self.comm.device, what):
                pipeline.forward(feed)
            self.has_validated = True
            totals += feed.totals.cpu()
            if time.monotonic() - said_at > ALIVE_S:
                self.report.alive()
                said_at = time.monotonic()
        return totals

    def _validation_batches(self) -> Iterator[tuple[Batch, bool]]:
        """This rank's share, and whether each batch counts; equally many on all ranks where a forward needs them."""
        validation, samples, data = self.data.validation, self.job.train.eval_samples, self.engine.data
        assert validation is not None

        def share(rank: int) -> Iterator[Batch]:
            return validation.batches(samples, rank, data.world_size, self.micro)

        is_piped = self.engine.pipeline is not None  # one of its stages may gather where others do not
        if self.engine.weights.backward_gathers or (is_piped and self.job.zero.stage == 3):
            return in_step(share(data.rank), lambda: share(0), data)
        return ((batch, True) for batch in share(data.rank))

    # --- checkpoints -----------------------------------------------------------------------------------------

    def save(self) -> None:
        """Begin to save a checkpoint; on all ranks. What becomes of it is reported when it is known. Raises
        ReplicasDifferError before: what is poisoned is not saved."""
        self.engine.check_replicas()
        saver = self.engine.saver
        assert saver is not None
        with self.engine.trace.whole(Category.CHECKPOINT, "checkpoint"):
            saver.begin()
            if not saver.asynchronous:
                saver.finish()
        self.saved_at = time.monotonic()
        self._report_saves()

    def close(self) -> None:
        """End what runs beside the training."""
        self.engine.close_trace()
        if self.engine.saver is not None:
            self.engine.saver.close()

    def _open_saver(self, root: Path) -> None:
        config = self.job.checkpoint
        assert config is not None
        self.engine.saver = Saver(
            self.engine, root, config.keep_last, config.keep_every, config.asynchronous, config.replicas
        )

    def _report_saves(self) -> None:
        saver = self.engine.saver
        if saver is not None and (saver.finished or saver.notes):
            for saved in saver.take_finished():
                self.report.saved(saved)
                self.unsaved = saved.problem
            self.report.noted(saver.notes)
            saver.notes.clear()

    def _finish_save(self, must_stand: bool = False) -> None:
        """Wait for the save in flight. must_stand: CheckpointError if the last one has failed."""
        if self.engine.saver is None:
            return
        self.engine.saver.finish()
        self._report_saves()
        if must_stand and self.unsaved:
            raise CheckpointError(self.unsaved)

    def _ask_by_the_clock(self) -> None:
        """Rank 0's clock asks all ranks for a checkpoint, by way of the step."""
        config = self.job.checkpoint
        if self.comm.rank or config is None or config.every_minutes is None:
            return
        if time.monotonic() - self.saved_at >= 60 * config.every_minutes:
            self.engine.save_requested = True

    def _is_time_to_save(self, step: int, asked: bool) -> bool:
        config = self.job.checkpoint
        if config is None:
            return False
        return asked or step == self.steps or (config.every_steps is not None and step % config.every_steps == 0)

    def _show_sample(self) -> None:
        """Text that the model goes on to write after a line's end; where the model is sharded, on all ranks at once."""
        count = self.job.train.sample_bytes
        pipeline = self.engine.pipeline
        is_needed = self.comm.rank == 0 or self.engine.weights.sharers > 1 or pipeline is not None
        if not is_needed or not count or self.data.decode is None or not isinstance(self.task, LanguageTask):
            return
        prompt = torch.tensor([SAMPLE_PROMPT], device=self.comm.device)
        generator = torch.Generator().manual_seed(self.job.train.seed)
        model = self.engine.module
        model.eval()
        forward = model if pipeline is None else lambda seen: pipeline.everywhere(((seen,), {}))
        with self.engine.averaged():
            tokens: Tensor = generate(
                forward,
                prompt,
                count,
                temperature=SAMPLE_TEMPERATURE,
                generator=generator,
                context=self.sequence_length,
            )
        text = self.data.decode(tokens.tolist())
        if text is not None:
            self.report.say(f"--- sample\n{text}\n---")


def seed_all(seed: int) -> None:
    """Seed the generators of torch, numpy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % (1 << 32))
    random.seed(seed)


def _check_vocabulary(job: JobConfig, needed: int | None, known: int | None) -> None:
    if needed is not None and known is not None and needed > known:
        key = "model.gpt.vocabulary" if job.gpt else "model.hf"
        raise ConfigError(f"{key}: expected at least {needed} tokens, as the data have, found {known}")


def _save_on_signals(engine: Engine) -> None:
    """SIGTERM ends the training behind this step, saved; SIGUSR1 saves and goes on. The ranks agree in the step."""

    def stop(*_: object) -> None:
        engine.stop_requested = True

    def save_now(*_: object) -> None:
        engine.save_requested = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGUSR1, save_now)


def _job_of(arguments: Sequence[str] | None) -> JobConfig:
    parser = argparse.ArgumentParser(prog="python -m dstrain.runtime.trainer", allow_abbrev=False)
    parser.add_argument("job", type=Path, nargs="?", help="job.yaml; without it, the job that DSTRAIN_JOB names")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="put over the file's value")
    parser.add_argument("--resume", metavar="auto|STEP|PATH", help="go on from a checkpoint")
    options = parser.parse_args(arguments)
    if options.resume == "":
        raise UsageError.mismatch("--resume", "auto, a step or a path", "nothing")
    overrides = [*options.set, *([f"checkpoint.resume={options.resume!r}"] if options.resume is not None else [])]
    if options.job is not None:
        return load_job(options.job, overrides)
    if overrides:
        raise UsageError("--set, --resume: expected a job.yaml to put it over, found none")
    resolved = os.environ.get("DSTRAIN_JOB")
    if not resolved:
        raise UsageError("expected a job.yaml as the argument, or its resolved form in DSTRAIN_JOB, found neither")
    return load_resolved(Path(resolved))


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; returns the process's exit code."""
    try:
        job = _job_of(arguments)
        with Communicator.connect() as comm, contextlib.ExitStack() as stack:
            trainer = Trainer(job, comm, EventWriter.from_environment())
            stack.callback(trainer.report.close)
            stack.callback(trainer.close)
            if job.checkpoint is not None:
                _save_on_signals(trainer.engine)
            whole = trainer.train()
    except DstrainError as error:
        say(f"dstrain: {error}\n")
        return int(error.exit_code)
    return 0 if whole else int(ExitCode.TERMINATED)


if __name__ == "__main__":
    sys.exit(main())
