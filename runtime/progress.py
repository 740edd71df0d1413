"""What rank 0 says on the console. Pure: numbers to lines."""

from __future__ import annotations

from dstrain.runtime.engine import StepResult

WIDTH = 80 - len("[localhost:0] ")
"""Columns of a line behind the prefix that the launcher puts before it."""


def step_line(
    step: int,
    steps: int,
    lr: float,
    result: StepResult,
    rate: float,
    left_s: float,
    memory_bytes: float | None = None,
    mfu: float | None = None,
    unit: str = "tokens",
) -> str:
    """One line of progress that fits `WIDTH`: words are shortened, and at last numbers left out, until it does.

    The gradient's norm is that before clipping; a step that was left out says `skipped` in its place.
    rate: of what `unit` says (tokens, samples), in a second. memory_bytes: peak of rank 0. mfu: share of the device's
    peak, from 0 to 1. Either may be None: not known.
    """
    counted = f"{step:>{len(str(steps))}}/{steps}"
    speed, left = thousands(rate), _clock(left_s)
    parts = {
        "step": [f"step {counted}", counted],
        "loss": [f"loss {result.loss:.3f}", f"loss {result.loss:.4g}"],
        "lr": [f"lr {lr:.1e}", f"lr {_short_power(lr)}", ""],
        "grad": ["skipped"] if result.skipped else [f"grad {result.grad_norm:.2f}", f"grad {result.grad_norm:.3g}", ""],
        "rate": [f"{speed} {'tok' if unit == 'tokens' else unit}/s", f"{speed}/s"],
        "mfu": [f"mfu {mfu:.0%}", f"{mfu:.0%}"] if mfu is not None else [""],
        "memory": [_gib(memory_bytes), ""] if memory_bytes is not None else [""],
        "left": [f"{left} left", left],
    }
    shorten = iter(("left", "mfu", "step", "rate", "lr", "loss", "grad", "memory", "lr", "grad"))
    while len(line := " ".join(forms[0] for forms in parts.values() if forms[0])) > WIDTH:
        part = next(shorten, None)
        if part is None:
            break
        parts[part] = parts[part][1:] or parts[part]
    return line


def validation_line(step: int, steps: int, loss: float) -> str:
    """One line for a validation; the loss is in nats per token."""
    return f"step {step:>{len(str(steps))}}/{steps}  validation loss {loss:.4f}"


def thousands(value: float) -> str:
    """Three digits or so: 950, 12.3k, 1.25M."""
    for power, sign in ((1e6, "M"), (1e3, "k")):
        if value >= power:
            return f"{value / power:.2f}{sign}" if power == 1e6 else f"{value / power:.1f}{sign}"
    return f"{value:.0f}"


def _gib(value: float) -> str:
    gib = value / 2**30
    return f"{gib:.1f}G" if gib < 10 else f"{gib:.0f}G"


def _short_power(value: float) -> str:
    """3.0e-04 as 3.0e-4."""
    digits, _, power = f"{value:.1e}".partition("e")
    return f"{digits}e{int(power)}"


def _clock(seconds: float) -> str:
    """2:03; of hours 12h34, of days 3d04."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24}d{hours % 24:02}"
    return f"{hours}h{minutes:02}" if hours else f"{minutes}:{rest:02}"
