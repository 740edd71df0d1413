"""`fp16`, `bf16`, `torch_autocast`, `communication_data_type`, `data_types`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dstrain.runtime.spec.deepspeed.verdict import (
    Rule,
    Rules,
    Verdict,
    count,
    honoured,
    mapped,
    never,
    number,
    own_way,
    refused,
    wrong,
)

_DTYPES = {"fp32": "fp32", "float32": "fp32", "fp16": "fp16", "float16": "fp16", "bf16": "bf16", "bfloat16": "bf16"}


def is_enabled(section: Any) -> bool:
    """Whether a section of DeepSpeed's with the key `enabled` is on; without that key it is off."""
    return isinstance(section, Mapping) and section.get("enabled") is True


def fp16_rules(section: Mapping[str, Any], other_enabled: bool) -> Rules:
    """The rules of `fp16`. other_enabled: bf16 is on too."""
    adapts = section.get("loss_scale", 0) == 0
    rules = {
        "enabled": Rule("precision.dtype", lambda value: _dtype(value, "fp16", other_enabled)),
        "auto_cast": never("precision.autocast", "inputs are not cast: cast them, or write precision.autocast: true"),
        "loss_scale": Rule("precision.loss_scale.value", _loss_scale),
        "initial_scale_power": Rule("precision.loss_scale.initial_power", _initial_power),
        "loss_scale_window": count(
            "precision.loss_scale.window", "DeepSpeed's is one step longer after a start or an overflow"
        ),
        "hysteresis": count(
            "precision.loss_scale.hysteresis", "as there: only a doubling refills it, overflows need not be in a row"
        ),
        "min_loss_scale": Rule("precision.loss_scale.minimum", _minimum),
        "consecutive_hysteresis": never("precision.loss_scale.hysteresis", "only a doubling refills the hysteresis"),
        "fp16_master_weights_and_grads": never("precision.dtype", "master weights are fp32"),
    }
    note = "DeepSpeed spells it loss_scale_window, and refuses or ignores this"
    rules["scale_window"] = (
        own_way("precision.loss_scale.window", f"{note}; loss_scale_window is given too")
        if "loss_scale_window" in section
        else count("precision.loss_scale.window", note)
    )
    if not adapts:
        for name in ("initial_scale_power", "loss_scale_window", "scale_window", "hysteresis", "min_loss_scale"):
            rules[name] = Rule(rules[name].ours, lambda value: honoured("without effect beside a fixed loss_scale"))
    return rules


def bf16_rules() -> Rules:
    return {
        "enabled": Rule("precision.dtype", lambda value: _dtype(value, "bf16", False)),
        "immediate_grad_update": own_way("nothing", "gradients are reduced in precision.reduce_dtype, fp32 by default"),
        "check_grad_overflow": own_way(
            "nothing", "a gradient that is not finite ends the job, with its parameter's name"
        ),
        "bf16_master_weights_and_grads": never("precision.dtype", "master weights are fp32"),
        "bf16_optimizer_states": never("precision.dtype", "optimizer states are fp32"),
    }


def autocast_rules(stage: int) -> Rules:
    def enabled(value: Any) -> Verdict:
        if value is True and stage == 3:
            return refused(
                "not at stage 3, where it would keep a cast copy of every weight; write bf16: {enabled: true}"
            )
        if not isinstance(value, bool):
            return wrong("true or false", value)
        return mapped({"precision.autocast": True}) if value else honoured("off here too")

    return {
        "enabled": Rule("precision.autocast", enabled),
        "dtype": Rule("precision.dtype", lambda value: _named(value, "precision.dtype")),
        "lower_precision_safe_modules": own_way(
            "precision.reduce_dtype", "torch.autocast's own list of operations counts"
        ),
    }


def reduce_dtype() -> Rule:
    """communication_data_type, data_types.grad_accum_dtype."""
    return Rule("precision.reduce_dtype", lambda value: _reduced(value))


def data_type_rules() -> Rules:
    return {
        "grad_accum_dtype": reduce_dtype(),
        "param_dtype": never("precision.dtype", "write fp16 or bf16: {enabled: true}"),
        "buffer_dtype": never("nothing", "buffers keep their dtype"),
    }


def _dtype(value: Any, dtype: str, other_enabled: bool) -> Verdict:
    if not isinstance(value, bool):
        return wrong("true or false", value)
    if value and other_enabled:
        return refused("bf16 is enabled too, which DeepSpeed does not take either; one of them")
    if not value:
        return honoured("off here too")
    return mapped(
        {"precision.dtype": dtype}, "gradients are summed in fp32 unless precision.reduce_dtype says otherwise"
    )


def _named(value: Any, key: str) -> Verdict:
    if not isinstance(value, str) or value.removeprefix("torch.") not in _DTYPES:
        return wrong("fp32, bf16 or fp16", value)
    return mapped({key: _DTYPES[value.removeprefix("torch.")]})


def _reduced(value: Any) -> Verdict:
    return honoured("fp32 by default here") if value is None else _named(value, "precision.reduce_dtype")


def _loss_scale(value: Any) -> Verdict:
    scale = number(value)
    if scale is None or scale < 0:
        return wrong("a number of at least 0", value)
    return mapped({"precision.loss_scale.value": scale}) if scale else honoured("0: the scale adapts, here too")


def _initial_power(value: Any) -> Verdict:
    verdict = count("precision.loss_scale.initial_power", at_least=0).judge(value)
    power = verdict.values.get("precision.loss_scale.initial_power", 0)
    return refused("at most 127: 2^128 is more than fp32 holds", harmless=False) if power > 127 else verdict


def _minimum(value: Any) -> Verdict:
    scale = number(value)
    if scale is None or scale <= 0:
        return wrong("a number above 0", value)
    return mapped({"precision.loss_scale.minimum": scale}, "an overflow there ends the job, as in DeepSpeed")
