"""Runs a schedule: each rank goes through its row of actions, and waits only for what an action needs.

[Note: beside]
Receives are posted AHEAD of the action that needs them; sends go on while the next action computes, and what was sent
is let go once the neighbour has shown that it has it (`arrivals.py`). Of an output that has been sent nothing else is
kept: the backward begins at its place in the graph (`GradientEdge`). A stage's gradients are reduced
in its last backward, beside the other stages' actions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from dstrain.runtime.gradients import GradientReducer
from dstrain.runtime.pipeline.action_trace import ActionTrace
from dstrain.runtime.pipeline.arrivals import Message
from dstrain.runtime.pipeline.messages import Mailbox, Signature
from dstrain.runtime.pipeline.part import ModelPart, tensors_of
from dstrain.runtime.pipeline.split_backward import Splitter, WeightGradients
from dstrain.runtime.spec.schedule import Action, Kind, endings
from dstrain.runtime.task import Arguments

AHEAD = 2
"""Receives that are posted before their turn: one hides the latency, the second a late sender."""


class Feed(Protocol):
    """The micro-batches of a step."""

    @property
    def signatures(self) -> Sequence[Signature]:
        """Of each."""

    def arguments(self, micro: int) -> Arguments:
        """Of the model's forward."""

    def loss(self, output: Any, micro: int) -> Tensor:
        """What is differentiated, of the last stage's output."""

    def counts(self, micro: int) -> bool:
        """Whether the gradients of a micro-batch count."""


class _Held(NamedTuple):
    """Between a stage's forward and its backward. ends: where the backward begins, None: it needs no gradient. seed:
    the gradient of the loss, in the last stage."""

    inputs: tuple[Tensor, ...]
    ends: tuple[Tensor | GradientEdge | None, ...]
    seed: Tensor | None = None


class Boundary(NamedTuple):
    """Between a stage and the next."""

    activations: Mailbox
    gradients: Mailbox


class Executor:
    """One rank's part in a schedule."""

    def __init__(
        self,
        part: ModelPart,
        boundaries: Sequence[Boundary | None],
        forward: Callable[..., Any],
        in_backward: Callable[[], AbstractContextManager[None]],
        reducers: dict[int, GradientReducer],
        trace: ActionTrace,
    ) -> None:
        """boundaries: behind each stage but the last; None where neither side is this rank's. forward: the model's.
        in_backward: around each backward."""
        self._part, self._boundaries, self._forward = part, list(boundaries), forward
        self._in_backward, self._reducers, self._trace = in_backward, reducers, trace
        self._last = len(part.layers) - 1
        self._parameters = {stage: part.parameters_of(stage) for stage in part.own}
        self._owner: dict[Tensor, int] = {
            parameter: part.stage_of(name) for name, parameter in part.model.named_parameters()
        }
        self._foreign = {stage: [p for p in self._parameters[stage] if self._owner[p] != stage] for stage in part.own}
        self._splitter = Splitter(part.model)
        self._held: dict[tuple[int, int], _Held] = {}
        self._left: dict[tuple[int, int], WeightGradients] = {}
        self._do: dict[Kind, Callable[[Action], None]] = {
            Kind.FORWARD: self._run_forward,
            Kind.BACKWARD: self._run_backward,
            Kind.INPUT_GRADIENT: self._run_input_gradient,
            Kind.WEIGHT_GRADIENT: self._run_weight_gradient,
        }
        self._feed: Feed
        self._split: set[tuple[int, int]] = set()  # stages and micro-batches whose backward is in two
        self._endings: set[Action] = set()  # a stage's last action of gradients, which ends its sums

    def run(
        self, row: Sequence[Action], feed: Feed, arrivals: Mapping[Action, Sequence[Message]] = MappingProxyType({})
    ) -> None:
        """All actions of a step, or the forwards of a validation; returns when all that was sent has gone.

        arrivals: what of it is known to have gone behind an action."""
        self._feed = feed
        self._split = {action[1:] for action in row if action.kind is Kind.INPUT_GRADIENT}
        self._endings = set(endings(row).values())
        receiving = [action for action in row if self._source(action) is not None]
        done, posted = 0, -1
        for action in row:
            if done != posted:
                self._post(receiving[done : done + 1 + AHEAD])
                posted = done
            if done < len(receiving) and receiving[done] is action:
                done += 1
            if self._trace.is_on:
                with self._trace.action(action):
                    self._do[action.kind](action)
            else:
                self._do[action.kind](action)
            for message in arrivals.get(action, ()):
                boundary = self._boundary(message.boundary)
                (boundary.activations if message.is_output else boundary.gradients).gone(message.micro_batch)
        assert not self._held, "the schedule has been checked"
        assert not self._left, "the schedule has been checked"
        with self._trace.finishing():
            for between in self._boundaries:
                if between is not None:
                    between.activations.finish()
                    between.gradients.finish()

    # --- actions -----------------------------------------------------------------------------------------------

    def _run_forward(self, action: Action) -> None:
        stage, micro = action.stage, action.micro_batch
        mailbox, training = self._source(action), torch.is_grad_enabled()
        received = [] if mailbox is None else self._take(mailbox, action)
        inputs = tuple(tensor for tensor in received if tensor is not None)
        with self._splitter.forward((stage, micro) in self._split):
            output = self._part.run(self._forward, stage, inputs, self._feed.arguments(micro))
        if stage == self._last:
            outputs: tuple[Tensor, ...] = (self._feed.loss(output, micro),)
        else:
            outputs = tensors_of(output, f"stage {stage}")
            self._send(self._boundary(stage).activations, action, outputs)
        if training:
            lives = stage == self._last or self._boundary(stage).activations.is_local
            ends = tuple(_end_of(tensor, lives) if tensor.requires_grad else None for tensor in outputs)
            seed = torch.ones_like(outputs[0]) if stage == self._last else None
            self._held[stage, micro] = _Held(inputs, ends, seed)

    def _run_backward(self, action: Action) -> None:
        reducer = self._reducers[action.stage]
        reducer.begin_backward(action in self._endings, counts=self._feed.counts(action.micro_batch))
        with self._splitter.backward(reducer):
            inputs = self._differentiate(action)
        reducer.end_backward()
        self._keep_early(action)
        self._send_back(action, inputs)

    def _run_input_gradient(self, action: Action) -> None:
        with self._splitter.input_gradients(self._parameters[action.stage]) as left:
            inputs = self._differentiate(action)
        self._left[action.stage, action.micro_batch] = left
        self._send_back(action, inputs)

    def _run_weight_gradient(self, action: Action) -> None:
        left, reducer = self._left.pop((action.stage, action.micro_batch)), self._reducers[action.stage]
        reducer.begin_backward(action in self._endings, counts=self._feed.counts(action.micro_batch))
        with torch.no_grad():
            for parameter, lazy in left.compute(self._parameters[action.stage]):
                if self._owner[parameter] == action.stage:
                    reducer.take(parameter, lazy)
                elif lazy is not None:
                    parameter.grad = lazy.whole()
        reducer.end_backward()
        self._keep_early(action)

    def _differentiate(self, action: Action) -> tuple[Tensor, ...]:
        """The backward of a stage, as far as its inputs, which it returns with their gradients."""
        stage, micro = action.stage, action.micro_batch
        held, mailbox = self._held.pop((stage, micro)), self._source(action)
        grads = [held.seed] if mailbox is None else self._take(mailbox, action)
        ends: list[tuple[Any, Tensor]] = [
            (end, grad) for end, grad in zip(held.ends, grads, strict=True) if end is not None and grad is not None
        ]
        if ends:
            with self._in_backward():
                torch.autograd.backward([end for end, _ in ends], [grad for _, grad in ends])
        return held.inputs

    def _send_back(self, action: Action, inputs: tuple[Tensor, ...]) -> None:
        if action.stage:
            gradients = [tensor.grad if tensor.requires_grad else None for tensor in inputs]
            self._send(self._boundary(action.stage - 1).gradients, action, gradients)

    # --- messages ----------------------------------------------------------------------------------------------

    def _source(self, action: Action) -> Mailbox | None:
        """Where what an action needs comes from."""
        if action.kind is Kind.FORWARD:
            return self._boundary(action.stage - 1).activations if action.stage else None
        if action.kind in (Kind.BACKWARD, Kind.INPUT_GRADIENT):
            return self._boundary(action.stage).gradients if action.stage < self._last else None
        return None

    def _take(self, mailbox: Mailbox, action: Action) -> list[Tensor | None]:
        micro, signature = action.micro_batch, self._feed.signatures[action.micro_batch]
        if not self._trace.is_on:
            return mailbox.take(micro, signature)
        with self._trace.waiting(action):
            return mailbox.take(micro, signature)

    def _send(self, mailbox: Mailbox, action: Action, tensors: Sequence[Tensor | None]) -> None:
        micro, signature = action.micro_batch, self._feed.signatures[action.micro_batch]
        if not self._trace.is_on:
            mailbox.send(micro, signature, tensors)
            return
        with self._trace.sending(action):
            mailbox.send(micro, signature, tensors)

    def _post(self, actions: Sequence[Action]) -> None:
        """Receives come in the order of the messages: none behind one whose shapes are not known yet."""
        unknown: set[Mailbox] = set()
        for action in actions:
            mailbox = self._source(action)
            if mailbox is None or mailbox.is_local or mailbox in unknown:
                continue
            if not mailbox.post(action.micro_batch, self._feed.signatures[action.micro_batch]):
                unknown.add(mailbox)

    def _boundary(self, stage: int) -> Boundary:
        boundary = self._boundaries[stage]
        assert boundary is not None
        return boundary

    # --- a parameter that two stages of this rank have ---------------------------------------------------------

    def _keep_early(self, action: Action) -> None:
        """What a stage's backward has made of another one's parameter waits for that one's."""
        counts = self._feed.counts(action.micro_batch)
        for parameter in self._foreign[action.stage]:
            if parameter.grad is not None and counts:
                self._reducers[self._owner[parameter]].come_early(parameter)
            parameter.grad = None


def _end_of(tensor: Tensor, lives: bool) -> Tensor | GradientEdge:
    """Where a backward begins. lives: the tensor's memory is another's too until then; else it is not kept for this."""
    return tensor if lives else get_gradient_edge(tensor)
