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
import sys
import time
import weakref
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
from dstrain.runtime.checkpoint.verify import contradictions
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
    order: list[str] = field(default_factory=list)


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
        self._stack = contextlib.ExitStack()
        if self._is_keeper:
            self._stack.enter_context(commit.in_use(self.root))
        self._secret = self._comm.all_gather_object(secrets.token_hex(16))[0]  # behind all sweeps
        self._copy_to: tuple[str, int, str] | None = None
        self._writer: Writer | None = None
        if (asynchronous or self._copies) and (problem := self._start_writer()):
            raise CheckpointError(f"checkpoint: expected a process that writes beside the training, found {problem}")
        self._flight: _Flight | None = None
        self._count = 0
        self._unfinished: list[int] = []
        weakref.finalize(self, _say_unfinished, self._unfinished, root, self._comm.rank)
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
        problem = ""
        if self._copies and any(self._comm.all_gather_object(self._writer is None)):
            self._end_writer()
            problem = self._start_writer()
        engine.share_buffers()
        self._count += 1
        token = f"{self._secret[:8]}-{self._count}"
        self._flight = flight = _Flight(engine.global_step, token, began, extra or {})
        self._unfinished[:] = [flight.step]
        found = {"problem": problem} if problem else answer(lambda: self._write(flight))
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
        writer = self._writer
        if writer is None or self._flight is not None:
            return

        def foresee() -> None:
            held = capture(self._engine).held
            writer.foresee(sum(-(-one.tensor.nbytes // ALIGNMENT) * ALIGNMENT for one in held))

        answer(foresee)  # what is wrong the save will say

    def close(self) -> None:
        """End the writer; what it has not finished is lost."""
        self._end_writer()
        self._unfinished.clear()
        self._stack.close()

    # --- its phases --------------------------------------------------------------------------------------------

    def _write(self, flight: _Flight) -> dict[str, Any] | None:
        """Write this rank's share, or have it written."""
        if self._writer is None and self.asynchronous and not self._copies:
            self._writer = Writer()
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
            vote = _Vote("", flight.parts, result["result"], captured.scalars, captured.order)
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
                self._fail(flight, problem, committed=not result.get("problem"))
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
        self._unfinished.clear()
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

    def _fail(self, flight: _Flight, problem: str, committed: bool = False) -> None:
        """On all ranks: nothing of the save stays. committed: on this disk it had become a checkpoint."""
        if self._is_keeper:
            answer(lambda: commit.discard(self.root, flight.step, flight.token, committed))
        self._flight = None
        self._unfinished.clear()
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
        names = dict.fromkeys(name for vote in votes for name in vote.order)
        order = {name: place for place, name in enumerate(names)}
        entries = sorted(entries_of(files), key=lambda entry: order.get(entry.name, len(order)))
        values = {**captured.values, "extra": flight.extra, "model": describe_model(self._engine)}
        values["optimizer"]["scalars"] = dict(sorted(scalars.items()))
        flight.size = sum(written.size for _, written in files)
        manifest = Manifest(
            step=flight.step,
            layout={
                "world_size": self._comm.world_size,
                "stage": self._engine.config.zero.stage,
                "data_shard": self._engine.weights.sharers,
                "pipeline": self._engine.dims.pipeline,
            },
            versions={"torch": torch.__version__, "python": platform.python_version()},
            run_id=os.environ.get("DSTRAIN_RUN_ID", ""),
            tensors=tuple(entries),
            files={written.file: written.size for _, written in files},
            hosts={written.file: host for (_, written), host in zip(files, self.disks.hosts, strict=True)},
            saved_at=time.time(),
            state=values,
        )
        self._check_coverage(manifest, votes)
        return manifest

    def _check_coverage(self, manifest: Manifest, votes: list[_Vote]) -> None:
        """The ranks have cut what they share alike only if they hold the same: else there is a gap."""
        stored = {entry.name for entry in manifest.tensors}
        lost = next((name for vote in votes for name in vote.order if name not in stored), None)
        wrong = next((said for entry in manifest.tensors for said in contradictions(self.root, manifest, entry)), None)
        if lost is not None or wrong is not None:
            said = wrong or f"nothing of {lost}"
            raise CheckpointError(f"{said}: ranks that share a state hold different tensors")

    def _at(self, rank: int, problem: str) -> str:
        where = f"rank {rank} on {self.disks.hosts[rank]}: " if self._comm.world_size > 1 and rank else ""
        return where + problem

    # --- the writer --------------------------------------------------------------------------------------------

    @property
    def _own_writer(self) -> Writer:
        assert self._writer is not None
        return self._writer

    def _start_writer(self) -> str:
        """The writers of all ranks; all call it. Returns what went wrong on any."""

        def start() -> tuple[str, int]:
            self._writer = Writer()
            if not self._copies:
                return "", 0
            address = _own_address()
            self._writer.ask("listen", root=self.root, address=address, secret=self._secret)
            found = self._writer.take()
            if "problem" in found:
                raise CheckpointError(found["problem"])
            return address, found["result"]

        everyone = self._comm.all_gather_object(answer(start))
        problem = next((self._at(rank, one["problem"]) for rank, one in enumerate(everyone) if "problem" in one), "")
        if not problem and self._copies:
            self._copy_to = (*everyone[self.disks.next_of(self._comm.rank)]["result"], self._secret)
        return problem

    def _end_writer(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


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
    try:
        path = saver.begin(extra)
        saver.finish()
        saver.raise_problems()
    finally:
        saver.close()
    return path


def _written(vote: _Vote) -> Written:
    """With the boxes that the parts tell."""
    file, pieces = vote.written["file"], []
    for part, rows in zip(vote.parts, vote.written["pieces"], strict=True):
        box = part.box_start or (0,) * len(part.shape), part.box_size or part.shape
        pieces.append([Piece(*box, start, stop, file, offset, size, sha) for start, stop, offset, size, sha in rows])
    return Written(file, vote.written["size"], pieces)


def _own_address() -> str:
    """By which other hosts reach this one: as they reach the job's store. Raises OSError."""
    name, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "1"))
    family, _, _, _, where = socket.getaddrinfo(name, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(where)
        return str(probe.getsockname()[0])


def _say_unfinished(steps: list[int], root: Path, rank: int) -> None:
    """At the end of a process that has not waited for its save."""
    if steps and rank == 0:
        target = folder_of(root, steps[0])
        fix = "a script calls engine.finish_checkpoint() at its end"
        print(f"dstrain: {target}: expected to be finished, found the end of the process; {fix}", file=sys.stderr)
