"""Keys at the top of a configuration that are no section of their own module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dstrain.runtime.spec.deepspeed.precision import reduce_dtype
from dstrain.runtime.spec.deepspeed.verdict import (
    AUTO,
    Rule,
    Rules,
    Verdict,
    always,
    honoured,
    integer,
    mapped,
    never,
    number,
    only,
    own_way,
    refused,
    wrong,
)

NO_CLIPPING_KEY = "not given: DeepSpeed 0.19 clips at 1.0, and older ones not at all (then train.clip: null)"

_EPOCH = "samples that do not fill a step come first in the next epoch"
_REPORT = "step time, memory and throughput of each rank are in `dstrain report`"


def _clipping(value: Any) -> Verdict:
    norm = number(value)
    if norm is None or norm < 0:
        return wrong("a number of at least 0", value)
    return mapped({"train.clip": norm or None}, "" if norm else "null never clips")


def judge_clipping_section(section: Mapping[str, Any]) -> list[tuple[str, Any, Verdict]]:
    """The mapping `{enabled, clip_value}`, which DeepSpeed itself does not take."""
    note = "DeepSpeed takes a number in place of the section"
    enabled = section.get("enabled", True)
    found = []
    for key, value in section.items():
        if key == "enabled" and isinstance(value, bool):
            verdict = honoured(note) if value else mapped({"train.clip": None}, note)
        elif key == "clip_value":
            verdict = _clipping(value) if enabled is True else honoured("without effect: not enabled")
        else:
            verdict = refused("expected enabled (true or false) and clip_value")
        found.append((key, value, verdict))
    return found


def _steps_per_print(value: Any) -> Verdict:
    if value is None:
        return honoured("log.every stays at its default")
    steps = integer(value, 1)
    return wrong("an integer of at least 1", value) if steps is None else mapped({"log.every": steps})


def _named(key: str) -> Rule:
    def judge(value: Any) -> Verdict:
        return mapped({key: value}) if isinstance(value, str) and value != AUTO else wrong("a text", value)

    return Rule(key, judge)


def _tracker(name: str) -> Rule:
    """log.trackers is a list: what several trackers say is joined."""

    def judge(value: Any) -> Verdict:
        if not isinstance(value, bool):
            return wrong("true or false", value)
        return mapped({"log.trackers": [name]}) if value else honoured("off here too")

    return Rule("log.trackers", judge)


def _wandb_variable(variable: str) -> Rule:
    def judge(value: Any) -> Verdict:
        if value is None:
            return honoured("none here either")
        return mapped({f"run.env.{variable}": value}) if isinstance(value, str) else wrong("a text", value)

    return Rule(f"run.env: {{{variable}: …}}", judge)


TENSORBOARD: Rules = {
    "enabled": _tracker("tensorboard"),
    "output_path": own_way("log.trackers", "event files lie in the run's own directory"),
    "job_name": _named("name"),
}

WANDB: Rules = {
    "enabled": _tracker("wandb"),
    "project": _named("log.project"),
    "group": _wandb_variable("WANDB_RUN_GROUP"),
    "team": _wandb_variable("WANDB_ENTITY"),
}

ACTIVATIONS: Rules = {
    "partition_activations": never(
        "train.activation_checkpointing",
        "activations are not spread over ranks here; train.activation_checkpointing: all keeps the blocks' inputs only",
    ),
    "cpu_checkpointing": never(
        "train.activation_checkpointing",
        "activations are not offloaded here; train.activation_checkpointing: all keeps the blocks' inputs only",
    ),
    "contiguous_memory_optimization": never("nothing", "of partitioned activations", harmless=True),
    "number_checkpoints": own_way(
        "train.activation_checkpointing", "the script's own calls decide; or write train.activation_checkpointing: all"
    ),
    "synchronize_checkpoint_boundary": never("nothing", "there is nothing to wait for", harmless=True),
    "profile": never("nothing", _REPORT, harmless=True),
}

CHECKPOINT: Rules = {
    "tag_validation": own_way("nothing", "all ranks save at the same step, or raise together"),
    "load_universal": never(
        "checkpoint.resume", "DeepSpeed's checkpoints are not read; ours load in any number of ranks"
    ),
    "use_node_local_storage": never("checkpoint.dir", "rank 0 writes a checkpoint"),
    "parallel_write": own_way("nothing", "of pipeline stages"),
}

SIMPLE: Rules = {
    "gradient_clipping": Rule("train.clip", _clipping),
    "steps_per_print": Rule("log.every", _steps_per_print),
    "communication_data_type": reduce_dtype(),
    "fp32_allreduce": always(
        "precision.reduce_dtype", "gradients are summed in fp32 unless reduce_dtype says otherwise"
    ),
    "seq_parallel_communication_data_type": own_way("nothing", "of sequence parallelism"),
    "prescale_gradients": never(
        "nothing", "gradients are summed, in fp32, and divided once; precision.reduce_dtype: fp32", harmless=True
    ),
    "gradient_predivide_factor": only(
        "nothing",
        1.0,
        "gradients are divided once, behind the sum",
        "gradients are divided once, behind the sum",
        harmless=True,
    ),
    "gradient_allreduce_op": only(
        "nothing", "mean", "the mean over ranks and micro-batches", "a mean is taken; ours has no sum"
    ),
    "managed_gradient_accumulation": only(
        "batch", True, "the engine counts", "the engine counts the micro-batches of a step"
    ),
    "sparse_gradients": never("nothing", "gradients are dense here: build the embedding with sparse=False"),
    "zero_allow_untested_optimizer": Rule(
        "nothing", lambda value: honoured("any torch optimizer is taken; one that cannot work on shards is refused")
    ),
    "zero_force_ds_cpu_optimizer": own_way("zero.offload.optimizer", "an offloaded optimizer is torch's own"),
    "wall_clock_breakdown": never("`dstrain report`", _REPORT, harmless=True),
    "memory_breakdown": never("`dstrain report`", _REPORT, harmless=True),
    "dump_state": never("`dstrain config show`", "the resolved job is in the run's directory", harmless=True),
    "disable_allgather": never("zero.stage", "updated parameters are always gathered"),
    "dataloader_drop_last": own_way("nothing", _EPOCH),
    "log_level": own_way("--quiet", "`dstrain run --quiet` shows less"),
    "vocabulary_size": own_way("nothing", "nothing here asks for it"),
    "use_data_before_expert_parallelism": never("nothing", "of expert parallelism", harmless=True),
    "train_iters": own_way("train.steps", "DeepSpeed knows no such key; write train.steps"),
    "sequence_parallel_size": only("nothing", 1, "no sequence parallelism", "there is no sequence parallelism"),
}

OTHER_SECTIONS: Mapping[str, tuple[str, bool]] = {
    "amp": ("write precision: {dtype: bf16, autocast: true}", False),
    "aio": ("of NVMe, which is not used here", True),
    "autotuning": ("there is no tuner; start short jobs with --set", True),
    "comet": ("log.trackers knows tensorboard and wandb", True),
    "comms_logger": ("bytes per step are among the numbers of `dstrain report`", True),
    "compile": ("write train.compile: true", True),
    "compression_training": ("there is no compression", False),
    "csv_monitor": ("every run keeps its numbers, see `dstrain report`", True),
    "curriculum_learning": ("there is no curriculum: order the data, or give a data.factory", False),
    "data_efficiency": ("there is no curriculum: order the data, or give a data.factory", False),
    "datastates_config": ("checkpoints are written by rank 0", True),
    "eigenvalue": ("of quantization, which is not done here", False),
    "elasticity": ("a job restarts in any number of ranks: run.max_restarts, batch.global stays", False),
    "expert_parallel": ("there is no expert parallelism", False),
    "flops_profiler": ("MFU is shown, see log.peak_tflops", True),
    "graph_harvesting": ("write train.compile: true", True),
    "hybrid_engine": ("there is no inference engine", False),
    "nebula": ("checkpoints are written by rank 0", True),
    "pipeline": ("write parallel.pipeline, see docs/pipeline.md", False),
    "progressive_layer_drop": ("layers are not dropped", False),
    "quantize_training": ("there is no quantization", False),
    "sparse_attention": ("give a model with such attention", False),
    "tensor_parallel": ("there is no tensor parallelism", False),
    "timers": (_REPORT, True),
    "weight_quantization": ("there is no quantization", False),
}
"""Sections without a counterpart: what to write instead, and whether all numbers stay the same without them."""

NEVER_EXISTED: Mapping[str, tuple[str, str]] = {
    "min_num_size": (
        "zero_optimization.stage3_param_persistence_threshold",
        "DeepSpeed has no such key",
    ),
    "stage3_gather_fp16_weights_during_training": (
        "zero_optimization.stage3_gather_16bit_weights_on_model_save",
        "DeepSpeed has no such key: in training, weights are gathered block by block",
    ),
    "sync_bn_in_backward": (
        "",
        "DeepSpeed has no such key; write nn.SyncBatchNorm.convert_sync_batchnorm(model) in the script",
    ),
}
"""Keys of tutorials that no DeepSpeed has had: the nearest known key and what is to be said."""
