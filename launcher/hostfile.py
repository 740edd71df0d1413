"""Hostfiles: read strictly, kept without loss.

    host [slots=N] [user=U] [port=P] [addr=A] [python=PATH] [key=PATH] [gpus=0,2,3] [transport=local|ssh] [spare]

A `#` at a word's start begins a comment. A `Hostfile` is its lines exactly as they were (comments, spacing,
newlines), each entry line together with what it means, so `parse_hostfile(text, source).render() == text`.
All problems of a file are raised together, one line each: `file:line:column: expected …, found …; fix`.
`hostfile_edit` changes one, `hostfile_store` reads and writes the file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from dstrain.launcher.host_grammar import (
    Conflict,
    Host,
    Problem,
    Transport,
    quoted,
    read_option,
    settle,
    split_option,
)
from dstrain.launcher.host_ranges import MAX_HOSTS, expand, split_outside_brackets
from dstrain.launcher.hostfile_store import read_text
from dstrain.runtime.spec.errors import HostfileError

__all__ = [
    "Entry",
    "Host",
    "Hostfile",
    "Line",
    "Transport",
    "Word",
    "load_hostfile",
    "parse_hostfile",
    "parse_hosts_expression",
]

MAX_SHOWN_PROBLEMS = 50

_WORD = re.compile(r"[^ \t]+")
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f]")  # everything but the tab
_UNUSABLE = re.compile(r"[^\t -~]")  # what an entry must not contain: control characters and all beyond ASCII


@dataclass(frozen=True)
class Word:
    """A word of a line and the index of its first character there."""

    text: str
    start: int

    @property
    def end(self) -> int:
        """The index behind the last character."""
        return self.start + len(self.text)


@dataclass(frozen=True)
class Entry:
    """What an entry line says: the pattern, its options by key, and the hosts that the pattern stands for."""

    pattern: Word
    options: Mapping[str, Word]
    hosts: tuple[Host, ...]

    @property
    def end(self) -> int:
        """The index behind the entry's last word."""
        return max(word.end for word in (self.pattern, *self.options.values()))


@dataclass(frozen=True)
class Line:
    """One line: its text, how it ends (`\\n`, `\\r\\n`, or nothing at the end), and its entry, if any."""

    text: str
    newline: str
    entry: Entry | None


@dataclass(frozen=True)
class Hostfile:
    """A hostfile that was read: `source` names it in messages, `lines` are all of it."""

    source: str
    lines: tuple[Line, ...]

    @property
    def hosts(self) -> tuple[Host, ...]:
        """All hosts in the file's order, ranges expanded."""
        return tuple(host for line in self.lines if line.entry for host in line.entry.hosts)

    def render(self) -> str:
        """The text, exactly as it was read."""
        return "".join(line.text + line.newline for line in self.lines)


@dataclass
class _Report:
    """The problems found so far, and where each host was first named."""

    source: str
    problems: list[str] = field(default_factory=list)
    seen: dict[str, tuple[int, str]] = field(default_factory=dict)

    def add(self, line: int, start: int, problem: Problem) -> None:
        where = f"{self.source}:{line}:{start + problem.offset + 1}"
        error = HostfileError.mismatch(where, problem.expected, problem.found, problem.fix)
        self.problems.append(str(error))

    def admit(self, line: int, pattern: Word, hosts: tuple[Host, ...]) -> None:
        """Each host once, by its name (names differ in more than case), and no more than MAX_HOSTS."""
        names = [host.name.lower() for host in hosts]
        before = len(self.seen)
        twice = next((name for name in names if name in self.seen), None)
        for name in names:
            self.seen.setdefault(name, (line, pattern.text))
        if twice is not None:
            first_line, first_pattern = self.seen[twice]
            found = f"{quoted(twice)} again (first on line {first_line}, as {quoted(first_pattern)})"
            problem = Problem("each host once", found, "remove one of the two; slots=N gives it more ranks")
            self.add(line, pattern.start, problem)
        if before <= MAX_HOSTS < len(self.seen):
            problem = Problem(f"at most {MAX_HOSTS:,} hosts", f"{len(self.seen):,}", "write several hostfiles")
            self.add(line, pattern.start, problem)

    def raise_any(self) -> None:
        """One error for all problems."""
        if not self.problems:
            return
        more = len(self.problems) - MAX_SHOWN_PROBLEMS
        rest = [f"{self.source}: and {more} more"] if more > 0 else []
        raise HostfileError("\n".join(self.problems[:MAX_SHOWN_PROBLEMS] + rest))


def parse_hostfile(text: str, source: str) -> Hostfile:
    """Read a hostfile's text. Raises HostfileError with all its problems, one line each."""
    report = _Report(source)
    lines = []
    for number, (body, newline) in enumerate(_split_lines(text), start=1):
        lines.append(Line(body, newline, _parse_line(body, number, report)))
    report.raise_any()
    return Hostfile(source, tuple(lines))


def load_hostfile(path: str | os.PathLike[str]) -> Hostfile:
    """Read a hostfile. Raises UsageError when it cannot be read, HostfileError for what it says."""
    return parse_hostfile(read_text(Path(path)), str(path))


def parse_hosts_expression(expression: str, source: str = "--hosts") -> tuple[Host, ...]:
    """Read `a:4,gpu[1-3]:8,bob@c,[fd00::1]:2`: comma-separated `[user@]host[:slots]`.

    Raises HostfileError with all problems; the column counts from the expression's start.
    """
    report = _Report(source)
    bad = _UNUSABLE.search(expression)
    if bad is not None:
        report.add(1, bad.start(), _unusable(bad[0]))
    hosts: list[Host] = []
    start = 0
    for part in split_outside_brackets(expression, ",") if bad is None else ():
        try:
            pattern, found = _parse_part(part, start)
            report.admit(1, pattern, found)
            hosts += found
        except Problem as problem:
            report.add(1, start, problem)
        start += len(part) + 1
    report.raise_any()
    return tuple(hosts)


def _parse_part(part: str, start: int) -> tuple[Word, tuple[Host, ...]]:
    if not part.strip():
        raise Problem("a host", "nothing", "write host or host:slots between two commas")
    if part != part.strip():
        raise Problem("no spaces", quoted(part), "write a:4,b:4 without spaces")
    user, at, rest = part.rpartition("@")
    host_offset = len(user) + len(at)
    name, colon, slots = rest, "", ""
    if not rest.endswith("]"):
        name, colon, slots = rest.rpartition(":") if ":" in rest else (rest, "", "")
    hosts = _expand_at(name, host_offset)
    if at:
        hosts = _read_all(hosts, "user", user, 0)
    if colon:
        hosts = _read_all(hosts, "slots", slots, host_offset + len(name) + 1)
    return Word(name, start + host_offset), tuple(settle(h, transport_given=False) for h in hosts)


def _expand_at(pattern: str, offset: int) -> tuple[Host, ...]:
    try:
        return tuple(Host(name) for name in expand(pattern))
    except Problem as problem:
        raise problem.shifted(offset) from None


def _read_all(hosts: tuple[Host, ...], key: str, value: str, offset: int) -> tuple[Host, ...]:
    try:
        return tuple(read_option(host, key, value) for host in hosts)
    except Problem as problem:
        raise problem.shifted(offset) from None


def _split_lines(text: str) -> list[tuple[str, str]]:
    """(text, newline) of every line; only `\\n` and `\\r\\n` end one."""
    pieces = text.split("\n")
    lines = [(piece[:-1], "\r\n") if piece.endswith("\r") else (piece, "\n") for piece in pieces[:-1]]
    return [*lines, (pieces[-1], "")] if pieces[-1] else lines


def _parse_line(text: str, number: int, report: _Report) -> Entry | None:
    words = []
    comment = len(text)
    for match in _WORD.finditer(text):
        if match[0].startswith("#"):
            comment = match.start()
            break
        words.append(Word(match[0], match.start()))
    bad = _UNUSABLE.search(text, 0, comment) or _CONTROL.search(text)
    if bad is not None:
        report.add(number, bad.start(), _unusable(bad[0]))
        return None
    return _parse_entry(words, number, report) if words else None


def _unusable(character: str) -> Problem:
    if _CONTROL.fullmatch(character):
        return Problem("no control characters", quoted(character), "remove it")
    if character == "\ufeff":
        return Problem("UTF-8 without a byte-order mark", quoted(character), "save the file without one")
    return Problem("ASCII outside of comments", quoted(character), "retype the word in plain letters")


def _parse_entry(words: list[Word], number: int, report: _Report) -> Entry | None:
    pattern, *rest = words
    before = len(report.problems)
    names: tuple[str, ...] = ()
    options: dict[str, Word] = {}
    try:
        names = expand(pattern.text)
    except Problem as problem:
        report.add(number, pattern.start, problem)
    host = Host(names[0] if names else "unreadable")
    for word in rest:
        try:
            host = _read_word(host, word, options)
        except Problem as problem:
            report.add(number, word.start, problem)
    if len(report.problems) > before:
        return None
    try:
        if "addr" in options and len(names) > 1:
            raise Conflict("addr", "one host for one addr=", f"{len(names)}", "write a line for each of them")
        host = settle(host, transport_given="transport" in options)
    except Conflict as conflict:
        report.add(number, options[conflict.key].start, conflict)
        return None
    hosts = tuple(replace(host, name=name) for name in names)
    report.admit(number, pattern, hosts)
    return Entry(pattern, options, hosts)


def _read_word(host: Host, word: Word, options: dict[str, Word]) -> Host:
    key, value = split_option(word.text)
    if key in options:
        raise Problem(f"{key}= once", quoted(word.text), "remove one of the two")
    options[key] = word
    try:
        return read_option(host, key, value)
    except Problem as problem:
        raise problem.shifted(len(key) + 1) from None
