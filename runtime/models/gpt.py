"""A decoder-only transformer: pre-norm, causal attention, rotary positions, head tied to the embedding.

Radford et al. 2019 (GPT-2) without dropout, and with the rotary positions of Su et al. 2021, with which a small
model learns to look back in a fraction of the steps.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dstrain.runtime.spec.model_config import GPTConfig

_INITIAL_STD = 0.02
_ROTARY_BASE = 10_000.0


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        """(batch, time, width) -> the same shape. rotation: see `rotary`."""
        split = self.query_key_value(x).unflatten(-1, (3, self.heads, -1))  # batch, time, 3, heads, head width
        query, key, value = split.permute(2, 0, 3, 1, 4)
        query, key = rotated(query, rotation), rotated(key, rotation)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        merged: Tensor = self.out(mixed.transpose(1, 2).flatten(-2))
        return merged


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        """(batch, time, width) -> the same shape."""
        x = x + self.attention(self.attention_norm(x), rotation)
        mlp: Tensor = self.mlp(self.mlp_norm(x))
        return x + mlp


class GPT(nn.Module):
    """Tokens to the logits of the next token."""

    rotation: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.context = config.context
        self.token = nn.Embedding(config.vocabulary, config.width)
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        self.head.weight = self.token.weight
        self.register_buffer("rotation", rotary(config.context, config.width // config.heads), persistent=False)
        self._scale_weights()

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, time) int64, time ≤ context -> logits, (batch, time, vocabulary)."""
        x = self.token(tokens)
        rotation = self.rotation[:, : tokens.shape[1]]
        for block in self.blocks:
            x = block(x, rotation)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def initialise(self) -> None:
        """Fill parameters and buffers of a model that was made on the meta device, after `to_empty`.

        The same numbers as making it where it is, with the same seed.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding | nn.LayerNorm):
                module.reset_parameters()
        self.head.weight = self.token.weight  # to_empty parts them
        self.rotation.copy_(rotary(self.context, 2 * self.rotation.shape[-1]))
        self._scale_weights()

    @torch.no_grad()
    def _scale_weights(self) -> None:
        """Normal weights; those that write to the residual stream are smaller, by the number of writers."""
        writers = 2 * len(self.blocks)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                writes_residual = name.endswith(("attention.out.weight", "mlp.2.weight"))
                parameter.normal_(0.0, _INITIAL_STD / (writers if writes_residual else 1) ** 0.5)


def rotary(context: int, head_width: int) -> Tensor:
    """Cosines and sines of each position's angles, (2, context, head_width / 2)."""
    frequencies = _ROTARY_BASE ** -(torch.arange(0, head_width, 2) / head_width)
    angles = torch.outer(torch.arange(context), frequencies)
    return torch.stack([angles.cos(), angles.sin()])


def parameter_count(config: GPTConfig) -> int:
    """Trained numbers of that GPT, without the memory for them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in GPT(config).parameters())


def rotated(x: Tensor, rotation: Tensor) -> Tensor:
    """x, (…, time, head width), its halves taken as coordinates of points in planes, turned by their position."""
    cosine, sine = rotation.to(x.dtype)  # under autocast x is of a lower precision than the buffer
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1)


def next_token_loss(logits: Tensor, samples: Tensor) -> Tensor:
    """Mean cross-entropy in nats of logits (batch, time, vocabulary) for samples (batch, time + 1)."""
    return F.cross_entropy(logits.flatten(0, 1).float(), samples[:, 1:].flatten())
