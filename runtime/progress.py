"""What rank 0 says on the console. Pure: numbers to lines."""

from __future__ import annotations

from dstrain.runtime.engine import StepResult


def step_line(step: int, steps: int, lr: float, result: StepResult, tokens_per_s: float, left_s: float) -> str:
    """One line of progress, short enough for 80 columns behind a host's prefix; grad: global norm before clipping."""
    return (
        f"step {step:>{len(str(steps))}}/{steps} loss {result.loss:.3f} lr {lr:.1e} "
        f"grad {result.grad_norm:.2f} {_thousands(tokens_per_s)} tok/s {_clock(left_s)} left"
    )


def validation_line(step: int, steps: int, loss: float) -> str:
    """One line for a validation; the loss is in nats per token."""
    return f"step {step:>{len(str(steps))}}/{steps}  validation loss {loss:.4f}"


def _thousands(value: float) -> str:
    return f"{value / 1000:.1f}k" if value >= 1000 else f"{value:.0f}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
