"""The console: the process in the foreground. It shows what the supervisor tells and passes on what the user wants.

It reads the workers' output from the log files, as far as it has been told that they have grown; so it can be
stopped, slow, or gone, and no step of the training waits for it.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from dstrain.launcher.console_link import parse
from dstrain.launcher.console_text import Folder, Prefixer, fold_hosts, fold_numbers
from dstrain.launcher.console_views import show_plan, show_problems, show_result, start_line
from dstrain.launcher.run_dir import RunDir
from dstrain.runtime.spec.frames import Stream

READ_BYTES = 1 << 20
FOLD_S = 0.1  # equal lines of ranks that are this much apart become one
COLOURS = (36, 33, 35, 32, 34, 96, 93, 95, 92, 94)


@dataclass(frozen=True)
class ConsoleOptions:
    """ranks: show only these; None: all."""

    ranks: frozenset[int] | None = None
    quiet: bool = False
    timestamps: bool = False
    json: bool = False


class Screen(Protocol):
    """Where output and messages go."""

    def output(self, log: Mapping[str, Any], data: bytes) -> None: ...
    def message(self, message: Mapping[str, Any]) -> None: ...
    def tick(self) -> float | None:
        """Draw what has waited; seconds until the next call, None if there is nothing to wait for."""

    def finish(self) -> None: ...


def write_all(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def descriptor(stream: int) -> int:
    return 2 if stream == Stream.STDERR else 1


class PipeScreen:
    """For a pipe or a file: every line, behind `[host:rank] `, nothing else."""

    def __init__(self, options: ConsoleOptions) -> None:
        self._options = options
        self._prefixers: dict[int, tuple[int, Prefixer]] = {}

    def output(self, log: Mapping[str, Any], data: bytes) -> None:
        prefix = f"[{log['host']}:{log['rank']}] ".encode()
        if self._options.timestamps:
            prefix = time.strftime("%H:%M:%S ").encode() + prefix
        entry = self._prefixers.setdefault(log["index"], (descriptor(log["stream"]), Prefixer(prefix)))
        entry[1].prefix = prefix
        write_all(entry[0], entry[1].feed(data))

    def message(self, message: Mapping[str, Any]) -> None:
        if text := plain_message(message):
            write_all(2, f"{text}\n".encode())

    def tick(self) -> None:
        return None

    def finish(self) -> None:
        for fd, prefixer in self._prefixers.values():
            write_all(fd, prefixer.finish())


def plain_message(message: Mapping[str, Any]) -> str | None:
    """The launcher's own words for a message that is one line."""
    if message["kind"] == "note":
        return f"dstrain: {message['text']}"
    if message["kind"] == "start":
        return start_line(message)
    return None


class JsonScreen:
    """One JSON object a line on stdout: output, notes, the runtime's events, the final report."""

    def __init__(self, run: RunDir) -> None:
        self._events, self._at = run.events, 0
        self._partial: dict[int, tuple[Mapping[str, Any], bytes]] = {}

    def output(self, log: Mapping[str, Any], data: bytes) -> None:
        *lines, rest = (self._partial.get(log["index"], (log, b""))[1] + data).split(b"\n")
        self._partial[log["index"]] = (log, rest)
        for line in lines:
            self._line(log, line)

    def _line(self, log: Mapping[str, Any], line: bytes) -> None:
        stream = "stderr" if log["stream"] == Stream.STDERR else "stdout"
        text = line.decode(errors="backslashreplace")
        self._print({"kind": "output", "host": log["host"], "rank": log["rank"], "stream": stream, "line": text})

    def message(self, message: Mapping[str, Any]) -> None:
        self.tick()
        self._print(message)

    def _print(self, value: Mapping[str, Any]) -> None:
        write_all(1, (json.dumps(value) + "\n").encode())

    def tick(self) -> float:
        with self._events.open("rb") as file:
            file.seek(self._at)
            whole = file.read().rpartition(b"\n")
        if whole[1]:
            self._at += len(whole[0]) + 1
            write_all(1, whole[0] + b"\n")
        return 0.5

    def finish(self) -> None:
        for log, rest in self._partial.values():
            if rest:
                self._line(log, rest)
        self.tick()


class TerminalScreen:
    """For a person: colours, folding, one status line for progress bars."""

    def __init__(self, options: ConsoleOptions) -> None:
        self._options = options
        self._colour = "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
        self._folders = {fd: Folder(self._emitter(fd), self._colour) for fd in (1, 2)}
        self._hosts: dict[int, str] = {}
        self._order: dict[str, int] = {}
        self._world = 0
        self._due: float | None = None
        self._status = ""
        self._lines: list[str] = []

    def _emitter(self, fd: int) -> Any:
        return lambda ranks, text: self._lines.append(f"{self._prefix(ranks)}{text}")

    def _prefix(self, ranks: frozenset[int]) -> str:
        hosts = {self._hosts[rank] for rank in ranks}
        label = f"[{fold_hosts(hosts)}:{fold_numbers(ranks)}]"
        if len(ranks) == self._world > 1:
            label = f"[all {self._world}]"
        if self._colour:
            number = COLOURS[self._order[next(iter(hosts))] % len(COLOURS)] if len(hosts) == 1 else 1
            label = f"\x1b[{number}m{label}\x1b[0m"
        stamp = time.strftime("%H:%M:%S ") if self._options.timestamps else ""
        return f"{stamp}{label} "

    def output(self, log: Mapping[str, Any], data: bytes) -> None:
        self._hosts[log["rank"]] = log["host"]
        self._order.setdefault(log["host"], len(self._order))
        self._folders[descriptor(log["stream"])].feed(log["host"], log["rank"], data)
        if self._due is None:
            self._due = time.monotonic() + FOLD_S

    def message(self, message: Mapping[str, Any]) -> None:
        self._draw()
        if message["kind"] == "start":
            self._world = message["world_size"]
        if text := plain_message(message):
            dim = f"\x1b[2m{text}\x1b[0m" if self._colour else text
            self._write([dim], "")

    def tick(self) -> float | None:
        if self._due is None:
            return None
        wait = self._due - time.monotonic()
        if wait > 0:
            return wait
        self._due = None
        self._draw()
        return None

    def _draw(self) -> None:
        for folder in self._folders.values():
            folder.flush()
        bars = [bar for folder in self._folders.values() for bar in folder.progress()]
        status = ""
        if bars:
            width = os.get_terminal_size().columns if os.isatty(1) else 80
            rank, text = bars[0]
            status = f"[{self._hosts[rank]}:{rank}] {text}"[: width - 1]
        lines, self._lines = self._lines, []
        if lines or status != self._status:
            self._write(lines, status)

    def _write(self, lines: list[str], status: str) -> None:
        erase = "\r\x1b[K" if self._status else ""
        self._status = status
        text = erase + "".join(f"{line}\n" for line in lines) + status
        write_all(1, text.encode(errors="backslashreplace"))

    def finish(self) -> None:
        for folder in self._folders.values():
            folder.finish()
        self._status, lines = "", self._lines
        self._lines = []
        write_all(1, ("\r\x1b[K" if self._colour else "").encode() + "".join(f"{line}\n" for line in lines).encode())


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
        if options.json:
            self._screen: Screen = JsonScreen(run)
        elif os.isatty(1):
            self._screen = TerminalScreen(options)
        else:
            self._screen = PipeScreen(options)

    def run(self) -> int:
        """Until the supervisor has said how it ended; returns the exit code."""
        signal.signal(signal.SIGINT, lambda *_: self._interrupt())
        signal.signal(signal.SIGTERM, lambda *_: self._ask("terminate"))
        signal.signal(signal.SIGHUP, lambda *_: self._ask("hangup"))
        self._link.setblocking(False)
        while self._read_link():
            wait_s = self._screen.tick()
            select.select([self._link], [], [], wait_s)
        self._screen.finish()
        return self._end()

    def _interrupt(self) -> None:
        self._interrupts += 1
        words = "stopping; Ctrl-C again kills at once" if self._interrupts == 1 else "killing"
        os.write(2, f"\ndstrain: {words}\n".encode())
        self._ask("interrupt")

    def _ask(self, word: str) -> None:
        try:
            self._link.send(f"{word}\n".encode())
        except OSError:
            pass  # the supervisor is ending by itself

    def _read_link(self) -> bool:
        """Take what the supervisor says; False at its end."""
        while True:
            try:
                data = self._link.recv(1 << 16)
            except BlockingIOError:
                return True
            except OSError:
                return False
            if not data:
                return False
            self._buffer += data
            *lines, rest = bytes(self._buffer).split(b"\n")
            self._buffer = bytearray(rest)
            for line in lines:
                self._take(parse(line))

    def _take(self, message: Mapping[str, Any]) -> None:
        match message["kind"]:
            case "file":
                self._files[message["index"]] = message
            case "grown":
                for index, length in message["lengths"]:
                    self._show_log(self._files[index], length)
            case "result":
                self._result = message["report"]
            case "plan":
                self._plan = message["plan"]
            case "problems":
                self._problems = message["problems"]
            case _ if not self._options.quiet or self._options.json:
                self._screen.message(message)

    def _show_log(self, log: Mapping[str, Any], length: int) -> None:
        if self._options.quiet or (self._options.ranks is not None and log["rank"] not in self._options.ranks):
            return
        position = self._shown.get(log["index"], 0)
        with open(log["path"], "rb") as file:  # noqa: PTH123 - a hot path
            while position < length:
                data = os.pread(file.fileno(), min(READ_BYTES, length - position), position)
                if not data:
                    break
                position += len(data)
                self._screen.output(log, data)
        self._shown[log["index"]] = position

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
