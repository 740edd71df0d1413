"""What a pipeline is fed with: the micro-batches of a step or a validation, and what becomes of the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dstrain.runtime.pipeline.messages import signature_of
from dstrain.runtime.task import Arguments, Task


class TrainingFeed:
    """weights: what is counted in each micro-batch. scale: of what is differentiated, which is a sum. totals: of the
    loss and of what is counted, where the last stage is; else zeros."""

    def __init__(self, task: Task, batches: Sequence[Any]) -> None:
        self._task, self._batches = task, list(batches)
        self.weights = [task.count(batch) for batch in batches]
        self.signatures = [signature_of(batch, training=True) for batch in batches]
        self.scale = 1.0
        self._losses: list[tuple[Tensor, float]] = []  # with their weights

    @property
    def totals(self) -> Tensor:
        """Float64, where the loss is."""
        if not self._losses:
            return torch.zeros(2, dtype=torch.float64)
        losses = torch.stack([loss for loss, _ in self._losses]).double()
        weights = torch.tensor([weight for _, weight in self._losses], dtype=torch.float64).to(losses.device)
        return torch.stack([losses @ weights, weights.sum()])

    def arguments(self, micro: int) -> Arguments:
        """Of the model's forward."""
        return self._task.arguments(self._batches[micro])

    def loss(self, output: Any, micro: int) -> Tensor:
        """What is differentiated, of the last stage's output."""
        loss, weight = self._task.loss_of(output, self._batches[micro]), self.weights[micro]
        if not weight:  # a mean over nothing is no number, and nobody's
            return loss
        self._losses.append((loss.detach(), weight))
        return loss * (weight * self.scale)

    def counts(self, micro: int) -> bool:
        """Whether there is anything to count."""
        return self.weights[micro] > 0


class ValidationFeed(TrainingFeed):
    """Without gradients. are_counted: the others are there for other ranks' sake."""

    def __init__(self, task: Task, batches: Sequence[Any], are_counted: Sequence[bool]) -> None:
        super().__init__(task, batches)
        self.signatures = [signature_of(batch, training=False) for batch in batches]
        self._are_counted = are_counted

    def loss(self, output: Any, micro: int) -> Tensor:
        if not self._are_counted[micro]:
            return self._task.loss_of(output, self._batches[micro])
        return super().loss(output, micro)
