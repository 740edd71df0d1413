"""The factor of an fp16 loss, which keeps small gradients from vanishing (Micikevicius et al. 2018)."""

from __future__ import annotations

from typing import Any

from dstrain.runtime.spec.errors import NonFiniteError, UsageError
from dstrain.runtime.spec.training_config import LossScaleConfig

_LARGEST = 2.0**127
"""The largest power of two in fp32."""

FIXED_PATIENCE = 10
"""Overflows in a row that a fixed scale bears: a skipped step leaves the weights as they are, so that only other
samples could help."""


class LossScaler:
    """Decides the scale of each step. Pure: the caller multiplies, divides, skips a step that overflowed, and tells.

    The scale is `loss_scale.value` for ever, and `FIXED_PATIENCE` overflows in a row end the job; or, if there is none,
    it adapts:

    - it begins at 2^initial_power;
    - `window` steps in a row without overflow double it and refill the hysteresis;
    - the first `hysteresis` − 1 overflows are borne; each one after them halves the scale. Only a doubling refills
      the hysteresis: overflows need not follow one another, and after one halving the next overflow halves again.
      So does DeepSpeed's DynamicLossScaler (consecutive_hysteresis off), but for its window, which is one step
      longer after a start or an overflow; with hysteresis 1 it is torch.amp.GradScaler;
    - it never falls below `minimum`.

    Not enabled, the scale is 1 and never changes.

    Raises UsageError if `minimum` is above the first scale.
    """

    def __init__(self, config: LossScaleConfig, enabled: bool) -> None:
        self._config, self.enabled = config, enabled
        self._adapts = enabled and config.value is None
        self.value = 1.0
        if enabled:
            self.value = 2.0**config.initial_power if config.value is None else config.value
        if self._adapts and config.minimum > self.value:
            expected = f"at most the first scale, 2^{config.initial_power} = {self.value:.15g}"
            raise UsageError.mismatch("precision.loss_scale.minimum", expected, f"{config.minimum:.15g}")
        self._good_steps = 0  # in a row
        self._overflows = 0  # in a row, of a fixed scale
        self._hysteresis = config.hysteresis

    def update(self, overflowed: bool) -> None:
        """Learn from a step whether any gradient, of any rank, was not finite.

        Raises NonFiniteError when the scale would have to fall below its minimum, or is fixed and too high.
        """
        if not self._adapts:
            self._bear_while_fixed(overflowed)
            return
        if overflowed:
            self._good_steps = 0
            self._bear_or_halve()
            return
        self._good_steps += 1
        if self._good_steps == self._config.window:
            self._good_steps = 0
            self._hysteresis = self._config.hysteresis
            self.value = min(2 * self.value, _LARGEST)

    def state_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"value": self.value, "good_steps": self._good_steps, "hysteresis": self._hysteresis}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from another's state_dict(); a scale that does not adapt stays what the configuration says."""
        if self._adapts:
            self.value = max(state["value"], self._config.minimum)
            self._good_steps, self._hysteresis = state["good_steps"], state["hysteresis"]

    def _bear_while_fixed(self, overflowed: bool) -> None:
        self._overflows = self._overflows + 1 if overflowed else 0
        if self.enabled and self._overflows == FIXED_PATIENCE:
            raise NonFiniteError(
                f"precision.loss_scale.value: expected a scale at which gradients are finite, found {FIXED_PATIENCE} "
                f"steps in a row that overflow at {self.value:.15g}; write a smaller value, or leave the key out: then "
                "the scale adapts"
            )

    def _bear_or_halve(self) -> None:
        if self._hysteresis > 1:
            self._hysteresis -= 1
            return
        minimum = self._config.minimum
        if self.value == minimum:
            raise NonFiniteError(
                f"precision.loss_scale: expected finite gradients at the smallest scale, minimum = {minimum:.15g}, "
                "found an overflow; a smaller optimizer.lr, a longer schedule.warmup_steps or precision.dtype bf16 "
                "may help"
            )
        self.value = max(self.value / 2, minimum)
