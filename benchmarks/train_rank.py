"""One rank of `benchmarks/train.py step`: trains the side-by-side's model under one contender.

    RANK=… WORLD_SIZE=… MASTER_ADDR=… MASTER_PORT=… python benchmarks/train_rank.py dstrain|ddp|floor WARMUP STEPS

prints one JSON line: step_s, the median seconds of a step; peak_mib, the most resident memory that it has ever had;
losses, of its own micro-batches in the first and the last step. `floor` only joins the other ranks.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY, WIDTH, LAYERS, HEADS, LENGTH, MICRO = 4096, 512, 8, 8, 128, 2
LR, CLIP = 1e-3, 1.0

Step = Callable[[Tensor], float]
"""One training step on one micro-batch (MICRO, LENGTH + 1); returns the loss."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = self.qkv(self.attention_norm(x)).view(batch, length, 3, HEADS, width // HEADS)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class GPT(nn.Module):
    """29.5 M parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def gpt() -> GPT:
    torch.manual_seed(0)
    return GPT()


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def batches(rank: int, ranks: int) -> Iterator[Tensor]:
    """This rank's micro-batches, for ever."""
    generator = torch.Generator().manual_seed(7)
    while True:
        yield torch.randint(VOCABULARY, (ranks * MICRO, LENGTH + 1), generator=generator)[rank * MICRO :][:MICRO]


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LR, fused=True)


def plain_step(model: nn.Module) -> Step:
    """torch's own loop, for a model alone and under DDP."""
    optimizer = adamw(model)

    def step(tokens: Tensor) -> float:
        loss = loss_of(model(tokens[:, :-1]), tokens[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def ddp_step() -> Step:
    return plain_step(nn.parallel.DistributedDataParallel(gpt(), gradient_as_bucket_view=True))


def engine_step() -> Step:
    """The engine with the project's default bucket size, and the optimizer of `adamw`."""
    from dstrain.runtime import initialize  # here: the peers' memory is not to hold it

    optimizer = {"name": "adamw", "lr": LR, "betas": [0.9, 0.999], "weight_decay": 0.01}
    engine = initialize(gpt(), {"optimizer": optimizer, "train": {"clip": CLIP}})

    def step(tokens: Tensor) -> float:
        loss = loss_of(engine(tokens[:, :-1]), tokens[:, 1:])
        engine.backward(loss, tokens[:, 1:].numel())
        engine.step()
        return loss.item()

    return step


def measure(step: Step, warmup: int, steps: int) -> tuple[float, list[float]]:
    """(Median seconds of a step, losses)."""
    data = batches(dist.get_rank(), dist.get_world_size())
    seconds, losses = [], []
    for _ in range(warmup + steps):
        tokens = next(data)
        dist.barrier()
        begun = time.perf_counter()
        losses.append(step(tokens))
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[warmup:]), losses


def peak_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def main(contender: str, warmup: int, steps: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    dist.all_reduce(torch.ones(1))
    found: dict[str, object] = {}
    if contender != "floor":
        step = {"ddp": ddp_step, "dstrain": engine_step}[contender]()
        step_s, losses = measure(step, warmup, steps)
        found = {"step_s": step_s, "losses": [losses[0], losses[-1]]}
    print(json.dumps({**found, "peak_mib": peak_mib()}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
