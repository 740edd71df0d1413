"""The configuration of one job: frozen, complete, and every key does something.

`dstrain.runtime.spec.load` makes it from a job.yaml; the launcher hands its JSON to the workers. Each
component gets only its own section. Rules of one key stand at its field, those between keys in
`_contradictions`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dstrain.runtime.spec.errors import ConfigError

BYTE_VALUES = 256
"""Tokens of the format `bytes`: each byte of the corpus is one token."""

Count = Annotated[int, Field(ge=1)]
NonNegativeCount = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=1 << 32)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
MomentDecay = Annotated[float, Field(ge=0, lt=1)]


class Contradiction(NamedTuple):
    """Two keys that cannot both be right: the key to change, what the others ask of it, and what it is."""

    key: tuple[str, ...]
    expected: str
    found: str


class Contradictions(ValueError):
    """All contradictions of one configuration; the loader gives each its place in the file."""

    def __init__(self, found: list[Contradiction]) -> None:
        super().__init__("; ".join(f"{'.'.join(c.key)}: expected {c.expected}, found {c.found}" for c in found))
        self.found = found


class Section(BaseModel):
    """Base of every section: frozen, no unknown key, no silent conversion ("3" is no integer), no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


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
        default=0, description="Attempts after the first. None by default: nothing resumes unless asked to."
    )
    grace_s: Positive = Field(
        default=10.0, description="Seconds from SIGTERM to SIGKILL; 10 lets a rank write its last lines."
    )


class GPTConfig(Section):
    """A decoder-only transformer: pre-norm, causal attention, rotary positions."""

    layers: Count = Field(description="Transformer blocks.")
    width: Count = Field(description="Features of the residual stream; a multiple of 2 × `heads`.")
    heads: Count = Field(description="Attention heads.")
    context: Count = Field(description="Longest sequence in tokens.")
    vocabulary: Count = Field(default=BYTE_VALUES, description="Tokens known; 256 are the values of a byte.")


class ModelConfig(Section):
    """The model to train."""

    gpt: GPTConfig = Field(description="Our own GPT.")


class DataConfig(Section):
    """What the model reads."""

    path: Path | None = Field(
        default=None,
        description="File, or folder read in sorted order. By default the Python standard library's source: "
        "real text that is on every host.",
    )
    format: Literal["bytes"] = Field(default="bytes", description="How the corpus becomes tokens: one byte, one token.")
    sequence_length: Count | None = Field(
        default=None, description="Tokens of one sample; by default the model's whole context."
    )
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.05,
        description="Share of the corpus held out; 0.05 of a few megabytes measures the loss to about 0.01.",
    )
    seed: Seed = Field(default=0, description="Order of the samples.")


class BatchConfig(Section):
    """Samples of one optimizer step, whatever the number of ranks."""

    global_: Count = Field(alias="global", description="Samples of one optimizer step, over all ranks.")
    micro: Count = Field(description="Samples of one forward and backward on one rank; bounds the memory.")

    def accumulation(self, data_ranks: int) -> int:
        """Micro-batches that each of `data_ranks` ranks adds up in one step; never rounded.

        Raises ConfigError, with every factor, when the global batch does not divide.
        """
        together = self.micro * data_ranks
        if self.global_ % together:
            nearest = max(1, round(self.global_ / together)) * together
            raise ConfigError(
                f"batch.global: expected a multiple of batch.micro × data ranks = {self.micro} × "
                f"{data_ranks} = {together}, found {self.global_}; the nearest is {nearest}"
            )
        return self.global_ // together


class ZeroConfig(Section):
    """How the training state is spread over the data ranks."""

    stage: Literal[0] = Field(default=0, description="0: every rank holds everything, gradients are all-reduced.")
    bucket_elements: Count = Field(
        default=1 << 20,
        description="Gradient elements of one all-reduce: small enough to start early in the backward, large "
        "enough to hide a collective's latency. 1 Mi is 4 MiB of fp32.",
    )


class PrecisionConfig(Section):
    """Number formats."""

    dtype: Literal["fp32"] = Field(default="fp32", description="Parameters, activations, gradients.")


class OptimizerConfig(Section):
    """The optimizer; defaults usual for transformers (Loshchilov and Hutter 2019, Brown et al. 2020)."""

    name: Literal["adamw"] = Field(default="adamw", description="AdamW, fused.")
    lr: Positive = Field(default=1e-3, description="Peak learning rate; 1e-3 suits models of a few million parameters.")
    betas: tuple[MomentDecay, MomentDecay] = Field(
        default=(0.9, 0.95),
        description="Decay of the two moments; 0.95 recovers faster than 0.999 from a bad batch.",
    )
    eps: Positive = Field(default=1e-8, description="Added to the denominator.")
    weight_decay: NonNegative = Field(default=0.1, description="Decoupled decay per unit of learning rate.")


class ScheduleConfig(Section):
    """The learning rate over the steps."""

    name: Literal["cosine", "constant"] = Field(default="cosine", description="Shape after the warm-up.")
    warmup_steps: NonNegativeCount = Field(
        default=0,
        description="Steps of linear rise from 0 to the peak; it may be longer than the training, for a quick try.",
    )
    minimum_ratio: Fraction | None = Field(
        default=None,
        description="Last learning rate ÷ peak, of `cosine`; by default 0.1 (Hoffmann et al. 2022).",
    )


class TrainConfig(Section):
    """The training loop."""

    steps: Count = Field(description="Optimizer steps.")
    clip: Positive | None = Field(
        default=1.0,
        description="Largest global L2 norm of the gradient; null never clips. 1.0 is usual.",
    )
    eval_every: Count | None = Field(default=None, description="Steps between validations; by default only at the end.")
    eval_samples: Count = Field(
        default=256,
        description="Validation samples, evenly spaced over the held-out part; always the same ones.",
    )
    seed: Seed = Field(default=0, description="Initial parameters and everything random but the data's order.")
    sample_bytes: NonNegativeCount = Field(default=200, description="Bytes of text to generate at the end; 0 for none.")


class LogConfig(Section):
    """What the console gets."""

    every: Count = Field(default=10, description="Steps between two progress lines.")


class JobConfig(Section):
    """One job. Raises pydantic's ValidationError; `load_job` turns that into one line per mistake."""

    name: str = Field(default="job", min_length=1, description="Shown in listings and part of the run's id.")
    run: RunConfig = Field(default=RunConfig(), description=RunConfig.__doc__)
    model: ModelConfig = Field(description=ModelConfig.__doc__)
    data: DataConfig = Field(default=DataConfig(), description=DataConfig.__doc__)
    batch: BatchConfig = Field(description=BatchConfig.__doc__)
    zero: ZeroConfig = Field(default=ZeroConfig(), description=ZeroConfig.__doc__)
    precision: PrecisionConfig = Field(default=PrecisionConfig(), description=PrecisionConfig.__doc__)
    optimizer: OptimizerConfig = Field(default=OptimizerConfig(), description=OptimizerConfig.__doc__)
    schedule: ScheduleConfig = Field(default=ScheduleConfig(), description=ScheduleConfig.__doc__)
    train: TrainConfig = Field(description=TrainConfig.__doc__)
    log: LogConfig = Field(default=LogConfig(), description=LogConfig.__doc__)

    @property
    def sequence_length(self) -> int:
        """Tokens of one sample."""
        return self.data.sequence_length or self.model.gpt.context

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> JobConfig:
        if found := list(_contradictions(self)):
            raise Contradictions(found)
        return self


def _contradictions(job: JobConfig) -> Iterator[Contradiction]:
    gpt, batch, schedule = job.model.gpt, job.batch, job.schedule
    if gpt.width % (2 * gpt.heads):
        even = f"a multiple of 2 × heads = {2 * gpt.heads} (a head's width is even)"
        yield Contradiction(("model", "gpt", "width"), even, str(gpt.width))
    if gpt.vocabulary < BYTE_VALUES:
        yield Contradiction(
            ("model", "gpt", "vocabulary"),
            f"at least {BYTE_VALUES} for data.format bytes",
            str(gpt.vocabulary),
        )
    if job.sequence_length > gpt.context:
        yield Contradiction(
            ("data", "sequence_length"),
            f"at most model.gpt.context = {gpt.context}",
            str(job.sequence_length),
        )
    if batch.global_ % batch.micro:
        yield Contradiction(("batch", "global"), f"a multiple of batch.micro = {batch.micro}", str(batch.global_))
    if schedule.name == "constant" and schedule.minimum_ratio is not None:
        yield Contradiction(
            ("schedule", "minimum_ratio"), "no such key with name: constant", str(schedule.minimum_ratio)
        )
    if job.run.hostfile is not None and job.run.hosts is not None:
        yield Contradiction(("run", "hosts"), "no such key beside run.hostfile", repr(job.run.hosts))
