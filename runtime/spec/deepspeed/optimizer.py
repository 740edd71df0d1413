"""`optimizer`: every value that differs from DeepSpeed's default or ours is written out."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from dstrain.runtime.spec.deepspeed.verdict import AUTO, AUTO_NOTE, Verdict, honoured, mapped, number, refused, wrong

TORCHS = {
    "Adadelta": 1.0,
    "Adagrad": 1e-2,
    "Adamax": 2e-3,
    "ASGD": 1e-2,
    "NAdam": 2e-3,
    "RAdam": 1e-3,
    "RMSprop": 1e-2,
    "Rprop": 1e-2,
}
"""Taken from torch.optim under this name, as DeepSpeed does; and their own default lr, which is not always ours."""

_ADAM = {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
"""Defaults of DeepSpeed's own Adam; torch_adam has torch's weight decay, 0.01."""

_ELSEWHERE = {
    "lamb": "write optimizer.factory: package.module:name of a LAMB",
    "lion": "write optimizer.factory: package.module:name of a Lion",
    "onebitadam": "gradients are not compressed to one bit here; write type AdamW, and precision.reduce_dtype: bf16",
    "zerooneadam": "gradients are not compressed to one bit here; write type AdamW, and precision.reduce_dtype: bf16",
    "onebitlamb": "gradients are not compressed to one bit here; write optimizer.factory: the import path of a LAMB",
    "muon": "ours scales updates unlike DeepSpeed's; write optimizer: {name: muon, lr: …} and try a learning rate anew",
    "muadam": "write optimizer.factory: mup:MuAdam",
    "muadamw": "write optimizer.factory: mup:MuAdamW",
    "musgd": "write optimizer.factory: mup:MuSGD",
}

Judged = Iterator[tuple[str, Any, Verdict]]


def judge_optimizer(section: Mapping[str, Any]) -> Judged:
    """Key below `optimizer`, its value, and the verdict on it."""
    kind, params = section.get("type"), section.get("params", {})
    if not isinstance(params, Mapping):
        yield "params", params, wrong("a section of keys", params)
        params = {}
    elif not params and "params" in section:
        yield "params", params, honoured("the defaults")
    name = kind.lower() if isinstance(kind, str) else ""
    if name in ("adam", "adamw"):
        yield from _adam(kind, name, params)
    elif name == "sgd":
        yield "type", kind, mapped({"optimizer.name": "sgd", "optimizer.momentum": 0.0, "optimizer.weight_decay": 0.0})
        yield from _params(params, {"lr", "momentum", "weight_decay"})
    elif name == "adagrad" or (name and kind in TORCHS):
        torchs = "Adagrad" if name == "adagrad" else str(kind)
        values = {"optimizer.factory": f"torch.optim:{torchs}", "optimizer.weight_decay": 0.0}
        yield "type", kind, mapped(values if "lr" in params else {**values, "optimizer.lr": TORCHS[torchs]})
        yield from _params(params, {"lr", "weight_decay"})
    else:
        yield "type", kind, _unknown(kind, name)
        for key, value in params.items():
            yield f"params.{key}", value, refused(AUTO_NOTE if value == AUTO else "of an optimizer that is refused")
    for key, value in section.items():
        if key == "legacy_fusion":
            yield key, value, refused("there is one fused step", harmless=True)
        elif key not in ("type", "params"):
            yield key, value, refused("DeepSpeed knows type and params here; arguments stand in params")


def _adam(kind: Any, name: str, params: Mapping[str, Any]) -> Judged:
    decoupled = name == "adamw" or params.get("adam_w_mode", True) is not False
    note = "DeepSpeed's Adam decouples the decay unless adam_w_mode is false" if name == "adam" and decoupled else ""
    defaults = dict(_ADAM)
    if params.get("torch_adam") is True and decoupled:
        defaults["weight_decay"] = 0.01
    values = {f"optimizer.{key}": value for key, value in defaults.items() if key not in params}
    yield "type", kind, mapped({"optimizer.name": "adamw" if decoupled else "adam", **values}, note)
    yield from _params(params, set(_ADAM), adam=True)


def _params(params: Mapping[str, Any], own: set[str], adam: bool = False) -> Judged:
    """own: arguments that are keys of ours; all others are `optimizer.args`."""
    for key, value in params.items():
        yield f"params.{key}", value, _of_adam(key, value) if adam and key not in own else _param(key, value, own)


def _of_adam(key: str, value: Any) -> Verdict:
    match key:
        case "adam_w_mode" | "torch_adam" | "bias_correction" | "amsgrad" | "set_grad_none" if value == AUTO:
            return refused(AUTO_NOTE)
        case "adam_w_mode":
            return honoured("said by optimizer.name")
        case "torch_adam":
            return honoured("it is torch's, fused; the numbers are the same")
        case "set_grad_none":
            return honoured("gradients never stay behind a step")
        case "bias_correction":
            return honoured("always so") if value else refused("torch's Adam always corrects its moments")
        case "amsgrad":
            return mapped({"optimizer.args.amsgrad": True}) if value else honoured("off here too")
        case "fp32_optimizer_states":
            return honoured("always so") if value else refused("optimizer states are fp32")
        case _:
            return _param(key, value, set())


def _param(key: str, value: Any, own: set[str]) -> Verdict:
    if value == AUTO:
        return refused(AUTO_NOTE)
    if key == "max_grad_norm":
        return refused("DeepSpeed refuses it too; write gradient_clipping, here train.clip")
    if key not in own:
        return mapped({f"optimizer.args.{key}": value})
    if key == "betas":
        pair = [number(beta) for beta in value] if isinstance(value, list | tuple) else []
        if len(pair) != 2 or not all(beta is not None and 0 <= beta < 1 for beta in pair):
            return wrong("two numbers from 0 to 1", value)
        return mapped({"optimizer.betas": pair})
    found = number(value)
    if found is None or found < 0 or (found == 0 and key in ("lr", "eps")) or (found >= 1 and key == "momentum"):
        return wrong("a number above 0" if key in ("lr", "eps") else "a number of at least 0", value)
    return mapped({f"optimizer.{key}": found})


def _unknown(kind: Any, name: str) -> Verdict:
    if kind == AUTO:
        return refused(AUTO_NOTE)
    if name in _ELSEWHERE:
        return refused(_ELSEWHERE[name])
    known = ["Adam", "AdamW", "SGD", *TORCHS]
    close = difflib.get_close_matches(str(kind), known, n=1)
    hint = f"did you mean {close[0]}?" if close else "write optimizer.factory: package.module:name"
    return refused(f"expected one of {', '.join(known)}; {hint}")
