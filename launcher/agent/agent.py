"""The agent: starts, feeds back, watches and ends the ranks of one job on one host.

One thread, one loop over descriptors: frames from the head on stdin, frames to it on stdout, the ranks' pipes, the
zygote's socket, the warden's lifeline. It ends the job at once when stdin ends (the head or the connection is gone),
when nothing was heard for LEASE_S (the link is dead), or when the warden dies. Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import select
import selectors
import shutil
import signal
import socket
import time
import traceback
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from dstrain.launcher.agent import host_facts, processes, rendezvous, watch
from dstrain.launcher.agent.outbox import Outbox
from dstrain.launcher.agent.workers import (
    PIPE_BYTES,
    Worker,
    Zygote,
    ask_to_end,
    handle_zygote,
    oom_kills,
    open_worker,
    spawn_program,
)
from dstrain.runtime.spec import frames
from dstrain.runtime.spec.linux import become_subreaper

HEARTBEAT_S = 1.0
LEASE_S = 12.0  # silence of the head after which a cut-off host ends its ranks (the promise: within 20 s)
READ_BYTES = 1 << 18
DRAIN_READS = PIPE_BYTES // READ_BYTES + 1  # what a pipe can hold when its rank ends; a grandchild may go on writing
LAST_WORDS_S = 1.0
STACK_WAIT_S = 0.3
OOM_TICKS = 3  # a kill by the kernel is one of the last seconds; a neighbour's of yesterday is not ours


class WardenGoneError(Exception):
    """The warden was killed; whoever of the two survives ends the job."""


class HeadGoneError(Exception):
    """The head or the way to it has gone; the job on this host must end."""


def main(package_root: str, work: str, warden: int, warden_alive: int) -> NoReturn:
    """Run as agent until the job is over; exits 0 only after a clean sweep."""
    become_subreaper()
    agent = Agent(package_root, Path(work), warden, warden_alive)
    reason = None
    try:
        agent.run()
    except HeadGoneError:
        pass  # ending the job is what the head's absence asks for
    except WardenGoneError:
        reason = "the warden was killed"
    except BaseException:
        reason = traceback.format_exc()
    roots = [os.getpid(), *([warden] if os.getppid() == warden else [])]  # a dead warden's pid is anybody's
    left = processes.sweep(agent.cookies, roots)
    if reason:
        agent.say_last(frames.AgentFailed(reason))
    if os.getppid() != warden:  # else the warden cleans up
        shutil.rmtree(work, ignore_errors=True)
    os._exit(1 if left or reason else 0)


class Agent:
    def __init__(self, package_root: str, work: Path, warden: int, warden_alive: int) -> None:
        self.package_root, self.work, self.warden = package_root, work, warden
        self.cookies: list[bytes] = []
        self.outbox = Outbox(1)
        self.reader = frames.FrameReader()
        self.prepare: frames.Prepare | None = None
        self.facts: frames.HostFacts | None = None
        self.environment: dict[str, str] = {}
        self.zygote: Zygote | None = None
        self.store_pid: int | None = None
        self.listeners: dict[str, socket.socket] = {}
        self.waiting_store: tuple[str, int, socket.socket] | None = None
        self.workers: dict[int, Worker] = {}
        self.watches: dict[int, watch.Watch] = {}
        self.attempt = -1
        self.all_ended_told = True
        self.oom_seen = deque([0], maxlen=OOM_TICKS)
        self.kill_at: float | None = None
        self.stacks_at: float | None = None
        self.closing = False
        self.paused_told = False
        self.token = ""
        self.heard_at = self.next_tick = time.monotonic()
        self.selector = selectors.DefaultSelector()
        self.paused_reading: set[int] = set()
        self._watch_descriptors(warden_alive)
        self._requests: dict[type, Callable[[Any], None]] = {
            frames.Heartbeat: self._do_heartbeat,
            frames.Prepare: self._do_prepare,
            frames.Listen: self._do_listen,
            frames.Dial: self._do_dial,
            frames.Start: self._do_start,
            frames.Stop: self._do_stop,
            frames.DumpStacks: self._do_dump_stacks,
            frames.Close: self._do_close,
        }

    def _watch_descriptors(self, warden_alive: int) -> None:
        wake_read, wake_write = socket.socketpair()
        wake_read.setblocking(False)
        wake_write.setblocking(False)
        self._wake = (wake_read, wake_write)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake_write.fileno(), warn_on_full_buffer=False)
        self._on(0, self._on_stdin)
        self._on(warden_alive, self._on_warden_gone)
        self._on(wake_read.fileno(), self._on_child)

    def _on(self, fd: int, handler: Callable[[int], None]) -> None:
        self.selector.register(fd, selectors.EVENT_READ, handler)

    # --- the loop --------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Until Close has been carried out. Raises HeadGoneError when there is nobody to work for."""
        while not (self.closing and not self.outbox.pending):
            self._apply_back_pressure()
            self._write_interest()
            for key, mask in self.selector.select(self._wait_s()):
                if mask & selectors.EVENT_READ and key.fd in self.selector.get_map():
                    key.data(key.fd)
            self._flush()
            self._on_time()

    def _wait_s(self) -> float:
        times = [self.next_tick, *(at for at in (self.kill_at, self.stacks_at) if at is not None)]
        return max(0.0, min(times) - time.monotonic())

    def _write_interest(self) -> None:
        if self.outbox.pending and 1 not in self.selector.get_map():
            self.selector.register(1, selectors.EVENT_WRITE, None)
        elif not self.outbox.pending and 1 in self.selector.get_map():
            self.selector.unregister(1)

    def _flush(self) -> None:
        try:
            self.outbox.flush()
        except OSError:
            raise HeadGoneError from None

    def _apply_back_pressure(self) -> None:
        if self.outbox.full and not self.paused_reading:
            self.paused_reading = {fd for worker in self.workers.values() for fd in worker.pipes}
            for fd in self.paused_reading:
                self.selector.unregister(fd)
        elif not self.outbox.full and self.paused_reading:
            for fd in self.paused_reading:
                self._on(fd, self._on_pipe)
            self.paused_reading = set()

    def _on_time(self) -> None:
        now = time.monotonic()
        if now - self.heard_at > LEASE_S:
            raise HeadGoneError
        if self.kill_at is not None and now >= self.kill_at:
            self.kill_at = None
            self._end_attempt()
        if self.stacks_at is not None and now >= self.stacks_at:
            self.stacks_at = None
            self._tell_stacks()
        if now >= self.next_tick:
            self.next_tick = now + HEARTBEAT_S
            self.tell(frames.Heartbeat())
            self._look_at_ranks(now)

    def tell(self, message: frames.Message) -> None:
        self.outbox.message(message)

    def say_last(self, message: frames.Message) -> None:
        """Last words, behind the sweep: as much as the way to the head takes within a second."""
        self.tell(message)
        deadline = time.monotonic() + LAST_WORDS_S
        with contextlib.suppress(OSError):
            while self.outbox.pending and (left := deadline - time.monotonic()) > 0:
                select.select([], [1], [], left)
                self.outbox.flush()

    # --- what wakes us ---------------------------------------------------------------------------------------

    def _on_stdin(self, fd: int) -> None:
        try:
            data = os.read(fd, 1 << 20)
        except BlockingIOError:
            return
        if not data:
            raise HeadGoneError
        self.heard_at = time.monotonic()
        for frame in self.reader.feed(data):
            handler = self._requests.get(type(frame))
            if handler is None:
                raise frames.ProtocolError(f"the head sent {type(frame).__name__}, which is not for an agent")
            handler(frame)
        self.heard_at = time.monotonic()  # what took long (a prologue) was our time, not the head's silence

    def _on_warden_gone(self, fd: int) -> None:
        raise WardenGoneError

    def _on_child(self, fd: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(fd, 4096)
        by_pid = {worker.pid: worker for worker in self.workers.values() if worker.running and not worker.preloaded}
        for pid, status in processes.reap():
            if pid in by_pid:
                self._rank_ended(by_pid[pid].spec.rank, pid, os.waitstatus_to_exitcode(status))
            elif self.zygote and pid == self.zygote.process.pid:
                self.zygote.process.returncode = os.waitstatus_to_exitcode(status)
                self._zygote_gone()

    def _on_zygote(self, fd: int) -> None:
        if self.zygote is None:
            return
        messages = self.zygote.read()
        if messages is None:
            self.selector.unregister(fd)
            return  # SIGCHLD follows and says how it ended
        for facts in handle_zygote(messages, self._rank_forked, self._rank_ended):
            self.tell(facts)
            if not self.all_ended_told and facts.torch_version is None:
                self.tell(frames.AgentFailed(f"a rank calls the store, but {self._python()} has no torch to hold it"))

    def _python(self) -> str:
        return (self.facts.python if self.facts else None) or "python3"

    def _on_zygote_log(self, fd: int) -> None:
        if self.zygote is None or not self.zygote.read_log():
            self.selector.unregister(fd)

    def _on_listener(self, fd: int) -> None:
        if self.prepare:
            for listener in self.listeners.values():
                if listener.fileno() == fd:
                    rendezvous.answer(listener, self.token)

    def _on_pipe(self, fd: int) -> None:
        for worker in self.workers.values():
            if fd in worker.pipes:
                self._read_pipe(worker, fd)
                return

    def _read_pipe(self, worker: Worker, fd: int) -> bool:
        """Forward what is there; False at the end of the pipe or when nothing is there now."""
        try:
            data = os.read(fd, READ_BYTES)
        except BlockingIOError:
            return False
        if data:
            worker.output_bytes += len(data)
            self.outbox.output(worker.spec.rank, worker.pipes[fd], data)
            return True
        self._close_pipe(worker, fd)
        return False

    def _drain(self, worker: Worker) -> None:
        """What lay in the pipes when the rank ended; whatever a grandchild adds comes in its turn."""
        for fd in list(worker.pipes):
            for _ in range(DRAIN_READS):
                if fd not in worker.pipes or not self._read_pipe(worker, fd):
                    break

    def _close_pipe(self, worker: Worker, fd: int) -> None:
        if fd in self.selector.get_map():
            self.selector.unregister(fd)
        self.paused_reading.discard(fd)
        del worker.pipes[fd]
        os.close(fd)

    # --- what the head asks ----------------------------------------------------------------------------------

    def _do_heartbeat(self, message: frames.Heartbeat) -> None:
        """Hearing it is enough."""

    def _do_prepare(self, message: frames.Prepare) -> None:
        self.prepare = message
        job_path = self.work / "job.json"
        own = {"DSTRAIN_RUN_ID": message.run_id, "DSTRAIN_HOST": message.host}
        if message.job is not None:
            job_path.write_text(message.job)
            own["DSTRAIN_JOB"] = str(job_path)
        self.cookies = [f"{name}={own[name]}".encode() for name in ("DSTRAIN_RUN_ID", "DSTRAIN_HOST")]
        (self.work / "cookies").write_bytes(b"\0".join(self.cookies))
        error = None
        try:
            self.environment = host_facts.job_environment(message, dict(os.environ))
        except host_facts.PrologueError as problem:
            error, self.environment = str(problem), dict(os.environ)
        self.environment.update(own)
        self.facts = facts = host_facts.gather(message, dict(os.environ), self.environment, error)
        if facts.slots:
            self.environment.setdefault("OMP_NUM_THREADS", str(max(1, facts.cores // facts.slots)))
        chosen = host_facts.chosen_gpus(message, facts.gpus)
        if chosen is not None:
            self.environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, chosen))
        paths = [self.package_root, self.environment.get("PYTHONPATH", "")]
        self.environment["PYTHONPATH"] = ":".join(path for path in paths if path)
        self.tell(facts)
        if message.kind != "program" and facts.python and facts.cwd:
            self._start_zygote(message, facts.python)
        else:  # a program may need no torch at all: see _on_store_asked
            self.tell(frames.PreloadFacts(None, None))

    def _start_zygote(self, message: frames.Prepare, python: str) -> None:
        try:
            optimizer = host_facts.makes_an_optimizer(message)
            self.zygote = Zygote(python, self.package_root, message, optimizer, self.environment)
        except OSError as error:
            self.tell(frames.PreloadFacts(None, None, error=str(error)))
            return
        self._on(self.zygote.socket.fileno(), self._on_zygote)
        self._on(self.zygote.log_fd, self._on_zygote_log)

    def _zygote_gone(self) -> None:
        """The zygote ended: an error to report, unless the job is over. Its ranks died with it."""
        zygote, self.zygote = self.zygote, None
        if zygote is None:
            return
        for fd in (zygote.socket.fileno(), zygote.log_fd):
            if fd in self.selector.get_map():
                self.selector.unregister(fd)
        zygote.read_log()
        zygote.close()
        if self.closing:
            return
        said = zygote.log.decode(errors="replace").strip()
        how = f"the process that holds torch ended with status {zygote.process.returncode}"
        if not zygote.ready:
            self.tell(frames.PreloadFacts(None, None, error=f"{how}\n{said}"))
            return
        self.tell(frames.AgentFailed(f"{how}{': ' + said.splitlines()[-1] if said else ''}"))
        self._end_attempt()

    def _do_listen(self, message: frames.Listen) -> None:
        self._close_listeners()
        self.token, errors = message.token, {}
        for address in dict.fromkeys(message.candidates):
            try:
                self.listeners[address] = listener = rendezvous.open_listener(address, message.port)
                self._on(listener.fileno(), self._on_listener)
            except OSError as error:
                errors[address] = error.strerror or str(error)
        opened = [(address, listener.getsockname()[1]) for address, listener in self.listeners.items()]
        interfaces = {address: rendezvous.interface_of(address) for address, _ in opened}
        self.tell(frames.Listening(opened, interfaces, errors))

    def _close_listeners(self) -> None:
        for listener in self.listeners.values():
            self.selector.unregister(listener.fileno())
            listener.close()
        self.listeners = {}

    def _do_dial(self, message: frames.Dial) -> None:
        addresses = [(address, port) for address, port in message.addresses]
        interfaces, errors = rendezvous.dial(addresses, message.token, message.timeout_s)
        self.tell(frames.Dialled(interfaces, errors))

    def _do_start(self, message: frames.Start) -> None:
        self._forget_attempt()
        self.attempt, self.all_ended_told, self.kill_at = message.attempt, False, None
        self.oom_seen = deque([oom_kills()], maxlen=OOM_TICKS)
        if message.serve_store:
            self._serve_store(message)
        self._close_listeners()
        for spec in message.processes:
            spec.environment.update(message.environment)
            self._start_rank(spec)

    def _serve_store(self, message: frames.Start) -> None:
        """Hand the socket that was dialled to the store's process; for a program, once somebody really calls."""
        listener = self.listeners.pop(message.master_address)
        self.selector.unregister(listener.fileno())
        rendezvous.answer(listener, self.token)
        if self.zygote:
            self.zygote.hold_store(message.master_address, message.master_port, listener)
            return
        self.waiting_store = (message.master_address, message.master_port, listener)
        self._on(listener.fileno(), self._on_store_asked)

    def _on_store_asked(self, fd: int) -> None:
        """A program's rank calls the store: now torch is worth its import. The caller waits in the socket's queue."""
        self.selector.unregister(fd)
        assert self.waiting_store is not None
        assert self.prepare is not None
        assert self.facts is not None
        address, port, listener = self.waiting_store
        self.waiting_store = None
        self._start_zygote(self.prepare, self._python())
        if self.zygote:
            self.zygote.hold_store(address, port, listener)

    def _start_rank(self, spec: frames.ProcessSpec) -> None:
        assert self.prepare is not None
        assert self.facts is not None
        prepare, preload = self.prepare, self.prepare.preload and self.zygote is not None
        worker, descriptors = open_worker(spec, preload)
        self.workers[spec.rank], self.watches[spec.rank] = worker, watch.Watch()
        for fd in worker.pipes:
            self._on(fd, self._on_pipe)
        if preload and self.zygote:
            fork = frames.Fork(spec.rank, spec.environment, prepare.kind, prepare.target, prepare.arguments)
            self.zygote.fork(fork, descriptors)
            return
        command = [prepare.target, *prepare.arguments]
        if prepare.kind != "program":
            command = [str(self.facts.python), *(["-m"] if prepare.kind == "module" else []), *command]
        elif self.facts.target_path:
            command[0] = self.facts.target_path
        try:
            spawn_program(command, prepare.cwd, self.environment, worker, descriptors)
        except (OSError, ValueError) as error:
            worker.status = 127
            self.tell(frames.StartFailed(spec.rank, f"{command[0]}: {getattr(error, 'strerror', None) or error}"))

    def _do_stop(self, message: frames.Stop) -> None:
        if message.grace_s <= 0:
            self._end_attempt()
            return
        for worker in self.workers.values():
            ask_to_end(worker, whole_group=self.prepare is not None and self.prepare.kind == "program")
        self.kill_at = time.monotonic() + message.grace_s
        self._check_all_ended()

    def _do_dump_stacks(self, message: frames.DumpStacks) -> None:
        for worker in self.workers.values():
            if worker.running and worker.preloaded and worker.pid:
                watch.clear_stack(worker.stacks)
                processes.kill(worker.pid, frames.STACK_SIGNAL)
        self.stacks_at = time.monotonic() + STACK_WAIT_S

    def _tell_stacks(self) -> None:
        running = {str(rank): worker for rank, worker in self.workers.items() if worker.running}
        texts = {rank: watch.read_stack(worker.stacks) for rank, worker in running.items()}
        self.tell(frames.Stacks({rank: text for rank, text in texts.items() if text}))

    def _do_close(self, message: frames.Close) -> None:
        self.closing = True
        self._end_attempt()

    # --- the ranks' lives ------------------------------------------------------------------------------------

    def _rank_forked(self, rank: int, pid: int) -> None:
        if rank == frames.STORE_RANK:
            self.store_pid = pid
            return
        self.workers[rank].pid = pid
        if all(worker.pid for worker in self.workers.values()):
            self.tell(frames.Started({str(rank): worker.pid or 0 for rank, worker in self.workers.items()}))

    def _rank_ended(self, rank: int, pid: int, status: int) -> None:
        worker = self.workers.get(rank)
        if worker is None or worker.pid != pid or worker.status is not None:
            return  # the store, or a rank of an attempt before this one
        worker.status = status
        self._drain(worker)
        killed = status == -signal.SIGKILL and not worker.signalled
        out_of_memory = killed and oom_kills() > self.oom_seen[0]
        self.tell(frames.Exited(rank, status, time.time_ns(), out_of_memory))
        self._check_all_ended()

    def _check_all_ended(self) -> None:
        """All ranks here have ended by themselves: other hosts' may still need the store."""
        if all(worker.status is not None for worker in self.workers.values()):
            self._end_attempt(keep_store=True)

    def _end_attempt(self, keep_store: bool = False) -> None:
        """Kill whatever of the attempt is left (grandchildren, daemons, the store), then say so, once."""
        if not keep_store:
            self._end_store()
        if self.all_ended_told:
            return
        self.kill_at = None
        for worker in self.workers.values():
            worker.signalled = True
        self._sweep_attempt()
        for rank, worker in list(self.workers.items()):
            if worker.status is None:
                self._rank_ended_by_sweep(rank, worker)
        self.all_ended_told = True
        self.tell(frames.AllEnded(self.attempt))

    def _rank_ended_by_sweep(self, rank: int, worker: Worker) -> None:
        worker.status = -signal.SIGKILL
        self._drain(worker)
        self.tell(frames.Exited(rank, worker.status, time.time_ns(), swept=True))

    def _sweep_attempt(self) -> None:
        keep = {self.zygote.process.pid} if self.zygote else set()
        keep |= {self.store_pid} if self.store_pid else set()
        deadline = time.monotonic() + 5.0
        while time.monotonic() < deadline:
            left = processes.members(self.cookies, [os.getpid(), self.warden]) - keep
            if not left:
                break
            for pid in left:
                processes.kill(pid, signal.SIGKILL)
            time.sleep(0.01)

    def _end_store(self) -> None:
        if self.store_pid:
            processes.kill(self.store_pid, signal.SIGKILL)
            self.store_pid = None

    def _forget_attempt(self) -> None:
        self._end_store()
        if self.waiting_store:
            self.selector.unregister(self.waiting_store[2].fileno())
            self.waiting_store[2].close()
            self.waiting_store = None
        for worker in self.workers.values():
            for fd in list(worker.pipes):
                self._close_pipe(worker, fd)
            os.close(worker.stacks)
        self.workers, self.watches = {}, {}

    def _look_at_ranks(self, now: float) -> None:
        self.oom_seen.append(oom_kills())
        running = {rank: worker for rank, worker in self.workers.items() if worker.running}
        for rank, worker in running.items():
            self.watches[rank].look(worker.pid or 0, worker.output_bytes, now)
        paused = {str(r): now - w.paused_since for r, w in self.watches.items() if r in running and w.paused_since}
        if paused or self.paused_told:
            self.tell(frames.Paused(paused))
            self.paused_told = bool(paused)
        if running:
            quiet = {str(r): now - (w.quiet_since or now) for r, w in self.watches.items() if r in running}
            if any(seconds >= watch.LOOK_AT_CHILDREN_S for seconds in quiet.values()):
                self.tell(frames.Quiet(quiet))
