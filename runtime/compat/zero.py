"""`deepspeed.zero`."""

from __future__ import annotations

import os
import sys
from types import TracebackType
from typing import Any


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
