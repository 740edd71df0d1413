"""Real Gloo ranks: forked from the test process, which has imported torch once."""

from __future__ import annotations

import atexit
import faulthandler
import gc
import multiprocessing
import os
import pickle
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dstrain.runtime import initialization

torch.set_num_threads(1)  # the ranks share the cores, and a forked process must not inherit a pool of threads
torch.optim.AdamW([torch.zeros(1)])  # imports torch._dynamo, which takes seconds: once here, not in each rank

# What a failed test before has left behind, such as a store, is not a forked process's to tear down: it would wait for
# threads that it does not have.
os.register_at_fork(after_in_child=gc.freeze)

RunRanks = Callable[..., list[Any]]


@pytest.fixture(autouse=True)
def joined_nothing() -> None:
    """A job that a test before has joined in this process is not this test's, nor its forks'."""
    initialization._joined.clear()


@pytest.fixture
def run_ranks(monkeypatch: pytest.MonkeyPatch) -> RunRanks:
    """`run_ranks(n, work)` calls `work(rank)` in n processes with torchrun's environment; returns their
    results.

    Fails with the tracebacks of the ranks that raised, or after `timeout_s`; no rank outlives the call.
    """

    def run(ranks: int, work: Callable[[int], Any], timeout_s: float = 90.0) -> list[Any]:
        listener = socket.create_server(("127.0.0.1", 0))
        for name, value in {
            "WORLD_SIZE": ranks,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": listener.getsockname()[1],
            "TORCHELASTIC_USE_AGENT_STORE": True,
        }.items():
            monkeypatch.setenv(name, str(value))
        return _results(ranks, work, listener, time.monotonic() + timeout_s)

    return run


def _results(ranks: int, work: Callable[[int], Any], listener: socket.socket, deadline: float) -> list[Any]:
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(ranks)]
    children = [
        context.Process(target=_be_rank, args=(rank, work, pipes[rank][1], deadline), daemon=True)
        for rank in range(ranks)
    ]
    replies: dict[int, tuple[bool, Any]] = {}
    store = None
    try:
        with warnings.catch_warnings():  # Python 3.12 warns of a fork beside threads; ours only wait
            warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
            for child in children:
                child.start()
        # Behind the forks: a rank must not inherit a lock, such as the resolver's, that the store's thread held.
        store = _store_at(listener, deadline)
        for _, writer in pipes:
            writer.close()
        waiting = {reader: rank for rank, (reader, _) in enumerate(pipes)}
        while waiting:
            ready = connection.wait(list(waiting), deadline - time.monotonic())
            if not ready:
                pytest.fail(f"ranks {sorted(waiting.values())} still run at the deadline; others: {replies}")
            for reader in ready:
                assert isinstance(reader, connection.Connection)
                replies[waiting.pop(reader)] = _reply(reader)
    finally:
        for child in children:
            if child.pid is not None:
                if len(replies) < ranks:
                    child.kill()
                child.join(timeout=20)
        del store
    if raised := {rank: text for rank, (ok, text) in replies.items() if not ok}:
        pytest.fail("\n".join(f"rank {rank}: {text}" for rank, text in sorted(raised.items())))
    return [replies[rank][1] for rank in range(ranks)]


def _store_at(listener: socket.socket, deadline: float) -> dist.Store:
    host, port = listener.getsockname()
    return dist.TCPStore(  # type: ignore[attr-defined, no-any-return] # public, but not in __all__
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=deadline - time.monotonic()),
        master_listen_fd=listener.detach(),
    )


def _reply(reader: connection.Connection) -> tuple[bool, Any]:
    try:
        ok, value = pickle.loads(reader.recv_bytes())
    except EOFError:
        return False, "ended without a result"
    return ok, value


def _be_rank(rank: int, work: Callable[[int], Any], writer: connection.Connection, deadline: float) -> None:
    faulthandler.dump_traceback_later(max(1.0, deadline - time.monotonic() - 5), file=sys.__stderr__)  # where it hangs
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    atexit._clear()  # the parent's
    try:
        reply = (True, work(rank))
        atexit._run_exitfuncs()  # a multiprocessing child ends without them, a rank does not
    except BaseException:
        reply = (False, traceback.format_exc())
    writer.send_bytes(pickle.dumps(reply))
    writer.close()
