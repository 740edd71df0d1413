"""The loss scale: tables of steps, and torch's GradScaler."""

from __future__ import annotations

import json
import random

import pytest
import torch

from dstrain.runtime.loss_scale import LossScaler
from dstrain.runtime.spec.errors import NonFiniteError, UsageError
from dstrain.runtime.spec.exit_codes import ExitCode
from dstrain.runtime.spec.training_config import LossScaleConfig

SMALL = LossScaleConfig(initial_power=4, window=3, hysteresis=2, minimum=2.0)


def scales(scaler: LossScaler, steps: str) -> list[float]:
    """The scale after each step: '.' a good one, '!' an overflow."""
    values = []
    for step in steps:
        scaler.update(step == "!")
        values.append(scaler.value)
    return values


@pytest.mark.parametrize(
    ("hysteresis", "steps", "expected"),
    [
        (1, "...", [16, 16, 32]),  # doubles after the window, and again after another one
        (1, "......", [16, 16, 32, 32, 32, 64]),
        (1, "..!...", [16, 16, 8, 8, 8, 16]),  # an overflow begins the window anew
        (1, "!!", [8, 4]),
        (2, "!!", [16, 8]),  # the first is borne
        (2, "!!!", [16, 8, 4]),  # and none after the first halving
        (2, "!.!", [16, 16, 8]),  # overflows need not follow one another
        (2, "!...!!", [16, 16, 16, 32, 32, 16]),  # a doubling refills
        (3, "!!!!...!", [16, 16, 8, 4, 4, 4, 8, 8]),
        (1, "!!!", [8, 4, 2]),  # down to the minimum
    ],
)
def test_table(hysteresis: int, steps: str, expected: list[float]) -> None:
    config = LossScaleConfig(initial_power=4, window=3, hysteresis=hysteresis, minimum=2.0)
    assert scales(LossScaler(config, enabled=True), steps) == expected


@pytest.mark.parametrize("seed", range(3))
def test_with_hysteresis_1_it_is_torchs(seed: int) -> None:
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=5)
    ours = LossScaler(LossScaleConfig(initial_power=20, window=5, hysteresis=1, minimum=2.0**-40), enabled=True)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    theirs.scale(torch.ones(1))  # type: ignore[no-untyped-call] # torch's
    drawn = random.Random(seed)
    for _ in range(200):
        overflowed = drawn.random() < 0.15
        parameter.grad = torch.tensor([float("inf") if overflowed else 1.0])
        theirs.step(optimizer)
        theirs.update()
        ours.update(overflowed)
        assert ours.value == theirs.get_scale()


def test_an_overflow_at_the_minimum_ends_the_job() -> None:
    scaler = LossScaler(SMALL, enabled=True)
    assert scales(scaler, "!!!!") == [16, 8, 4, 2]
    with pytest.raises(NonFiniteError) as error:
        scaler.update(True)
    assert error.value.exit_code == ExitCode.NON_FINITE
    assert str(error.value) == (
        "precision.loss_scale: expected finite gradients at the smallest scale, minimum = 2, found an overflow; "
        "a smaller optimizer.lr, a longer schedule.warmup_steps or precision.dtype bf16 may help"
    )


def test_an_odd_minimum_is_reached_but_not_passed() -> None:
    scaler = LossScaler(LossScaleConfig(initial_power=4, hysteresis=1, minimum=3.0), enabled=True)
    assert scales(scaler, "!!!") == [8, 4, 3]


def test_it_grows_no_further_than_fp32() -> None:
    scaler = LossScaler(LossScaleConfig(initial_power=126, window=1), enabled=True)
    assert scales(scaler, "..!!") == [2.0**127, 2.0**127, 2.0**127, 2.0**126]


def test_a_fixed_scale_and_none_never_change() -> None:
    assert scales(LossScaler(LossScaleConfig(value=128.0, window=1, hysteresis=1), enabled=True), ".!!.") == [128] * 4
    assert scales(LossScaler(LossScaleConfig(window=1, hysteresis=1), enabled=False), ".!!.") == [1] * 4


def test_a_fixed_scale_that_is_too_high_ends_the_job() -> None:
    scaler = LossScaler(LossScaleConfig(value=2.0**20), enabled=True)
    assert scales(scaler, "!!!!!!!!!.!!!!!!!!!") == [2.0**20] * 19, "nine in a row are borne"
    with pytest.raises(NonFiniteError) as error:
        scaler.update(True)
    assert str(error.value) == (
        "precision.loss_scale.value: expected a scale at which gradients are finite, found 10 steps in a row that "
        "overflow at 1048576; write a smaller value, or leave the key out: then the scale adapts"
    )
    assert scales(LossScaler(LossScaleConfig(value=2.0**20), enabled=False), "!" * 20) == [1] * 20


def test_it_goes_on_from_its_state() -> None:
    first, second = LossScaler(SMALL, enabled=True), LossScaler(SMALL, enabled=True)
    scales(first, "!...!..")
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert scales(second, ".!!!") == scales(first, ".!!!") == [64, 64, 32, 16]
    fixed = LossScaler(LossScaleConfig(value=128.0), enabled=True)
    fixed.load_state_dict(first.state_dict())
    assert fixed.value == 128


def test_a_minimum_above_the_first_scale_is_an_error() -> None:
    with pytest.raises(UsageError) as error:
        LossScaler(LossScaleConfig(initial_power=4, minimum=20.0), enabled=True)
    assert str(error.value) == ("precision.loss_scale.minimum: expected at most the first scale, 2^4 = 16, found 20")
