"""A training script of your own, with dstrain's engine; the five lines that differ from plain PyTorch are marked.

dstrain run examples/script.py
torchrun --nproc-per-node 2 examples/script.py
"""

import torch
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from dstrain.runtime import initialize  # 1: in place of torch.optim

CONFIG = {
    "batch": {"global": 64, "micro": 16},
    "optimizer": {"name": "adamw", "lr": 3e-3},
    "train": {"steps": 200, "clip": 1.0},
}


def spirals(points: int = 2000) -> TensorDataset:
    """Two interleaved spirals: points in the plane, and which spiral each is on."""
    generator = torch.Generator().manual_seed(0)
    arm = torch.randint(2, (points,), generator=generator)
    turn = torch.rand(points, generator=generator) * 3 + 0.3
    angle = turn * 2 + arm * torch.pi
    plane = torch.stack([turn * angle.cos(), turn * angle.sin()], dim=1)
    return TensorDataset(plane + 0.05 * torch.randn(points, 2, generator=generator), arm)


torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Linear(2, 64), torch.nn.GELU(), torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 2)
)
engine = initialize(model, config=CONFIG, training_data=spirals())  # 2: ranks, optimizer, loader

for points, arms in engine.dataloader:  # 3: this rank's micro-batches, until train.steps are done
    loss = F.cross_entropy(engine(points), arms)
    engine.backward(loss)  # 4: in place of loss.backward()
    result = engine.step()  # 5: in place of optimizer.step(), zero_grad(), clip_grad_norm_(), scheduler.step()
    if result and engine.rank == 0 and engine.global_step % 50 == 0:  # None until the step's last micro-batch
        print(f"step {engine.global_step} loss {result.loss:.3f} lr {engine.learning_rate:.1e}", flush=True)

if engine.rank == 0:
    print(f"done: {engine.global_step} steps on {engine.world_size} × {engine.device}, grad {engine.grad_norm:.3f}")
