"""Who will like what: embeddings of users and items, and a small network over both (He et al. 2017, "NeuMF")."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_INITIAL_STD = 0.1


class Recommender(nn.Module):
    """Pairs of a user and an item to the logit that the user likes the item."""

    def __init__(self, users: int, items: int, width: int = 16, hidden: int = 64) -> None:
        """width: features of one embedding. hidden: of the network's one hidden layer."""
        super().__init__()
        self.user = nn.Embedding(users, width)
        self.item = nn.Embedding(items, width)
        self.mlp = nn.Sequential(nn.Linear(3 * width, hidden), nn.ReLU(), nn.Linear(hidden, 1))
        for table in (self.user, self.item):
            nn.init.normal_(table.weight, std=_INITIAL_STD)

    def forward(self, pairs: Tensor) -> Tensor:
        """(batch, 2) int64, user and item -> logits, (batch,)."""
        user, item = self.user(pairs[:, 0]), self.item(pairs[:, 1])
        logits: Tensor = self.mlp(torch.cat([user * item, user, item], dim=-1))
        return logits.squeeze(-1)
