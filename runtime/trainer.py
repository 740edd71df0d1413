"""The trainer of a declared job, one process for each rank.

    python -m dstrain.runtime.trainer                             the job that the launcher put in DSTRAIN_JOB
    torchrun … -m dstrain.runtime.trainer job.yaml [--set k=v …]  many ranks
    python -m dstrain.runtime.trainer job.yaml [--set k=v …]      one rank

A user's error is one line on stderr and the exit code of its class; nothing else is caught.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dstrain.runtime import progress
from dstrain.runtime.comm import Communicator
from dstrain.runtime.data.corpus import check_same_on_all_ranks, load_corpus, split
from dstrain.runtime.data.sampler import BatchLayout, TokenWindows
from dstrain.runtime.engine import DataParallelEngine, EngineConfig, StepResult
from dstrain.runtime.lr_schedule import lr_ratio
from dstrain.runtime.models.gpt import GPT, next_token_loss
from dstrain.runtime.spec.config import JobConfig
from dstrain.runtime.spec.errors import DstrainError, UsageError
from dstrain.runtime.spec.event import EventWriter
from dstrain.runtime.spec.load import load_job, load_resolved

SAMPLE_TEMPERATURE = 0.8
"""Of the text at the end: below 1, so that a small model's rare nonsense stays rare."""

SAMPLE_PROMPT = b"\n"


class Trainer:
    """All state of one rank: job, ranks, events, batch layout, model, engine, data."""

    def __init__(self, job: JobConfig, comm: Communicator, events: EventWriter) -> None:
        """Raises UsageError (also ConfigError) where job, ranks and corpus do not fit together."""
        self.job, self.comm, self.events = job, comm, events
        micro, accumulation = job.batch.micro, job.batch.accumulation(comm.world_size)
        self.layout = BatchLayout(comm.rank, comm.world_size, micro, accumulation)

        corpus = load_corpus(job.data)
        check_same_on_all_ranks(corpus, comm)
        parts = split(corpus, job.data.validation_fraction)
        self.training = TokenWindows(parts.train, job.sequence_length, job.data.seed)
        self.validation = TokenWindows(parts.validation, job.sequence_length, job.data.seed)
        self.corpus_bytes = len(corpus)

        torch.manual_seed(job.train.seed)  # the same parameters whatever the number of ranks
        self.model = GPT(job.model.gpt).to(comm.device)
        torch.manual_seed(job.train.seed + 1 + comm.rank)  # what is random in training differs between ranks
        config = EngineConfig(job.optimizer, job.zero.bucket_elements, job.train.clip)
        self.engine = DataParallelEngine(self.model, comm, config)

    @property
    def parameters(self) -> int:
        """Trained numbers of the model."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def train(self) -> None:
        """Train all steps, validating in between and at the end; then show what was learnt."""
        steps, every = self.job.train.steps, self.job.train.eval_every
        self._announce()
        started = time.perf_counter()
        for step in range(1, steps + 1):
            begun = time.perf_counter()
            lr = self.job.optimizer.lr * lr_ratio(self.job.schedule, step, steps)
            result = self.train_step(step, lr)
            now = time.perf_counter()
            self._report_step(step, lr, result, step_s=now - begun, elapsed_s=now - started)
            if step == steps or (every is not None and step % every == 0):
                val_loss = self.validate()
                self.events.emit("validation", step=step, val_loss=val_loss)
                self._say(progress.validation_line(step, steps, val_loss))
        self._finish(val_loss, elapsed_s=time.perf_counter() - started)

    def train_step(self, step: int, lr: float) -> StepResult:
        """One optimizer step (counted from 1) over this rank's micro-batches. May raise NonFiniteError."""
        for micro_batch in range(self.layout.accumulation):
            indices = self.layout.samples(step - 1, micro_batch)
            samples = self.training.shuffled(indices).to(self.comm.device)
            loss = next_token_loss(self.model(samples[:, :-1]), samples)
            is_last = micro_batch == self.layout.accumulation - 1
            self.engine.backward(loss, tokens=samples[:, 1:].numel(), last=is_last)
        return self.engine.step(lr)

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss over the validation samples, in nats per token; one all-reduce of the ranks' shares."""
        self.model.eval()
        mine = slice(self.comm.rank, None, self.comm.world_size)
        samples = self.validation.evenly_spaced(self.job.train.eval_samples, mine)
        totals = torch.zeros(2, dtype=torch.float64)  # sum of the loss, tokens
        for batch in torch.split(samples, self.job.batch.micro):
            batch = batch.to(self.comm.device)
            tokens = batch[:, 1:].numel()
            if tokens:
                totals += torch.tensor([next_token_loss(self.model(batch[:, :-1]), batch).item() * tokens, tokens])
        totals = totals.to(self.comm.device)
        self.comm.all_reduce(totals)
        self.model.train()
        loss_sum, count = totals.tolist()
        return float(loss_sum / count)

    def sample_text(self) -> str:
        """Text that the model goes on to write after a line's end."""
        self.model.eval()
        prompt = torch.tensor(list(SAMPLE_PROMPT), device=self.comm.device)
        generator = torch.Generator().manual_seed(self.job.train.seed)
        tokens: Tensor = self.model.generate(prompt, self.job.train.sample_bytes, SAMPLE_TEMPERATURE, generator)
        return bytes(token % 256 for token in tokens.tolist()).decode(errors="replace")

    def _announce(self) -> None:
        self.events.emit(
            "start",
            world_size=self.comm.world_size,
            device=str(self.comm.device),
            parameters=self.parameters,
            corpus_bytes=self.corpus_bytes,
            accumulation=self.layout.accumulation,
        )
        self._say(
            f"{self.job.name}: {self.parameters / 1e6:.2f} M parameters, {self.corpus_bytes / 1e6:.1f} MB "
            f"of text, {self.comm.world_size} ranks × {self.layout.accumulation} × {self.layout.micro} samples "
            f"of {self.job.sequence_length} bytes on {self.comm.device.type}"
        )

    def _report_step(self, step: int, lr: float, result: StepResult, *, step_s: float, elapsed_s: float) -> None:
        steps = self.job.train.steps
        rate = result.tokens / step_s
        self.events.emit(
            "step",
            step=step,
            loss=result.loss,
            lr=lr,
            grad_norm=result.grad_norm,
            tokens_per_s=rate,
            step_s=step_s,
            memory_bytes=_peak_memory_bytes(self.comm.device),
        )
        if step % self.job.log.every == 0 or step in (1, steps):
            left_s = elapsed_s / step * (steps - step)
            self._say(progress.step_line(step, steps, lr, result, rate, left_s))

    def _finish(self, val_loss: float, elapsed_s: float) -> None:
        if self.comm.rank == 0 and self.job.train.sample_bytes:
            self._say(f"--- sample\n{self.sample_text()}\n---")
        steps = self.job.train.steps
        tokens = steps * self.job.batch.global_ * self.job.sequence_length
        self.events.emit("end", step=steps, val_loss=val_loss, tokens=tokens, elapsed_s=elapsed_s)
        self._say(
            f"done: {steps} steps, {tokens / 1e6:.2f} M tokens in {elapsed_s:.1f} s "
            f"({tokens / elapsed_s / 1000:.1f}k tokens/s), validation loss {val_loss:.4f} nats per byte"
        )

    def _say(self, line: str) -> None:
        if self.comm.rank == 0:
            print(line, flush=True)


def _peak_memory_bytes(device: torch.device) -> int:
    """The most that this process has held: on the GPU by torch, on the CPU resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _job_of(arguments: Sequence[str] | None) -> JobConfig:
    parser = argparse.ArgumentParser(prog="python -m dstrain.runtime.trainer", allow_abbrev=False)
    parser.add_argument("job", type=Path, nargs="?", help="job.yaml; without it, the job that DSTRAIN_JOB names")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="put over the file's value")
    options = parser.parse_args(arguments)
    if options.job is not None:
        return load_job(options.job, options.set)
    if options.set:
        raise UsageError("--set: expected a job.yaml to put it over, found none")
    resolved = os.environ.get("DSTRAIN_JOB")
    if not resolved:
        raise UsageError("expected a job.yaml as the argument, or its resolved form in DSTRAIN_JOB, found neither")
    return load_resolved(Path(resolved))


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; returns the process's exit code."""
    try:
        job = _job_of(arguments)
        with Communicator.connect() as comm:
            Trainer(job, comm, EventWriter.from_environment()).train()
    except DstrainError as error:
        sys.stderr.write(f"dstrain: {error}\n")  # at once, where print would let another rank's line in between
        return int(error.exit_code)
    return 0


if __name__ == "__main__":
    sys.exit(main())
