"""The line of progress: complete, and never wider than a terminal."""

from __future__ import annotations

import pytest

from dstrain.runtime.engine import StepResult
from dstrain.runtime.progress import WIDTH, step_line, validation_line


def line(steps: int = 400, step: int = 25, **more: float) -> str:
    given = {"loss": 3.0131, "grad_norm": 2.271, "lr": 1.5e-3, "rate": 9412.0, "left": 152.0} | more
    result = StepResult(given["loss"], given["grad_norm"], tokens=0)
    return step_line(
        step, steps, given["lr"], result, given["rate"], given["left"], more.get("memory"), more.get("mfu")
    )


def test_a_short_run_in_full_words() -> None:
    assert line() == "step  25/400 loss 3.013 lr 1.5e-03 grad 2.27 9.4k tok/s 2:32 left"


def test_with_memory_and_utilization() -> None:
    assert line(memory=0.42 * 2**30) == "step  25/400 loss 3.013 lr 1.5e-03 grad 2.27 9.4k tok/s 0.4G 2:32"
    found = line(memory=71.6 * 2**30, mfu=0.413, rate=1.234e6, left=45_296)
    assert found == " 25/400 loss 3.013 lr 1.5e-03 grad 2.27 1.23M tok/s 41% 72G 12h34"


def test_a_skipped_step_says_so() -> None:
    result = StepResult(3.0131, float("nan"), tokens=0, skipped=True)
    assert step_line(25, 400, 1.5e-3, result, 9412.0, 152.0) == (
        "step  25/400 loss 3.013 lr 1.5e-03 skipped 9.4k tok/s 2:32 left"
    )


def test_what_is_counted_may_be_samples() -> None:
    result = StepResult(3.0131, 2.271, tokens=0)
    found = step_line(25, 400, 1.5e-3, result, 9412.0, 152.0, unit="samples")
    assert found == "step  25/400 loss 3.013 lr 1.5e-03 grad 2.27 9.4k samples/s 2:32"
    assert "9.4k/s" in step_line(25, 99_950, 1.5e-3, result, 9412.0, 152.0, 0.42 * 2**30, unit="samples")


def test_the_largest_runs_fit_with_everything() -> None:
    found = line(99_950, 99_950, memory=71.6 * 2**30, mfu=0.413, rate=1.234e6, left=3 * 86_400)
    assert found == "99950/99950 loss 3.013 lr 1.5e-03 grad 2.27 1.23M/s 41% 72G 3d00"


@pytest.mark.parametrize("steps", [1, 10**3, 10**6, 10**9])
@pytest.mark.parametrize("rate", [0.0, 950.0, 99_999.0, 9e8])
@pytest.mark.parametrize("left", [0.0, 59.6, 3600.0, 1e8])
@pytest.mark.parametrize("loss", [0.0, 1234.5678, 1e30, float("nan")])
def test_it_fits_whatever_the_numbers(steps: int, rate: float, left: float, loss: float) -> None:
    found = line(steps, 1, rate=rate, left=left, loss=loss, grad_norm=1e20, memory=1e12, mfu=1.0, lr=1e-10)
    assert len(found) <= WIDTH
    assert f"1/{steps} loss " in found


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3600, "1h00"), (172_799, "47h59"), (172_800, "2d00")],
)
def test_time_left(seconds: float, text: str) -> None:
    assert line(left=seconds).endswith(f" {text} left")


def test_a_validation() -> None:
    assert validation_line(100, 400, 2.20746) == "step 100/400  validation loss 2.2075"
