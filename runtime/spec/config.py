"""The configuration of one job: frozen, complete, and every key does something.

`dstrain.runtime.spec.load` makes it from a job.yaml; the launcher hands its JSON to the workers. Each
component gets only its own section. Rules of one key stand at its field, those between keys in
`_contradictions`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from dstrain.runtime.spec.data_config import BatchConfig, DataConfig
from dstrain.runtime.spec.model_config import BYTE_VALUES, GPTConfig, ModelConfig
from dstrain.runtime.spec.section import (
    Contradiction,
    Contradictions,
    Count,
    NonNegative,
    NonNegativeCount,
    Positive,
    Section,
)
from dstrain.runtime.spec.training_config import (
    MOST_TRACED,
    CheckpointConfig,
    LogConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    ScheduleConfig,
    TrainConfig,
    ZeroConfig,
)

_USERS = {"betas": ("adamw", "adam", "muon"), "eps": ("adamw", "adam", "muon"), "momentum": ("sgd", "muon")}
"""Which optimizers use a key."""

_SHAPES = {
    "minimum_ratio": ("cosine", "linear", "one_cycle", "plateau"),
    "factor": ("step", "plateau"),
    "patience": ("plateau",),
    "threshold": ("plateau",),
    "peak_fraction": ("one_cycle",),
    "start_ratio": ("one_cycle",),
}
"""Which schedules use a key."""


class RunConfig(Section):
    """Where and how the workers start; the launcher reads it, the runtime does not."""

    hostfile: Path | None = Field(default=None, description="File of hosts; without it and `hosts`, this machine.")
    hosts: str | None = Field(default=None, description="Hosts in place of a file, such as 'a:4,gpu[1-3]:8'.")
    nproc_per_node: Count | Literal["auto"] | None = Field(
        default=None,
        description="Ranks on each host; 'auto': one per GPU. By default what the hosts' slots say.",
    )
    env: dict[str, str] = Field(default_factory=dict, description="Environment of every worker, set last.")
    pass_env: tuple[str, ...] = Field(
        default=(), description="Patterns of the caller's variables to pass on: 'NCCL_*'."
    )
    cwd: Path | None = Field(
        default=None, description="Working directory on every host; by default the same path as here."
    )
    python: str | None = Field(default=None, description="Interpreter on every host; by default the one of the host.")
    prologue: str | None = Field(
        default=None, description="Shell line to run before a host's workers: 'module load cuda'."
    )
    max_restarts: NonNegativeCount = Field(
        default=0,
        description="Attempts after the first; each goes on from the newest checkpoint, if the job saves any.",
    )
    min_nodes: Count | None = Field(
        default=None,
        description="Hosts that suffice for another attempt where some are lost and no spare is left; by default as "
        "many as there were. batch.global stays.",
    )
    grace_s: Positive = Field(
        default=10.0, description="Seconds from SIGTERM to SIGKILL; 10 lets a rank write its last lines."
    )
    hang_s: NonNegative | None = Field(
        default=None,
        description="Seconds without a step that are a hang, which ends the attempt; 0: none is. By default from the "
        "run's own steps: 10 of their median, at least 60.",
    )


class JobConfig(Section):
    """One job. Raises pydantic's ValidationError; `load_job` turns that into one line per mistake.

    The trainer needs `model`, `batch` and `train.steps`: see `what_a_trainer_lacks`. A script of the user's may do
    without them.
    """

    name: str = Field(default="job", min_length=1, description="Shown in listings and part of the run's id.")
    run: RunConfig = Field(default=RunConfig(), description=RunConfig.__doc__)
    model: ModelConfig | None = Field(default=None, description=ModelConfig.__doc__)
    data: DataConfig = Field(default=DataConfig(), description=DataConfig.__doc__)
    batch: BatchConfig | None = Field(default=None, description=BatchConfig.__doc__)
    parallel: ParallelConfig = Field(default=ParallelConfig(), description=ParallelConfig.__doc__)
    zero: ZeroConfig = Field(default=ZeroConfig(), description=ZeroConfig.__doc__)
    precision: PrecisionConfig = Field(default=PrecisionConfig(), description=PrecisionConfig.__doc__)
    optimizer: OptimizerConfig = Field(default=OptimizerConfig(), description=OptimizerConfig.__doc__)
    schedule: ScheduleConfig = Field(default=ScheduleConfig(), description=ScheduleConfig.__doc__)
    train: TrainConfig = Field(default=TrainConfig(), description=TrainConfig.__doc__)
    checkpoint: CheckpointConfig | None = Field(default=None, description=CheckpointConfig.__doc__)
    log: LogConfig = Field(default=LogConfig(), description=LogConfig.__doc__)

    @property
    def gpt(self) -> GPTConfig | None:
        """Our own GPT, if it is the model."""
        return self.model.gpt if self.model else None

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> JobConfig:
        if found := list(_contradictions(self)):
            raise Contradictions(found)
        return self


def what_a_trainer_lacks(job: JobConfig) -> Iterator[Contradiction]:
    """Keys that our trainer must have, where a user's own script need not."""
    if job.model is None:
        yield Contradiction(("model",), "a section with gpt, hf or factory", "none")
    if job.batch is None:
        yield Contradiction(("batch",), "a section with global and micro", "none")
    if job.train.steps is None:
        yield Contradiction(("train", "steps"), "a value", "none")
    if job.schedule.name == "plateau" and job.train.eval_every is None:
        expected = "steps between validations, whose loss schedule.name: plateau looks at"
        yield Contradiction(("train", "eval_every"), expected, "none")


def _differs(section: Section, *names: str) -> Iterator[tuple[str, str]]:
    """(key, value) of the keys among `names` that differ from their defaults.

    Not `model_fields_set`: a job that was resolved, or printed by `dstrain config show`, has every key.
    """
    for name in names:
        value, field = getattr(section, name), type(section).model_fields[name]
        if value != field.get_default(call_default_factory=True):
            yield name, str(list(value) if isinstance(value, tuple) else value)


def _contradictions(job: JobConfig) -> Iterator[Contradiction]:
    yield from _of_model(job)
    yield from _of_data(job)
    yield from _of_training(job)
    yield from _of_optimizer(job)
    yield from _of_schedule(job)
    yield from _of_sharding(job)
    yield from _of_pipeline(job)
    if job.run.hostfile is not None and job.run.hosts is not None:
        yield Contradiction(("run", "hosts"), "no such key beside run.hostfile", repr(job.run.hosts))


def _of_model(job: JobConfig) -> Iterator[Contradiction]:
    model = job.model
    if model is None:
        return
    given = [name for name in ("gpt", "hf", "factory") if getattr(model, name) is not None]
    if len(given) != 1:
        yield Contradiction(("model",), "one of gpt, hf, factory", ", ".join(given) or "none")
    if model.args and model.factory is None:
        yield Contradiction(("model", "args"), "no such key without model.factory", str(model.args))
    if model.hf is not None and (model.hf.path is None) == (model.hf.config is None):
        found = "none" if model.hf.path is None else "both"
        yield Contradiction(("model", "hf"), "path (pretrained) or config (random weights)", found)
    gpt = model.gpt
    if gpt is None:
        return
    if gpt.width % (2 * gpt.heads):
        even = f"a multiple of 2 × heads = {2 * gpt.heads} (a head's width is even)"
        yield Contradiction(("model", "gpt", "width"), even, str(gpt.width))
    if gpt.vocabulary < BYTE_VALUES and job.data.format == "bytes" and job.data.factory is None:
        yield Contradiction(
            ("model", "gpt", "vocabulary"),
            f"at least {BYTE_VALUES} for data.format bytes",
            str(gpt.vocabulary),
        )
    length = job.data.sequence_length
    if length is not None and length > gpt.context:
        yield Contradiction(("data", "sequence_length"), f"at most model.gpt.context = {gpt.context}", str(length))


def _of_data(job: JobConfig) -> Iterator[Contradiction]:
    data = job.data
    given = [name for name in ("path", "sources", "factory") if getattr(data, name)]
    if len(given) > 1:
        yield Contradiction(("data", given[-1]), f"no such key beside data.{given[0]}", "both")
    if data.args and data.factory is None:
        yield Contradiction(("data", "args"), "no such key without data.factory", str(data.args))
    if data.factory is not None:
        corpus = ("format", "tokenizer", "token_type", "validation_fraction", "validation_path", "cache")
        for key, found in _differs(data, *corpus):
            yield Contradiction(("data", key), "no such key beside data.factory", found)
        return
    if data.validation_path is not None:
        for key, found in _differs(data, "validation_fraction"):
            yield Contradiction(("data", key), "no such key beside data.validation_path", found)
    if data.format != "tokens":
        for key, found in _differs(data, "token_type"):
            yield Contradiction(("data", key), f"no such key with format: {data.format}", found)
    if (data.format == "text") != (data.tokenizer is not None):
        expected = "a tokenizer.json for data.format text" if data.format == "text" else "none without format: text"
        yield Contradiction(("data", "tokenizer"), expected, str(data.tokenizer or "none"))
    if data.format != "bytes" and not given:
        yield Contradiction(("data", "path"), f"a file or folder for data.format {data.format}", "none")


def _of_training(job: JobConfig) -> Iterator[Contradiction]:
    batch, precision = job.batch, job.precision
    if batch is not None and batch.global_ % batch.micro:
        yield Contradiction(("batch", "global"), f"a multiple of batch.micro = {batch.micro}", str(batch.global_))
    if precision.autocast and precision.dtype == "fp32":
        yield Contradiction(("precision", "dtype"), "bf16 or fp16 for precision.autocast", "fp32")
    if job.train.on_nonfinite == "rewind" and job.checkpoint is None:
        yield Contradiction(("train", "on_nonfinite"), "a section checkpoint for rewind", "none")
    if len(set(job.log.trackers)) < len(job.log.trackers):
        yield Contradiction(("log", "trackers"), "each tracker once", ", ".join(job.log.trackers))
    if job.log.trace is not None:
        traced, steps = job.log.traced_steps, job.train.steps
        if traced is None:
            expected = f"a step or FIRST-LAST, from 1, of at most {MOST_TRACED} steps"
            yield Contradiction(("log", "trace"), expected, repr(job.log.trace))
        elif steps is not None and traced[0] > steps:
            yield Contradiction(("log", "trace"), f"steps within train.steps = {steps}", repr(job.log.trace))


def _of_optimizer(job: JobConfig) -> Iterator[Contradiction]:
    optimizer = job.optimizer
    if optimizer.factory is not None:
        for key, found in _differs(optimizer, "name", "betas", "eps", "momentum"):
            fix = "" if key == "name" else "; its own arguments stand in optimizer.args"
            yield Contradiction(("optimizer", key), "no such key beside optimizer.factory", found + fix)
        return
    for key, found in _differs(optimizer, *(key for key, users in _USERS.items() if optimizer.name not in users)):
        yield Contradiction(("optimizer", key), f"no such key with name: {optimizer.name}", found)


def _of_schedule(job: JobConfig) -> Iterator[Contradiction]:
    schedule = job.schedule
    if (schedule.name == "step") != (schedule.every is not None):
        expected = "a number of steps for name: step" if schedule.name == "step" else f"none for name: {schedule.name}"
        yield Contradiction(("schedule", "every"), expected, str(schedule.every or "none"))
    if schedule.name == "one_cycle" and schedule.warmup_steps:
        yield Contradiction(("schedule", "warmup_steps"), "0: one_cycle has its own rise", str(schedule.warmup_steps))
    for key, found in _differs(schedule, *(key for key, users in _SHAPES.items() if schedule.name not in users)):
        yield Contradiction(("schedule", key), f"no such key with name: {schedule.name}", found)


def _of_pipeline(job: JobConfig) -> Iterator[Contradiction]:
    parallel = job.parallel
    if parallel.pipeline == 1:
        for key, found in _differs(parallel, "schedule", "stages_per_rank", "partition"):
            yield Contradiction(("parallel", key), "no such key without parallel.pipeline", found)
        return
    if parallel.stages_per_rank is not None and parallel.schedule != "interleaved_1f1b":
        expected = f"no such key with schedule: {parallel.schedule}"
        yield Contradiction(("parallel", "stages_per_rank"), expected, str(parallel.stages_per_rank))
    if job.train.compile:
        yield Contradiction(("train", "compile"), "false with parallel.pipeline", "true")


def _of_sharding(job: JobConfig) -> Iterator[Contradiction]:
    zero, parallel = job.zero, job.parallel
    if zero.stage == 0 and zero.accumulate == "sharded":
        yield Contradiction(("zero", "accumulate"), "local at stage 0, where every rank has all gradients", "sharded")
    if zero.stage < 3 and zero.reshard != "micro_batch":
        yield Contradiction(("zero", "reshard"), "no such key below stage 3", zero.reshard)
    if zero.stage == 0 and zero.comm not in ("auto", "direct", "native"):
        yield Contradiction(("zero", "comm"), "auto, direct or native at stage 0, which all-reduces", zero.comm)
    if zero.stage == 0 and zero.offload.optimizer:
        yield Contradiction(("zero", "offload", "optimizer"), "stage 1, 2 or 3 to offload", "stage 0")
    if zero.stage < 3 and zero.offload.parameters:
        yield Contradiction(("zero", "offload", "parameters"), "stage 3 to offload parameters", f"stage {zero.stage}")
    if zero.offload.parameters and not zero.offload.optimizer:
        expected = "zero.offload.optimizer too: it moves the parameters where they are"
        yield Contradiction(("zero", "offload", "parameters"), expected, "false")
    if zero.stage == 0 and parallel.data_shard is not None and parallel.data_shard > 1:
        yield Contradiction(("parallel", "data_shard"), "stage 1, 2 or 3 to shard", "stage 0")
    if zero.stage == 3 and job.train.compile:
        keep = "its parameters come and go between operations"
        yield Contradiction(("train", "compile"), f"false at stage 3 ({keep}), or stage 2", "true")
    if zero.stage == 3 and job.precision.autocast:
        found, keep = "true", "it would keep a cast copy of every weight; precision.dtype: bf16 does not"
        yield Contradiction(("precision", "autocast"), f"false at stage 3 ({keep})", found)
