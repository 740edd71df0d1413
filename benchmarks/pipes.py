"""Everyone who trains the GPT of `gpt.py` in a pipeline: one step of each, all micro-batches through all stages.

The model is a sequence: embedding, blocks, norm and head; with two ranks each has half of the blocks. Losses are known
on the last stage alone: the others say 0, and the last says as many times the loss as there are ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from contenders import CLIP, LR, Contender
from gpt import GPT, Work, gpt, loss_of

PIPELINE = 2
"""Ranks that hold one copy of the model."""


class Embedding(nn.Module):
    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.token, self.position = model.token, model.position

    def forward(self, tokens: Tensor) -> Tensor:
        embedded: Tensor = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        return embedded


class Head(nn.Module):
    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.norm, self.head = model.norm, model.head

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(x))
        return logits


def layers(work: Work) -> list[nn.Module]:
    model = gpt(work)
    return [Embedding(model), *model.blocks, Head(model)]


def counts(work: Work, stages: int) -> list[int]:
    """Layers of each stage: the blocks evenly, the embedding first, the head last."""
    each = [work.layers * (stage + 1) // stages - work.layers * stage // stages for stage in range(stages)]
    each[0] += 1
    each[-1] += 1
    return each


def torchs(work: Work, schedule: str) -> Contender:
    """torch.distributed.pipelining, with clipping by the norm over both stages."""
    from torch.distributed import pipelining

    rank, ranks = dist.get_rank(), dist.get_world_size()
    sizes = counts(work, ranks)
    start = sum(sizes[:rank])
    own = nn.Sequential(*layers(work)[start : start + sizes[rank]])
    stage = pipelining.PipelineStage(own, rank, ranks, torch.device("cpu"))
    runs = getattr(pipelining, schedule)(stage, work.accumulation, loss_fn=loss_of)
    optimizer = torch.optim.AdamW(own.parameters(), lr=LR, fused=True)

    def step(micros: Sequence[Tensor]) -> float:
        tokens = torch.cat(list(micros))
        losses: list[Tensor] = []
        if rank == 0:
            runs.step(tokens[:, :-1])
        elif rank == ranks - 1:
            runs.step(target=tokens[:, 1:], losses=losses)
        else:
            runs.step()
        clip(own)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return ranks * sum(loss.item() for loss in losses) / len(micros)

    return Contender(step)


def clip(model: nn.Module) -> None:
    """By the norm over all stages."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    square = torch.stack(torch._foreach_norm(gradients)).square().sum()
    dist.all_reduce(square)
    factor = min(1.0, CLIP / (float(square.sqrt()) + 1e-6))
    torch._foreach_mul_(gradients, factor)


def deepspeed(work: Work) -> Contender:
    import deepspeed
    from deepspeed.pipe import PipelineModule

    ranks = dist.get_world_size()
    deepspeed.init_distributed("gloo")
    module = PipelineModule(layers=layers(work), num_stages=ranks, loss_fn=loss_of, partition_method="uniform")
    optimizer = torch.optim.AdamW(list(module.parameters()), lr=LR, fused=True)
    config = {
        "train_micro_batch_size_per_gpu": work.micro,
        "gradient_accumulation_steps": work.accumulation,
        "gradient_clipping": CLIP,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)

    def step(micros: Sequence[Tensor]) -> float:
        return float(engine.train_batch(iter([(tokens[:, :-1], tokens[:, 1:]) for tokens in micros])))

    return Contender(step)


def dstrain(work: Work, schedule: str, stage: int = 0) -> Contender:
    """The engine with the project's defaults."""
    from dstrain.runtime.comm import Communicator
    from dstrain.runtime.engine import Engine, EngineConfig, TorchSchedule
    from dstrain.runtime.optimizers import make_optimizer
    from dstrain.runtime.pipeline.pipeline import Pipeline
    from dstrain.runtime.spec.parallel_dims import parallel_dims
    from dstrain.runtime.spec.schedule import find_schedule
    from dstrain.runtime.spec.training_config import OptimizerConfig, ParallelConfig, ZeroConfig
    from dstrain.runtime.task import LanguageTask

    comm = Communicator(dist.get_rank(), dist.get_world_size(), dist.get_rank(), torch.device("cpu"))
    dims = parallel_dims(comm.world_size, stage, PIPELINE)
    model = nn.Sequential(*layers(work))
    plan = find_schedule(schedule, PIPELINE, work.accumulation)
    pipe = Pipeline(model, comm, dims, plan, counts(work, plan.stages))
    config = EngineConfig(
        zero=ZeroConfig(stage=stage),  # type: ignore[arg-type]
        parallel=ParallelConfig(pipeline=PIPELINE),
        clip=CLIP,
        accumulation=work.accumulation,
    )
    adamw = OptimizerConfig(lr=LR, betas=(0.9, 0.999), weight_decay=0.01)
    engine = Engine(model, comm, config, lambda p: make_optimizer(p, adamw), TorchSchedule(None), pipeline=pipe)
    task = LanguageTask()
    return Contender(lambda micros: engine.train_batch(task, micros).loss, comm.take_traffic)


TINY_STAGES = 4


def tiny_stages(micro_batches: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """One step of a pipeline of tiny layers, all on this rank, and the same computing in a plain loop."""
    from dstrain.runtime.comm import Communicator
    from dstrain.runtime.engine import Engine, EngineConfig, TorchSchedule
    from dstrain.runtime.optimizers import make_optimizer
    from dstrain.runtime.pipeline.pipeline import Pipeline
    from dstrain.runtime.spec.parallel_dims import parallel_dims
    from dstrain.runtime.spec.schedule import make_schedule
    from dstrain.runtime.spec.training_config import OptimizerConfig
    from dstrain.runtime.task import SampleTask

    def layers() -> list[nn.Module]:
        return [nn.Linear(2, 2) for _ in range(TINY_STAGES)]

    comm = Communicator(0, 1, 0, torch.device("cpu"))
    model = nn.Sequential(*layers())
    plan = make_schedule("interleaved_1f1b", 1, micro_batches, TINY_STAGES)
    pipe = Pipeline(model, comm, parallel_dims(1, 0, 1), plan, [1] * TINY_STAGES)
    sgd = OptimizerConfig(name="sgd", lr=1e-9)
    config = EngineConfig(accumulation=micro_batches)
    engine = Engine(model, comm, config, lambda p: make_optimizer(p, sgd), TorchSchedule(None), pipeline=pipe)
    batches = [(torch.ones(1, 2), torch.ones(1, 2)) for _ in range(micro_batches)]
    task, own = SampleTask("torch.nn.functional:mse_loss"), layers()

    def by_hand() -> None:
        for given, target in batches:
            ins, outs = [], []
            for layer in own:
                ins.append(given)
                outs.append(layer(given))
                given = outs[-1].detach().requires_grad_()
            gradient = None
            for place in reversed(range(TINY_STAGES)):
                output = outs[place]
                if gradient is None:
                    output = nn.functional.mse_loss(output, target)
                torch.autograd.backward(output, gradient)
                gradient = ins[place].grad

    return lambda: engine.train_batch(task, batches), by_hand


PIPES: dict[str, Callable[[Work], Contender]] = {
    "torch-1f1b": lambda work: torchs(work, "Schedule1F1B"),
    "torch-gpipe": lambda work: torchs(work, "ScheduleGPipe"),
    "deepspeed-pipe": deepspeed,
    "pipe-gpipe": lambda work: dstrain(work, "gpipe"),
    "pipe-1f1b": lambda work: dstrain(work, "1f1b"),
    "pipe-interleaved": lambda work: dstrain(work, "interleaved_1f1b"),
    "pipe-zb_h1": lambda work: dstrain(work, "zb_h1"),
    "pipe-zb_v": lambda work: dstrain(work, "zb_v"),
    "pipe-1f1b-stage2": lambda work: dstrain(work, "1f1b", stage=2),
}
