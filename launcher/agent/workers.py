"""Starting ranks on this host: forked by the zygote, or as plain programs. Standard library only."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from dstrain.launcher.agent.processes import kill, read_proc
from dstrain.runtime.spec.file_frames import Chunk
from dstrain.runtime.spec.frames import (
    Ended,
    Fork,
    Forked,
    FrameReader,
    HoldStore,
    Message,
    Output,
    PreloadFacts,
    Prepare,
    ProcessSpec,
    Stream,
    encode_message,
)
from dstrain.runtime.spec.linux import die_with_parent

PIPE_BYTES = 1 << 20  # the most that Linux gives a user by default; a burst of lines then rarely waits for us
ZYGOTE_LOG_BYTES = 16384


@dataclass
class Worker:
    """One rank of the running attempt. `status`: None while it runs; as in subprocess after."""

    spec: ProcessSpec
    pipes: dict[int, Stream]  # our read ends that are still open
    stacks: int  # a file that receives the rank's stack on STACK_SIGNAL
    preloaded: bool
    pid: int | None = None
    status: int | None = None
    signalled: bool = False  # we asked it to end
    output_bytes: int = field(default=0)

    @property
    def running(self) -> bool:
        return self.pid is not None and self.status is None

    @property
    def to_come(self) -> bool:
        """Has the zygote still to fork it?"""
        return self.preloaded and self.pid is None and self.status is None


def open_worker(spec: ProcessSpec, preloaded: bool) -> tuple[Worker, list[int]]:
    """A worker with its pipes, and the four descriptors that the process itself gets."""
    pipes, ends = {}, []
    for stream in (Stream.STDOUT, Stream.STDERR, Stream.EVENTS):
        read, write = os.pipe()
        _enlarge(write)
        os.set_blocking(read, False)
        pipes[read] = stream
        ends.append(write)
    stacks = os.memfd_create("stacks")
    return Worker(spec, pipes, stacks, preloaded), [*ends, os.dup(stacks)]


def pipe_bytes(pipe: int) -> int:
    """What the pipe can hold."""
    return fcntl.fcntl(pipe, fcntl.F_GETPIPE_SZ)


def _enlarge(pipe: int) -> None:
    with contextlib.suppress(OSError):  # over the user's soft limit of pipe pages; a new pipe then has 8 KiB, or 4
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)


class Zygote:
    """The process that has imported torch, and the socket to it."""

    def __init__(
        self, python: str, package_root: str, prepare: Prepare, optimizer: bool, environment: Mapping[str, str]
    ) -> None:
        ours, theirs = socket.socketpair()
        log_read, log_write = os.pipe()
        code = (
            f"import sys; sys.path[0] = {package_root!r}; from dstrain.runtime.zygote import main; "
            f"main({theirs.fileno()}, {prepare.requirements!r}, {optimizer})"
        )
        agent = os.getpid()
        try:
            self.process = subprocess.Popen(
                [python, "-c", code, " " * 200],  # room for the title that each rank writes over it
                cwd=prepare.cwd,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=log_write,
                stderr=log_write,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                preexec_fn=lambda: die_with_parent(agent),
            )
        except BaseException:
            ours.close()
            os.close(log_read)
            raise
        finally:
            theirs.close()
            os.close(log_write)
        self.socket, self.log_fd = ours, log_read
        os.set_blocking(log_read, False)
        self.log = b""
        self.ready = False
        self._reader = FrameReader()

    def read(self) -> list[Message] | None:
        """What it says, now that the socket is readable; None when it has gone."""
        try:
            data = self.socket.recv(1 << 16)
        except OSError:
            return None
        if not data:
            return None
        messages = [frame for frame in self._reader.feed(data) if not isinstance(frame, Output | Chunk)]
        self.ready |= any(isinstance(message, PreloadFacts) for message in messages)
        return messages

    def read_log(self) -> bool:
        """Keep the end of what it prints (an import's warnings, an error); False at its end."""
        try:
            data = os.read(self.log_fd, 1 << 16)
        except BlockingIOError:
            return True
        self.log = (self.log + data)[-ZYGOTE_LOG_BYTES:]
        return bool(data)

    def close(self) -> None:
        self.socket.close()
        os.close(self.log_fd)

    def fork(self, prepared: Fork, descriptors: list[int]) -> None:
        """Ask for a rank; `Forked` answers. Our copies of the descriptors are closed."""
        self._send(prepared, descriptors)

    def hold_store(self, request: HoldStore, listener: socket.socket) -> None:
        """Ask for the store's process on a socket that already listens; our copy is closed."""
        listener.setblocking(True)
        self._send(request, [listener.detach()])

    def _send(self, message: Message, descriptors: list[int]) -> None:
        data = encode_message(message)
        try:
            sent = socket.send_fds(self.socket, [data], descriptors)
            self.socket.sendall(data[sent:])
        finally:
            for fd in descriptors:
                os.close(fd)


def spawn_program(
    command: list[str], cwd: str, environment: Mapping[str, str], worker: Worker, descriptors: list[int]
) -> None:
    """Start a plain program as this rank, in a session of its own. Raises OSError as exec does."""
    out, err, events, _ = descriptors
    agent = os.getpid()
    try:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env={**environment, **worker.spec.environment, "DSTRAIN_EVENT_FD": str(events)},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            pass_fds=[events],
            start_new_session=True,
            preexec_fn=lambda: _become_program(agent),
        )
    finally:
        for fd in descriptors:
            os.close(fd)
    worker.pid = process.pid
    process.returncode = 0  # reaped by the agent, which adopts strangers too; Popen must not wait for it


def _become_program(agent: int) -> None:
    """In the child before exec: signals that the warden ignores would stay ignored in the program."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)
    die_with_parent(agent)


def ask_to_end(worker: Worker, whole_group: bool) -> None:
    """SIGTERM: to the rank alone, so that its data-loading children do not fail before it has saved; a program
    that is not ours gets it with its group, since a shell passes no signal on to what it runs."""
    if not worker.running or worker.pid is None:
        return
    worker.signalled = True
    if whole_group:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(worker.pid, signal.SIGTERM)
    else:
        kill(worker.pid, signal.SIGTERM)
    kill(worker.pid, signal.SIGCONT)


def handle_zygote(
    messages: list[Message], on_fork: Callable[[Forked], None], on_end: Callable[[int, int, int], None]
) -> list[PreloadFacts]:
    """Dispatch what the zygote said: forks and ends to the callbacks; its facts are returned."""
    facts = []
    for message in messages:
        if isinstance(message, Forked):
            on_fork(message)
        elif isinstance(message, Ended):
            on_end(message.rank, message.pid, message.status)
        elif isinstance(message, PreloadFacts):
            facts.append(message)
    return facts


def oom_kills() -> int:
    """How many processes the kernel has killed for lack of memory since boot (any cgroup)."""
    try:
        return int(read_proc("/proc/vmstat").partition(b"\noom_kill ")[2].partition(b"\n")[0])
    except (OSError, ValueError):
        return 0
