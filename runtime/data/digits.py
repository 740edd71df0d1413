"""Handwritten digits: 1,797 real images of 8 × 8 pixels that scikit-learn ships (Alpaydin and Kaynak 1998)."""

from __future__ import annotations

import torch
from torch.utils.data import TensorDataset

from dstrain.runtime.imports import optional_module

_BRIGHTEST = 16


def digits(validation_fraction: float = 0.2, seed: int = 0) -> tuple[TensorDataset, TensorDataset]:
    """Training and validation: images (1, 8, 8) fp32 from -1 to 1, and their classes, int64 from 0 to 9.

    seed: of the choice of those held out. Raises UsageError without scikit-learn.
    """
    source = optional_module("sklearn.datasets", "data.factory", "examples").load_digits()
    images = torch.tensor(source.images, dtype=torch.float32).unsqueeze(1) / (_BRIGHTEST / 2) - 1
    classes = torch.tensor(source.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    held_out = round(len(images) * validation_fraction)
    validation, training = order[:held_out], order[held_out:]
    return TensorDataset(images[training], classes[training]), TensorDataset(images[validation], classes[validation])
