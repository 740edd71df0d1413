"""Gradients in flat buckets, reduced while the backward goes on.

[Note: gradients]
Gradients live in flat buckets, in the order in which the backward makes them (the reverse of the
parameters'). A hook on each parameter moves its gradient into the bucket as soon as autograd has it: copied
on the first micro-batch, added on later ones; `p.grad` is free again at once. In the last micro-batch's
backward a bucket that has all its gradients starts its reduction while the backward goes on. Buckets start
strictly in one order, for collectives are matched by order, and ranks may get their gradients in different
orders: in that of the first step on rank 0, so that a parameter that nothing uses holds nobody up. What the
backwards leave out (a parameter that no loss depends on) is reduced as zero, so that ranks that take different
branches cannot wait for each other.

[Note: whose gradient]
A sum that is not finite does not tell whose part was not. So each rank keeps a few of its own numbers of every
bucket, some of every parameter, before they become sums.

[Note: memory]
A collective under way holds a few small objects until the step's end. Had they the memory of a gradient just freed
to choose from, they would split it, and malloc would have to grow for the next large gradient, bucket after bucket.
So gradients are freed behind the launch; and fewer, larger buckets leave fewer such objects. A single rank has
nothing to reduce: its gradients stay where autograd put them. In a pipeline, where several micro-batches' activations
come and go between one gradient's parts, such a rank has buckets too: sums that stay where they are for the whole job
leave malloc no holes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile
from typing import NoReturn, cast

import torch
from torch import Tensor, nn

from dstrain.runtime.comm import Communicator
from dstrain.runtime.comm_group import CommGroup, Pending
from dstrain.runtime.lazy_gradients import LazyGradient
from dstrain.runtime.spec.errors import UsageError
from dstrain.runtime.tracing.recorder import Recorder
from dstrain.runtime.zero.plan import UnitPlan

_SAMPLED = 1024
"""Of each bucket. [Note: whose gradient]"""

_NORM_ELEMENTS = 1 << 18
"""torch adds squares in fp32 on the CPU: the norm of 30 Mi numbers is wrong by 2e-3, of 256 Ki by 2e-6."""


class GradientBucket:
    """One flat buffer of gradients, with a view of it for each parameter. [Note: gradients]

    flat: while it is open. dtype: of the sums.
    """

    def __init__(self, plan: UnitPlan, parameters: Sequence[nn.Parameter], dtype: torch.dtype) -> None:
        self.plan, self.parameters, self.dtype = plan, list(parameters), dtype
        self.flat: Tensor | None = None
        self.views: dict[nn.Parameter, Tensor] = {}
        self._absent = set(parameters)  # no gradient since the bucket was filled anew
        self._absent_in_backward = set(parameters)
        self._places: Tensor | None = None
        self._found = self._sampled = torch.empty(0)

    def open(self, flat: Tensor) -> None:
        """Take `flat`, of plan.size elements, for the gradients; what is no parameter's is zeroed."""
        self.flat = flat
        self.views = {
            parameter: flat[entry.start : entry.stop].view(entry.shape)
            for entry, parameter in zip(self.plan.entries, self.parameters, strict=True)
        }
        for start, stop in self.plan.gaps():
            flat[start:stop].zero_()

    def close(self) -> Tensor:
        """Give the buffer back."""
        flat, self.flat, self.views = self.flat, None, {}
        assert flat is not None
        return flat

    def add(self, parameter: nn.Parameter, lazy: LazyGradient | None = None) -> None:
        """Take in the parameter's gradient: the first is written, later ones are added. lazy: in its place."""
        view, gradient, is_first = self.views[parameter], parameter.grad, parameter in self._absent
        if lazy is not None:
            lazy.write_to(view) if is_first else lazy.add_to(view)
        else:
            assert gradient is not None
            view.copy_(gradient) if is_first else view.add_(gradient)
        if is_first:
            self._absent.remove(parameter)
        self.skip(parameter)

    def skip(self, parameter: nn.Parameter) -> None:
        """The parameter's gradient has come, and counts for nothing."""
        self._absent_in_backward.discard(parameter)

    @property
    def is_complete(self) -> bool:
        """Whether this backward has made all its gradients."""
        return not self._absent_in_backward

    def zero_absent(self) -> None:
        """Zero the gradients that no backward has made."""
        for parameter in self._absent:
            self.views[parameter].zero_()

    def sample(self) -> None:
        """Keep some of the numbers, added to those that were kept before. [Note: whose gradient]"""
        assert self.flat is not None
        if self._places is None:
            counts = [max(1, entry.numel * _SAMPLED // max(1, self.plan.size)) for entry in self.plan.entries]
            even = [
                torch.linspace(entry.start, entry.stop - 1, min(count, entry.numel)).long()
                for entry, count in zip(self.plan.entries, counts, strict=True)
            ]
            self._places = torch.cat(even).clamp_(0, self.plan.size - 1).to(self.flat.device)
            self._sampled = torch.zeros_like(self._places, dtype=self.dtype)
            self._found = torch.zeros_like(self._sampled)
        self._sampled.add_(torch.index_select(self.flat, 0, self._places, out=self._found))

    def forget_sample(self) -> None:
        """Another step begins."""
        self._sampled.zero_()

    def is_sample_finite(self) -> bool:
        """Whether what was kept of this rank's own numbers is finite."""
        return bool(self._sampled.isfinite().all())

    def begin_backward(self) -> None:
        """Expect every gradient once."""
        self._absent_in_backward = set(self.parameters)

    def begin_filling(self) -> None:
        """Forget the gradients: the next ones are copied."""
        self._absent = set(self.parameters)


class GradientReducer(ABC):
    """The gradients of all trained parameters, summed over micro-batches and ranks. [Note: gradients]

    Subclasses say where a bucket's buffer comes from, what its reduction is, and what comes out. uncounted: parameters
    that another pipeline stage has too, and counts in the norm; each is alone in its bucket.
    """

    def __init__(self, buckets: Sequence[GradientBucket]) -> None:
        self.buckets = list(buckets)
        self._bucket_of = {p: bucket for bucket in self.buckets for p in bucket.parameters}
        self._in_order = list(range(len(self.buckets)))
        self._launched = 0  # of the buckets, in this backward
        self._completed: list[int] = []  # in this backward, by their numbers
        self._number_of = {id(bucket): number for number, bucket in enumerate(self.buckets)}
        self._reduces = self._in_backward = self._counts = False
        self.uncounted: set[nn.Parameter] = set()
        self.trace = Recorder()
        self._early: dict[nn.Parameter, Tensor] = {}
        for parameter in self._bucket_of:
            parameter.register_post_accumulate_grad_hook(self._come)  # type: ignore[no-untyped-call] # torch's

    def record(self, trace: Recorder) -> None:
        """Let `trace` have the waits for other ranks within a backward."""
        self.trace = trace

    @abstractmethod
    def wait(self) -> None:
        """Until all gradients are sums over all ranks."""

    @abstractmethod
    def reduced(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """What this rank has of them, flat or not, each with the first parameter in it."""

    @abstractmethod
    def _open(self, bucket: GradientBucket) -> None:
        """Give a bucket its buffer."""

    @abstractmethod
    def _launch(self, bucket: GradientBucket) -> None:
        """Start the bucket's reduction."""

    def begin_backward(self, last: bool, counts: bool = True) -> None:
        """Before each backward; last: no other follows in this step. counts: its gradients are added up."""
        self._in_backward, self._counts, self._launched, self._completed = True, counts, 0, []
        self._reduces = self._reduces_in(last)
        for bucket in self.buckets:
            bucket.begin_backward()
            for parameter in bucket.parameters:
                parameter.grad = None  # of somebody else's backward

    def end_backward(self) -> None:
        """Behind each backward: what a reducing one has left out is reduced too."""
        self._in_backward = False
        if self._reduces:
            self._launch_all(self._waiting())

    def order(self) -> list[int]:
        """The numbers of the buckets as the last backward has made their gradients; at the end those it has not."""
        return [*self._completed, *(number for number in self._in_order if number not in self._completed)]

    def agree(self, comm: Communicator) -> None:
        """Reduce the buckets, from now on, in the order in which rank 0's last backward has made their gradients."""
        self.launch_in(comm.all_gather_object(self.order())[0])

    def of_parameters(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each parameter with its gradient, where ranks have whole ones: at stage 0."""
        return iter(())

    def launch_in(self, order: Sequence[int]) -> None:
        """Reduce the buckets in this order from now on; the same on all ranks."""
        self._in_order = list(order)

    def sample_is_finite(self) -> bool:
        """Whether this rank's own gradients of the step look finite. [Note: whose gradient]"""
        return all(bucket.is_sample_finite() for bucket in self.buckets)

    def squares(self) -> Tensor:
        """The sum of squares of what this rank has, float64, one number."""
        norms = [
            torch.linalg.vector_norm(piece, dtype=_norm_dtype(piece))
            for first, gradient in self.reduced()
            if first not in self.uncounted
            for piece in torch.split(gradient.reshape(-1), _NORM_ELEMENTS)
        ]
        if not norms:
            return torch.zeros((), dtype=torch.float64)
        return torch.stack(norms).double().square().sum()

    def scale(self, factor: float) -> None:
        """Multiply all gradients."""
        for _, gradient in self.reduced():
            gradient.mul_(factor)

    def sum_of(self, parameter: nn.Parameter) -> Tensor:
        """Of a parameter that is alone in its bucket: what this rank has of its gradient, once `wait` has returned."""
        return next(gradient for first, gradient in self.reduced() if first is parameter)

    def begin_step(self) -> None:
        """Forget the gradients."""
        self._launched = 0
        self._early.clear()
        for bucket in self.buckets:
            bucket.begin_filling()
            bucket.forget_sample()

    def _waiting(self) -> list[GradientBucket]:
        """Buckets whose reduction has not started in this backward, in order."""
        return [self.buckets[number] for number in self._in_order[self._launched :]]

    def _reduces_in(self, last: bool) -> bool:
        return last

    def take(self, parameter: Tensor, lazy: LazyGradient | None = None) -> None:
        """Within a backward, a gradient that no autograd has put into `parameter.grad`, but somebody else; or one
        that is not computed yet."""
        self._come(parameter, lazy)

    def come_early(self, parameter: nn.Parameter) -> None:
        """A part of the gradient of this reducer's next backward: `parameter.grad`, which is taken."""
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        early = self._early.get(parameter)
        self._early[parameter] = gradient if early is None else early + gradient

    def changed(self, parameter: nn.Parameter) -> None:  # noqa: B027 # most have no copy of it
        """Somebody has changed `sum_of(parameter)`."""

    def _come(self, parameter: Tensor, lazy: LazyGradient | None = None) -> None:
        if not self._in_backward or (lazy is None and parameter.grad is None):  # it came in another way
            return
        own = cast(nn.Parameter, parameter)  # torch's own check of that is slow
        if self._early and self._counts and own in self._early:
            gradient = own.grad if lazy is None else lazy.whole()
            assert gradient is not None
            own.grad, lazy = gradient + self._early.pop(own), None
        self._on_gradient(own, lazy)

    def _on_gradient(self, parameter: nn.Parameter, lazy: LazyGradient | None) -> None:
        bucket = self._bucket_of[parameter]
        if self._reduces and self._number_of[id(bucket)] in self._in_order[: self._launched]:
            self._refuse_late(bucket, parameter)
        if not self._counts:
            bucket.skip(parameter)
        else:
            if bucket.flat is None:
                self._open(bucket)
            bucket.add(parameter, lazy)
        if bucket.is_complete:
            if (number := self._number_of[id(bucket)]) not in self._completed:
                self._completed.append(number)
            if self._reduces:
                self._launch_all(takewhile(lambda other: other.is_complete, self._waiting()))
        if lazy is None:
            parameter.grad = None  # behind the launch: [Note: memory]

    def _refuse_late(self, bucket: GradientBucket, parameter: nn.Parameter) -> NoReturn:
        """[Note: gradients] Backwards within a backward make the gradients of a parameter that is used twice twice."""
        name = next(e.name for e, p in zip(bucket.plan.entries, bucket.parameters, strict=True) if p is parameter)
        fix = "call torch's checkpoint with use_reentrant=False, or train.activation_checkpointing"
        raise UsageError.mismatch(f"parameter {name}", "its gradient once in a backward", "it again", fix)

    def _launch_all(self, buckets: Iterable[GradientBucket]) -> None:
        for bucket in buckets:
            if bucket.flat is None:
                self._open(bucket)
            bucket.zero_absent()
            bucket.sample()
            self._launch(bucket)
            self._launched += 1


class ReplicatedGradients(GradientReducer):
    """Stage 0: every bucket is all-reduced, every rank has all gradients."""

    def __init__(self, buckets: Sequence[GradientBucket], ranks: CommGroup) -> None:
        super().__init__(buckets)
        self._ranks = ranks
        self._pending: list[Pending] = []
        for bucket in self.buckets:
            self._open(bucket)

    def wait(self) -> None:
        for pending in self._pending:
            pending.wait()
        self._pending.clear()

    def reduced(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        for bucket in self.buckets:
            assert bucket.flat is not None
            yield bucket.parameters[0], bucket.flat

    def of_parameters(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each parameter with its gradient."""
        for bucket in self.buckets:
            yield from bucket.views.items()

    def begin_step(self) -> None:
        self.wait()  # for those of a step that was begun and is forgotten
        super().begin_step()

    def _open(self, bucket: GradientBucket) -> None:
        device = bucket.parameters[0].device
        bucket.open(torch.zeros(bucket.plan.size, dtype=bucket.dtype, device=device))

    def _launch(self, bucket: GradientBucket) -> None:
        assert bucket.flat is not None
        self._pending.append(self._ranks.start_all_reduce(bucket.flat))


class OwnGradients(GradientReducer):
    """A single rank without a pipeline: gradients stay where autograd put them. [Note: memory]"""

    def __init__(self, buckets: Sequence[GradientBucket]) -> None:
        super().__init__(buckets)
        self._held: dict[nn.Parameter, Tensor] = {}
        self._storages: set[int] = set()

    def wait(self) -> None:
        """They are sums already."""

    def reduced(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        yield from self._held.items()

    def of_parameters(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each parameter with its gradient."""
        yield from self._held.items()

    def end_backward(self) -> None:
        self._in_backward = False
        if self._reduces:
            for bucket in self.buckets:
                for parameter in bucket.parameters:
                    if parameter not in self._held:
                        self._held[parameter] = torch.zeros_like(parameter, dtype=bucket.dtype)

    def begin_step(self) -> None:
        self._early.clear()
        self._held.clear()
        self._storages.clear()

    def _on_gradient(self, parameter: nn.Parameter, lazy: LazyGradient | None) -> None:
        gradient, parameter.grad = parameter.grad, None
        if not self._counts:
            return
        assert gradient is not None, "only a pipeline has others, and it has buckets"
        held = self._held.get(parameter)
        if held is not None:
            held.add_(gradient)
            return
        gradient = gradient.to(self._bucket_of[parameter].dtype)
        storage = gradient.untyped_storage().data_ptr()
        if storage in self._storages:  # torch lets two gradients share memory, which may not be scaled twice
            gradient = gradient.clone()
        self._storages.add(storage)
        self._held[parameter] = gradient

    def _open(self, bucket: GradientBucket) -> None:
        raise AssertionError("no bucket is ever filled")

    def _launch(self, bucket: GradientBucket) -> None:
        raise AssertionError("nothing is reduced")


def sum_dtype(parameter: torch.dtype, configured: torch.dtype) -> torch.dtype:
    """That of a parameter's gradient's sums: what is configured, unless it would lose numbers."""
    return configured if parameter in (torch.float32, torch.bfloat16, torch.float16) else parameter


def _norm_dtype(gradients: Tensor) -> torch.dtype | None:
    return torch.float32 if gradients.dtype in (torch.bfloat16, torch.float16) else None
