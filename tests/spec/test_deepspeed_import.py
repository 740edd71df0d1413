"""DeepSpeed's configuration in ours: every key has its verdict."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dstrain.runtime.spec.deepspeed.importer import Imported, import_deepspeed, read_deepspeed
from dstrain.runtime.spec.deepspeed.optimizer import TORCHS
from dstrain.runtime.spec.deepspeed.verdict import Fate
from dstrain.runtime.spec.errors import ConfigError
from dstrain.runtime.spec.load import job_of

ZERO_KEYS = [
    "stage",
    "contiguous_gradients",
    "reduce_scatter",
    "reduce_bucket_size",
    "use_multi_rank_bucket_allreduce",
    "allgather_partitions",
    "allgather_bucket_size",
    "overlap_comm",
    "load_from_fp32_weights",
    "elastic_checkpoint",
    "offload_param",
    "offload_optimizer",
    "zenflow",
    "sub_group_size",
    "cpu_offload_param",
    "cpu_offload_use_pin_memory",
    "cpu_offload",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_model_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_gather_16bit_weights_on_model_save",
    "stage3_module_granularity_threshold",
    "stage3_use_all_reduce_for_fetch_params",
    "stage3_allgather_sequential",
    "stage3_gather_fp16_weights_on_model_save",
    "ignore_unused_parameters",
    "legacy_stage1",
    "round_robin_gradients",
    "zero_hpz_partition_size",
    "zero_quantized_weights",
    "zero_quantized_nontrainable_weights",
    "zero_quantized_gradients",
    "zeropp_loco_param",
    "mics_shard_size",
    "mics_hierarchical_params_gather",
    "memory_efficient_linear",
    "pipeline_loading_checkpoint",
    "override_module_apply",
    "log_trace_cache_warnings",
    "enable_sanity_checks",
    "save_muon_momentum_buffer_in_memory",
    "leaf_module",
    "prefetch_bucket_size",
    "param_persistence_threshold",
    "max_live_parameters",
    "max_reuse_distance",
]
"""The fields of DeepSpeed 0.19's zero/config.py."""

OFFLOAD_KEYS = {
    "offload_param": ["device", "nvme_path", "buffer_count", "buffer_size", "max_in_cpu", "pin_memory"],
    "offload_optimizer": [
        "device",
        "nvme_path",
        "buffer_count",
        "pin_memory",
        "pipeline_read",
        "pipeline_write",
        "fast_init",
        "ratio",
        "super_offload",
        "cpuadam_cores_perc",
    ],
}
FP16_KEYS = [
    "enabled",
    "auto_cast",
    "loss_scale",
    "initial_scale_power",
    "loss_scale_window",
    "hysteresis",
    "consecutive_hysteresis",
    "min_loss_scale",
    "fp16_master_weights_and_grads",
]
TOP_KEYS = [
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "managed_gradient_accumulation",
    "steps_per_print",
    "dump_state",
    "disable_allgather",
    "communication_data_type",
    "seq_parallel_communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "gradient_allreduce_op",
    "sparse_gradients",
    "zero_optimization",
    "activation_checkpointing",
    "comms_logger",
    "tensorboard",
    "wandb",
    "csv_monitor",
    "comet",
    "gradient_clipping",
    "fp16",
    "bf16",
    "bfloat16",
    "amp",
    "torch_autocast",
    "compression_training",
    "graph_harvesting",
    "optimizer",
    "scheduler",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "flops_profiler",
    "wall_clock_breakdown",
    "memory_breakdown",
    "autotuning",
    "eigenvalue",
    "hybrid_engine",
    "sparse_attention",
    "pipeline",
    "progressive_layer_drop",
    "curriculum_learning",
    "data_efficiency",
    "checkpoint",
    "data_types",
    "aio",
    "dataloader_drop_last",
    "log_level",
    "nebula",
    "weight_quantization",
    "compile",
    "timers",
    "tensor_parallel",
    "expert_parallel",
    "elasticity",
    "use_data_before_expert_parallelism",
    "vocabulary_size",
    "quantize_training",
]


def verdicts(config: dict[str, Any], ranks: int | None = None) -> dict[str, tuple[str, str]]:
    """Fate and note by key, and none but those of the configuration."""
    return {e.key: (e.verdict.fate.value, e.verdict.note) for e in import_deepspeed(config, ranks).entries}


def values(config: dict[str, Any], ranks: int | None = None) -> dict[str, Any]:
    return import_deepspeed(config, ranks).values


def entry_lines(imported: Imported) -> list[str]:
    return [str(entry) for entry in imported.entries]


# --- every key -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [True, 1, "x", {}], ids=str)
def test_no_key_of_deepspeeds_is_unknown(value: Any) -> None:
    config = {key: value for key in TOP_KEYS if "batch" not in key and "accumulation_steps" not in key}
    config["zero_optimization"] = dict.fromkeys(ZERO_KEYS, value)
    config["fp16"] = dict.fromkeys(FP16_KEYS, value)
    unknown = [e.key for e in import_deepspeed(config).entries if "no such key" in e.verdict.note]
    assert unknown == []
    for name, keys in OFFLOAD_KEYS.items():
        offload = {"zero_optimization": {"stage": 3, name: dict.fromkeys(keys, value)}}
        assert not [e for e in import_deepspeed(offload).entries if "no such key" in e.verdict.note]


keys = st.sampled_from([*TOP_KEYS, *ZERO_KEYS, *FP16_KEYS, "type", "params", "enabled", "lr", "device", "nothing"])
scalars = st.none() | st.booleans() | st.integers(0, 9) | st.floats(allow_nan=False) | st.sampled_from(["auto", "cpu"])
sections = st.recursive(scalars, lambda inner: st.dictionaries(keys, inner, max_size=5), max_leaves=12)


def leaves(value: Any, path: str = "") -> list[str]:
    if not isinstance(value, dict) or not value:
        return [path]
    return [leaf for key, inner in value.items() for leaf in leaves(inner, f"{path}.{key}".lstrip("."))]


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(keys, sections, max_size=6))
def test_every_leaf_of_any_configuration_is_told_once(config: dict[str, Any]) -> None:
    """Whatever stands in it; a value of a wrong kind may be told as a whole."""
    sizes = {key: value for key, value in config.items() if key in (T, M, G)}
    try:
        import_deepspeed(sizes)
    except ConfigError:  # and all else has a verdict
        config = {key: value for key, value in config.items() if key not in sizes}
    found = [entry.key for entry in import_deepspeed(config).entries]
    assert len(found) == len(set(found)) or "bf16" in config
    for leaf in leaves(config) if config else []:
        assert any(f"{leaf}.".startswith(f"{key}.") or key.startswith(f"{leaf}.") for key in found), leaf


TUTORIAL: dict[str, Any] = {
    "train_batch_size": 64,
    "train_micro_batch_size_per_gpu": 8,
    "gradient_accumulation_steps": 2,
    "steps_per_print": 100,
    "gradient_clipping": {"enabled": True, "clip_value": 1.0},
    "sync_bn_in_backward": False,
    "fp16": {
        "enabled": True,
        "loss_scale": 0,
        "initial_scale_power": 16,
        "scale_window": 1000,
        "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": True,
        "offload_param": True,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": 5e8,
        "allgather_bucket_size": 5e8,
        "stage3_prefetch_bucket_size": 5e7,
        "stage3_param_persistence_threshold": 1e5,
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_fp16_weights_on_model_save": True,
        "stage3_gather_fp16_weights_during_training": True,
        "sub_group_size": 1e9,
        "round_robin_gradients": True,
        "load_from_fp32_weights": True,
        "min_num_size": 1e8,
        "fast_init": True,
        "pin_memory": True,
        "cpu_offload": False,
    },
}


def test_a_tutorials_configuration_of_which_some_keys_never_existed() -> None:
    imported = import_deepspeed(TUTORIAL)
    assert [entry.key for entry in imported.entries] == leaves(TUTORIAL)
    assert {entry.key: entry.verdict.note for entry in imported.refused(harmless=False)} == {
        "sync_bn_in_backward": "DeepSpeed has no such key; write nn.SyncBatchNorm.convert_sync_batchnorm(model) in the "
        "script",
        "zero_optimization.stage3_gather_fp16_weights_during_training": "DeepSpeed has no such key: in training, "
        "weights are gathered block by block; the nearest is "
        "zero_optimization.stage3_gather_16bit_weights_on_model_save",
        "zero_optimization.min_num_size": "DeepSpeed has no such key; the nearest is "
        "zero_optimization.stage3_param_persistence_threshold, here zero.resident_elements",
    }
    assert imported.values["precision"]["loss_scale"]["window"] == 1000


# --- sections ------------------------------------------------------------------------------------------------


def test_zero_3_with_offload() -> None:
    zero = {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": True,
        "stage3_param_persistence_threshold": 1e6,
        "stage3_gather_fp16_weights_on_model_save": True,
    }
    imported = import_deepspeed({"zero_optimization": zero})
    assert imported.values["zero"] == {
        "stage": 3,
        "offload": {"optimizer": True, "parameters": True},
        "resident_elements": 1000000,
    }
    assert imported.refused(harmless=False) == imported.refused(harmless=True) == []


@pytest.mark.parametrize(
    ("zero", "key", "fate", "words"),
    [
        ({"stage": 4}, "stage", "refused", "expected 0, 1, 2 or 3, found 4"),
        ({"stage": 2, "reduce_bucket_size": 5e8}, "reduce_bucket_size", "mapped", "elements, as there"),
        ({"stage": 3, "reduce_bucket_size": 5e8}, "reduce_bucket_size", "refused", "one block of the model"),
        ({"stage": 2, "stage3_max_live_parameters": 1e9}, "stage3_max_live_parameters", "honoured", "below stage 3"),
        ({"stage": 0, "cpu_offload": True}, "cpu_offload", "refused", "needs zero.stage 1 to 3, found 0"),
        ({"stage": 2, "cpu_offload": True}, "cpu_offload", "mapped", ""),
        ({"stage": 2, "offload_param": {"device": "cpu"}}, "offload_param.device", "refused", "needs zero.stage 3"),
        (
            {"stage": 3, "offload_param": {"device": "nvme"}},
            "offload_param.device",
            "refused",
            "nothing is kept on NVMe",
        ),
        ({"stage": 3, "offload_param": {"nvme_path": "/x"}}, "offload_param.nvme_path", "honoured", "without effect"),
        ({"stage": 3, "mics_shard_size": 8}, "mics_shard_size", "mapped", ""),
        ({"stage": "auto"}, "stage", "refused", "'auto' is filled in by Hugging Face's Trainer"),
        ({"pin_memory": True}, "pin_memory", "honoured", "DeepSpeed has the key in offload_optimizer"),
        ({"min_num_size": 5}, "min_num_size", "refused", "here zero.resident_elements"),
        ({"overlap_com": True}, "overlap_com", "refused", "did you mean zero_optimization.overlap_comm?"),
    ],
    ids=str,
)
def test_a_key_of_zero(zero: dict[str, Any], key: str, fate: str, words: str) -> None:
    found = verdicts({"zero_optimization": zero})[f"zero_optimization.{key}"]
    assert found[0] == fate
    assert words in found[1]


def test_fp16_and_the_misspelt_window() -> None:
    fp16 = {"enabled": True, "initial_scale_power": 12, "scale_window": 500, "hysteresis": 1, "min_loss_scale": 2}
    assert values({"fp16": fp16})["precision"] == {
        "dtype": "fp16",
        "loss_scale": {"initial_power": 12, "window": 500, "hysteresis": 1, "minimum": 2.0},
    }
    both = verdicts({"fp16": fp16 | {"loss_scale_window": 100}})
    assert both["fp16.scale_window"][0] == "refused"
    fixed = verdicts({"fp16": fp16 | {"loss_scale": 128}})
    assert fixed["fp16.hysteresis"] == ("honoured", "without effect beside a fixed loss_scale")
    off = verdicts({"fp16": {"enabled": False, "loss_scale": 128}})
    assert off["fp16.loss_scale"] == ("honoured", "without effect: the section is not enabled")
    twice = verdicts({"fp16": {"enabled": True}, "bf16": {"enabled": True}})
    assert (twice["fp16.enabled"][0], twice["bf16.enabled"][0]) == ("refused", "mapped")


@pytest.mark.parametrize(
    ("clipping", "expected"),
    [(0.5, 0.5), (0, None), ({"enabled": True, "clip_value": 2.0}, 2.0), ({"enabled": False, "clip_value": 2}, None)],
    ids=str,
)
def test_clipping_as_a_number_or_as_tutorials_have_it(clipping: Any, expected: float | None) -> None:
    assert values({"gradient_clipping": clipping})["train"] == {"clip": expected}


def test_clipping_that_is_not_given_is_told() -> None:
    assert values({}) == {"schedule": {"name": "constant"}, "train": {"clip": 1.0}}
    assert "older ones not at all" in verdicts({})["gradient_clipping"][1]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"type": "Adam"}, {"name": "adamw", "lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}),
        (
            {"type": "Adam", "params": {"adam_w_mode": False, "lr": 1e-4, "weight_decay": 0.1}},
            {"name": "adam", "lr": 1e-4, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.1},
        ),
        (
            {"type": "AdamW", "params": {"torch_adam": True, "betas": [0.8, 0.9]}},
            {"name": "adamw", "lr": 1e-3, "betas": [0.8, 0.9], "eps": 1e-8, "weight_decay": 0.01},
        ),
        (
            {"type": "SGD", "params": {"lr": 0.1, "nesterov": True, "momentum": 0.9}},
            {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, "args": {"nesterov": True}},
        ),
        ({"type": "Adagrad"}, {"factory": "torch.optim:Adagrad", "weight_decay": 0.0, "lr": 0.01}),
        (
            {"type": "RMSprop", "params": {"lr": 0.5}},
            {"factory": "torch.optim:RMSprop", "weight_decay": 0.0, "lr": 0.5},
        ),
    ],
    ids=str,
)
def test_an_optimizer(config: dict[str, Any], expected: dict[str, Any]) -> None:
    """DeepSpeed's Adam is AdamW unless adam_w_mode is false, and its weight decay is 0 by default, ours 0.1."""
    assert values({"optimizer": config})["optimizer"] == expected


@pytest.mark.parametrize(
    ("config", "key", "words"),
    [
        ({"type": "OneBitAdam", "params": {"lr": 1}}, "optimizer.type", "not compressed to one bit"),
        ({"type": "AdmW"}, "optimizer.type", "did you mean AdamW?"),
        ({"type": "Adam", "params": {"max_grad_norm": 1}}, "optimizer.params.max_grad_norm", "here train.clip"),
        ({"type": "Adam", "params": {"lr": "auto"}}, "optimizer.params.lr", "'auto' is filled in"),
    ],
)
def test_an_optimizer_that_is_refused(config: dict[str, Any], key: str, words: str) -> None:
    fate, note = verdicts({"optimizer": config})[key]
    assert fate == "refused"
    assert words in note


@pytest.mark.parametrize("kind", TORCHS)
def test_an_optimizer_of_torchs_has_its_own_default_rate(kind: str) -> None:
    default = inspect.signature(getattr(torch.optim, kind)).parameters["lr"].default
    for section in ({"type": kind}, {"type": kind, "params": {}}):
        assert values({"optimizer": section})["optimizer"]["lr"] == default


def test_schedulers() -> None:
    params = {"total_num_steps": 100, "warmup_num_steps": 10, "warmup_max_lr": 0.01, "warmup_type": "linear"}
    decay = {"type": "WarmupDecayLR", "params": params}
    for config in ({"scheduler": decay, "optimizer": {"type": "Adam", "params": {"lr": 1}}},):
        job = values(config)
        assert job["schedule"] == {"name": "linear", "warmup_steps": 10, "minimum_ratio": 0.0}
        assert (job["train"]["steps"], job["optimizer"]["lr"]) == (100, 0.01)
    fate, note = verdicts({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 7}}})["scheduler.type"]
    assert fate == "refused"
    assert "write schedule: {name: constant, warmup_steps: 7}" in note
    assert values({"scheduler": {"type": "StepLR", "params": {"step_size": 5, "gamma": 0.5}}})["schedule"] == {
        "name": "step",
        "every": 5,
        "factor": 0.5,
    }
    assert "write schedule: {name: one_cycle" in verdicts({"scheduler": {"type": "OneCycle"}})["scheduler.type"][1]
    assert (
        "did you mean warmup_num_steps?"
        in (verdicts({"scheduler": {"type": "WarmupLR", "params": {"warmup_steps": 7}}})["scheduler.type"][1])
    )


# --- batch sizes ---------------------------------------------------------------------------------------------

T, M, G = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"


@pytest.mark.parametrize(
    ("config", "ranks", "batch"),
    [
        ({T: 32, M: 4, G: 2}, None, (32, 4)),
        ({T: 32, M: 4, G: 2}, 4, (32, 4)),
        ({T: 32, M: 4}, None, (32, 4)),
        ({T: 32, G: 2}, 4, (32, 4)),
        ({M: 4, G: 2}, 4, (32, 4)),
        ({T: 32}, 4, (32, 8)),
        ({M: 4}, 4, (16, 4)),
    ],
    ids=str,
)
def test_the_sizes_follow_from_one_another(config: dict[str, Any], ranks: int | None, batch: tuple[int, int]) -> None:
    found = values(config, ranks)["batch"]
    assert (found["global"], found["micro"]) == batch


@pytest.mark.parametrize(
    ("config", "ranks", "words"),
    [
        ({T: 32, M: 4, G: 3}, 4, f"{T}: expected {M} × {G} × ranks = 4 × 3 × 4 = 48, found 32"),
        ({T: 32, M: 4, G: 3}, None, f"{T}: expected a multiple of {M} × {G} = 4 × 3 = 12, found 32"),
        ({T: 30, M: 4}, None, f"{T}: expected a multiple of {M} = 4, found 30"),
        ({T: 30}, 4, f"{T}: expected a multiple of {G} × ranks = 1 × 4 = 4, found 30"),
        ({G: 3}, 4, f"{M}: expected it or {T} beside {G}, found neither"),
    ],
    ids=str,
)
def test_sizes_that_contradict_one_another_show_the_numbers(config: dict[str, Any], ranks: int, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        import_deepspeed(config, ranks, "ds.json")
    assert str(caught.value) == f"ds.json: {words}"


def test_sizes_that_need_the_ranks_or_a_number() -> None:
    assert verdicts({M: 4, G: 2})[M] == ("refused", "the batch follows from the number of ranks only: give --ranks N")
    assert "Hugging Face" in verdicts({T: "auto", M: 4})[T][1]
    assert verdicts({T: "auto", M: 4})[M] == ("refused", f"needs {T}")


# --- as a file -----------------------------------------------------------------------------------------------


def test_a_line_says_all(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 1, "sub_group_size": 1e9, "overlap_comm": True}}))
    imported = import_deepspeed(read_deepspeed(file))
    assert imported.listing() == [
        "mapped    zero_optimization.stage: 1 → zero.stage: 1",
        "refused   zero_optimization.sub_group_size: 1000000000 (no number changes without it: the optimizer goes over "
        "a rank's shards one by one)",
        "honoured  zero_optimization.overlap_comm: true (communication always overlaps with the backward)",
        "mapped    gradient_clipping: nothing → train.clip: 1.0 (not given: DeepSpeed 0.19 clips at 1.0, and older "
        "ones not at all (then train.clip: null))",
        "4 keys: 1 honoured, 2 mapped, 1 refused (0 of them may change the training)",
    ]
    assert [entry.verdict.fate for entry in imported.refused(harmless=True)] == [Fate.REFUSED]
    job_of(imported.values)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"fp16": }', "ds.json:1:10: expected JSON, found Expecting value"),
        ('{"fp16": {"enabled": true, "enabled": false}}', "found enabled twice"),
        ("[]", "expected a mapping of keys, found a list"),
    ],
)
def test_a_file_that_is_none(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_deepspeed(file)
    assert words in str(caught.value)
