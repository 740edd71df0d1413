"""What a training says of itself: events for the launcher, lines for the console, numbers for trackers."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from dstrain.runtime import metrics, progress
from dstrain.runtime.checkpoint.load import Loaded
from dstrain.runtime.checkpoint.save import Saved
from dstrain.runtime.comm import Communicator
from dstrain.runtime.engine import Engine, StepResult
from dstrain.runtime.models.hf import text_size
from dstrain.runtime.spec.config import JobConfig
from dstrain.runtime.spec.event import EventWriter
from dstrain.runtime.trackers import open_trackers


class ModelSize(NamedTuple):
    """Of the whole model. flops_per_token: of forward and backward; None where it is not known."""

    parameters: int
    flops_per_token: float | None

    @classmethod
    def of(cls, model: nn.Module, job: JobConfig, sequence_length: int | None) -> ModelSize:
        """sequence_length: of what is counted in tokens."""
        parameters = sum(parameter.numel() for parameter in model.parameters())
        return cls(parameters, None if sequence_length is None else flops_per_token(model, job, sequence_length))


class Reporter:
    """Of one rank; only rank 0 speaks and feeds trackers. unit: of what the loss counts (tokens, samples)."""

    def __init__(
        self,
        job: JobConfig,
        comm: Communicator,
        events: EventWriter,
        engine: Engine,
        size: ModelSize,
        data: str,
        unit: str,
    ) -> None:
        assert job.train.steps is not None
        self._job, self._comm, self._events, self._engine = job, comm, events, engine
        self._steps, self._data, self._unit = job.train.steps, data, unit
        self._size = size
        self._peak_tflops = job.log.peak_tflops
        if self._peak_tflops is None and comm.device.type == "cuda":
            self._peak_tflops = metrics.peak_tflops(torch.cuda.get_device_name(comm.device), job.precision.dtype)
        self._began = time.perf_counter()
        self._first_step = self._counted = 0
        run_id = os.environ.get("DSTRAIN_RUN_ID", "")
        log = job.log if comm.rank == 0 else job.log.model_copy(update={"trackers": ()})
        self._trackers = open_trackers(log, job.name, run_id, Path("trackers"), job.model_dump(mode="json"))

    def start(self, sequence_length: int | None) -> None:
        """Before the first step: what is trained, on what."""
        batch = self._job.batch
        assert batch is not None
        accumulation = self._engine.config.accumulation
        self._events.emit(
            "start",
            world_size=self._comm.world_size,
            device=str(self._comm.device),
            parameters=self._size.parameters,
            accumulation=accumulation,
            data=self._data,
            unit=self._unit,
        )
        samples = f" of {sequence_length} tokens" if self._unit == "tokens" else ""
        self.say(
            f"{self._job.name}: {self._size.parameters / 1e6:.2f} M parameters, {self._data}, {self._comm.world_size} "
            f"{'rank' if self._comm.world_size == 1 else 'ranks'} × {accumulation} × {batch.micro} "
            f"samples{samples} on {self._comm.device.type}, {self._job.precision.dtype}"
        )
        if self._engine.pipeline is not None:
            self.say(self._engine.pipeline.describe())
        if layout := self._engine.weights.describe():
            self.say(layout)
        self._began, self._first_step = time.perf_counter(), self._engine.global_step

    def step(self, result: StepResult, step_s: float, data_wait_s: float) -> None:
        """Behind each step."""
        engine, step = self._engine, self._engine.global_step
        self._counted += result.tokens
        rate = result.tokens / step_s
        memory = metrics.peak_memory_bytes(self._comm.device)
        values: dict[str, float] = {
            "loss": result.loss,
            "lr": engine.learning_rate,
            "grad_norm": result.grad_norm,
            "tokens_per_s": rate,
            "step_s": step_s,
            "memory_bytes": memory,
            "data_wait_s": data_wait_s,
        }
        if engine.scaler.enabled:
            values["loss_scale"] = engine.scaler.value
        mfu = self._mfu(rate)
        if mfu is not None:
            values["mfu"] = mfu
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._events.emit("step", step=step, **finite, **({"skipped": True} if result.skipped else {}))
        self._trackers.log(step, values)
        if step % self._job.log.every == 0 or step in (self._first_step + 1, self._steps):
            elapsed_s = time.perf_counter() - self._began
            left_s = elapsed_s / (step - self._first_step) * (self._steps - step)
            self.say(
                progress.step_line(
                    step, self._steps, engine.learning_rate, result, rate, left_s, memory, mfu, unit=self._unit
                )
            )

    def alive(self) -> None:
        """Where no other event is due for long, on each rank."""
        self._events.emit("alive", step=self._engine.global_step)

    def validation(self, val_loss: float) -> None:
        """Behind each validation."""
        step = self._engine.global_step
        self._events.emit("validation", step=step, val_loss=val_loss if math.isfinite(val_loss) else None)
        self._trackers.log(step, {"val_loss": val_loss})
        self.say(progress.validation_line(step, self._steps, val_loss))

    def saved(self, saved: Saved) -> None:
        """When it is known what has become of a save; one that failed is said loudly, and the training goes on."""
        if saved.problem:
            self._events.emit("warning", text=saved.problem, step=saved.step)
            self.say(f"warning: {saved.problem}")
            return
        self._events.emit(
            "checkpoint",
            step=saved.step,
            path=str(saved.path),
            seconds=saved.seconds,
            stall_s=saved.stall_s,
            bytes=saved.size,
        )
        stall = f", the training waited {saved.stall_s:.2f} s" if saved.stall_s < saved.seconds else ""
        self.say(f"step {saved.step}: saved {saved.path} ({saved.size / 1e6:.1f} MB in {saved.seconds:.1f} s{stall})")

    def noted(self, notes: list[str]) -> None:
        """What a save has to say besides."""
        for note in notes:
            self._events.emit("warning", text=note)
            self.say(f"warning: {note}")

    def resumed(self, loaded: Loaded) -> None:
        """Behind loading; what was passed over is said loudly."""
        for why in loaded.passed_over:
            self._events.emit("warning", text=f"passed over: {why}")
            self.say(f"warning: a checkpoint was passed over: {why}")
        if loaded.model_only:
            kept = f"; {', '.join(loaded.missing)} as initialized" if loaded.missing else ""
            besides = f"; without its {', '.join(loaded.foreign)}" if loaded.foreign else ""
            self.say(f"began with the model of {loaded.path}{kept}{besides}")
            return
        self._events.emit("resume", step=loaded.step, path=str(loaded.path))
        self.say(f"resumed from step {loaded.step}: {loaded.path}")
        if loaded.left:
            self.say(f"later steps were set aside, as step-N.left-…: {', '.join(map(str, loaded.left))}")

    def rewound(self, loaded: Loaded, why: str) -> None:
        """Behind going back to a checkpoint."""
        self._events.emit("warning", text=f"rewound: {why}")
        self.say(f"warning: {why}")
        self.resumed(loaded)
        self._began, self._first_step = time.perf_counter(), loaded.step

    def stopped(self, step: int) -> None:
        """Asked to end before the last step."""
        self._events.emit("end", step=step, stopped=True, elapsed_s=time.perf_counter() - self._began)
        saved = "saved; " if self._job.checkpoint is not None else ""
        self.say(f"stopped behind step {step} of {self._steps} (SIGTERM): {saved}go on by --resume auto")

    def end(self, val_loss: float | None) -> None:
        """The final summary."""
        elapsed_s = time.perf_counter() - self._began
        steps = self._engine.global_step - self._first_step
        self._events.emit("end", step=self._steps, val_loss=val_loss, tokens=self._counted, elapsed_s=elapsed_s)
        data = self._job.data
        nats = " nats per byte" if self._unit == "tokens" and data.format == "bytes" and not data.factory else ""
        loss = f", validation loss {val_loss:.4f}{nats}" if val_loss is not None else ""
        count = f"{progress.thousands(self._counted)} {self._unit}"
        rate = progress.thousands(self._counted / elapsed_s) if steps else "0"
        self.say(f"done: {steps} steps, {count} in {elapsed_s:.1f} s ({rate} {self._unit}/s){loss}")

    def say(self, line: str) -> None:
        """A line on rank 0's console."""
        if self._comm.rank == 0:
            print(line, flush=True)

    def close(self) -> None:
        """Let trackers write what they hold."""
        self._trackers.close()

    def _mfu(self, tokens_per_s: float) -> float | None:
        if self._size.flops_per_token is None or self._peak_tflops is None:
            return None
        ranks = self._comm.world_size
        return metrics.model_flops_utilization(tokens_per_s, ranks, self._size.flops_per_token, self._peak_tflops)


def _weight(module: nn.Module) -> object:
    """The parameter as it lies there: reading the attribute of a sharded module would gather it."""
    return module._parameters.get("weight")


def flops_per_token(model: nn.Module, job: JobConfig, sequence_length: int) -> float | None:
    """FLOPs of forward and backward for one token; None for a model whose layers and width are not known."""
    if job.gpt is not None:
        layers, width = job.gpt.layers, job.gpt.width
    elif job.model is not None and job.model.hf is not None:
        found = text_size(model, "num_hidden_layers"), text_size(model, "hidden_size")
        if found[0] is None or found[1] is None:
            return None
        layers, width = found[0], found[1]
    else:
        return None
    heads = {id(_weight(module)) for module in model.modules() if isinstance(module, nn.Linear)}
    tables = {
        id(_weight(m)): m.num_embeddings * m.embedding_dim for m in model.modules() if isinstance(m, nn.Embedding)
    }
    only_looked_up = sum(size for table, size in tables.items() if table not in heads)
    multiplying = sum(parameter.numel() for parameter in model.parameters()) - only_looked_up
    return metrics.transformer_flops_per_token(multiplying, layers, width, sequence_length)
