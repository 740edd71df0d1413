"""Made-up interactions of users and items with the structure that real ones have.

Each user and item has a vector of latent factors (tastes and qualities), each item an appeal to everybody; whether a
user likes an item is drawn with the chance sigmoid(tastes · qualities + appeal). A few items are seen by many and
most by few, as Zipf's law has it. So there is something to learn, and a loss below which no model can get.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import TensorDataset


class Tastes:
    """What the users are like and the items too: a pure function of the sizes and the seed."""

    def __init__(self, users: int, items: int, factors: int, generator: torch.Generator) -> None:
        scale = 2.0 / factors**0.5  # of the product: its standard deviation is then 2, a decided taste
        self.tastes = torch.randn(users, factors, generator=generator) * scale
        self.qualities = torch.randn(items, factors, generator=generator)
        self.appeal = torch.randn(items, generator=generator)
        self.popularity = 1.0 / torch.arange(1, items + 1)

    def logits(self, pairs: Tensor) -> Tensor:
        """Of the chance that the user likes the item; pairs (n, 2) int64 -> (n,)."""
        user, item = pairs.unbind(1)
        logits: Tensor = (self.tastes[user] * self.qualities[item]).sum(-1) + self.appeal[item]
        return logits


def interactions(
    users: int = 1000,
    items: int = 500,
    samples: int = 200_000,
    factors: int = 4,
    validation_fraction: float = 0.05,
    seed: int = 0,
) -> tuple[TensorDataset, TensorDataset]:
    """Training and validation: pairs (user, item), (2,) int64, and whether the user likes the item, fp32 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    tastes = Tastes(users, items, factors, generator)
    user = torch.randint(users, (samples,), generator=generator)
    item = torch.multinomial(tastes.popularity, samples, replacement=True, generator=generator)
    pairs = torch.stack([user, item], dim=1)
    likes = torch.bernoulli(tastes.logits(pairs).sigmoid(), generator=generator)
    cut = round(samples * (1 - validation_fraction))
    return TensorDataset(pairs[:cut], likes[:cut]), TensorDataset(pairs[cut:], likes[cut:])
