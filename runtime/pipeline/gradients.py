"""The gradients of a rank's stages, and those of parameters that several stages have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from dstrain.runtime.comm import Communicator
from dstrain.runtime.comm_group import CommGroup
from dstrain.runtime.gradients import GradientReducer
from dstrain.runtime.tracing.recorder import Recorder


class StagedGradients:
    """Each stage has a reducer of its own, whose backwards come when the schedule says so.

    A tied parameter is alone in its bucket. Behind all micro-batches the sums of the stages that have it are added
    up, over the ranks with the same place in each stage, and counted in the norm by the first of them.
    """

    def __init__(
        self, of_stage: Mapping[int, GradientReducer], tied: Sequence[tuple[nn.Parameter, GradientReducer, CommGroup]]
    ) -> None:
        self.of_stage, self._tied = dict(of_stage), list(tied)

    def record(self, trace: Recorder) -> None:
        """Of each stage: see GradientReducer."""
        for reducer in self.of_stage.values():
            reducer.record(trace)

    def wait(self) -> None:
        """Until all gradients are sums over all ranks."""
        for reducer in self.of_stage.values():
            reducer.wait()
        for parameter, reducer, stages in self._tied:
            stages.start_all_reduce(reducer.sum_of(parameter)).wait()
            reducer.changed(parameter)

    def squares(self) -> Tensor:
        """The sum of squares of what this rank has, float64, one number."""
        squares = [reducer.squares() for reducer in self.of_stage.values()]
        return torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64)

    def scale(self, factor: float) -> None:
        """Multiply all gradients."""
        for reducer in self.of_stage.values():
            reducer.scale(factor)

    def of_parameters(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Stage 0: each parameter with its gradient."""
        for reducer in self.of_stage.values():
            yield from reducer.of_parameters()

    def agree(self, comm: Communicator) -> None:
        """Of each stage: see GradientReducer."""
        for reducer in self.of_stage.values():
            reducer.agree(comm)

    def sample_is_finite(self) -> bool:
        """Whether this rank's own gradients of the step look finite."""
        return all(reducer.sample_is_finite() for reducer in self.of_stage.values())

    def begin_step(self) -> None:
        """Forget the gradients."""
        for reducer in self.of_stage.values():
            reducer.begin_step()
