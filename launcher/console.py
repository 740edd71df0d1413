"""The console: the process in the foreground. It shows what the supervisor tells and passes on what the user wants.

It reads the workers' output from the log files, as far as it has been told that they have grown; so it can be
stopped, slow, or gone, and no step of the training waits for it.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from dstrain.launcher.console_link import parse
from dstrain.launcher.console_screens import ConsoleOptions, JsonScreen, make_screen
from dstrain.launcher.console_views import show_plan, show_problems, show_result
from dstrain.launcher.run_dir import RunDir

__all__ = ["Console", "ConsoleOptions", "exit_quietly_on_closed_pipe"]

READ_BYTES = 1 << 18


class Console:
    def __init__(self, link: socket.socket, supervisor: int, run: RunDir, options: ConsoleOptions) -> None:
        self._link, self._supervisor, self._run, self._options = link, supervisor, run, options
        self._buffer = bytearray()
        self._files: dict[int, Mapping[str, Any]] = {}
        self._shown: dict[int, int] = {}
        self._result: Mapping[str, Any] | None = None
        self._problems: list[Mapping[str, Any]] = []
        self._plan: Mapping[str, Any] | None = None
        self._interrupts = 0
        self._screen = JsonScreen(run) if options.json else make_screen(options)

    def run(self) -> int:
        """Until the supervisor has said how it ended; returns the exit code."""
        signal.signal(signal.SIGINT, lambda *_: self._interrupt())
        signal.signal(signal.SIGTERM, lambda *_: self._ask("terminate"))
        signal.signal(signal.SIGHUP, lambda *_: self._ask("hangup"))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
        self._link.setblocking(False)
        while self._read_link():
            wait_s = self._screen.tick()
            select.select([self._link], [], [], wait_s)
        self._screen.finish()
        return self._end()

    def _interrupt(self) -> None:
        self._interrupts += 1
        self._ask("interrupt")  # first: a terminal that is held up would hold this up
        words = "stopping; Ctrl-C again kills at once" if self._interrupts == 1 else "killing"
        os.write(2, f"\ndstrain: {words}\n".encode())

    def _ask(self, word: str) -> None:
        with contextlib.suppress(OSError):  # the supervisor is ending by itself
            self._link.send(f"{word}\n".encode())

    def _read_link(self) -> bool:
        """Take one piece of what the supervisor says; False at its end."""
        try:
            data = self._link.recv(1 << 16)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self._buffer += data
        *lines, rest = bytes(self._buffer).split(b"\n")
        self._buffer = bytearray(rest)
        for line in lines:
            self._take(parse(line))
        return bool(data)

    def _take(self, message: Mapping[str, Any]) -> None:
        match message["kind"]:
            case "file":
                self._files[message["index"]] = message
            case "grown":
                self._show_logs([(self._files[index], length) for index, length in message["lengths"]])
            case "result":
                self._result = message["report"]
            case "plan":
                self._plan = message["plan"]
            case "problems":
                self._problems = message["problems"]
            case _ if not self._options.quiet or self._options.json:
                self._screen.message(message)

    def _show_logs(self, grown: Sequence[tuple[Mapping[str, Any], int]]) -> None:
        """Rounds of one piece of each log: equal lines of many ranks stay near each other, and memory small."""
        ranks = self._options.ranks
        if self._options.quiet:
            return
        waiting = [(log, length) for log, length in grown if ranks is None or log["rank"] in ranks]
        while waiting:
            waiting = [(log, length) for log, length in waiting if self._show_piece(log, length)]
            self._screen.tick()

    def _show_piece(self, log: Mapping[str, Any], length: int) -> bool:
        """The next bytes of a log; False when it has been shown up to `length`."""
        position = self._shown.get(log["index"], 0)
        try:
            fd = os.open(log["path"], os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False  # somebody has deleted the log of a running job: their wish, and no reason to end it
        try:
            data = os.pread(fd, min(READ_BYTES, length - position), position)
        finally:
            os.close(fd)
        if data:
            self._screen.output(log, data)
        self._shown[log["index"]] = position + len(data)
        return bool(data) and position + len(data) < length

    def _end(self) -> int:
        _, status = os.waitpid(self._supervisor, 0)
        if self._result is None:
            code = os.waitstatus_to_exitcode(status)
            code = 128 - code if code < 0 else code or 1
            cause = {
                "headline": f"the supervisor of this run ended without a report (status {code})",
                "detail": "",
                "remedy": f"every host ends its own ranks; see {self._run.path}/supervisor.log",
            }
            self._result = {"exit_code": code, "origin": "launcher", "cause": cause}
            with contextlib.suppress(OSError):  # a full disk: what is said below must do
                self._run.write_json("report.json", self._result)
        if self._plan is not None:
            show_plan(self._plan, self._options.json)
        elif self._options.json:
            if self._problems:
                self._screen.message({"kind": "problems", "problems": self._problems})
            self._screen.message({"kind": "result", **self._result})
        elif self._problems:
            show_problems(self._problems)
        elif not (self._options.quiet and self._result["cause"] is None):
            show_result(self._result, str(self._run.path))
        return int(self._result["exit_code"])


def exit_quietly_on_closed_pipe() -> None:
    """`dstrain run … | head`: end as every filter does; the supervisor sees us go and ends the run."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(128 + signal.SIGPIPE)
