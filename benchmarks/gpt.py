"""What every contender of the training benchmarks trains: a GPT, on random tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Work:
    """One job's work, the same for every contender; by default a GPT of 29.5 M parameters in fp32 on CPU.

    length: tokens of a sample. micro: samples of a micro-batch; accumulation: micro-batches of a rank's step. warmup,
    steps: those that are not measured, and those that are.
    """

    vocabulary: int = 4096
    width: int = 512
    layers: int = 8
    heads: int = 8
    length: int = 128
    micro: int = 2
    accumulation: int = 1
    dtype: Literal["fp32", "bf16"] = "fp32"
    device: Literal["cpu", "cuda"] = "cpu"
    warmup: int = 3
    steps: int = 8

    @property
    def block_parameters(self) -> int:
        """Of one block: matrices, their biases, and two norms."""
        return 12 * self.width**2 + 13 * self.width

    @property
    def parameters(self) -> int:
        embeddings = (2 * self.vocabulary + self.length) * self.width  # of tokens, the head, of positions
        return self.layers * self.block_parameters + embeddings + 2 * self.width


TINY = Work(vocabulary=64, width=64, layers=2, heads=2, length=16, warmup=1, steps=2)
"""For a look at whether a benchmark still runs."""


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class GPT(nn.Module):
    def __init__(self, work: Work) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(work.vocabulary, work.width), nn.Embedding(work.length, work.width)
        self.blocks = nn.ModuleList(Block(work.width, work.heads) for _ in range(work.layers))
        self.norm, self.head = nn.LayerNorm(work.width), nn.Linear(work.width, work.vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def gpt(work: Work) -> GPT:
    """The same one on every rank, on the CPU."""
    torch.manual_seed(0)
    return GPT(work)


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def batches(work: Work, rank: int, ranks: int) -> Iterator[list[Tensor]]:
    """This rank's micro-batches (micro, length + 1) of each step, for ever."""
    generator = torch.Generator().manual_seed(7)
    while True:
        yield [
            torch.randint(work.vocabulary, (ranks * work.micro, work.length + 1), generator=generator)[
                rank * work.micro :
            ][: work.micro].to(work.device)
            for _ in range(work.accumulation)
        ]
