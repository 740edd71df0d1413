"""The ranks of the running attempt on this host: started, read, watched, and ended to the last process.

Everything here is called by the agent's one thread. Standard library only.
"""

from __future__ import annotations

import math
import os
import selectors
import signal
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto

from dstrain.launcher.agent import processes, watch
from dstrain.launcher.agent.outbox import Outbox
from dstrain.launcher.agent.workers import (
    PIPE_BYTES,
    Worker,
    Zygote,
    ask_to_end,
    oom_kills,
    open_worker,
    pipe_bytes,
    spawn_program,
)
from dstrain.runtime.spec import frames

READ_BYTES = 1 << 18
DRAIN_READS = PIPE_BYTES // READ_BYTES + 1  # what a pipe can hold when its rank ends; a grandchild may go on writing
GATHER_S = 0.2  # few lines a second travel in packets of this length: a tenth of a line's cost is in its bytes
FLOOD_BYTES = 1 << 15  # more than this in such a time: every piece is read at once, lest a full pipe slow its rank
SIZABLE_PART = 4  # so is a piece of a quarter of its pipe: a user over the kernel's limit gets pipes of 4 or 8 KiB
STACK_WAIT_S = 0.3  # for an answer; then again, while one is still to come
STACK_TIMEOUT_S = 2.0
FORK_TIMEOUT_S = 5.0  # less than the head waits for AllEnded; what is forked later still dies at once
SWEEP_TIMEOUT_S = 5.0
OOM_TICKS = 3  # a kill by the kernel is one of the last seconds; a neighbour's of yesterday is not ours


class Phase(Enum):
    """Of an attempt: RUNNING -> ASKED -> ENDING -> ENDED, any of the middle skipped; the next one is RUNNING again."""

    RUNNING = auto()
    ASKED = auto()  # SIGTERM has been sent, SIGKILL follows
    ENDING = auto()  # all that we know of is killed; requests still lie in the zygote's socket and become ranks yet
    ENDED = auto()  # the head has been told


@dataclass(frozen=True)
class _Pipe:
    worker: Worker
    sizable_bytes: int


class Ranks:
    """`spared`: processes of the job that outlive an attempt. `fileno()` is readable when a rank has written."""

    def __init__(self, outbox: Outbox, warden: int, spared: Callable[[], set[int]]) -> None:
        self.cookies: list[bytes] = []
        self.workers: dict[int, Worker] = {}
        self.phase = Phase.ENDED
        self._end_at = self._stacks_at = math.inf  # when ASKED becomes ENDING, and ENDING ENDED; when stacks are told
        self._stacks_until = 0.0
        self.read_at = 0.0  # no pipe is read before this moment
        self._period_began, self._bytes_before, self._bytes = 0.0, 0, 0
        self._attempt = -1
        self._whole_groups = False
        self._outbox, self._warden, self._spared = outbox, warden, spared
        self._pipes = selectors.DefaultSelector()
        self._watches: dict[int, watch.Watch] = {}
        self._oom_seen = deque([0], maxlen=OOM_TICKS)
        self._paused_told = False

    def fileno(self) -> int:
        return self._pipes.fileno()

    # --- starting --------------------------------------------------------------------------------------------

    def start(
        self,
        message: frames.Start,
        prepare: frames.Prepare,
        facts: frames.HostFacts,
        environment: Mapping[str, str],
        zygote: Zygote | None,
    ) -> None:
        """Start all ranks of an attempt: forked by the zygote if there is one, else as programs."""
        self._attempt, self.phase, self._end_at = message.attempt, Phase.RUNNING, math.inf
        self._whole_groups = prepare.kind == "program"
        self._oom_seen = deque([oom_kills()], maxlen=OOM_TICKS)
        for spec in message.processes:
            spec.environment.update(message.environment)
            worker, descriptors = open_worker(spec, preloaded=zygote is not None)
            self.workers[spec.rank], self._watches[spec.rank] = worker, watch.Watch()
            for fd in worker.pipes:
                self.watch_pipe(fd, worker)
            if zygote is not None:
                kind, target, arguments = prepare.kind, prepare.target, prepare.arguments
                fork = frames.Fork(spec.rank, spec.environment, kind, target, arguments, message.attempt)
                zygote.fork(fork, descriptors)
            else:
                self._spawn(worker, descriptors, prepare, facts, environment)

    def _spawn(
        self,
        worker: Worker,
        descriptors: list[int],
        prepare: frames.Prepare,
        facts: frames.HostFacts,
        environment: Mapping[str, str],
    ) -> None:
        command = [prepare.target, *prepare.arguments]
        if prepare.kind != "program":
            command = [str(facts.python), *(["-m"] if prepare.kind == "module" else []), *command]
        elif facts.target_path:
            command[0] = facts.target_path
        try:
            spawn_program(command, prepare.cwd, environment, worker, descriptors)
        except (OSError, ValueError) as error:
            worker.status = 127
            reason = f"{command[0]}: {getattr(error, 'strerror', None) or error}"
            self._tell(frames.StartFailed(worker.spec.rank, reason))

    def forked(self, message: frames.Forked) -> None:
        """The zygote has forked a rank. One that comes too late gets what the others have got already."""
        worker = self.workers.get(message.rank)
        if message.attempt != self._attempt or worker is None or worker.status is not None:
            processes.kill(message.pid, signal.SIGKILL)
            return
        worker.pid = message.pid
        if self.phase is Phase.ASKED:
            ask_to_end(worker, whole_group=self._whole_groups)
        elif self.phase is Phase.ENDING:
            processes.kill(message.pid, signal.SIGKILL)
            if not self._forks_to_come():
                self.end()
            return
        if all(worker.pid for worker in self.workers.values()):
            self._tell(frames.Started({str(rank): worker.pid or 0 for rank, worker in self.workers.items()}))

    def _forks_to_come(self) -> bool:
        return any(worker.to_come for worker in self.workers.values())

    # --- output ----------------------------------------------------------------------------------------------

    def read(self) -> None:
        """Forward what the ranks have written. A trickle is then left to gather: see GATHER_S."""
        now = time.monotonic()
        if now - self._period_began > GATHER_S:
            self._period_began, self._bytes_before, self._bytes = now, self._bytes, 0
        for key, _ in self._pipes.select(0):
            pipe: _Pipe = key.data
            count = self._read_pipe(pipe.worker, key.fd)
            self._bytes += count if count < pipe.sizable_bytes else max(count, FLOOD_BYTES)
        if max(self._bytes, self._bytes_before) < FLOOD_BYTES:
            self.read_at = now + GATHER_S

    def watch_pipe(self, fd: int, worker: Worker) -> None:
        """Read this pipe from now on."""
        self._pipes.register(fd, selectors.EVENT_READ, _Pipe(worker, pipe_bytes(fd) // SIZABLE_PART))

    def _read_pipe(self, worker: Worker, fd: int) -> int:
        """Forward one piece; 0 at the end of the pipe (which closes it), or when nothing is there now."""
        try:
            data = os.read(fd, READ_BYTES)
        except BlockingIOError:
            return 0
        if not data:
            self._close_pipe(worker, fd)
        else:
            worker.output_bytes += len(data)
            self._outbox.output(worker.spec.rank, worker.pipes[fd], data)
        return len(data)

    def _drain(self, worker: Worker) -> None:
        """What lay in the pipes when the rank ended; whatever a grandchild adds comes in its turn."""
        for fd in list(worker.pipes):
            for _ in range(DRAIN_READS):
                if fd not in worker.pipes or not self._read_pipe(worker, fd):
                    break

    def _close_pipe(self, worker: Worker, fd: int) -> None:
        self._pipes.unregister(fd)
        del worker.pipes[fd]
        os.close(fd)

    # --- ending ----------------------------------------------------------------------------------------------

    def reaped(self, pid: int, status: int) -> None:
        """A child of ours has ended; it may be a rank that is a plain program."""
        for rank, worker in self.workers.items():
            if worker.pid == pid and worker.running and not worker.preloaded:
                self.ended(rank, pid, status)
                return

    def ended(self, rank: int, pid: int, status: int) -> None:
        """A rank has ended by itself, or by a signal."""
        worker = self.workers.get(rank)
        if worker is None or worker.pid != pid or worker.status is not None:
            return  # the store, or a rank of an attempt before this one
        worker.status = status
        self._drain(worker)
        killed = status == -signal.SIGKILL and not worker.signalled
        out_of_memory = killed and oom_kills() > self._oom_seen[0]
        self._tell(frames.Exited(rank, status, time.time_ns(), out_of_memory))
        self.end_if_all_ended()

    def end_if_all_ended(self) -> None:
        """All ranks here have ended: what they left behind ends too. Other hosts' may still need the store."""
        if all(worker.status is not None for worker in self.workers.values()):
            self.end()

    def ask_to_end(self, grace_s: float) -> None:
        """SIGTERM now, SIGKILL when the grace is over. The request may cross our word that all have ended."""
        if self.phase not in (Phase.RUNNING, Phase.ASKED):
            return
        self.phase, self._end_at = Phase.ASKED, time.monotonic() + grace_s
        for worker in self.workers.values():
            ask_to_end(worker, whole_group=self._whole_groups)
        self.end_if_all_ended()

    def end(self, wait_for_forks: bool = True) -> None:
        """Kill whatever of the attempt is left (grandchildren, daemons), then say so, once.

        wait_for_forks: say it only when the zygote has answered every request, or has not for FORK_TIMEOUT_S.
        """
        if self.phase is Phase.ENDED:
            return
        if self.phase is not Phase.ENDING:
            self.phase, self._end_at = Phase.ENDING, time.monotonic() + FORK_TIMEOUT_S
        for worker in self.workers.values():
            worker.signalled = True
        roots = [os.getpid(), self._warden]
        processes.sweep(self.cookies, roots, SWEEP_TIMEOUT_S, self._spared)
        if wait_for_forks and self._forks_to_come() and time.monotonic() < self._end_at:
            return
        for rank, worker in self.workers.items():
            self._drain(worker)  # what grandchildren wrote behind their rank's end too
            if worker.status is None:
                worker.status = -signal.SIGKILL
                self._tell(frames.Exited(rank, worker.status, time.time_ns(), swept=True))
        self.phase, self._end_at = Phase.ENDED, math.inf
        self._tell(frames.AllEnded(self._attempt))

    def forget(self) -> None:
        """Close what an attempt that has ended still holds."""
        for worker in self.workers.values():
            for fd in list(worker.pipes):
                self._close_pipe(worker, fd)
            os.close(worker.stacks)
        self.workers, self._watches, self._stacks_at = {}, {}, math.inf

    # --- watching --------------------------------------------------------------------------------------------

    def look(self, now: float) -> None:
        """Once a second: who is paused, who is quiet."""
        self._oom_seen.append(oom_kills())
        running = {rank: worker for rank, worker in self.workers.items() if worker.running}
        for rank, worker in running.items():
            self._watches[rank].look(worker.pid or 0, worker.output_bytes, now)
        watches = {str(rank): self._watches[rank] for rank in running}
        paused = {rank: now - seen.paused_since for rank, seen in watches.items() if seen.paused_since}
        if paused or self._paused_told:
            self._tell(frames.Paused(paused))
            self._paused_told = bool(paused)
        quiet = {rank: now - (seen.quiet_since or now) for rank, seen in watches.items()}
        if any(seconds >= watch.LOOK_AT_CHILDREN_S for seconds in quiet.values()):
            self._tell(frames.Quiet(quiet))

    def dump_stacks(self, all_threads: bool) -> None:
        """Ask all ranks for their stacks; `on_time` tells them. One that is stopped would answer too late."""
        number = frames.ALL_STACKS_SIGNAL if all_threads else frames.STACK_SIGNAL
        for worker in self.workers.values():
            watch.clear_stack(worker.stacks)
        for worker in self._askable():
            if worker.pid:
                processes.kill(worker.pid, number)
        now = time.monotonic()
        self._stacks_at, self._stacks_until = now + STACK_WAIT_S, now + STACK_TIMEOUT_S

    def _askable(self) -> list[Worker]:
        workers = [worker for worker in self.workers.values() if worker.running and worker.preloaded]
        return [worker for worker in workers if not watch.state(worker.pid or 0).startswith(("T", "t"))]

    def _tell_stacks(self, now: float) -> None:
        if now < self._stacks_until and not all(watch.read_stack(worker.stacks) for worker in self._askable()):
            self._stacks_at = now + STACK_WAIT_S
            return
        self._stacks_at = math.inf
        running = {str(rank): worker for rank, worker in self.workers.items() if worker.running}
        texts = {rank: watch.read_stack(worker.stacks) for rank, worker in running.items()}
        states = {rank: watch.state(worker.pid or 0) for rank, worker in running.items()}
        self._tell(frames.Stacks({rank: text for rank, text in texts.items() if text}, states))

    def due_at(self, reading: bool) -> float:
        """When to call `on_time`, or to read again unless that is being done; infinity: nothing is due."""
        read_at = math.inf if reading or self._outbox.full else self.read_at
        return min(self._end_at, self._stacks_at, read_at)

    def on_time(self, now: float) -> bool:
        """Do what is due; True when the attempt's time to end has come."""
        if now >= self._stacks_at:
            self._tell_stacks(now)
        return now >= self._end_at

    def _tell(self, message: frames.Message) -> None:
        self._outbox.message(message)
