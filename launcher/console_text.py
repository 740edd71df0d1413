"""Worker output as lines for people: prefix, folding of equal lines, escapes, shortening. Pure."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

MAX_LINE_CHARACTERS = 1000
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
RESET = "\x1b[0m"


def clean(raw: bytes, colour: bool) -> str:
    """A line that cannot do anything to a terminal: control characters escaped, colours kept where wanted.

    Of a line with carriage returns (a progress bar) the last state remains; a long line is shortened.
    """
    text = raw.rstrip(b"\r").rpartition(b"\r")[2].decode(errors="backslashreplace")
    hidden = len(text) - MAX_LINE_CHARACTERS
    if hidden > 0:
        text = f"{text[:MAX_LINE_CHARACTERS]} … ({hidden} more characters, in the log)"
    if "\x1b" not in text:
        return _CONTROL.sub(_escape, text)
    parts = _COLOUR.split(text)
    codes = [*_COLOUR.findall(text), ""]
    kept = "".join(
        _CONTROL.sub(_escape, part) + (code if colour else "") for part, code in zip(parts, codes, strict=True)
    )
    return kept + (RESET if colour and len(codes) > 1 else "")


def escape(text: str) -> str:
    """One line of the launcher's own that may quote a host or a worker: no control character stays."""
    return _CONTROL.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    return match.group().encode("unicode_escape").decode()


def fold_numbers(numbers: Iterable[int]) -> str:
    """0,1,2,5 -> "0-2,5"."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def fold_hosts(hosts: Iterable[str]) -> str:
    """gpu1, gpu2, gpu4 -> "gpu[1-2,4]"."""
    names = sorted(set(hosts))
    if len(names) == 1:
        return names[0]
    from ClusterShell.NodeSet import RESOLVER_NOGROUP, NodeSet

    folded = NodeSet(resolver=RESOLVER_NOGROUP)
    try:
        for name in names:
            folded.update(NodeSet(name, resolver=RESOLVER_NOGROUP))
    except Exception:  # a name that NodeSet would read as a pattern (an IPv6 address): a list is right too
        return ",".join(names)
    return str(folded)


@dataclass
class Source:
    """One rank's stream: `partial` is what came after the last newline."""

    host: str
    rank: int
    partial: bytes = b""
    lines: deque[str] = field(default_factory=deque)


def _newest_state(partial: bytes) -> bytes:
    """Of a line that a progress bar has drawn for hours, what can still be seen."""
    state = partial.rstrip(b"\r")
    if len(state) == len(partial) and b"\r" not in state:
        return partial
    return b"\r" + state.rpartition(b"\r")[2] + (b"\r" if len(state) < len(partial) else b"")


class Folder:
    """Holds lines for a moment, so that equal ones of many ranks become one; each rank's order is kept."""

    def __init__(self, emit: Callable[[frozenset[int], str], None], colour: bool) -> None:
        self._emit, self._colour = emit, colour
        self._sources: dict[int, Source] = {}

    def feed(self, host: str, rank: int, data: bytes) -> None:
        """Take bytes of one rank's stream."""
        source = self._sources.setdefault(rank, Source(host, rank))
        *lines, rest = (source.partial + data).split(b"\n")
        source.partial = _newest_state(rest)
        source.lines.extend(clean(line, self._colour) for line in lines)

    @property
    def waiting(self) -> bool:
        return any(source.lines for source in self._sources.values())

    def flush(self) -> None:
        """Emit all whole lines. The head of the longest queue goes first, with every rank whose head is equal."""
        queues = [source for _, source in sorted(self._sources.items()) if source.lines]
        while queues:
            text = max(queues, key=lambda source: len(source.lines)).lines[0]
            group = [source for source in queues if source.lines[0] == text]
            for source in group:
                source.lines.popleft()
            self._emit(frozenset(source.rank for source in group), text)
            if not all(source.lines for source in group):
                queues = [source for source in queues if source.lines]

    def finish(self) -> None:
        """Emit everything, last lines without a newline too."""
        for source in self._sources.values():
            if source.partial:
                source.lines.append(clean(source.partial, self._colour))
                source.partial = b""
        self.flush()

    def progress(self) -> Iterator[tuple[int, str]]:
        """(rank, newest state) of every line that a progress bar is still drawing."""
        for source in self._sources.values():
            if b"\r" in source.partial:
                yield source.rank, clean(source.partial, False)


class Prefixer:
    """The fast way, for a pipe: whole lines, each behind its prefix, in chunks. Nothing is changed or folded."""

    def __init__(self, prefix: bytes) -> None:
        self.prefix = prefix  # may change between calls: a time of day
        self._partial: list[bytes] = []

    def feed(self, data: bytes) -> bytes:
        """What can be written now."""
        cut = data.rfind(b"\n") + 1
        if not cut:
            self._partial.append(data)
            return b""
        whole = b"".join([*self._partial, data[: cut - 1]])
        self._partial = [data[cut:]] if cut < len(data) else []
        return b"".join((self.prefix, whole.replace(b"\n", b"\n" + self.prefix), b"\n"))

    def finish(self) -> bytes:
        """The last line, if it had no newline."""
        rest, self._partial = b"".join(self._partial), []
        return self.prefix + rest + b"\n" if rest else b""
