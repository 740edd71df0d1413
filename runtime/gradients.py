"""Gradients in flat buckets, reduced while the backward goes on.

[Note: gradients]
Gradients live in flat buckets, in the order in which the backward makes them (the reverse of the
parameters'). A hook on each parameter moves its gradient into the bucket as soon as autograd has it: copied
on the first micro-batch, added on later ones; `p.grad` is free again at once. In the last micro-batch's
backward a bucket that has all its gradients starts its all-reduce while the backward goes on. Buckets start
strictly in order, for collectives are matched by order, and ranks may get their gradients in different
orders. What the backwards leave out (a parameter that no loss depends on) is reduced as zero, so that ranks
that take different branches cannot wait for each other.

[Note: memory]
A collective under way holds a few small objects until the step's end. Had they the memory of a gradient just freed
to choose from, they would split it, and malloc would have to grow for the next large gradient, bucket after bucket.
So gradients are freed behind the launch; and fewer, larger buckets leave fewer such objects.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile

import torch
from torch import Tensor, nn

from dstrain.runtime.comm import Communicator, Pending

_NORM_ELEMENTS = 1 << 18
"""torch adds squares in fp32 on the CPU: the norm of 30 Mi numbers is wrong by 2e-3, of 256 Ki by 2e-6."""


class GradientBucket:
    """One flat buffer of gradients, with a view of it for each parameter. [Note: gradients]"""

    def __init__(self, parameters: list[nn.Parameter], dtype: torch.dtype | None = None) -> None:
        """dtype: of the sums; by default the parameters'."""
        first, sizes = parameters[0], [parameter.numel() for parameter in parameters]
        self.parameters = parameters
        self.flat = torch.zeros(sum(sizes), dtype=dtype or first.dtype, device=first.device)
        pieces = zip(parameters, torch.split(self.flat, sizes), strict=True)
        self.views = {parameter: piece.view_as(parameter) for parameter, piece in pieces}
        self._absent_in_step = set(parameters)
        self._absent_in_backward = set(parameters)

    def add(self, parameter: nn.Parameter) -> None:
        """Take in the parameter's gradient: the first of a step is copied, later ones are added."""
        assert parameter.grad is not None
        if parameter in self._absent_in_step:
            self.views[parameter].copy_(parameter.grad)
            self._absent_in_step.remove(parameter)
        else:
            self.views[parameter].add_(parameter.grad)
        self._absent_in_backward.discard(parameter)

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


class GradientReducer:
    """The gradients of all trained parameters, summed over micro-batches and ranks. [Note: gradients]"""

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        comm: Communicator,
        bucket_elements: int,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._comm = comm
        self.buckets = [GradientBucket(group, dtype) for group in grouped(reversed(parameters), bucket_elements)]
        self._bucket_of = {p: bucket for bucket in self.buckets for p in bucket.parameters}
        self._pending: list[Pending] = []  # of the first len(_pending) buckets
        self._is_last_backward = self._in_backward = False
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._on_gradient)  # type: ignore[no-untyped-call] # torch's

    def begin_backward(self, last: bool) -> None:
        """Before each backward; last: no other follows in this step."""
        self._is_last_backward, self._in_backward = last, True
        for bucket in self.buckets:
            bucket.begin_backward()
            for parameter in bucket.parameters:
                parameter.grad = None  # of somebody else's backward

    def end_backward(self) -> None:
        """Behind each backward: what the last one has left out is reduced too."""
        self._in_backward = False
        if self._is_last_backward:
            for bucket in self.buckets:
                bucket.zero_absent()
            self._launch(self.buckets[len(self._pending) :])

    def wait(self) -> None:
        """Until all gradients are sums over all ranks."""
        for pending in self._pending:
            pending.wait()

    def norm(self) -> Tensor:
        """Their global L2 norm, float64, one number."""
        norms = [
            torch.linalg.vector_norm(piece, dtype=_norm_dtype(piece))
            for bucket in self.buckets
            for piece in bucket.flat.split(_NORM_ELEMENTS)  # type: ignore[no-untyped-call] # torch's
        ]
        if not norms:
            return torch.zeros((), dtype=torch.float64, device=self._comm.device)
        total: Tensor = torch.linalg.vector_norm(torch.stack(norms).double())
        return total

    def scale(self, factor: float) -> None:
        """Multiply all gradients."""
        for bucket in self.buckets:
            bucket.flat.mul_(factor)

    def views(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each parameter with its gradient."""
        for bucket in self.buckets:
            yield from bucket.views.items()

    def begin_step(self) -> None:
        """Forget the gradients."""
        self._is_last_backward = False
        self._pending.clear()
        for bucket in self.buckets:
            bucket.begin_step()

    def _on_gradient(self, parameter: Tensor) -> None:
        if not self._in_backward:
            return
        assert isinstance(parameter, nn.Parameter)
        self._bucket_of[parameter].add(parameter)
        if self._is_last_backward:
            waiting = self.buckets[len(self._pending) :]
            self._launch(takewhile(lambda bucket: bucket.is_complete, waiting))
        parameter.grad = None  # behind the launch: [Note: memory]

    def _launch(self, buckets: Iterable[GradientBucket]) -> None:
        self._pending += [self._comm.start_all_reduce(bucket.flat) for bucket in buckets]


def _norm_dtype(gradients: Tensor) -> torch.dtype | None:
    return torch.float32 if gradients.dtype in (torch.bfloat16, torch.float16) else None


def grouped(parameters: Iterable[nn.Parameter], bucket_elements: int) -> Iterator[list[nn.Parameter]]:
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
