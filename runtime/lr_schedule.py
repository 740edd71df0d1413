"""The learning rate of each step."""

from __future__ import annotations

import math
from typing import Any

from dstrain.runtime.spec.errors import UsageError
from dstrain.runtime.spec.training_config import ScheduleConfig

COSINE_MINIMUM = 0.1
ONE_CYCLE_FALL = 1e4
"""torch's final_div_factor: first ÷ last learning rate of `one_cycle`."""


class LRSchedule:
    """A linear rise, then the shape that `schedule.name` says.

    steps: of the whole training; constant, step and plateau need none. Raises UsageError if another shape has none.
    """

    def __init__(self, config: ScheduleConfig, steps: int | None) -> None:
        if steps is None and config.name in ("cosine", "linear", "one_cycle"):
            expected = f"a number of steps for schedule.name {config.name}"
            raise UsageError.mismatch("train.steps", expected, "none", "constant, step and plateau need none")
        self._config, self._steps = config, steps
        self._level = 1.0  # of plateau
        self._best: float | None = None
        self._worse = 0  # validations since the best

    def ratio(self, step: int) -> float:
        """Learning rate of `step`, counted from 1, ÷ its peak. The warm-up's last step has the peak itself."""
        config = self._config
        rise = min(1.0, step / config.warmup_steps) if config.warmup_steps else 1.0
        match config.name:
            case "constant":
                return rise
            case "linear":
                return rise * (1 - (1 - self._minimum(0.0)) * self._progress(step))
            case "cosine":
                minimum = self._minimum(COSINE_MINIMUM)
                return rise * (minimum + (1 - minimum) * (1 + math.cos(math.pi * self._progress(step))) / 2)
            case "step":
                assert config.every is not None, "the configuration asks for schedule.every"
                falls = (step - config.warmup_steps - 1) // config.every
                return rise * config.factor ** max(0, falls)
            case "one_cycle":
                return self._one_cycle(step)
            case "plateau":
                return rise * self._level

    def observe(self, val_loss: float) -> None:
        """Tell `plateau` of a validation; the other shapes do not mind.

        As torch's ReduceLROnPlateau (mode min, threshold rel): after more than `patience` validations in a row that
        are not better than the best by the share `threshold`, the learning rate falls to `factor` of itself.
        """
        if val_loss < (math.inf if self._best is None else self._best * (1 - self._config.threshold)):
            self._best, self._worse = val_loss, 0
            return
        self._worse += 1
        if self._worse > self._config.patience:
            self._level, self._worse = max(self._level * self._config.factor, self._minimum(0.0)), 0

    def state_dict(self) -> dict[str, Any]:
        """What `observe` has learnt, for JSON."""
        return {"level": self._level, "best": self._best, "worse": self._worse}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from another's state_dict()."""
        self._level, self._best, self._worse = state["level"], state["best"], state["worse"]

    def _minimum(self, default: float) -> float:
        return default if self._config.minimum_ratio is None else self._config.minimum_ratio

    def _progress(self, step: int) -> float:
        """Share of the steps after the warm-up that are behind: 1 at the last step."""
        assert self._steps is not None
        warmup = self._config.warmup_steps
        return 0.0 if step <= warmup else min(1.0, (step - warmup) / (self._steps - warmup))

    def _one_cycle(self, step: int) -> float:
        """As torch's OneCycleLR (Smith and Topin 2018): half a cosine up from `start_ratio`, half a cosine down."""
        assert self._steps is not None
        start, at = self._config.start_ratio, step - 1
        peak, last = self._config.peak_fraction * self._steps - 1, self._steps - 1
        if peak > 0 and at <= peak:
            return _half_cosine(start, 1.0, at / peak)
        return _half_cosine(1.0, self._minimum(start / ONE_CYCLE_FALL), (at - peak) / (last - peak))


def _half_cosine(first: float, last: float, share: float) -> float:
    return last + (first - last) * (1 + math.cos(math.pi * share)) / 2
