"""The learning rate of each step."""

from __future__ import annotations

import pytest
import torch

from dstrain.runtime.lr_schedule import lr_ratio
from dstrain.runtime.spec.config import ScheduleConfig


def test_cosine_is_torchs_after_a_linear_warmup() -> None:
    steps, warmup, minimum = 50, 10, 0.2
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps - warmup, eta_min=minimum)
    config = ScheduleConfig(name="cosine", warmup_steps=warmup, minimum_ratio=minimum)
    assert [lr_ratio(config, step, steps) for step in range(1, 11)] == pytest.approx([i / 10 for i in range(1, 11)])
    for step in range(warmup + 1, steps + 1):
        optimizer.step()
        theirs.step()
        assert lr_ratio(config, step, steps) == pytest.approx(theirs.get_last_lr()[0])


def test_cosine_ends_at_a_tenth_by_default_or_earlier_in_its_warmup() -> None:
    assert lr_ratio(ScheduleConfig(), 100, 100) == pytest.approx(0.1)
    assert lr_ratio(ScheduleConfig(warmup_steps=5), 5, 5) == 1.0
    assert lr_ratio(ScheduleConfig(warmup_steps=8), 2, 2) == 0.25


def test_constant() -> None:
    config = ScheduleConfig(name="constant", warmup_steps=2)
    assert [lr_ratio(config, step, 5) for step in range(1, 6)] == [0.5, 1, 1, 1, 1]
