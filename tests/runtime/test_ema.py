"""The average of the weights, against torch's AveragedModel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dstrain.runtime.ema import WeightAverage


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)).to(dtype)


def move(module: nn.Module, step: int) -> None:
    """Change the weights as a training step would."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def values(module: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_it_is_torchs_bit_for_bit() -> None:
    ours_of, theirs_of = model(), model()
    ours = WeightAverage(list(ours_of.named_parameters()), decay=0.3)
    theirs = AveragedModel(theirs_of)
    theirs.update_parameters(theirs_of)  # the first one copies
    for step, decay in enumerate((2 / 11, 3 / 12, 0.3, 0.3, 0.3), start=1):
        move(ours_of, step)
        move(theirs_of, step)
        ours.update()
        theirs.multi_avg_fn = get_ema_multi_avg_fn(decay)
        theirs.update_parameters(theirs_of)
        assert_equal(list(ours.tensors.values()), values(theirs.module))
    assert list(ours.tensors) == [name for name, _ in ours_of.named_parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swapped_shows_the_averages_and_restores_the_weights_bit_for_bit(dtype: torch.dtype) -> None:
    module = model(dtype)
    average = WeightAverage(list(module.named_parameters()), decay=0.9)
    move(module, 1)
    average.update()
    before, views = values(module), [parameter.detach().view(-1) for parameter in module.parameters()]
    with average.swapped():
        shown = values(module)
        assert_equal([view.clone() for view in views], [tensor.view(-1) for tensor in shown])
    assert_equal(shown, [tensor.to(dtype) for tensor in average.tensors.values()])
    assert_equal(values(module), before)
    assert any(not torch.equal(a, b) for a, b in zip(shown, before, strict=True))
    with pytest.raises(KeyboardInterrupt), average.swapped():
        raise KeyboardInterrupt
    assert_equal(values(module), before)


def test_bf16_weights_have_an_average_in_fp32() -> None:
    """Steps of 1e-4 · 1 are lost in bf16, which has 8 bits: the average has to keep them."""
    parameter = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    average = WeightAverage([("x", parameter)], decay=0.9999)
    average.updates = 1_000_000  # past the quick beginning
    with torch.no_grad():
        parameter.fill_(2.0)
    for _ in range(10):
        average.update()
    assert average.tensors["x"].dtype == torch.float32
    # ten roundings of fp32 near 1, 6e-8 each
    torch.testing.assert_close(average.tensors["x"], torch.full((4,), 2 - 0.9999**10), rtol=0, atol=6e-7)


def test_it_begins_anew_with_other_weights() -> None:
    module = model()
    average = WeightAverage(list(module.named_parameters()), decay=0.9)
    move(module, 1)
    average.update()
    move(module, 2)
    average.restart()
    assert average.updates == 0
    assert_equal(list(average.tensors.values()), [parameter.detach() for parameter in module.parameters()])
