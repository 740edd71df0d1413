"""One rank's place in a pipeline: its stages, its neighbours, and the ranks with the same stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from dstrain.runtime.comm import Communicator
from dstrain.runtime.models.language import logits_of
from dstrain.runtime.pipeline.action_trace import ActionTrace
from dstrain.runtime.pipeline.arrivals import arrivals
from dstrain.runtime.pipeline.cuts import chain_of
from dstrain.runtime.pipeline.executor import Boundary, Executor, Feed
from dstrain.runtime.pipeline.gradients import StagedGradients
from dstrain.runtime.pipeline.messages import Mailbox, signature_of
from dstrain.runtime.pipeline.part import ModelPart
from dstrain.runtime.pipeline.partition import bounds
from dstrain.runtime.spec.parallel_dims import ParallelDims
from dstrain.runtime.spec.schedule import Action, Kind, Schedule
from dstrain.runtime.task import Arguments
from dstrain.runtime.tracing.recorder import Recorder


class Pipeline:
    """part: what this rank has of the model. data: the ranks that have the same. column: those that have one copy of
    the model, part by part."""

    def __init__(
        self,
        model: nn.Module,
        comm: Communicator,
        dims: ParallelDims,
        schedule: Schedule,
        counts: Sequence[int],
        seconds: Sequence[float] = (),
    ) -> None:
        """counts: layers of each stage. seconds: of each layer, where they were measured. Takes the model apart; all
        ranks call it."""
        self.dims, self.schedule, self.counts, self._seconds = dims, schedule, list(counts), list(seconds)
        self.place = dims.pipeline_rank(comm.rank)
        self.part = ModelPart(model, chain_of(model), bounds(counts), schedule, self.place)
        self.data = comm.part([dims.data_ranks(place) for place in range(dims.pipeline)])
        columns = [dims.pipeline_ranks(place) for place in range(dims.data)]
        self.column = comm.part(columns)
        self.last = schedule.rank_of[-1]
        self._comm, self._columns = comm, columns
        self._boundaries = [self._boundary(stage) for stage in range(schedule.stages - 1)]
        self._executor: Executor | None = None
        self._arrivals = arrivals(schedule.ranks, schedule.rank_of, self.place)

    def describe(self) -> str:
        """One line for people."""
        of_stages = " + ".join(map(str, self.counts))
        times = ""
        if self._seconds:
            stages = [sum(self._seconds[place] for place in places) for places in bounds(self.counts)]
            times = f", by {' + '.join(f'{1000 * taken:.1f}' for taken in stages)} ms"
        return (
            f"pipeline: {self.dims}, {self.schedule.name}, {self.schedule.micro_batches} micro-batches, "
            f"{of_stages} layers{times}"
        )

    def attach(
        self,
        forward: Callable[..., Any],
        in_backward: Callable[[], AbstractContextManager[None]],
        gradients: StagedGradients,
        trace: Recorder,
    ) -> None:
        """What runs the model, and takes its gradients."""
        actions = ActionTrace(trace, self.schedule, self.place, self.column.job_ranks)
        self._executor = Executor(self.part, self._boundaries, forward, in_backward, gradients.of_stage, actions)

    def train(self, feed: Feed) -> None:
        """Forwards and backwards of all micro-batches of a step."""
        assert self._executor is not None
        self._executor.run(self.schedule.ranks[self.place], feed, self._arrivals)

    @torch.no_grad()
    def forward(self, feed: Feed) -> None:
        """Forwards alone, of as many micro-batches as there are."""
        assert self._executor is not None
        self._executor.run(forwards(self.schedule, self.place, len(feed.signatures)), feed)

    def everywhere(self, arguments: Arguments) -> Tensor:
        """What the model gives, on all ranks of the column."""
        found = _Output(arguments)
        self.forward(found)
        own = None if found.output is None else found.output.float()
        form = self.column.broadcast_object(None if own is None else own.shape, self.last)
        assert form is not None
        output = torch.empty(form, device=self._comm.device) if own is None else own
        self.column.broadcast(output, self.last)
        return output

    def _boundary(self, stage: int) -> Boundary | None:
        """Behind a stage; every rank makes the connections of all."""
        before, after = self.schedule.rank_of[stage : stage + 2]
        words = f"between stages {stage} and {stage + 1}"
        there = back = None
        if before != after:
            pairs = [(column[before], column[after]) for column in self._columns]
            there, back = self._comm.edge(pairs), self._comm.edge([(to, source) for source, to in pairs])
        if self.place not in (before, after):
            return None
        device = self._comm.device
        return Boundary(Mailbox(there, device, words), Mailbox(back, device, f"gradients {words}"))


class _Output:
    """Of one micro-batch, where the last stage is."""

    def __init__(self, arguments: Arguments) -> None:
        self._arguments = arguments
        self.output: Tensor | None = None
        self.signatures = [signature_of(arguments, training=False)]

    def arguments(self, _: int) -> Arguments:
        return self._arguments

    def loss(self, output: Any, _: int) -> Tensor:
        self.output = logits = logits_of(output)
        return logits

    def counts(self, _: int) -> bool:
        return False


def forwards(schedule: Schedule, rank: int, micro_batches: int) -> list[Action]:
    """A rank's row of forwards: of as many micro-batches as there are ranks, stage by stage, and so on."""
    own = [stage for stage, owner in enumerate(schedule.rank_of) if owner == rank]
    ranks = max(schedule.rank_of) + 1
    return [
        Action(Kind.FORWARD, stage, micro)
        for first in range(0, micro_batches, ranks)
        for stage in own
        for micro in range(first, min(first + ranks, micro_batches))
    ]
