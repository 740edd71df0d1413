"""The sections that say how a model is trained: zero, precision, optimizer, schedule, train, checkpoint, log."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from dstrain.runtime.spec.section import (
    Count,
    Fraction,
    ImportPath,
    MomentDecay,
    NonNegative,
    NonNegativeCount,
    OpenFraction,
    Positive,
    Section,
    Seed,
)

DEFAULT_TRACE = "4-6"

MOST_TRACED = 100
"""Steps: a pipeline of 8 stages and 64 micro-batches then has some 40 MB of spans."""


class OffloadConfig(Section):
    """What lives in the host's memory in place of the GPU's; on ranks without a GPU there is nothing to move."""

    optimizer: bool = Field(
        default=False, description="fp32 weights, optimizer states and the step itself; stages 1 to 3."
    )
    parameters: bool = Field(default=False, description="Shards of the parameters; stage 3.")


class ZeroConfig(Section):
    """How the training state is spread over the data ranks (Rajbhandari et al. 2020)."""

    stage: Literal[0, 1, 2, 3] = Field(
        default=0,
        description="What is sharded. 0: nothing, gradients are all-reduced; 1: optimizer states; 2: gradients too; "
        "3: parameters too.",
    )
    bucket_elements: Count = Field(
        default=1 << 22,
        description="Elements that are reduced together at stages 0 to 2: small enough to start early in the backward, "
        "large enough to hide a collective's latency. 4 Mi are 16 MiB of fp32. Stage 3 goes by the model's blocks.",
    )
    resident_elements: NonNegativeCount = Field(
        default=1 << 17,
        description="At stage 3, units of fewer elements stay whole on every rank: a gather would cost more time than "
        "it saves memory.",
    )
    accumulate: Literal["local", "sharded"] | None = Field(
        default=None,
        description="Over micro-batches. local: one reduction a step, in the memory of all gradients; sharded: one for "
        "each micro-batch, in that of a shard. By default local at stages 0 and 1, sharded at 2 and 3.",
    )
    reshard: Literal["micro_batch", "step"] = Field(
        default="micro_batch",
        description="At stage 3, how long gathered parameters are kept. micro_batch: until others need the memory; "
        "step: to the step's end, gathered once, in the memory of stage 2.",
    )
    comm: Literal["auto", "direct", "pairwise", "ring", "native"] = Field(
        default="auto",
        description="Algorithm of all-gather and reduce-scatter; auto: native (NCCL's own) on GPUs, on CPUs the "
        "fastest of the others in a trial at the start. direct: ranks on one host read each other's memory. ring sends "
        "less between hosts that have several ranks each.",
    )
    offload: OffloadConfig = Field(default=OffloadConfig(), description=OffloadConfig.__doc__)


class ParallelConfig(Section):
    """How the ranks are arranged: pipeline stages of data_replicate groups, of data_shard neighbouring ranks each."""

    pipeline: Count = Field(
        default=1, description="Ranks that hold one copy of the model, layer by layer; 1 for the whole on each."
    )
    schedule: Literal["gpipe", "1f1b", "interleaved_1f1b", "zb_h1", "zb_v"] | Path = Field(
        default="1f1b",
        description="The order of forwards and backwards in a pipeline: gpipe (Huang et al. 2019), 1f1b and "
        "interleaved_1f1b (Narayanan et al. 2021), zb_h1 and zb_v (Qi et al. 2023), or a CSV file with a row of "
        "actions (0F3: stage 0, forward of micro-batch 3) for each rank.",
    )
    stages_per_rank: Count | None = Field(
        default=None, description="Of interleaved_1f1b; by default 2. More make waits shorter and messages more."
    )
    partition: Literal["parameters", "time"] | tuple[Count, ...] = Field(
        default="parameters",
        description="How layers are dealt out to stages. parameters: by their number of parameters; time: by a "
        "measurement at the start; or the number of layers of each stage, the embedding the first, the head the last.",
    )
    data_shard: Count | None = Field(
        default=None,
        description="Ranks that share one copy of what zero.stage shards; by default all of them. Fewer (the ranks of "
        "one host) gather over fast links only.",
    )
    data_replicate: Count | None = Field(default=None, description="Such groups; by default ranks / data_shard.")


class LossScaleConfig(Section):
    """Scaling of an fp16 loss, so that small gradients do not vanish (Micikevicius et al. 2018)."""

    value: Positive | None = Field(
        default=None, description="A fixed scale; by default it adapts. Ten overflows in a row end the job."
    )
    initial_power: NonNegativeCount = Field(
        default=16, le=127, description="The first scale is 2 to this power; at most fp32's largest."
    )
    window: Count = Field(default=1000, description="Steps in a row without overflow before the scale doubles.")
    hysteresis: Count = Field(
        default=2, description="The overflow that halves the scale, and every one after it until the scale doubles."
    )
    minimum: Positive = Field(default=1.0, description="The scale never falls below; an overflow there ends the job.")


class PrecisionConfig(Section):
    """Number formats."""

    dtype: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32", description="Parameters and activations; bf16 and fp16 keep fp32 master weights."
    )
    autocast: bool = Field(
        default=False,
        description="Keep parameters in fp32 and let torch.autocast compute in `dtype`, operation by operation.",
    )
    reduce_dtype: Literal["fp32", "bf16", "fp16"] | None = Field(
        default=None, description="Gradients while they are summed over micro-batches and ranks; by default fp32."
    )
    loss_scale: LossScaleConfig = Field(default=LossScaleConfig(), description=LossScaleConfig.__doc__)


class GroupConfig(Section):
    """Parameters that are trained unlike the others."""

    match: tuple[str, ...] = Field(min_length=1, description="Patterns of parameters' names: 'head.*'.")
    lr_ratio: Positive = Field(default=1.0, description="Learning rate ÷ `optimizer.lr`.")
    weight_decay: NonNegative | None = Field(default=None, description="In place of `optimizer.weight_decay`.")


class OptimizerConfig(Section):
    """The optimizer; defaults usual for transformers (Loshchilov and Hutter 2019, Brown et al. 2020)."""

    name: Literal["adamw", "adam", "sgd", "adafactor", "muon"] = Field(
        default="adamw",
        description="adamw and adam are fused. muon moves matrices of hidden layers, adamw all the rest.",
    )
    factory: ImportPath | None = Field(
        default=None, description="`package.module:name` of a torch optimizer, in place of `name`."
    )
    args: dict[str, Any] = Field(default_factory=dict, description="More keyword arguments of the optimizer.")
    lr: Positive = Field(default=1e-3, description="Peak learning rate; 1e-3 suits models of a few million parameters.")
    betas: tuple[MomentDecay, MomentDecay] = Field(
        default=(0.9, 0.95),
        description="Decay of the two moments; 0.95 recovers faster than 0.999 from a bad batch. adamw, adam, muon.",
    )
    eps: Positive = Field(default=1e-8, description="Added to the denominator. adamw, adam, muon.")
    momentum: MomentDecay | None = Field(
        default=None, description="Of sgd (by default 0.9) and muon (by default 0.95)."
    )
    weight_decay: NonNegative = Field(default=0.1, description="Decay per unit of learning rate; coupled in adam, sgd.")
    no_decay: tuple[str, ...] = Field(
        default=(),
        description="Parameters without decay, also those of `groups`: patterns of names, or '1d' for all of fewer "
        "than two dimensions (biases, norms).",
    )
    groups: tuple[GroupConfig, ...] = Field(
        default=(), description="Parameters that are trained unlike the others; the first group that matches has them."
    )


class ScheduleConfig(Section):
    """The learning rate over the steps: a linear rise, then a shape."""

    name: Literal["cosine", "constant", "linear", "step", "one_cycle", "plateau"] = Field(
        default="cosine", description="Shape after the warm-up."
    )
    warmup_steps: NonNegativeCount = Field(
        default=0,
        description="Steps of linear rise from 0 to the peak; it may be longer than the training, for a quick try.",
    )
    minimum_ratio: Fraction | None = Field(
        default=None,
        description="Last learning rate ÷ peak: cosine 0.1 by default (Hoffmann et al. 2022), linear 0, one_cycle "
        "start_ratio / 10,000, plateau 0.",
    )
    every: Count | None = Field(default=None, description="Steps between two falls, of `step`.")
    factor: OpenFraction = Field(default=0.1, description="One fall of `step` and `plateau` multiplies by this.")
    patience: NonNegativeCount = Field(
        default=3, description="Validations without a better loss that `plateau` bears before it falls."
    )
    threshold: NonNegative = Field(default=1e-4, description="A loss better by less than this share is no better.")
    peak_fraction: OpenFraction = Field(default=0.3, description="Share of the steps to the peak, of `one_cycle`.")
    start_ratio: Fraction = Field(default=0.04, description="First learning rate ÷ peak, of `one_cycle`.")


class TrainConfig(Section):
    """The training loop."""

    steps: Count | None = Field(default=None, description="Optimizer steps.")
    clip: Positive | None = Field(
        default=1.0,
        description="Largest global L2 norm of the gradient; null never clips. 1.0 is usual.",
    )
    loss: ImportPath | None = Field(
        default=None,
        description="`package.module:name` of loss(output, target), for samples (input, target) of a data.factory; "
        "by default the model returns its loss.",
    )
    activation_checkpointing: Literal["all"] | Count | tuple[str, ...] | None = Field(
        default=None,
        description="Blocks that recompute their activations: all, every k-th, or modules by patterns of names.",
    )
    compile: bool = Field(
        default=False, description="Compile the model's forward with torch.compile; below zero.stage 3."
    )
    ema_decay: OpenFraction | None = Field(
        default=None, description="Keep an exponential moving average of the weights, and validate with it."
    )
    on_nonfinite: Literal["stop", "skip", "rewind"] = Field(
        default="stop",
        description="When the loss or a gradient is not finite, on all ranks at the same step. stop: end with 206; "
        "skip: leave the step out, 10 in a row at most; rewind: go on from the newest checkpoint, once for a step.",
    )
    check_replicas_every: NonNegativeCount | None = Field(
        default=10,
        description="Steps between two comparisons of what several ranks hold alike, a slice at a time, by checksums; "
        "before each checkpoint all of it. Ranks that differ end the job with 209, or rewind as on_nonfinite says. "
        "0 or null: never.",
    )
    eval_every: Count | None = Field(default=None, description="Steps between validations; by default only at the end.")
    eval_samples: Count = Field(
        default=256,
        description="Validation samples, evenly spaced over the held-out part; always the same ones.",
    )
    seed: Seed = Field(default=0, description="Initial parameters and everything random but the data's order.")
    sample_bytes: NonNegativeCount = Field(
        default=200, description="Tokens of text to generate at the end, of a language model; 0 for none."
    )


class CheckpointConfig(Section):
    """Saving, so that a job can go on. Without this section nothing is saved."""

    dir: Path | None = Field(default=None, description="Folder of checkpoints; by default checkpoints/NAME.")
    every_steps: Count | None = Field(
        default=None, description="Steps between two; by default only at the end and on SIGTERM or SIGUSR1."
    )
    every_minutes: Positive | None = Field(
        default=None, description="Minutes between two, by rank 0's clock; beside every_steps."
    )
    keep_last: Count | None = Field(default=2, description="Newest checkpoints to keep; null keeps all.")
    keep_every: Count | None = Field(
        default=None, description="Steps whose multiples are kept too, whatever keep_last says."
    )
    asynchronous: bool = Field(
        default=True,
        description="Train on while a copy of the state, in the host's memory, is written; false writes in place.",
    )
    replicas: Literal[1, 2] = Field(
        default=1,
        description="2: a second copy of each file on the next host, where hosts have disks of their own.",
    )
    init_from: Path | None = Field(
        default=None,
        description="A checkpoint whose model the training begins with, where there is nothing to resume from.",
    )
    init_except: tuple[str, ...] = Field(
        default=(),
        description="Patterns of names, such as head.*, that init_from may lack, have besides, or have in another "
        "shape.",
    )
    resume: str | None = Field(
        default=None,
        description="auto: from the newest whole one, if there is any; a step; or the path of one. As `--resume`.",
    )


class LogConfig(Section):
    """What is shown and kept of the training."""

    every: Count = Field(default=10, description="Steps between two progress lines.")
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = Field(
        default=(), description="Where else the numbers go; WANDB_MODE=offline keeps them here."
    )
    project: str = Field(default="dstrain", min_length=1, description="Project in Weights & Biases.")
    peak_tflops: Positive | None = Field(
        default=None, description="Of one device in the job's dtype, for MFU; known for usual GPUs."
    )
    trace: str | Count | None = Field(
        default=None,
        description="Steps whose timeline is written for Perfetto, '4-6' or 5, counted from 1 since the attempt began; "
        f"{MOST_TRACED} at most. `--trace` is {DEFAULT_TRACE}.",
    )

    @property
    def traced_steps(self) -> tuple[int, int] | None:
        """The first and the last; also None where `trace` is no such words."""
        match = re.fullmatch(r"([1-9][0-9]{0,8})(?:-([1-9][0-9]{0,8}))?", str(self.trace))
        if match is None:
            return None
        first, last = int(match[1]), int(match[2] or match[1])
        return (first, last) if 0 <= last - first < MOST_TRACED else None


def default_trace(steps: int | None) -> str:
    """A few steps behind those that are slow because they are the first; of a short training the last ones."""
    if steps is None or steps >= int(DEFAULT_TRACE.partition("-")[2]):
        return DEFAULT_TRACE
    return f"{max(1, steps - 2)}-{steps}"
