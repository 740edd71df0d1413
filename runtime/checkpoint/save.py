"""Saving: every rank writes its share, and all decide together when it has become a checkpoint.

[Note: phases]
A save goes through `write`, `commit` and `retire` ([Note: commit] in commit.py). In each, a rank has something to do or
is ready at once; when all are ready, `advance` gathers what has come of it and begins the next. All ranks advance at
the same point: behind the same step, whose all-reduce counts who is ready, or in `finish`, which waits.

Asynchronous: `begin` copies the share into memory that a writer process sees (writer.py), and the training goes on.
At once: `begin` writes it; nothing is copied. One save is in flight; the next one waits for it.
"""

from __future__ import annotations

import contextlib
import os
import platform
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from dstrain.runtime.checkpoint import commit
from dstrain.runtime.checkpoint.background import ALIGNMENT, Writer
from dstrain.runtime.checkpoint.disks import Disks, find_disks
from dstrain.runtime.checkpoint.manifest import Manifest, Piece, folder_of
from dstrain.runtime.checkpoint.model_file import bytes_of
from dstrain.runtime.checkpoint.parts import Part, Written, entries_of
from dstrain.runtime.checkpoint.state import Captured, capture, describe_model
from dstrain.runtime.checkpoint.writer import answer, commit_all, write_share
from dstrain.runtime.engine import Engine
from dstrain.runtime.spec.errors import CheckpointError

POLL_S = 20.0
"""Between two questions whether all ranks are ready: far below the timeout of a collective."""

_FIX = "the checkpoints before it are untouched; look at the disk, or give another checkpoint.dir"


@dataclass(frozen=True)
class Saved:
    """What has become of a save, the same on all ranks. problem: why it is no checkpoint, in a line; "" if it is one.
    seconds: from begin to commit; stall_s: of them, those in which rank 0 could not train. size: bytes of all files.
    """

    step: int
    path: Path
    problem: str = ""
    seconds: float = 0.0
    stall_s: float = 0.0
    size: int = 0


@dataclass
class _Flight:
    """The save under way. result: what this rank says of the phase, where no writer does."""

    step: int
    token: str
    began: float
    extra: Mapping[str, Any]
    captured: Captured | None = None
    parts: list[Part] = field(default_factory=list)
    phase: Literal["write", "commit", "retire"] = "write"
    result: dict[str, Any] | None = None
    stall_s: float = 0.0
    seconds: float = 0.0
    size: int = 0


@dataclass
class _Vote:
    """Of one rank behind `write`."""

    problem: str = ""
    parts: list[Part] = field(default_factory=list)
    written: dict[str, Any] = field(default_factory=dict)
    scalars: dict[str, dict[str, Any]] = field(default_factory=dict)


class Saver:
    """The checkpoints of one engine in one folder; all ranks call alike. `engine.saver` is moved on by each step.

    keep_last: older ones than so many are deleted, once a newer stands; keep_every: steps whose multiples stay.
    Checkpoints of later steps are of a timeline that was left: deleted too, or set aside where all are kept.
    replicas: 2 for a second copy of each file on the next host, where hosts have disks of their own. notes: what of
    this was not needed, for people. finished: what has become of saves, until somebody takes it.
    """

    def __init__(
        self,
        engine: Engine,
        root: Path,
        keep_last: int | None = None,
        keep_every: int | None = None,
        asynchronous: bool = False,
        replicas: int = 1,
    ) -> None:
        """Makes `root` and tries to write there: CheckpointError on all ranks. Some small collectives of objects."""
        self._engine, self._comm = engine, engine.comm
        self.root, self._said_root = root.absolute(), root
        self._keep_last, self._keep_every = keep_last, keep_every
        self.disks: Disks = find_disks(root, engine.comm)
        self._is_keeper = self.disks.of[self._comm.rank] == self._comm.rank
        self.notes: list[str] = []
        if replicas > 1 and len(self.disks.keepers) == 1:
            self.notes.append(f"checkpoint.replicas: all ranks share {root}, so one copy of each file is kept")
            replicas = 1
        self.asynchronous = asynchronous
        self._copies = replicas > 1
        if self._is_keeper:
            commit.sweep(self.root)
        self._secret = self._comm.all_gather_object(secrets.token_hex(16))[0]  # behind all sweeps
        self._copy_to: tuple[str, int, str] | None = None
        self._writer: Writer | None = None
        if asynchronous or self._copies:
            self._start_writer()
        self._flight: _Flight | None = None
        self._count = 0
        self.finished: list[Saved] = []

    # --- a save ------------------------------------------------------------------------------------------------

    def begin(self, extra: Mapping[str, Any] | None = None) -> Path:
        """Save the engine's state, between two steps, behind the save in flight; returns where it will be.

        extra: plain values of the script's, rank 0's, which `load` gives back. The end is in `finished`, also a bad
        one.
        """
        engine, began = self._engine, time.monotonic()
        assert engine.micro_step == 0, "a checkpoint is saved between two steps"
        self.finish()
        if self._copies and any(self._comm.all_gather_object(self._writer is None)):
            self.close()
            self._start_writer()
        engine.share_buffers()
        self._count += 1
        token = f"{self._secret[:8]}-{self._count}"
        self._flight = flight = _Flight(engine.global_step, token, began, extra or {})
        found = answer(lambda: self._write(flight))
        if found.get("problem") or self._writer is None:
            flight.result = found
        flight.stall_s = time.monotonic() - began
        return folder_of(self._said_root, flight.step)

    @property
    def is_ready(self) -> bool:
        """Whether this rank has nothing in flight, or could advance."""
        return self._flight is None or self._flight.result is not None or self._own_writer.is_ready()

    @property
    def in_flight(self) -> bool:
        """Whether a save is under way; the same on all ranks."""
        return self._flight is not None

    def advance(self) -> None:
        """All ranks are ready: go on with the next phase, on all ranks at once. Small collectives of objects."""
        flight, began = self._flight, time.monotonic()
        assert flight is not None
        result = flight.result if flight.result is not None else self._own_writer.take()
        flight.result = None
        if result.get("died"):
            self._writer = None
        if flight.phase == "write":
            self._end_write(flight, result)
        else:
            self._end_phase(flight, result)
        flight.stall_s += time.monotonic() - began

    def finish(self) -> None:
        """Wait until nothing is in flight; on all ranks."""
        while self._flight is not None:
            ready = self._flight.result is not None or self._own_writer.is_ready(POLL_S)
            if all(self._comm.all_gather_object(ready)):
                self.advance()

    def take_finished(self) -> list[Saved]:
        """What has become of saves since the last call."""
        taken, self.finished = self.finished, []
        return taken

    def raise_problems(self) -> None:
        """CheckpointError, on all ranks, where a save since the last call has failed."""
        for saved in self.take_finished():
            if saved.problem:
                raise CheckpointError(saved.problem)

    def reserve(self) -> None:
        """Behind the first step: have the memory of the copies there before it is needed."""
        if self._writer is not None and self._flight is None:
            held = capture(self._engine).held
            with contextlib.suppress(OSError):  # the save will say so
                self._writer.foresee(sum(-(-one.tensor.nbytes // ALIGNMENT) * ALIGNMENT for one in held))

    def close(self) -> None:
        """End the writer; what it has not finished is lost."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    # --- its phases --------------------------------------------------------------------------------------------

    def _write(self, flight: _Flight) -> dict[str, Any] | None:
        """Write this rank's share, or have it written."""
        if self._writer is None and self.asynchronous and not self._copies:
            self._start_writer()
        flight.captured = captured = capture(self._engine)
        flight.parts, tensors = [one.part for one in captured.held], [one.tensor for one in captured.held]
        captured.held = []  # they change from now on
        file = f"rank-{self._comm.rank}.safetensors"
        if self._writer is None:
            draft = commit.draft_of(self.root, flight.step, flight.token)
            return write_share(draft, file, flight.parts, (bytes_of(tensor) for tensor in tensors))
        offsets = self._writer.copy(tensors)
        self._ask(
            "write",
            flight,
            file=file,
            parts=[vars(part) for part in flight.parts],
            offsets=offsets,
            copy_to=self._copy_to,
        )
        return None

    def _end_write(self, flight: _Flight, result: dict[str, Any]) -> None:
        captured, flight.captured = flight.captured, None
        vote = _Vote(result.get("problem", ""))
        if captured is not None and not vote.problem:
            vote = _Vote("", flight.parts, result["result"], captured.scalars)
        votes = self._comm.gather_object(vote)
        text, problem = "", ""
        if votes is not None:
            problem = next((self._at(rank, vote.problem) for rank, vote in enumerate(votes) if vote.problem), "")
            if not problem:
                assert captured is not None
                found = answer(lambda: self._manifest(flight, votes, captured).to_text())
                text, problem = found.get("result", ""), found.get("problem", "")
        several = len(self.disks.keepers) > 1  # then other keepers need it too
        problem, sent, flight.size = self._comm.broadcast_object((problem, text if several else "", flight.size))
        text = text or sent
        if problem:
            self._fail(flight, problem)
            return
        flight.phase = "commit"
        self._keep(flight, "commit", lambda: commit_all(self.root, flight.step, flight.token, text), manifest=text)

    def _end_phase(self, flight: _Flight, result: dict[str, Any]) -> None:
        problems = self._comm.all_gather_object(result.get("problem", ""))
        problem = next((self._at(rank, said) for rank, said in enumerate(problems) if said), "")
        if flight.phase == "commit":
            if problem:
                self._fail(flight, problem)
                return
            flight.seconds = time.monotonic() - flight.began
            flight.phase = "retire"
            words = {"keep_last": self._keep_last, "keep_every": self._keep_every}
            self._keep(flight, "retire", lambda: commit.retire(self.root, flight.step, **words), **words)
            return
        if problem:
            self.notes.append(f"older checkpoints could not be deleted: {problem}")
        path = folder_of(self._said_root, flight.step)
        self._flight = None
        self.finished.append(Saved(flight.step, path, "", flight.seconds, flight.stall_s, flight.size))

    def _keep(self, flight: _Flight, what: str, work: Callable[[], None], **request: Any) -> None:
        """A phase that only the keepers of disks have work in."""
        if not self._is_keeper:
            flight.result = {"result": None}
        elif self._writer is None:
            flight.result = answer(work)
        else:
            self._ask(what, flight, **request)

    def _ask(self, what: str, flight: _Flight, **request: Any) -> None:
        assert self._writer is not None
        if what != "retire":
            request["token"] = flight.token
        self._writer.ask(what, root=self.root, step=flight.step, **request)

    def _fail(self, flight: _Flight, problem: str) -> None:
        """On all ranks: nothing of the save stays."""
        if self._is_keeper:
            answer(lambda: commit.discard(self.root, flight.step, flight.token))
        self._flight = None
        target = folder_of(self._said_root, flight.step)
        words = f"{target}: expected to save step {flight.step}, found {problem}; {_FIX}"
        self.finished.append(Saved(flight.step, target, words, time.monotonic() - flight.began, flight.stall_s))

    def _manifest(self, flight: _Flight, votes: list[_Vote], captured: Captured) -> Manifest:
        """Everything is there: what a checkpoint of it must hold."""
        files = [(vote.parts, _written(vote)) for vote in votes]
        scalars: dict[str, dict[str, Any]] = {}
        for vote in votes:
            for name, values in vote.scalars.items():
                scalars.setdefault(name, values)
        order = {name: place for place, name in enumerate(captured.order)}
        entries = sorted(entries_of(files), key=lambda entry: order.get(entry.name, len(order)))
        values = {**captured.values, "extra": flight.extra, "model": describe_model(self._engine)}
        values["optimizer"]["scalars"] = {name: scalars[name] for name in captured.trained if name in scalars}
        flight.size = sum(written.size for _, written in files)
        return Manifest(
            step=flight.step,
            layout={
                "world_size": self._comm.world_size,
                "stage": self._engine.config.zero.stage,
                "data_shard": self._engine.weights.sharers,
            },
            versions={"torch": torch.__version__, "python": platform.python_version()},
            run_id=os.environ.get("DSTRAIN_RUN_ID", ""),
            tensors=tuple(entries),
            files={written.file: written.size for _, written in files},
            hosts={written.file: host for (_, written), host in zip(files, self.disks.hosts, strict=True)},
            saved_at=time.time(),
            state=values,
        )

    def _at(self, rank: int, problem: str) -> str:
        where = f"rank {rank} on {self.disks.hosts[rank]}: " if self._comm.world_size > 1 and rank else ""
        return where + problem

    # --- the writer --------------------------------------------------------------------------------------------

    @property
    def _own_writer(self) -> Writer:
        assert self._writer is not None
        return self._writer

    def _start_writer(self) -> None:
        """The writer of this rank; where copies are kept, on all ranks at once."""
        self._writer = Writer()
        if not self._copies:
            return
        address = _own_address()
        self._writer.ask("listen", root=self.root, address=address, secret=self._secret)
        found = self._writer.take()
        everyone = self._comm.all_gather_object((address, found.get("result"), found.get("problem", "")))
        host, port, problem = everyone[self.disks.next_of(self._comm.rank)]
        if problem or port is None:
            raise CheckpointError(f"checkpoint.replicas: expected a port to take copies at, found {problem}")
        self._copy_to = host, port, self._secret


def save(
    engine: Engine,
    root: Path,
    keep_last: int | None = None,
    extra: Mapping[str, Any] | None = None,
    keep_every: int | None = None,
) -> Path:
    """Save the engine's state below `root` as step-N, now; all ranks call it, between two steps. As `Saver`.

    Raises CheckpointError on all ranks, with the cause; what was there before is untouched then.
    """
    saver = Saver(engine, root, keep_last, keep_every)
    path = saver.begin(extra)
    saver.finish()
    saver.raise_problems()
    return path


def _written(vote: _Vote) -> Written:
    """With the boxes that the parts tell."""
    file, pieces = vote.written["file"], []
    for part, rows in zip(vote.parts, vote.written["pieces"], strict=True):
        box = part.box_start or (0,) * len(part.shape), part.box_size or part.shape
        pieces.append([Piece(*box, start, stop, file, offset, size, sha) for start, stop, offset, size, sha in rows])
    return Written(file, vote.written["size"], pieces)


def _own_address() -> str:
    """By which other hosts reach this one: as the job's store does."""
    where = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "1"))
    with socket.socket(socket.AF_INET6 if ":" in where[0] else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(where)
        return str(probe.getsockname()[0])
