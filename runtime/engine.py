"""The engine: data parallelism (ZeRO stage 0) around one model and its optimizer.

One step, on every rank:

    for each micro-batch:  loss = …;  engine.backward(loss, tokens, last=…)
    engine.step(lr)

[Note: gradients]
Gradients live in flat buckets, in the order in which the backward makes them (the reverse of the
parameters'). A hook on each parameter moves its gradient into the bucket as soon as autograd has it: copied
on the first micro-batch, added on later ones; `p.grad` is free again at once. In the last micro-batch's
backward a bucket that has all its gradients starts its all-reduce while the backward goes on. Buckets start
strictly in order, for collectives are matched by order, and ranks may get their gradients in different
orders. What the backwards leave out (a parameter that no loss depends on) is reduced as zero, so that ranks
that take different branches cannot wait for each other.

[Note: the mean]
The loss is the mean over all tokens of the step, of all ranks and micro-batches. So each backward runs on the
*sum* over its tokens, gradients and token counts are summed over ranks, and one division by the global count
follows, together with clipping. How samples are spread over ranks and micro-batches changes neither loss nor
gradients.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, takewhile
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dstrain.runtime.comm import Communicator, Pending
from dstrain.runtime.spec.config import OptimizerConfig
from dstrain.runtime.spec.errors import NonFiniteError

_REMEDY = "a smaller optimizer.lr, a longer schedule.warmup_steps or train.clip may help"


@dataclass(frozen=True)
class EngineConfig:
    """The engine's share of a job. bucket_elements: of one all-reduce. clip: largest global norm, or None."""

    optimizer: OptimizerConfig
    bucket_elements: int
    clip: float | None


class StepResult(NamedTuple):
    """What one step gives, the same on every rank. grad_norm: before clipping. tokens: of all ranks."""

    loss: float
    grad_norm: float
    tokens: int


class GradientBucket:
    """One flat buffer of gradients, with a view of it for each parameter. [Note: gradients]"""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        first, sizes = parameters[0], [parameter.numel() for parameter in parameters]
        self.parameters = parameters
        self.flat = torch.zeros(sum(sizes), dtype=first.dtype, device=first.device)
        pieces = zip(parameters, torch.split(self.flat, sizes), strict=True)
        self.views = {parameter: piece.view_as(parameter) for parameter, piece in pieces}
        self._absent_in_step = set(parameters)
        self._absent_in_backward = set(parameters)

    def add(self, parameter: nn.Parameter) -> None:
        """Move the parameter's gradient here: the first of a step is copied, later ones are added."""
        assert parameter.grad is not None
        if parameter in self._absent_in_step:
            self.views[parameter].copy_(parameter.grad)
            self._absent_in_step.remove(parameter)
        else:
            self.views[parameter].add_(parameter.grad)
        self._absent_in_backward.discard(parameter)
        parameter.grad = None

    @property
    def is_complete(self) -> bool:
        """Whether this backward has made all its gradients."""
        return not self._absent_in_backward

    def zero_absent(self) -> None:
        """Zero the gradients that no backward of this step has made."""
        for parameter in self._absent_in_step:
            self.views[parameter].zero_()

    def begin_backward(self) -> None:
        """Expect every gradient once."""
        self._absent_in_backward = set(self.parameters)

    def begin_step(self) -> None:
        """Forget the gradients: the next ones are copied."""
        self._absent_in_step = set(self.parameters)


class DataParallelEngine:
    """Trains `model` alike on every rank.

    On construction, rank 0's parameters and buffers are broadcast: one collective for each bucket and
    buffer. A step all-reduces each bucket and one pair of numbers, once, whatever the number of
    micro-batches.

    global_step: steps done.
    """

    def __init__(self, model: nn.Module, comm: Communicator, config: EngineConfig) -> None:
        self.model = model
        self.global_step = 0
        self._comm, self._clip = comm, config.clip
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._names = {parameter: name for name, parameter in trained.items()}
        self._buckets = [
            GradientBucket(group) for group in _grouped(reversed(trained.values()), config.bucket_elements)
        ]
        self._bucket_of = {p: bucket for bucket in self._buckets for p in bucket.parameters}
        self._broadcast_state()
        self._optimizer = _adamw(trained.values(), config.optimizer)
        self._pending: list[Pending] = []  # of the first len(_pending) buckets
        self._is_last_backward = False
        self._totals = torch.zeros(2, dtype=torch.float64, device=comm.device)  # sum of the loss, tokens
        for parameter in trained.values():
            parameter.register_post_accumulate_grad_hook(self._on_gradient)  # type: ignore[no-untyped-call] # torch's

    def backward(self, loss: Tensor, tokens: int, *, last: bool) -> None:
        """Add the gradients of one micro-batch, whose mean over `tokens` tokens is `loss`, a scalar.

        last: no other micro-batch follows in this step: its gradients are all-reduced while they are made.
        """
        self._totals += torch.stack([loss.detach().double() * tokens, loss.new_tensor(tokens).double()])
        self._is_last_backward = last
        for bucket in self._buckets:
            bucket.begin_backward()
        (loss * tokens).backward()  # type: ignore[no-untyped-call] # torch's
        if last:
            for bucket in self._buckets:
                bucket.zero_absent()
            self._launch(self._buckets[len(self._pending) :])

    def step(self, lr: float) -> StepResult:
        """Update the parameters with the learning rate `lr`, from the gradients of all ranks.

        Raises NonFiniteError, on all ranks at the same step and before any parameter changes, when the loss
        or the gradient is not finite.
        """
        assert self._is_last_backward, "step() follows a backward(…, last=True)"
        self._comm.all_reduce(self._totals)
        for pending in self._pending:
            pending.wait()
        norms = [torch.linalg.vector_norm(bucket.flat).double() for bucket in self._buckets]
        norm_of_sum = torch.linalg.vector_norm(torch.stack(norms))
        loss_sum, tokens, norm = torch.stack([*self._totals, norm_of_sum]).tolist()
        result = StepResult(loss_sum / tokens, norm / tokens, int(tokens))
        self._check_finite(result)
        self._update(lr, scale=self._clip_factor(result.grad_norm) / tokens)
        self._begin_step()
        return result

    def _on_gradient(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        self._bucket_of[parameter].add(parameter)
        if self._is_last_backward:
            waiting = self._buckets[len(self._pending) :]
            self._launch(takewhile(lambda bucket: bucket.is_complete, waiting))

    def _launch(self, buckets: Iterable[GradientBucket]) -> None:
        self._pending += [self._comm.start_all_reduce(bucket.flat) for bucket in buckets]

    def _clip_factor(self, norm: float) -> float:
        """The factor of torch's clip_grad_norm_."""
        return 1.0 if self._clip is None else min(1.0, self._clip / (norm + 1e-6))

    def _check_finite(self, result: StepResult) -> None:
        step = self.global_step + 1
        if not math.isfinite(result.loss):
            raise NonFiniteError(f"step {step}: expected a finite loss, found {result.loss}; {_REMEDY}")
        if not math.isfinite(result.grad_norm):
            views = ((p, view) for bucket in self._buckets for p, view in bucket.views.items())
            names = [self._names[p] for p, view in views if not view.isfinite().all()]
            where = f" (in {names[0]}, {len(names)} parameters in all)" if names else " (its square overflows)"
            raise NonFiniteError(
                f"step {step}: expected a finite gradient, found norm {result.grad_norm}{where}; {_REMEDY}"
            )

    def _update(self, lr: float, scale: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        for bucket in self._buckets:
            bucket.flat.mul_(scale)
            for parameter, view in bucket.views.items():
                parameter.grad = view
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def _begin_step(self) -> None:
        self.global_step += 1
        self._is_last_backward = False
        self._pending.clear()
        self._totals.zero_()
        for bucket in self._buckets:
            bucket.begin_step()

    @torch.no_grad()
    def _broadcast_state(self) -> None:
        for bucket in self._buckets:  # through its flat buffer: one collective for many parameters
            for parameter, view in bucket.views.items():
                view.copy_(parameter)
            self._comm.broadcast(bucket.flat)
            for parameter, view in bucket.views.items():
                parameter.copy_(view)
        frozen = (parameter for parameter in self.model.parameters() if not parameter.requires_grad)
        for tensor in chain(frozen, self.model.buffers()):
            self._comm.broadcast(tensor)


def _grouped(parameters: Iterable[nn.Parameter], bucket_elements: int) -> Iterator[list[nn.Parameter]]:
    """Neighbours of one dtype, up to `bucket_elements` elements together; a larger parameter stands alone."""
    group: list[nn.Parameter] = []
    elements = 0
    for parameter in parameters:
        is_full = elements + parameter.numel() > bucket_elements
        if group and (is_full or parameter.dtype != group[0].dtype):
            yield group
            group, elements = [], 0
        group.append(parameter)
        elements += parameter.numel()
    if group:
        yield group


def _adamw(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameters,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )
