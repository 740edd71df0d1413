"""The learning rate of each step, against torch's own schedulers over all steps."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable

import pytest
import torch
from torch.optim import lr_scheduler

from dstrain.runtime.lr_schedule import LRSchedule
from dstrain.runtime.spec.errors import UsageError
from dstrain.runtime.spec.training_config import ScheduleConfig

MakeScheduler = Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]


def torchs_rates(make: MakeScheduler, steps: int) -> list[float]:
    """The learning rates that torch's scheduler gives to so many optimizer steps, of a peak of 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, rates = make(optimizer), []
    for _ in range(steps):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return rates


def ratios(config: ScheduleConfig, steps: int) -> list[float]:
    schedule = LRSchedule(config, steps)
    return [schedule.ratio(step) for step in range(1, steps + 1)]


def test_cosine_is_torchs_after_a_linear_warmup() -> None:
    steps, warmup, minimum = 50, 10, 0.2
    theirs = torchs_rates(
        lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps - warmup, eta_min=minimum), 41
    )
    ours = ratios(ScheduleConfig(name="cosine", warmup_steps=warmup, minimum_ratio=minimum), steps)
    assert ours[:9] == pytest.approx([i / 10 for i in range(1, 10)])
    assert ours[9:] == pytest.approx(theirs)


def test_cosine_ends_at_a_tenth_by_default_or_earlier_in_its_warmup() -> None:
    assert LRSchedule(ScheduleConfig(), 100).ratio(100) == pytest.approx(0.1)
    assert LRSchedule(ScheduleConfig(warmup_steps=5), 5).ratio(5) == 1.0
    assert LRSchedule(ScheduleConfig(warmup_steps=8), 2).ratio(2) == 0.25


@pytest.mark.parametrize("minimum", [None, 0.3])
def test_linear_is_torchs_after_a_linear_warmup(minimum: float | None) -> None:
    steps, warmup = 30, 5
    theirs = torchs_rates(
        lambda optimizer: lr_scheduler.LinearLR(optimizer, 1.0, minimum or 0.0, total_iters=steps - warmup), 26
    )
    ours = ratios(ScheduleConfig(name="linear", warmup_steps=warmup, minimum_ratio=minimum), steps)
    assert ours[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert ours[4:] == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize("warmup", [0, 6])
def test_step_is_torchs_and_begins_to_count_after_the_warmup(warmup: int) -> None:
    theirs = torchs_rates(lambda optimizer: lr_scheduler.StepLR(optimizer, step_size=7, gamma=0.3), 40)
    ours = ratios(ScheduleConfig(name="step", every=7, factor=0.3, warmup_steps=warmup), warmup + 40)
    assert ours[:warmup] == pytest.approx([step / 6 for step in range(1, warmup + 1)])
    assert ours[warmup:] == pytest.approx(theirs)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 37, 100])
@pytest.mark.parametrize("peak_fraction", [0.1, 0.3, 0.45])
def test_one_cycle_is_torchs(steps: int, peak_fraction: float) -> None:
    theirs = torchs_rates(
        lambda optimizer: lr_scheduler.OneCycleLR(
            optimizer, max_lr=1.0, total_steps=steps, pct_start=peak_fraction, cycle_momentum=False
        ),
        steps,
    )
    ours = ratios(ScheduleConfig(name="one_cycle", peak_fraction=peak_fraction), steps)
    assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-15)
    assert ours[-1] == pytest.approx(4e-6)


def test_one_cycle_begins_and_ends_where_it_is_told_to() -> None:
    theirs = torchs_rates(
        lambda optimizer: lr_scheduler.OneCycleLR(
            optimizer, max_lr=1.0, total_steps=20, div_factor=5, final_div_factor=4, cycle_momentum=False
        ),
        20,
    )
    ours = ratios(ScheduleConfig(name="one_cycle", start_ratio=0.2, minimum_ratio=0.05), 20)
    assert ours == pytest.approx(theirs)
    assert (ours[0], ours[5], ours[-1]) == pytest.approx((0.2, 1.0, 0.05))


def test_one_cycle_peaks_at_once_when_its_rise_is_one_step() -> None:
    assert ratios(ScheduleConfig(name="one_cycle", peak_fraction=0.5, minimum_ratio=0.0), 2) == [1.0, 0.0]


def test_constant() -> None:
    schedule = LRSchedule(ScheduleConfig(name="constant", warmup_steps=2), None)
    assert [schedule.ratio(step) for step in range(1, 6)] == [0.5, 1, 1, 1, 1]


@pytest.mark.parametrize("seed", range(3))
def test_plateau_is_torchs_over_losses_that_fall_and_stall(seed: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=0.5, patience=2, threshold=0.01, threshold_mode="rel", min_lr=0.03, eps=0.0
    )
    config = ScheduleConfig(name="plateau", factor=0.5, patience=2, threshold=0.01, minimum_ratio=0.03)
    ours = LRSchedule(config, None)
    drawn = random.Random(seed)
    levels = set()
    for number in range(60):
        val_loss = 1 + math.exp(-number / 5) + 0.02 * drawn.random()
        ours.observe(val_loss)
        theirs.step(val_loss)
        assert ours.ratio(number + 1) == pytest.approx(theirs.get_last_lr()[0])
        levels.add(ours.ratio(1))
    assert levels == {1, 0.5, 0.25, 0.125, 0.0625, 0.03125, 0.03}


def test_plateau_counts_a_loss_that_is_no_number_as_no_better() -> None:
    ours = LRSchedule(ScheduleConfig(name="plateau", patience=0), None)
    ours.observe(math.nan)
    assert ours.ratio(1) == pytest.approx(0.1)
    ours.observe(2.0)
    assert ours.ratio(1) == pytest.approx(0.1)


def test_plateau_rises_first_and_goes_on_from_its_state() -> None:
    config = ScheduleConfig(name="plateau", warmup_steps=4, factor=0.5, patience=1)
    first, second = LRSchedule(config, None), LRSchedule(config, None)
    for val_loss in (2.0, 2.0):
        first.observe(val_loss)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [second.ratio(step) for step in (1, 2, 4, 9)] == [0.25, 0.5, 1, 1]
    second.observe(2.0)  # the second that is no better: more than the patience
    assert [second.ratio(step) for step in (1, 2, 4, 9)] == [0.125, 0.25, 0.5, 0.5]


@pytest.mark.parametrize("name", ["cosine", "linear", "one_cycle"])
def test_a_shape_over_all_steps_asks_for_their_number(name: str) -> None:
    config = ScheduleConfig.model_validate({"name": name})
    with pytest.raises(UsageError) as error:
        LRSchedule(config, None)
    assert str(error.value) == (
        f"train.steps: expected a number of steps for schedule.name {name}, found none; "
        "constant, step and plateau need none"
    )
