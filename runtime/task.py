"""What a loss is: of text, of (input, target) samples, or the model's own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dstrain.runtime.imports import load_object
from dstrain.runtime.models.gpt import next_token_loss
from dstrain.runtime.models.language import logits_of
from dstrain.runtime.spec.errors import UsageError

Forward = Callable[..., Any]


Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Task(ABC):
    """What a micro-batch is to a model. unit: of what is counted."""

    unit: str

    @abstractmethod
    def arguments(self, batch: Any) -> Arguments:
        """Of the model's forward, positional and by name."""

    @abstractmethod
    def loss_of(self, output: Any, batch: Any) -> Tensor:
        """The loss, a mean over what is counted, of what the model has given."""

    @abstractmethod
    def count(self, batch: Any) -> int:
        """How much is counted in a micro-batch."""

    def loss(self, forward: Forward, batch: Any) -> tuple[Tensor, int]:
        """One forward; its loss, and over how much that is the mean."""
        args, words = self.arguments(batch)
        return self.loss_of(forward(*args, **words), batch), self.count(batch)


class LanguageTask(Task):
    """Batches of tokens, (micro, length + 1) int64: each token predicts the next. In nats per token."""

    unit = "tokens"

    def arguments(self, batch: Any) -> Arguments:
        return (batch[:, :-1],), {}

    def loss_of(self, output: Any, batch: Any) -> Tensor:
        return next_token_loss(logits_of(output), batch)

    def count(self, batch: Any) -> int:
        return int(batch[:, 1:].numel())


class SampleTask(Task):
    """Batches of (input, …, target), or of names: the loss is `train.loss`'s, or what the model returns."""

    unit = "samples"

    def __init__(self, loss: str | None) -> None:
        self._loss: Callable[..., Tensor] | None = load_object(loss, "train.loss") if loss else None

    def arguments(self, batch: Any) -> Arguments:
        if self._loss is None:
            return ((), dict(batch)) if isinstance(batch, Mapping) else (_parts(batch), {})
        *inputs, _ = _parts(batch)
        return tuple(inputs), {}

    def loss_of(self, output: Any, batch: Any) -> Tensor:
        if self._loss is None:
            return _own_loss(output)
        loss = self._loss(output, _parts(batch)[-1])
        if not isinstance(loss, Tensor) or loss.dim():
            found = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise UsageError.mismatch("train.loss", "a scalar tensor, the mean over the samples", found)
        return loss

    def count(self, batch: Any) -> int:
        return _samples(batch) if self._loss is None else len(_parts(batch)[-1])


def task_of(batch: Any, loss: str | None) -> Task:
    """The task that a batch of this shape asks for. Raises UsageError for a loss that cannot be imported."""
    is_text = loss is None and isinstance(batch, Tensor) and not batch.is_floating_point() and batch.dim() == 2
    return LanguageTask() if is_text else SampleTask(loss)


def _parts(batch: Any) -> tuple[Any, ...]:
    return tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)


def _samples(batch: Any) -> int:
    first = next(iter(batch.values())) if isinstance(batch, Mapping) else _parts(batch)[0]
    return len(first)


def _own_loss(output: Any) -> Tensor:
    """The loss in what a model has returned: itself, `output["loss"]`, or transformers' `output.loss`."""
    loss = output["loss"] if isinstance(output, Mapping) and "loss" in output else output
    if isinstance(loss, Tensor) and loss.dim() == 0:
        return loss
    shape = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(output).__name__
    raise UsageError.mismatch(
        "train.loss", "a function of (output, target), or a model that returns its loss", shape, "give train.loss"
    )
