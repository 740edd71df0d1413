"""Ranks that use units in different orders end with a word, not with a hang.

[Note: divergence]
At stage 3 a gather is a collective: where one rank's forward takes another way, it waits for a unit that the others
never send, and they wait for another. A blocked collective cannot carry the question, so each rank keeps the names of
its gathers, and a thread of its own looks on: when the rank has waited for more than `SUSPICIOUS_S`, it publishes
them in the job's store, and compares them with what the other waiting ranks have published. Names that differ at the
same place prove the divergence; every rank finds it and ends, with one line that names them. A rank that is merely
slow has no other name there, and is waited for; after `LONG_S` the others say for whom, once: it may stand in a
collective of the script's own.

Not every algorithm blocks: `native` pairs gathers by their order alone, and `direct` needs nobody. So a checksum of
the names also goes into the one all-reduce of every step, and its ranks compare names where checksums differ.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import threading
import time
import weakref
import zlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from typing import NamedTuple

from dstrain.runtime.comm import Communicator, JobStore
from dstrain.runtime.spec.errors import UsageError
from dstrain.runtime.spec.exit_codes import ExitCode

SUSPICIOUS_S = 1.0
POLL_S = 0.25
LONG_S = 30.0
CHECKSUMS = 1 << 16
"""Sums of squares of so small numbers are exact in float64."""

KEPT = 512
"""Names of gathers that are kept: more than ranks can be apart."""

BACKWARD, END_OF_BACKWARD, END_OF_STEP = "the backward", "the end of the backward", "the end of the step"
"""Behind them a rank may wait for the others' gradients, which are not among the names."""


_numbers = count()
"""Of the engines of this process, which all ranks make in one order."""


class Trail(NamedTuple):
    """The last gathers of a rank. first: number of the first name, counted from the beginning of the job."""

    first: int
    names: Sequence[str]


class Lookout:
    """Watches this rank's waits, in a thread. [Note: divergence]"""

    def __init__(self, comm: Communicator, ranks: Sequence[int]) -> None:
        """comm: the whole job's. ranks: of the shard group."""
        self._comm, self._ranks = comm, list(ranks)
        self._names: deque[str] = deque(maxlen=KEPT)
        self._count = self._checksum = 0
        self._key = f"lookout/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(_numbers)}"
        self._waits_since: float | None = None
        self._store: JobStore | None = None
        self._told: float | None = None
        self._noting, self._comparing = threading.Lock(), threading.Lock()
        ended = threading.Event()
        atexit.register(ended.set)
        self._thread: threading.Thread | None = None
        self._ended = ended

    def note(self, name: str) -> None:
        """A gather starts."""
        with self._noting:
            self._names.append(name)
            self._count += 1
            self._checksum = zlib.crc32(name.encode(), self._checksum)

    @property
    def checksum(self) -> int:
        """Of all gathers so far, below `CHECKSUMS`."""
        return self._checksum % CHECKSUMS

    def compare(self, ranks: Sequence[int]) -> None:
        """Raise UsageError: a checksum of the step has shown that these ranks differ, and all of the job compare."""
        trails = self._comm.all_gather_object(self._trail())
        raise UsageError(_in_words(difference({rank: trails[rank] for rank in ranks}) or {}))

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what may block until others come."""
        if self._thread is None:
            self._thread = threading.Thread(
                target=_look_on, args=(weakref.ref(self), self._ended), name="dstrain lookout", daemon=True
            )
            self._thread.start()
        before, since = self._waits_since, time.monotonic()
        self._waits_since = since
        try:
            yield
        except RuntimeError:  # others have gone: because they found it before us?
            if time.monotonic() - since > SUSPICIOUS_S:
                self._compare()
            raise
        finally:
            self._waits_since = before

    def look(self) -> None:
        """Now and then, in a thread: has this rank waited for long?"""
        since = self._waits_since
        if since is None:
            return
        waited = time.monotonic() - since
        if waited > SUSPICIOUS_S:
            self._compare()
        if waited > LONG_S and since != self._told:
            self._told = since
            self._tell()

    def _trail(self) -> Trail:
        with self._noting:
            return Trail(self._count - len(self._names), list(self._names))

    def _compare(self) -> None:
        with self._comparing:
            if self._store is None:
                self._store = self._comm.store()
            self._store.put(f"{self._key}/{self._comm.rank}", json.dumps(self._trail()))
            if difference(self._published(self._store)) is not None:
                time.sleep(SUSPICIOUS_S)  # those who came later have published too; nobody ends before they see it
                self._end(difference(self._published(self._store)) or {})

    def _tell(self) -> None:
        """One line on whom this rank waits for."""
        assert self._store is not None
        with self._noting:
            place, name = self._count, self._names[-1] if self._names else "the first unit"
        trails = self._published(self._store)
        reached = {rank: trail.first + len(trail.names) for rank, trail in trails.items()}
        behind = [rank for rank in self._ranks if reached.get(rank, 0) < place]
        if behind:
            sys.stderr.write(
                f"dstrain: rank {self._comm.rank} has waited {LONG_S:.0f} s in {name} for {ranks_in_words(behind)}, "
                "not there yet: slow, or in a collective of the script's own that the others do not join?\n"
            )
            sys.stderr.flush()

    def _published(self, store: JobStore) -> dict[int, Trail]:
        texts = {rank: store.get(f"{self._key}/{rank}") for rank in self._ranks}
        return {rank: Trail(*json.loads(text)) for rank, text in texts.items() if text is not None}

    def _end(self, found: Mapping[str, Sequence[int]]) -> None:
        """One line, and the end of this process: its main thread is blocked for good."""
        sys.stdout.flush()
        sys.stderr.write(f"dstrain: {_in_words(found)}\n")
        sys.stderr.flush()
        os._exit(ExitCode.USAGE)


def _look_on(lookout: weakref.ref[Lookout], ended: threading.Event) -> None:
    """Until the process or the engine ends."""
    while not ended.wait(POLL_S) and (alive := lookout()) is not None:
        alive.look()
        del alive


def _in_words(found: Mapping[str, Sequence[int]]) -> str:
    said = " and ".join(f"{name} on {ranks_in_words(ranks)}" for name, ranks in found.items()) or "others long ago"
    return (
        f"zero.stage 3: expected all ranks to use the model's units in one order, found {said} "
        "at the same place; let all ranks take the same branches, or use stage 2"
    )


def difference(trails: Mapping[int, Trail]) -> dict[str, list[int]] | None:
    """The first place where ranks have different names: name -> ranks. Pure."""
    first = max(trail.first for trail in trails.values())
    last = max(trail.first + len(trail.names) for trail in trails.values())
    for place in range(first, last):
        at: dict[str, list[int]] = {}
        for rank, (start, names) in sorted(trails.items()):
            if place - start < len(names):
                at.setdefault(names[place - start], []).append(rank)
        if len(at) > 1:
            return at
    return None


def ranks_in_words(ranks: Sequence[int]) -> str:
    """'rank 3', 'ranks 0, 1 and 12 more'."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    shown = ", ".join(map(str, ranks[:8]))
    return f"ranks {shown}" + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
