"""What the console draws on: a terminal, a pipe, or JSON lines. All of them may block; nobody waits for them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from dstrain.launcher.console_text import Folder, Prefixer, escape, fold_hosts, fold_numbers
from dstrain.launcher.console_views import start_line
from dstrain.launcher.run_dir import RunDir
from dstrain.runtime.spec.frames import Stream

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
        return escape(f"dstrain: {message['text']}")
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
        whole = self._new_events().rpartition(b"\n")
        if whole[1]:
            self._at += len(whole[0]) + 1
            write_all(1, whole[0] + b"\n")
        return 0.5

    def _new_events(self) -> bytes:
        try:
            with self._events.open("rb") as file:
                file.seek(self._at)
                return file.read()
        except FileNotFoundError:
            return b""  # the supervisor has not come to it yet

    def finish(self) -> None:
        for log, rest in self._partial.values():
            if rest:
                self._line(log, rest)
        self.tick()


class TerminalScreen:
    """For a person: colours, folding, one status line for progress bars.

    fd: the terminal. speaks: the launcher's own words come here too.
    """

    def __init__(self, options: ConsoleOptions, fd: int = 1, speaks: bool = True) -> None:
        self._options, self._fd, self._speaks = options, fd, speaks
        self._clever = os.environ.get("TERM", "dumb") != "dumb"  # it can erase a line
        self._colour = self._clever and not os.environ.get("NO_COLOR")
        self._folders = {fd: Folder(self._emit, self._colour) for fd in (1, 2)}
        self._hosts: dict[int, str] = {}
        self._order: dict[str, int] = {}
        self._world = 0
        self._due: float | None = None
        self._status = ""
        self._lines: list[str] = []

    def _emit(self, ranks: frozenset[int], text: str) -> None:
        self._lines.append(f"{self._prefix(ranks)}{text}")

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
            self._order = {host: number for number, host in enumerate(message["hosts"])}
        if self._speaks and (text := plain_message(message)):
            self._write([f"\x1b[2m{text}\x1b[0m" if self._colour else text], "")

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
        if bars and self._clever:
            width = os.get_terminal_size(self._fd).columns or 80
            rank, text = bars[0]
            status = f"[{self._hosts[rank]}:{rank}] {text}"[: width - 1]
        lines, self._lines = self._lines, []
        if lines or status != self._status:
            self._write(lines, status)

    def _write(self, lines: list[str], status: str) -> None:
        erase = "\r\x1b[K" if self._status else ""
        self._status = status
        text = erase + "".join(f"{line}\n" for line in lines) + status
        write_all(self._fd, text.encode(errors="backslashreplace"))

    def finish(self) -> None:
        for folder in self._folders.values():
            folder.finish()
        lines, self._lines = self._lines, []
        self._write(lines, "")


class MixedScreen:
    """One of stdout and stderr is a terminal, the other is not: each gets its own form."""

    def __init__(self, options: ConsoleOptions, terminal: int) -> None:
        self._fd = terminal
        self._terminal, self._pipe = TerminalScreen(options, terminal, speaks=terminal == 2), PipeScreen(options)

    def output(self, log: Mapping[str, Any], data: bytes) -> None:
        screen: Screen = self._terminal if descriptor(log["stream"]) == self._fd else self._pipe
        screen.output(log, data)

    def message(self, message: Mapping[str, Any]) -> None:
        self._terminal.message(message)
        if self._fd != 2:
            self._pipe.message(message)

    def tick(self) -> float | None:
        return self._terminal.tick()

    def finish(self) -> None:
        self._terminal.finish()
        self._pipe.finish()


def make_screen(options: ConsoleOptions) -> Screen:
    """What suits the descriptors that we have."""
    terminals = [fd for fd in (1, 2) if os.isatty(fd)]
    if len(terminals) == 1:
        return MixedScreen(options, terminals[0])
    return TerminalScreen(options) if terminals else PipeScreen(options)
