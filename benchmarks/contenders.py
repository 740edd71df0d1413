"""Everyone who trains the GPT of `gpt.py`: one step of each, with the same optimizer, clipping and mean.

All join the ranks by torchrun's environment before. bf16 is what each offers for it: DDP and the plain loop compute in
autocast on fp32 weights; FSDP2, DeepSpeed and dstrain in bf16 with fp32 masters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gpt import Work, gpt, loss_of

LR, CLIP = 1e-3, 1.0

Step = Callable[[Sequence[Tensor]], float]
"""One training step on this rank's micro-batches; returns the mean of their losses."""

Hold = Callable[[bool], AbstractContextManager[Any]]
"""Around a forward and backward; True: other micro-batches of the step follow, keep the gradients back."""


class Contender(NamedTuple):
    """take_traffic: bytes that this rank has sent since the last call, where the contender counts them."""

    step: Step
    take_traffic: Callable[[], int] | None = None


def contender(name: str, work: Work) -> Contender:
    return CONTENDERS[name](work)


# --- torch -----------------------------------------------------------------------------------------------------------


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LR, fused=True)


def plain_step(
    model: nn.Module, autocast: bool, optimizer: torch.optim.Optimizer | None = None, hold: Hold | None = None
) -> Step:
    """torch's own loop, for a model alone or wrapped."""
    optimizer = optimizer or adamw(model)
    device = next(model.parameters()).device.type

    def step(micros: Sequence[Tensor]) -> float:
        total = 0.0
        for left, tokens in zip(reversed(range(len(micros))), micros, strict=True):
            with hold(left > 0) if hold else nullcontext():
                with torch.autocast(device, torch.bfloat16, enabled=autocast):
                    logits = model(tokens[:, :-1])
                loss = loss_of(logits, tokens[:, 1:]) / len(micros)
                loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return step


def plain(work: Work, compiled: bool = False) -> Contender:
    model: Any = gpt(work).to(work.device)
    return Contender(plain_step(torch.compile(model) if compiled else model, work.dtype == "bf16"))


def ddp(work: Work, sharded_optimizer: bool = False) -> Contender:
    model = nn.parallel.DistributedDataParallel(gpt(work).to(work.device), gradient_as_bucket_view=True)
    optimizer = None
    if sharded_optimizer:
        from torch.distributed.optim import ZeroRedundancyOptimizer

        optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=LR, fused=True)

    def hold(more_follow: bool) -> AbstractContextManager[Any]:
        return model.no_sync() if more_follow else nullcontext()

    return Contender(plain_step(model, work.dtype == "bf16", optimizer, hold))


def fsdp2(work: Work, reshard: bool) -> Contender:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model: Any = gpt(work)
    how: dict[str, Any] = {
        "mesh": init_device_mesh(work.device, (dist.get_world_size(),)),
        "reshard_after_forward": reshard,
    }
    if work.dtype == "bf16":
        how["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    for block in model.blocks:
        fully_shard(block, **how)
    fully_shard(model, **how)

    def hold(more_follow: bool) -> AbstractContextManager[Any]:
        model.set_requires_gradient_sync(not more_follow)
        return nullcontext()

    return Contender(plain_step(model, autocast=False, hold=hold))


# --- DeepSpeed -------------------------------------------------------------------------------------------------------


def deepspeed(work: Work, stage: int, offload: bool = False) -> Contender:
    """With DeepSpeed's own defaults; its own Adam where it offloads, since it takes no other there."""
    import logging

    import deepspeed as ds

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    ds.init_distributed("nccl" if work.device == "cuda" else "gloo")
    zero: dict[str, Any] = {"stage": stage}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": work.micro,
        "gradient_accumulation_steps": work.accumulation,
        "gradient_clipping": CLIP,
        "zero_optimization": zero,
        "bf16": {"enabled": work.dtype == "bf16"},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    model = gpt(work)
    if offload:
        zero |= {"offload_optimizer": {"device": "cpu", "pin_memory": work.device == "cuda"}}
        config["optimizer"] = {"type": "AdamW", "params": {"lr": LR, "weight_decay": 0.01}}
        engine, *_ = ds.initialize(model=model, model_parameters=list(model.parameters()), config=config)
    else:
        model = model.to(work.device)
        engine, *_ = ds.initialize(model=model, optimizer=adamw(model), config=config)

    def step(micros: Sequence[Tensor]) -> float:
        total = 0.0
        for tokens in micros:
            loss = loss_of(engine(tokens[:, :-1]), tokens[:, 1:])
            engine.backward(loss)
            engine.step()
            total += loss.item() / len(micros)
        return total

    return Contender(step)


# --- ours ------------------------------------------------------------------------------------------------------------


def dstrain(
    work: Work, stage: int, offload: bool = False, compiled: bool = False, check_replicas_every: int = 10
) -> Contender:
    """The engine with the project's defaults, and the optimizer of `adamw`."""
    from dstrain.runtime import initialize  # here: the peers' memory is not to hold it

    ranks = dist.get_world_size() if dist.is_initialized() else 1
    job: dict[str, Any] = {
        "zero": {"stage": stage},
        "precision": {"dtype": work.dtype},
        "batch": {"global": ranks * work.micro * work.accumulation, "micro": work.micro},
        "optimizer": {"name": "adamw", "lr": LR, "betas": [0.9, 0.999], "weight_decay": 0.01},
        "train": {"clip": CLIP, "compile": compiled, "check_replicas_every": check_replicas_every},
    }
    if offload:
        job["zero"]["offload"] = {"optimizer": True}
    engine = initialize(gpt(work), job)

    def step(micros: Sequence[Tensor]) -> float:
        total = 0.0
        for tokens in micros:
            loss = loss_of(engine(tokens[:, :-1]), tokens[:, 1:])
            engine.backward(loss, tokens[:, 1:].numel())
            engine.step()
            total += loss.item() / len(micros)
        return total

    return Contender(step, engine.comm.take_traffic)


CONTENDERS: dict[str, Callable[[Work], Contender]] = {
    "plain": plain,
    "plain-compiled": lambda work: plain(work, compiled=True),
    "ddp": ddp,
    "ddp-zero1": lambda work: ddp(work, sharded_optimizer=True),
    "fsdp2-keep": lambda work: fsdp2(work, reshard=False),
    "fsdp2": lambda work: fsdp2(work, reshard=True),
    "deepspeed1": lambda work: deepspeed(work, 1),
    "deepspeed2": lambda work: deepspeed(work, 2),
    "deepspeed3": lambda work: deepspeed(work, 3),
    "deepspeed3-offload": lambda work: deepspeed(work, 3, offload=True),
    "stage0": lambda work: dstrain(work, 0),
    "stage1": lambda work: dstrain(work, 1),
    "stage2": lambda work: dstrain(work, 2),
    "stage3": lambda work: dstrain(work, 3),
    "stage0-compiled": lambda work: dstrain(work, 0, compiled=True),
    "stage3-offload": lambda work: dstrain(work, 3, offload=True),
}
