"""`scheduler`: mapped where our shape is the same, else refused with what comes near."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from dstrain.runtime.spec.deepspeed.verdict import (
    AUTO,
    AUTO_NOTE,
    Verdict,
    honoured,
    integer,
    mapped,
    number,
    refused,
    wrong,
)

WARMUPS = ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR")

PARAMS = {
    "WarmupLR": ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "warmup_type", "last_batch_iteration"),
    "WarmupDecayLR": (
        *("total_num_steps", "warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "warmup_type"),
        "last_batch_iteration",
    ),
    "WarmupCosineLR": (
        *("total_num_steps", "warmup_min_ratio", "warmup_num_steps", "cos_min_ratio", "warmup_type"),
        "last_batch_iteration",
    ),
}
DEFAULT_WARMUP_STEPS = 1000
DEFAULT_MAX_LR = 1e-3
DEFAULT_COS_MIN_RATIO = 1e-4

_SHAPES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
_NEAR = {
    "OneCycle": "ours rises and falls by cosines and leaves the momentum alone: write schedule: {name: one_cycle, "
    "peak_fraction: …, start_ratio: …} and train.steps",
    "LRRangeTest": "there is no such test; start a few short jobs with --set optimizer.lr=…",
    "CosineAnnealingLR": "write schedule: {name: cosine, minimum_ratio: eta_min ÷ lr} and train.steps",
    "LinearLR": "write schedule: {name: linear, warmup_steps: …} and train.steps",
    "OneCycleLR": "write schedule: {name: one_cycle, peak_fraction: …, start_ratio: …} and train.steps",
    "ReduceLROnPlateau": "write schedule: {name: plateau, factor: …, patience: …} and train.eval_every",
}
_AHEAD = "ours is two steps ahead: DeepSpeed's first two steps have the lowest rate"

Judged = Iterator[tuple[str, Any, Verdict]]


def judge_scheduler(section: Mapping[str, Any]) -> Judged:
    """Key below `scheduler`, its value, and the verdict on it. Without a scheduler that fits, the rate is constant."""
    kind, params = section.get("type"), section.get("params", {})
    if not isinstance(params, Mapping):
        yield "params", params, wrong("a section of keys", params)
        params = {}
    elif not params and "params" in section:
        yield "params", params, honoured("the defaults")
    reason = _reason_against(kind, params)
    if reason:
        yield "type", kind, refused(reason)
        for key, value in params.items():
            yield f"params.{key}", value, refused(AUTO_NOTE if value == AUTO else "of a scheduler that is refused")
    elif kind == "StepLR":
        yield "type", kind, mapped({"schedule.name": "step"})
        yield "params.step_size", params["step_size"], mapped({"schedule.every": integer(params["step_size"])})
        if "gamma" in params:
            yield "params.gamma", params["gamma"], mapped({"schedule.factor": number(params["gamma"])})
    else:
        yield from _warmup(str(kind), params)
    for key, value in section.items():
        if key not in ("type", "params"):
            yield key, value, refused("DeepSpeed knows type and params here; arguments stand in params")


def _warmup(kind: str, params: Mapping[str, Any]) -> Judged:
    steps = integer(params.get("warmup_num_steps", DEFAULT_WARMUP_STEPS))
    values: dict[str, Any] = {"schedule.name": _SHAPES[kind], "schedule.warmup_steps": max(2, steps or 0)}
    if kind == "WarmupDecayLR":
        values |= {"schedule.minimum_ratio": 0.0, "optimizer.lr": DEFAULT_MAX_LR}
    elif kind == "WarmupCosineLR":
        values["schedule.minimum_ratio"] = DEFAULT_COS_MIN_RATIO
    keys = {"warmup_num_steps": "schedule.warmup_steps", "cos_min_ratio": "schedule.minimum_ratio"}
    said = {ours for key, ours in {**keys, "warmup_max_lr": "optimizer.lr"}.items() if key in params}
    yield "type", kind, mapped({key: value for key, value in values.items() if key not in said}, _AHEAD)
    for key, value in params.items():
        yield f"params.{key}", value, _param(key, value)


def _param(key: str, value: Any) -> Verdict:
    match key:
        case "warmup_num_steps":
            return mapped({"schedule.warmup_steps": max(2, integer(value) or 0)})
        case "warmup_max_lr" if value is not None:
            return mapped({"optimizer.lr": number(value)}, "the rise ends there, whatever the optimizer's lr")
        case "warmup_max_lr":
            return honoured("the optimizer's lr")
        case "total_num_steps":
            return mapped({"train.steps": integer(value)}, "the shape ends with the training")
        case "cos_min_ratio":
            return mapped({"schedule.minimum_ratio": number(value)})
        case _:  # warmup_type linear, warmup_min_* 0, last_batch_iteration -1: looked at beforehand
            return honoured("so it is here")


def _reason_against(kind: Any, params: Mapping[str, Any]) -> str:
    """Why a scheduler is not ours; "" if it is."""
    if kind == AUTO:
        return AUTO_NOTE
    if kind == "StepLR":
        factor = number(params.get("gamma", 0.1))
        fits = integer(params.get("step_size"), 1) and factor is not None and 0 < factor < 1
        return "" if fits and params.keys() <= {"step_size", "gamma"} else "expected step_size, and gamma from 0 to 1"
    if kind not in WARMUPS:
        known = [*WARMUPS, "StepLR", *_NEAR]
        close = difflib.get_close_matches(str(kind), known, n=1)
        more = f"did you mean {close[0]}?" if close else "write a schedule of ours"
        return _NEAR.get(str(kind), f"expected one of {', '.join(known)}; {more}")
    if bad := mistake_in(kind, params):
        return bad
    if params.get("warmup_type", "log") != "linear":
        name = _SHAPES[kind]
        return (
            f"its rise is logarithmic unless warmup_type is linear, ours is linear: "
            f"write schedule: {{name: {name}, warmup_steps: {params.get('warmup_num_steps', DEFAULT_WARMUP_STEPS)}}}"
        )
    if lowest := next((key for key in ("warmup_min_lr", "warmup_min_ratio") if params.get(key)), None):
        return f"ours rises from 0, found {lowest} {params[lowest]}: write it as 0"
    if params.get("last_batch_iteration", -1) != -1:
        return "where to go on from is said by --resume: leave out last_batch_iteration"
    return ""


def mistake_in(kind: str, params: Mapping[str, Any]) -> str:
    """What is wrong with the params of one of WARMUPS; "" if nothing."""
    known = PARAMS[kind]
    for key, value in params.items():
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            return f"{kind} has no {key}" + (f"; did you mean {close[0]}?" if close else "")
        if value == AUTO:
            return f"{key}: {AUTO_NOTE}"
        if key == "warmup_type" and value not in ("log", "linear"):
            return f"{key}: expected log or linear, found {value!r}"
        if key.endswith("_steps") and integer(value, 1) is None:
            return f"{key}: expected an integer of at least 1, found {value!r}"
        if key.endswith(("_lr", "_ratio")) and value is not None and number(value) is None:
            return f"{key}: expected a number, found {value!r}"
    if "total_num_steps" in known and "total_num_steps" not in params:
        return f"{kind}: expected total_num_steps, found none"
    return ""
