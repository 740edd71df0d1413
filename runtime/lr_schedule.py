"""The learning rate of each step."""

from __future__ import annotations

import math

from dstrain.runtime.spec.config import ScheduleConfig

DEFAULT_MINIMUM_RATIO = 0.1


def lr_ratio(config: ScheduleConfig, step: int, steps: int) -> float:
    """Learning rate of `step` (1 to `steps`) ÷ its peak: a linear rise, then constant or half a cosine."""
    if step <= config.warmup_steps:
        return step / config.warmup_steps
    if config.name == "constant":
        return 1.0
    minimum = DEFAULT_MINIMUM_RATIO if config.minimum_ratio is None else config.minimum_ratio
    progress = (step - config.warmup_steps) / (steps - config.warmup_steps)
    return minimum + (1 - minimum) * (1 + math.cos(math.pi * progress)) / 2
