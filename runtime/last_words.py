"""The words of an error that ends this rank, said once where all ranks end with the same.

[Note: said once]
Rank 0 says its words, and then puts them into the store by which the ranks have met. Another rank waits for them, for
`WAIT_S`, and is silent if they are its own. So nothing is lost: who is silent has seen its very words said. It is no
collective, for a rank that fails alone would wait in one for ranks that are in another. Where no agent keeps the store
(neither dstrain nor torchrun), it would end with rank 0: then each rank speaks.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from datetime import timedelta

from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined] # public, but not in __all__

WAIT_S = 2.0
"""For rank 0's words; ranks that fail alike do so within milliseconds, or in the first second of a start."""

POLL_S = 0.02


def say(words: str, environ: Mapping[str, str] = os.environ) -> None:
    """Write `words` to stderr, unless rank 0 has written the same. [Note: said once]"""
    is_first = environ.get("RANK", "0") == "0"
    store = _store(environ)
    if store is None or is_first or _of_rank_0(store, environ) != words:
        sys.stderr.write(words)  # at once, where print would let another rank's line in between
        sys.stderr.flush()
    if store is not None and is_first:
        store.set(_key(environ), words)


def _store(environ: Mapping[str, str]) -> TCPStore | None:
    if environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or environ.get("WORLD_SIZE", "1") == "1":
        return None
    try:
        host, port = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
        return TCPStore(host, port, is_master=False, timeout=timedelta(seconds=WAIT_S), wait_for_workers=False)
    except (DistError, KeyError, ValueError):
        return None


def _of_rank_0(store: TCPStore, environ: Mapping[str, str]) -> str | None:
    key, deadline = _key(environ), time.monotonic() + WAIT_S
    try:
        while time.monotonic() < deadline:  # the store's own wait warns on stderr when it ends in vain
            if store.check([key]):
                return store.get(key).decode()
            time.sleep(POLL_S)
    except DistError:  # the store has gone
        pass
    return None


def _key(environ: Mapping[str, str]) -> str:
    """Of this attempt: torchrun keeps the store for the next one."""
    return f"dstrain/last words/{environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
