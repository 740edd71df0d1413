"""The supervisor's one thread: it waits for hosts, console and signals, and for nothing else.

`wait(condition)` takes in what happens until the condition holds, and raises `StopRequested` once when somebody wants
the run to end. Other threads reach it by `post` and `wake`.
"""

from __future__ import annotations

import contextlib
import queue
import selectors
import socket
import time
from collections.abc import Callable

from dstrain.launcher.console_link import ConsoleLink
from dstrain.launcher.logs import LogFile
from dstrain.runtime.spec.exit_codes import ExitCode

LOOK_S = 1.0
LOG_BATCH_S = 0.02  # growth of logs is told to the console in batches: 50 a second at the most
STOP_WORDS = {
    "interrupt": ExitCode.INTERRUPTED,
    "terminate": ExitCode.TERMINATED,
    "hangup": ExitCode.HANGUP,
}


class StopRequested(Exception):
    """Somebody wants the run to end: Ctrl-C, SIGTERM, a closed terminal."""

    def __init__(self, code: ExitCode) -> None:
        super().__init__(code.name)
        self.code = code


class EventLoop:
    """take: what is done with each (index, message) posted. look: called once a second.

    stop_code, stop_times: what console and signals have asked for; twice means at once.
    """

    def __init__(
        self,
        console: ConsoleLink,
        take_grown: Callable[[], list[LogFile]],
        take: Callable[[int, object], None],
        look: Callable[[], None],
    ) -> None:
        self._console, self._take_grown, self._take, self._look = console, take_grown, take, look
        self.stop_code: ExitCode | None = None
        self.stop_times = 0
        self._stop_raised = False
        self._inbox: queue.SimpleQueue[tuple[int, object]] = queue.SimpleQueue()
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._next_look = self._next_logs = time.monotonic()
        self._logs_waiting = False
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake_read, selectors.EVENT_READ)
        self._mask = selectors.EVENT_READ
        self._selector.register(console.socket, self._mask)

    # --- from other threads and signal handlers ----------------------------------------------------------------

    def post(self, index: int, message: object) -> None:
        """Have the loop take a message."""
        self._inbox.put((index, message))
        self.wake()

    def wake(self) -> None:
        """Something has changed: messages, logs, a stop."""
        with contextlib.suppress(BlockingIOError):
            self._wake_write.send(b"x")

    def request_stop(self, code: ExitCode) -> None:
        """End the run; the first reason counts."""
        self.stop_code = self.stop_code or code
        self.stop_times += 1
        self.wake()

    # --- the loop ----------------------------------------------------------------------------------------------

    def wait(self, until: Callable[[], bool], timeout_s: float | None = None, stoppable: bool = True) -> bool:
        """Take in what happens until the condition holds; False when the time is over first."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            self._take_messages()
            if time.monotonic() >= self._next_look:
                self._next_look = time.monotonic() + LOOK_S
                self._look()
            if stoppable and self.stop_code is not None and not self._stop_raised:
                self._stop_raised = True
                raise StopRequested(self.stop_code)
            if until():
                return True
            now = time.monotonic()
            if deadline is not None and now >= deadline:
                return False
            self._sleep(min(self._next_look, deadline or self._next_look) - now)

    def _take_messages(self) -> None:
        while True:
            try:
                index, message = self._inbox.get_nowait()
            except queue.Empty:
                return
            self._take(index, message)

    def _sleep(self, seconds: float) -> None:
        if self._logs_waiting:
            seconds = min(seconds, self._next_logs - time.monotonic())
        self._watch_console()
        for key, events in self._selector.select(max(0.0, seconds)):
            if key.fileobj is self._wake_read:
                with contextlib.suppress(BlockingIOError):
                    self._wake_read.recv(4096)
                self._logs_waiting = True
            elif events & selectors.EVENT_READ:
                for word in self._console.receive():
                    self.request_stop(STOP_WORDS[word])
        if self._logs_waiting and time.monotonic() >= self._next_logs:
            self._logs_waiting = False
            self._next_logs = time.monotonic() + LOG_BATCH_S
            self._console.grown(self._take_grown())
        self._console.flush()

    def _watch_console(self) -> None:
        if not self._mask:
            return
        if self._console.gone:
            self._mask = 0
            self._selector.unregister(self._console.socket)
            if self.stop_code is None:  # else it went because it was asked to, and the grace holds
                self.request_stop(ExitCode.HANGUP)
            return
        mask = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._console.wants_to_write else 0)
        if mask != self._mask:
            self._mask = mask
            self._selector.modify(self._console.socket, mask)
