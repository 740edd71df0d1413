"""What of DeepSpeed's module has no counterpart here, and what to write instead."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

_PARALLEL = "a model that does not fit is sharded by zero_optimization stage 3"
_PIPELINE = "write a job.yaml with parallel.pipeline, whose model.factory returns the list of layers"
_INFERENCE = "write the model by engine.save_16bit_model(dir), and serve its model.safetensors by another library"
_DEVICE = "write engine.device, or torch.accelerator"
_RECOMPUTED = "write torch.utils.checkpoint.checkpoint(function, *inputs, use_reentrant=False)"
_OPTIMIZERS = "write the section optimizer, or torch.optim.AdamW(…) for FusedAdam and DeepSpeedCPUAdam"
_EXPERTS = "write experts as plain modules of the model, whose parameters stage 3 shards as all others"

INSTEAD = {
    "DeepSpeedConfig": "pass initialize the mapping, or the path of its JSON, as config",
    "DeepSpeedTransformerConfig": "write torch.nn.TransformerEncoderLayer",
    "DeepSpeedTransformerLayer": "write torch.nn.TransformerEncoderLayer",
    "InferenceEngine": _INFERENCE,
    "OnDevice": "make the model in the host's memory; initialize moves it",
    "PipelineEngine": _PIPELINE,
    "PipelineModule": _PIPELINE,
    "accelerator": _DEVICE,
    "add_tuning_arguments": "write add_config_arguments; WarmupLR and others stand in the section scheduler",
    "checkpointing": _RECOMPUTED,
    "comm": "write torch.distributed: initialize and init_distributed join its process group",
    "get_accelerator": _DEVICE,
    "inference": _INFERENCE,
    "init_inference": _INFERENCE,
    "module_inject": _INFERENCE,
    "moe": _EXPERTS,
    "monitor": "log in the script what engine.step() did",
    "ops": _OPTIMIZERS,
    "pipe": _PIPELINE,
    "profiling": "write torch.profiler around the steps",
    "runtime": "write torch.optim.lr_scheduler for its schedules; initialize makes the engine, a DeepSpeedEngine",
    "tp_model_init": _PARALLEL,
    "utils": "write logging for its logger, zero.GatheredParameters(…) for safe_get_…, engine.save_16bit_model(dir) "
    "for zero_to_fp32",
}
"""By the name below `deepspeed`."""


def words(module: str, name: str) -> str:
    """Why `module` has no `name`, in one line."""
    if name in INSTEAD:
        return f"deepspeed.{name}: expected a part that is here too, found one that is not; {INSTEAD[name]}"
    return f"module {module!r} has no attribute {name!r}; see docs/deepspeed.md"


class _Refusing(importlib.abc.MetaPathFinder):
    """Says the same where a script imports such a part: Python's own words would hide ours."""

    def __init__(self, package: str) -> None:
        self._package = package

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        if package == self._package and name in INSTEAD:
            raise ImportError(words(package, name), name=fullname)
        return None


def refuse_imports(package: str) -> None:
    """Have imports of what is INSTEAD, below `package`, raise ImportError with what to write. Once a process."""
    sys.meta_path.append(_Refusing(package))
