"""`zero_optimization`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dstrain.runtime.spec.deepspeed.verdict import (
    AUTO_NOTE,
    Rule,
    Rules,
    Verdict,
    always,
    count,
    honoured,
    integer,
    mapped,
    never,
    only,
    own_way,
    refused,
    wrong,
)

_NVME = "nothing is kept on NVMe here: write device cpu, or more ranks"
_PINNED = "memory that a GPU copies from is always pinned"
_GATHERED = "a saved model is gathered tensor by tensor, at every stage"
_FIXED_LIVE = "stage 3 holds a few blocks at a time, whatever their size; zero.reshard: step keeps all, as stage 2 does"
_INACTIVE = "without effect below stage 3, in DeepSpeed too"

ALIASES = {
    "prefetch_bucket_size": "stage3_prefetch_bucket_size",
    "param_persistence_threshold": "stage3_param_persistence_threshold",
    "model_persistence_threshold": "stage3_model_persistence_threshold",
    "max_live_parameters": "stage3_max_live_parameters",
    "max_reuse_distance": "stage3_max_reuse_distance",
    "gather_16bit_weights_on_model_save": "stage3_gather_16bit_weights_on_model_save",
    "stage3_gather_fp16_weights_on_model_save": "stage3_gather_16bit_weights_on_model_save",
    "module_granularity_threshold": "stage3_module_granularity_threshold",
    "use_all_reduce_for_fetch_params": "stage3_use_all_reduce_for_fetch_params",
    "allgather_sequential": "stage3_allgather_sequential",
    "cpu_offload_params": "cpu_offload_param",
}
"""Names that DeepSpeed takes, or took, for another."""


def stage_of(section: Any) -> int:
    """0 where it is not given or wrong, which the key's own verdict says. True is DeepSpeed's old form of stage 1."""
    if isinstance(section, bool):
        return int(section)
    stage = section.get("stage", 0) if isinstance(section, Mapping) else 0
    return stage if integer(stage) in (0, 1, 2, 3) and not isinstance(stage, bool) else 0


def zero_rules(stage: int) -> Rules:
    """The rules of the section's keys, for the stage that it names."""
    rules = dict(_ANY_STAGE)
    rules["stage"] = Rule("zero.stage", _stage)
    if stage < 3:
        rules["reduce_bucket_size"] = count(
            "zero.bucket_elements", "elements, as there; our default of 4194304 starts earlier in the backward"
        )
    rules["cpu_offload"] = Rule("zero.offload.optimizer", lambda value: _offload(value, "optimizer", stage))
    rules["cpu_offload_param"] = Rule("zero.offload.parameters", lambda value: _offload(value, "parameters", stage))
    for name, rule in _STAGE_3.items():
        rules[name] = rule if stage == 3 else Rule(rule.ours, lambda value: honoured(_INACTIVE))
    if stage == 3:
        note = "DeepSpeed compares single parameters, ours whole units (blocks of the model)"
        rules["stage3_param_persistence_threshold"] = count("zero.resident_elements", note, at_least=0)
    return rules


def offload_rules(what: str, stage: int) -> Rules:
    """what: optimizer or parameters, as in zero.offload."""
    device = Rule(f"zero.offload.{what}", lambda value: _device(value, what, stage))
    return {"device": device, **(_OPTIMIZER if what == "optimizer" else _PARAMETERS)}


def offload_flag(value: Any, what: str, stage: int) -> Verdict:
    """A boolean where DeepSpeed has a section."""
    return _offload(value, what, stage, "DeepSpeed takes a section: {device: cpu}")


def _stage(value: Any) -> Verdict:
    stage = integer(value)
    return mapped({"zero.stage": stage}) if stage in (0, 1, 2, 3) else wrong("0, 1, 2 or 3", value)


def _offload(value: Any, what: str, stage: int, note: str = "") -> Verdict:
    if not isinstance(value, bool) and value is not None:
        return wrong("true or false", value)
    return _device("cpu" if value else "none", what, stage, note)


def _device(value: Any, what: str, stage: int, note: str = "") -> Verdict:
    least = 1 if what == "optimizer" else 3
    match value:
        case None | "none":
            return honoured("nothing is offloaded")
        case "cpu" if stage < least:
            return refused(f"needs zero.stage {'3' if least == 3 else '1 to 3'}, found {stage}, in DeepSpeed too")
        case "cpu" if what == "parameters":
            note = ", ".join(filter(None, [note, "the optimizer too, which moves them where they are"]))
            return mapped({"zero.offload.parameters": True, "zero.offload.optimizer": True}, note)
        case "cpu":
            return mapped({f"zero.offload.{what}": True}, note)
        case "nvme":
            return refused(_NVME)
        case _:
            return wrong("none, cpu or nvme", value)


def _mics(value: Any) -> Verdict:
    ranks = integer(value, at_least=-1)
    if ranks is None:
        return wrong("a number of ranks", value)
    return mapped({"parallel.data_shard": ranks}) if ranks > 0 else honoured("all ranks share one copy of the state")


_OF_NVME = own_way("nothing", "of NVMe, which is not used here")
_OWN_BUFFERS = "our offload copies shard by shard"

_OPTIMIZER: Rules = {
    "nvme_path": _OF_NVME,
    "buffer_count": _OF_NVME,
    "fast_init": _OF_NVME,
    "pipeline_read": _OF_NVME,
    "pipeline_write": _OF_NVME,
    "pin_memory": always("always so", _PINNED),
    "ratio": only("zero.offload.optimizer", 1.0, "all of it is offloaded", "all of the state is offloaded, or nothing"),
    "super_offload": never("zero.offload.optimizer", "there is one way to offload", harmless=True),
    "cpuadam_cores_perc": own_way("OMP_NUM_THREADS", "torch's threads do it: run.env: {OMP_NUM_THREADS: …}"),
}

_PARAMETERS: Rules = {
    "nvme_path": _OF_NVME,
    "buffer_count": _OF_NVME,
    "buffer_size": _OF_NVME,
    "max_in_cpu": _OF_NVME,
    "pin_memory": always("always so", _PINNED),
}

_ANY_STAGE: Rules = {
    "contiguous_gradients": always("always so", "gradients always lie in flat buckets"),
    "reduce_scatter": always("always so", "stages 1 to 3 always reduce-scatter"),
    "reduce_bucket_size": own_way(
        "zero.bucket_elements (stages 0 to 2)", "stage 3 reduces the gradients of one block of the model at a time"
    ),
    "use_multi_rank_bucket_allreduce": own_way("zero.comm", "zero.comm chooses among our collectives"),
    "allgather_partitions": always("always so", "updated parameters are always all-gathered"),
    "allgather_bucket_size": own_way(
        "zero.bucket_elements", "parameters are gathered in the units that gradients are reduced in"
    ),
    "overlap_comm": always("always so", "communication always overlaps with the backward"),
    "load_from_fp32_weights": only(
        "always so",
        True,
        "a checkpoint's fp32 masters are always taken",
        "a checkpoint's fp32 masters are always taken",
    ),
    "elastic_checkpoint": always("always so", "a checkpoint loads in any number of ranks"),
    "cpu_offload_use_pin_memory": always("always so", _PINNED),
    "pin_memory": always("always so", f"{_PINNED} (DeepSpeed has the key in offload_optimizer and offload_param)"),
    "fast_init": own_way("nothing", "of NVMe, which is not used here (DeepSpeed has the key in offload_optimizer)"),
    "sub_group_size": own_way("nothing", "the optimizer goes over a rank's shards one by one"),
    "ignore_unused_parameters": always("always so", "a parameter without a gradient counts as zero"),
    "legacy_stage1": never("zero.stage", "there is one stage 1", harmless=True),
    "round_robin_gradients": never("nothing", "every rank copies its own shards only", harmless=True),
    "zero_hpz_partition_size": only(
        "parallel.data_shard",
        1,
        "no second copy of the shards",
        "write parallel.data_shard: it keeps all of a group's state inside the group",
    ),
    "mics_hierarchical_params_gather": never("zero.comm", "zero.comm chooses how to gather", harmless=True),
    "zero_quantized_weights": never("precision.dtype", "weights travel in the dtype of the model"),
    "zero_quantized_nontrainable_weights": never("precision.dtype", "frozen weights keep their dtype"),
    "zero_quantized_gradients": never("precision.reduce_dtype", "write precision.reduce_dtype: bf16"),
    "zeropp_loco_param": never("precision.reduce_dtype", "gradients are not quantized here"),
    "memory_efficient_linear": own_way("nothing", "linear layers are torch's own"),
    "override_module_apply": own_way("nothing", "module.apply is torch's own"),
    "pipeline_loading_checkpoint": own_way("nothing", "rank 0 reads a checkpoint and sends it, tensor by tensor"),
    "log_trace_cache_warnings": never("nothing", "a changed order of units is an error at stage 3", harmless=True),
    "enable_sanity_checks": never("nothing", "our checks are always on", harmless=True),
    "save_muon_momentum_buffer_in_memory": never("nothing", "optimizer states are sharded", harmless=True),
    "grad_hooks": always("always so", "gradients are reduced by hooks"),
    "zenflow": never("zero.offload.optimizer", "an asynchronous update would change the numbers; not done here"),
    "leaf_module": never("nothing", "stage 3 goes by the model's blocks", harmless=True),
}

_STAGE_3: Rules = {
    "mics_shard_size": Rule("parallel.data_shard", _mics),
    "stage3_prefetch_bucket_size": own_way(
        "nothing", "the next unit is gathered while one computes, whatever its size"
    ),
    "stage3_param_persistence_threshold": Rule("zero.resident_elements", lambda value: honoured(_INACTIVE)),
    "stage3_model_persistence_threshold": own_way("zero.resident_elements", "bound it by zero.resident_elements"),
    "stage3_max_live_parameters": own_way("zero.reshard", _FIXED_LIVE),
    "stage3_max_reuse_distance": own_way("zero.reshard", _FIXED_LIVE),
    "stage3_gather_16bit_weights_on_model_save": always("always so", _GATHERED),
    "stage3_module_granularity_threshold": own_way("zero.resident_elements", "small units are joined"),
    "stage3_use_all_reduce_for_fetch_params": never("zero.comm", "zero.comm chooses how to gather", harmless=True),
    "stage3_allgather_sequential": never("zero.comm", "zero.comm chooses how to gather", harmless=True),
}

OLD_FORM = "DeepSpeed's old form; it means {stage: 1}"


def old_form(value: Any) -> Verdict:
    """`zero_optimization: true`."""
    if not isinstance(value, bool):
        return refused(AUTO_NOTE) if value == "auto" else wrong("a section of keys", value)
    return mapped({"zero.stage": int(value)}, OLD_FORM if value else "DeepSpeed's old form of stage 0")
