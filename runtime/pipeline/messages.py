"""What goes from one stage to the next, and back: tensors whose shapes both ends know beforehand.

[Note: shapes]
Every rank of a pipeline has the micro-batch at hand, so both ends of a boundary know its *signature*: the shapes and
dtypes in it, and whether it is trained on. The first tensors of a signature are announced by a description; from then
on both ends know what a micro-batch of that signature gives, nothing is announced, and receives are posted before they
are needed. Other sequence lengths, a smaller last micro-batch or several tensors are other signatures, no more.
A gradient that was there in the first backward and is None later is sent as zeros.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from dstrain.runtime.comm_edge import Edge, Message
from dstrain.runtime.spec.errors import UsageError

Signature = Hashable


class Form(NamedTuple):
    """Of one tensor that is sent."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool


Forms = list[Form | None]


def signature_of(batch: Any, training: bool) -> Signature:
    """[Note: shapes]"""
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    return training, tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors)


class Mailbox:
    """One boundary between two stages, in one direction. [Note: shapes]

    Both ends go through the micro-batches in one order. Without an edge both stages are this rank's.
    """

    def __init__(self, edge: Edge | None, device: torch.device, where: str) -> None:
        """where: for people."""
        self._edge, self._device, self._where = edge, device, where
        self.is_local = edge is None
        self._forms: dict[Signature, Forms] = {}
        self._posted: dict[int, list[tuple[Tensor, Message] | None]] = {}
        self._kept: dict[int, Sequence[Tensor | None]] = {}
        self._sent: dict[int, list[tuple[Message, Tensor]]] = {}

    def send(self, micro: int, signature: Signature, tensors: Sequence[Tensor | None]) -> None:
        """Send tensors, whose gradients are nobody's here; they must not change before they have gone."""
        if self._edge is None:
            self._kept[micro] = tensors
            return
        if len(tensors) > _TENSORS:
            self._refuse(f"at most {_TENSORS} tensors", str(len(tensors)))
        sent = self._sent[micro] = []
        forms = self._forms.get(signature)
        if forms is None:
            forms = self._forms[signature] = [_form(tensor) for tensor in tensors]
            sent += self._edge.send_object(forms, micro)
        if len(tensors) != len(forms):
            self._refuse(f"{len(forms)} tensors, {_AS_BEFORE}", str(len(tensors)))
        for number, (tensor, form) in enumerate(zip(tensors, forms, strict=True)):
            if form is not None:
                filled = torch.zeros(form.shape, dtype=form.dtype, device=self._device) if tensor is None else tensor
                self._check(filled, form)
                whole = filled.detach().contiguous()
                if whole.numel():
                    sent.append((self._edge.send(whole, _tag(micro, number)), whole))
            elif tensor is not None:
                self._refuse(f"no gradient, {_AS_BEFORE}", f"one of shape {tuple(tensor.shape)}")

    def post(self, micro: int, signature: Signature) -> bool:
        """Be ready for what will come; returns whether it is known what that is."""
        assert self._edge is not None
        if micro in self._posted:
            return True
        forms = self._forms.get(signature)
        if forms is None:
            return False
        posted: list[tuple[Tensor, Message] | None] = []
        for number, form in enumerate(forms):
            if form is None:
                posted.append(None)
                continue
            into = torch.empty(form.shape, dtype=form.dtype, device=self._device)
            pending: Message = self._edge.receive(into, _tag(micro, number)) if into.numel() else _Done()
            posted.append((into, pending))
        self._posted[micro] = posted
        return True

    def take(self, micro: int, signature: Signature) -> list[Tensor | None]:
        """What has come, as leaves that require gradients where the sender's did."""
        if self._edge is None:
            return [
                None if kept is None else kept.detach().requires_grad_(kept.requires_grad)
                for kept in self._kept.pop(micro)
            ]
        if signature not in self._forms:
            self._forms[signature] = self._edge.receive_object(micro)
        self.post(micro, signature)
        taken: list[Tensor | None] = []
        for posted, form in zip(self._posted.pop(micro), self._forms[signature], strict=True):
            if posted is None or form is None:
                taken.append(None)
                continue
            into, pending = posted
            pending.wait()
            taken.append(into.requires_grad_(form.requires_grad))
        return taken

    def gone(self, micro: int) -> None:
        """The other end has taken a micro-batch's: what was sent is not kept any longer."""
        for message, _ in self._sent.pop(micro, ()):
            message.wait()

    def finish(self) -> None:
        """Return once all has gone."""
        for micro in list(self._sent):
            self.gone(micro)

    def _check(self, tensor: Tensor, form: Form) -> None:
        if (tuple(tensor.shape), tensor.dtype) != (form.shape, form.dtype):
            self._refuse(f"shape {form.shape} of {form.dtype}", f"shape {tuple(tensor.shape)} of {tensor.dtype}")

    def _refuse(self, expected: str, found: str) -> None:
        raise UsageError.mismatch(
            f"parallel.pipeline: {self._where}",
            expected,
            found,
            "shapes between stages must follow from those of the batch",
        )


class _Done:
    def wait(self) -> None:
        return None


def _form(tensor: Tensor | None) -> Form | None:
    return None if tensor is None else Form(tuple(tensor.shape), tensor.dtype, tensor.requires_grad)


_AS_BEFORE = "as in the first micro-batch of these shapes"

_TENSORS = 16
"""The most between two stages, for the numbers of their messages."""


def _tag(micro: int, number: int) -> int:
    return micro * _TENSORS + number
