"""`deepspeed.zero`."""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Iterable
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from torch import nn

from dstrain.runtime.engine import Engine

engines: weakref.WeakSet[Engine] = weakref.WeakSet()
"""Those that `deepspeed.initialize` has made."""


class Init:
    """DeepSpeed's context that shards parameters while a model is made.

    Here the model is made whole on every rank, in memory of the host, and sharded by `initialize`: each entered
    context says so once, on rank 0's stderr, since a model that does not fit there cannot be made so. The trained
    numbers are the same. enabled: without it nothing is meant to happen. settings: DeepSpeed's others, of how to shard.
    """

    def __init__(self, module: Any = None, *, enabled: bool = True, **settings: Any) -> None:
        self._enabled = enabled

    def __enter__(self) -> Init:
        if self._enabled and os.environ.get("RANK", "0") == "0":
            said = "the model is made whole on every rank's host, and sharded by initialize"
            print(f"dstrain: deepspeed.zero.Init: {said}", file=sys.stderr, flush=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


class GatheredParameters:
    """DeepSpeed's context in which parameters have all their elements; on all ranks.

    modifier_rank: whose changes become everyone's; without it, none is made. Before `initialize` a model is whole on
    every rank, and rank 0's values become everyone's there.
    """

    def __init__(
        self,
        params: nn.Parameter | Iterable[nn.Parameter],
        modifier_rank: int | None = None,
        fwd_module: nn.Module | None = None,
        enabled: bool = True,
    ) -> None:
        self._parameters = [params] if isinstance(params, nn.Parameter) else list(params)
        self._modifier, self._enabled = modifier_rank, enabled
        self._inside = ExitStack()

    def __enter__(self) -> None:
        for engine in engines if self._enabled else ():
            own = set(engine.module.parameters())
            if chosen := [parameter for parameter in self._parameters if parameter in own]:
                self._inside.enter_context(engine.whole(chosen, self._modifier))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._inside.__exit__(kind, error, trace)
