"""Messages from one rank to one other, in one direction, over connections of their own.

NCCL matches sends and receives by their order alone, so each kind of message has an edge of its own, on which both ends
go in one order. Gloo matches them by tag besides.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor


class Message(Protocol):
    """On its way."""

    def wait(self) -> object:
        """Return once it has gone, or come. RuntimeError when the other end has gone or the timeout is over."""


class Edge:
    """From rank `source` to rank `to`, of which this is one."""

    def __init__(
        self, group: dist.ProcessGroup, source: int, to: int, device: torch.device, count: Callable[[int], None]
    ) -> None:
        """count: told the bytes that are sent."""
        self._group, self._source, self._to, self._device, self._count = group, source, to, device, count

    def send(self, tensor: Tensor, tag: int) -> Message:
        """Start to send; the tensor, contiguous and not empty, must not change before `wait`."""
        self._count(tensor.nbytes)
        return cast(Message, dist.isend(tensor, self._to, group=self._group, tag=tag))

    def receive(self, into: Tensor, tag: int) -> Message:
        """Start to receive."""
        return cast(Message, dist.irecv(into, self._source, group=self._group, tag=tag))

    def send_object(self, item: Any, tag: int) -> list[tuple[Message, Tensor]]:
        """Start to send a small thing, by pickle; what is on its way must be kept until it has gone."""
        data = torch.frombuffer(bytearray(pickle.dumps(item)), dtype=torch.uint8).to(self._device)
        size = torch.tensor([data.numel()], device=self._device)
        return [(self.send(part, _OBJECT + 2 * tag + number), part) for number, part in enumerate((size, data))]

    def receive_object(self, tag: int) -> Any:
        """What the other end, a rank of this job, has sent by `send_object`."""
        size = torch.zeros(1, dtype=torch.int64, device=self._device)
        self.receive(size, _OBJECT + 2 * tag).wait()
        data = torch.empty(int(size), dtype=torch.uint8, device=self._device)
        self.receive(data, _OBJECT + 2 * tag + 1).wait()
        return pickle.loads(data.cpu().numpy().tobytes())


_OBJECT = 1 << 28
"""A tag above those of tensors."""
