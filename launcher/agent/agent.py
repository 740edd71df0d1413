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
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from dstrain.launcher.agent import host_facts, processes, rendezvous
from dstrain.launcher.agent.files import REQUESTS, FileWorker, Request
from dstrain.launcher.agent.outbox import Outbox
from dstrain.launcher.agent.ranks import Phase, Ranks
from dstrain.launcher.agent.workers import Zygote, handle_zygote
from dstrain.runtime.spec import frames
from dstrain.runtime.spec.file_frames import Chunk
from dstrain.runtime.spec.linux import become_subreaper

HEARTBEAT_S = 1.0
LEASE_S = 12.0  # silence of the head after which a cut-off host ends its ranks (the promise: within 20 s)
LAST_WORDS_S = 1.0


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
    left = processes.sweep(agent.ranks.cookies, roots)
    agent.files.abandon()
    if reason:
        agent.say_last(frames.AgentFailed(reason))
    if os.getppid() != warden:  # else the warden cleans up
        shutil.rmtree(work, ignore_errors=True)
    os._exit(1 if left or reason else 0)


class Agent:
    def __init__(self, package_root: str, work: Path, warden: int, warden_alive: int) -> None:
        self.package_root, self.work, self.warden = package_root, work, warden
        self.job_path = work / "job.json"
        self.outbox = Outbox(1)
        self.ranks = Ranks(self.outbox, warden, self._spared)
        self.files = FileWorker()
        self.reader = frames.FrameReader()
        self.prepare: frames.Prepare | None = None
        self.facts: frames.HostFacts | None = None
        self.environment: dict[str, str] = {}
        self.zygote: Zygote | None = None
        self.store_pid: int | None = None
        self.listeners: dict[str, socket.socket] = {}
        self.store_attempt: int | None = None  # the attempt that wants a store; its process may be still to come
        self.waiting_store: tuple[frames.HoldStore, socket.socket] | None = None
        self.closing = False
        self.token = ""
        self.heard_at = self.next_tick = time.monotonic()
        self.selector = selectors.DefaultSelector()
        self.reading = False
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
            **dict.fromkeys(REQUESTS, self._do_files),
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
        self._on(self.files.fileno(), self._on_files)

    def _on(self, fd: int, handler: Callable[[int], None]) -> None:
        self.selector.register(fd, selectors.EVENT_READ, handler)

    # --- the loop --------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Until Close has been carried out. Raises HeadGoneError when there is nobody to work for."""
        while not (self.closing and not self.outbox.pending):
            self._choose_interests()
            for key, mask in self.selector.select(self._wait_s()):
                if mask & selectors.EVENT_READ and key.fd in self.selector.get_map():
                    key.data(key.fd)
            self._on_time()
            self._flush()

    def _wait_s(self) -> float:
        return max(0.0, min(self.next_tick, self.ranks.due_at(self.reading)) - time.monotonic())

    def _choose_interests(self) -> None:
        """Read the ranks' output when it is time to, and the way to the head has room; write when there is need."""
        self._set_interest(1, selectors.EVENT_WRITE, None, self.outbox.pending)
        self.reading = not self.outbox.full and time.monotonic() >= self.ranks.read_at
        self._set_interest(self.ranks.fileno(), selectors.EVENT_READ, self._on_output, self.reading)

    def _set_interest(self, fd: int, event: int, handler: Callable[[int], None] | None, wanted: bool) -> None:
        registered = fd in self.selector.get_map()
        if wanted and not registered:
            self.selector.register(fd, event, handler)
        elif registered and not wanted:
            self.selector.unregister(fd)

    def _flush(self) -> None:
        try:
            self.outbox.flush()
        except OSError:
            raise HeadGoneError from None

    def _on_time(self) -> None:
        now = time.monotonic()
        if now - self.heard_at > LEASE_S:
            raise HeadGoneError
        if self.ranks.on_time(now):
            self._end_attempt()
        if now >= self.next_tick:
            self.next_tick = now + HEARTBEAT_S
            self.tell(frames.Heartbeat())
            self.ranks.look(now)

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
        for pid, status in processes.reap():
            code = os.waitstatus_to_exitcode(status)
            if self.zygote and pid == self.zygote.process.pid:
                self.zygote.process.returncode = code
                self._zygote_gone()
            else:
                self.ranks.reaped(pid, code)

    def _on_output(self, fd: int) -> None:
        self.ranks.read()

    def _on_files(self, fd: int) -> None:
        for answer in self.files.answers():
            if isinstance(answer, Chunk):
                self.outbox.chunk(answer.talk, answer.data)
            else:
                self.tell(answer)

    def _on_zygote(self, fd: int) -> None:
        if self.zygote is None:
            return
        messages = self.zygote.read()
        if messages is None:
            self.selector.unregister(fd)
            return  # SIGCHLD follows and says how it ended
        for facts in handle_zygote(messages, self._forked, self.ranks.ended):
            self.tell(facts)
            if self.ranks.phase is not Phase.ENDED and facts.torch_version is None:
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

    # --- what the head asks ----------------------------------------------------------------------------------

    def _do_heartbeat(self, message: frames.Heartbeat) -> None:
        """Hearing it is enough."""

    def _do_prepare(self, message: frames.Prepare) -> None:
        self.prepare = message
        own = {"DSTRAIN_RUN_ID": message.run_id, "DSTRAIN_HOST": message.host}
        if message.job is not None:
            self.job_path.write_text(message.job)
            own["DSTRAIN_JOB"] = str(self.job_path)
        cookies = self.ranks.cookies = [f"{name}={own[name]}".encode() for name in ("DSTRAIN_RUN_ID", "DSTRAIN_HOST")]
        (self.work / "cookies").write_bytes(b"\0".join(cookies))
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
        self._end_attempt(wait_for_forks=False)

    def _do_listen(self, message: frames.Listen) -> None:
        self._end_store()
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
        assert self.prepare is not None
        assert self.facts is not None
        self._end_store()
        self.ranks.forget()
        if message.job is not None:
            self.job_path.write_text(message.job)
        if message.serve_store:
            self._serve_store(message)
        self._close_listeners()
        zygote = self.zygote if self.prepare.preload else None
        self.ranks.start(message, self.prepare, self.facts, self.environment, zygote)

    def _serve_store(self, message: frames.Start) -> None:
        """Hand the socket that was dialled to the store's process; for a program, once somebody really calls."""
        listener = self.listeners.pop(message.master_address)
        self.selector.unregister(listener.fileno())
        rendezvous.answer(listener, self.token)
        request = frames.HoldStore(message.master_address, message.master_port, message.attempt)
        self.store_attempt = message.attempt
        if self.zygote:
            self.zygote.hold_store(request, listener)
            return
        self.waiting_store = (request, listener)
        self._on(listener.fileno(), self._on_store_asked)

    def _on_store_asked(self, fd: int) -> None:
        """A program's rank calls the store: now torch is worth its import. The caller waits in the socket's queue."""
        self.selector.unregister(fd)
        assert self.waiting_store is not None
        assert self.prepare is not None
        assert self.facts is not None
        request, listener = self.waiting_store
        self.waiting_store = None
        self._start_zygote(self.prepare, self._python())
        if self.zygote:
            self.zygote.hold_store(request, listener)

    def _do_stop(self, message: frames.Stop) -> None:
        if message.grace_s <= 0:
            self._end_attempt()
        else:
            self.ranks.ask_to_end(message.grace_s)

    def _do_dump_stacks(self, message: frames.DumpStacks) -> None:
        self.ranks.dump_stacks(message.all_threads)

    def _do_files(self, message: Request) -> None:
        assert self.prepare is not None
        self.files.ask(Path(self.prepare.cwd), message)

    def _do_close(self, message: frames.Close) -> None:
        self.closing = True
        self._end_attempt(wait_for_forks=False)  # the sweep at our own end takes the zygote too

    # --- what outlives the ranks -----------------------------------------------------------------------------

    def _forked(self, message: frames.Forked) -> None:
        if message.rank != frames.STORE_RANK:
            self.ranks.forked(message)
        elif message.attempt == self.store_attempt:
            self.store_pid = message.pid
        else:
            processes.kill(message.pid, signal.SIGKILL)

    def _spared(self) -> set[int]:
        """What a sweep of the ranks leaves: the zygote for the next attempt, the store for other hosts' ranks."""
        if self.zygote is None:
            return set()
        zygote = self.zygote.process.pid
        if self.store_attempt is not None and self.store_pid is None:  # it may be there already, and be told soon
            return {zygote} | processes.descendants(processes.all_processes(), [zygote])
        return {zygote} | ({self.store_pid} if self.store_pid else set())

    def _end_attempt(self, wait_for_forks: bool = True) -> None:
        self._end_store()
        self.ranks.end(wait_for_forks)

    def _end_store(self) -> None:
        self.store_attempt = None
        if self.store_pid:
            processes.kill(self.store_pid, signal.SIGKILL)
            self.store_pid = None
        if self.waiting_store:
            _, listener = self.waiting_store
            self.selector.unregister(listener.fileno())
            listener.close()
            self.waiting_store = None
