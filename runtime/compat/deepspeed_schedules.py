"""DeepSpeed's warm-up schedules (its lr_schedules.py), step by step the same, as torch's LambdaLR.

DeepSpeed steps a schedule behind each optimizer step and begins at iteration −1. So the first step has the lowest
rate, and step k > 1 that of iteration k − 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from dstrain.runtime.spec.deepspeed.scheduler import (
    DEFAULT_COS_MIN_RATIO,
    DEFAULT_MAX_LR,
    DEFAULT_WARMUP_STEPS,
    WARMUPS,
    mistake_in,
)
from dstrain.runtime.spec.document import show
from dstrain.runtime.spec.errors import UsageError


def schedule_of(section: Any) -> Callable[[Optimizer], LambdaLR]:
    """What makes the schedule of a `scheduler` section. Raises UsageError for one that is not among WARMUPS."""
    if not isinstance(section, Mapping) or not isinstance(section.get("params", {}), Mapping):
        raise UsageError.mismatch("scheduler", "a section with type and params", show(section))
    kind, params = section.get("type"), section.get("params", {})
    if kind not in WARMUPS:
        fix = "pass deepspeed.initialize an lr_scheduler of torch's"
        raise UsageError.mismatch("scheduler.type", f"one of {', '.join(WARMUPS)}", repr(kind), fix)
    if problem := mistake_in(kind, params):
        raise UsageError(f"scheduler.params: {problem}")
    warmup = max(2, int(params.get("warmup_num_steps", DEFAULT_WARMUP_STEPS)))
    rise = _rise(warmup, logarithmic=params.get("warmup_type", "log") == "log")
    total = int(params.get("total_num_steps", 0))

    def rate(iteration: int, base: float) -> float:
        """The learning rate, of a group that the optimizer gave `base`."""
        if kind == "WarmupCosineLR":
            lowest, last = params.get("warmup_min_ratio", 0.0), params.get("cos_min_ratio", DEFAULT_COS_MIN_RATIO)
            if iteration < 0:
                return 0.0
            if iteration < warmup:
                return base * float(lowest + (1 - lowest) * rise(iteration))
            done = min(1.0, (iteration - warmup + 1) / max(1, total - warmup))
            return base * float(last + (1 - last) * (1 + math.cos(math.pi * done)) / 2)
        default = DEFAULT_MAX_LR if kind == "WarmupDecayLR" else None
        lowest, highest = params.get("warmup_min_lr", 0.0), params.get("warmup_max_lr", default)
        highest = base if highest is None else highest
        if iteration < 0:
            share = 0.0
        elif iteration < warmup:
            share = rise(iteration)
        elif kind == "WarmupDecayLR":
            share = max(0.0, (total - iteration) / max(1.0, total - warmup))
        else:
            share = 1.0
        return float(lowest + (highest - lowest) * share)

    def made(optimizer: Optimizer) -> LambdaLR:
        rates = [float(group["lr"]) for group in optimizer.param_groups]

        def factor(base: float) -> Callable[[int], float]:
            peak = rates[0] if kind == "WarmupLR" else base  # so does DeepSpeed: the first group's for all
            return lambda epoch: rate(epoch - 1, peak) / base

        return LambdaLR(optimizer, [factor(base) for base in rates])

    return made


def _rise(steps: int, *, logarithmic: bool) -> Callable[[int], float]:
    if logarithmic:
        return lambda iteration: math.log(iteration + 1) / math.log(steps)
    return lambda iteration: iteration / steps
