"""Changing a hostfile without loss: comments, order and spacing stay; only the named hosts' lines change.

    add_host(hostfile, ["gpu5", "slots=8"])       appends a line, in the file's own newline style
    remove_hosts(hostfile, ["gpu2"])              gpu[1-4] slots=8  # x   ->   gpu[1,3-4] slots=8  # x
    set_options(hostfile, "gpu2", ["slots=4"])    gpu[1-4] slots=8  # x   ->   gpu[1,3-4] slots=8  # x
                                                                               gpu2 slots=4
Each is pure and parses what it made, so a result always reads. `edit_file` does one on disk.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from dstrain.launcher.host_grammar import Problem, quoted, split_option
from dstrain.launcher.host_ranges import fold, resolve
from dstrain.launcher.hostfile import Entry, Hostfile, Line, parse_hostfile
from dstrain.launcher.hostfile_store import edit_text
from dstrain.runtime.spec.errors import HostfileError, UsageError

COMMAND_LINE = "command line"  # the source that messages name for what the user just typed


def edit_file(path: Path, edit: Callable[[Hostfile], Hostfile], *, create: bool = False) -> None:
    """Apply one edit to the file, atomically and alone; see [Note: how a hostfile is changed].

    Raises HostfileError or UsageError, and the file is then as it was.
    """
    edit_text(path, lambda text: edit(parse_hostfile(text, str(path))).render(), create=create)


def add_host(hostfile: Hostfile, words: Sequence[str]) -> Hostfile:
    """Append the entry made of `words`: the host (or a range), then key=value.

    Raises HostfileError for what is no entry, and for a host that is there already.
    """
    entry = _read_words(words)
    there = _line_numbers(hostfile)
    for host in entry.hosts:
        if host.name.lower() in there:
            found = f"{quoted(host.name)}, which {hostfile.source}:{there[host.name.lower()]} has"
            fix = f"change it with `dstrain hosts set {host.written_name} key=value`"
            raise HostfileError.mismatch(COMMAND_LINE, "a new host", found, fix)
    lines = list(hostfile.lines)
    ending = ""
    if not lines or lines[-1].newline:
        ending = _newline_of(hostfile)
    else:  # the last line has no newline: it needs one now, and the new last line has none
        lines[-1] = replace(lines[-1], newline=_newline_of(hostfile))
    return _reparsed(hostfile, [*lines, Line(" ".join(words), ending, None)])


def remove_hosts(hostfile: Hostfile, patterns: Sequence[str]) -> Hostfile:
    """Remove the named hosts: their lines, or their part of a line's range.

    Raises HostfileError for a host that is not there.
    """
    doomed = {name for pattern in patterns for name in _find(hostfile, pattern)}
    lines: list[Line] = []
    for line in hostfile.lines:
        if line.entry is None or not doomed & _names(line.entry):
            lines.append(line)
            continue
        kept = [host.name for host in line.entry.hosts if host.name.lower() not in doomed]
        lines += _spread(hostfile, line, _retargeted(line, line.entry, kept))
    return _reparsed(hostfile, lines)


def set_options(hostfile: Hostfile, pattern: str, assignments: Sequence[str]) -> Hostfile:
    """Set options of a host (or a range of them) by `key=value`; `key=` removes that option.

    A line that also names other hosts is split, and its comment stays with those. Raises HostfileError for a
    host that is not there and for options that cannot be.
    """
    changes = _read_changes(pattern, assignments)
    chosen = _find(hostfile, pattern)
    lines: list[Line] = []
    for line in hostfile.lines:
        if line.entry is None or not chosen & _names(line.entry):
            lines.append(line)
        else:
            lines += _with_changes(hostfile, line, line.entry, chosen, changes)
    return _reparsed(hostfile, lines)


def _with_changes(
    hostfile: Hostfile, line: Line, entry: Entry, chosen: set[str], changes: dict[str, str]
) -> list[Line]:
    """`line` with the options of the chosen hosts changed; several lines when only a part of it is chosen."""
    changed = _apply(line.text, entry, changes)
    kept = [host.name for host in entry.hosts if host.name.lower() not in chosen]
    if changed == line.text or not kept:
        return [replace(line, text=changed)]
    hit = [host.name for host in entry.hosts if host.name.lower() in chosen]
    without_comment = _apply(line.text[: entry.end], entry, changes)
    split_off = _retargeted(replace(line, text=without_comment), entry, hit)
    rest = _retargeted(line, entry, kept)
    # Hosts split off from the front go in front, so that the order of the hosts changes as little as it can.
    leading = entry.hosts[0].name.lower() in chosen and len(split_off) == 1
    return _spread(hostfile, line, [*split_off, *rest] if leading else [*rest, *split_off])


def _apply(text: str, entry: Entry, changes: dict[str, str]) -> str:
    """The entry's text with options replaced, removed (with the space before them), or added at its end."""
    added = [f" {key}={value}" for key, value in changes.items() if value and key not in entry.options]
    text = text[: entry.end] + "".join(added) + text[entry.end :]
    there = [(entry.options[key], key, value) for key, value in changes.items() if key in entry.options]
    for word, key, value in sorted(there, key=lambda item: item[0].start, reverse=True):
        before, after = text[: word.start], text[word.end :]
        text = f"{before}{key}={value}{after}" if value else before.rstrip(" \t") + after
    return text


def _retargeted(line: Line, entry: Entry, names: list[str]) -> list[str]:
    """The line's text for these hosts instead. Names that fold into several patterns take a line each."""
    head, tail = line.text[: entry.pattern.start], line.text[entry.pattern.end :]
    tail_end = max(entry.end - entry.pattern.end, 0)
    return [head + pattern + (tail if index == 0 else tail[:tail_end]) for index, pattern in enumerate(fold(names))]


def _spread(hostfile: Hostfile, line: Line, texts: list[str]) -> list[Line]:
    """Lines in the place of `line`: all end as it does, but only the file's last may lack its newline."""
    inner = line.newline or _newline_of(hostfile)
    return [Line(text, line.newline if index == len(texts) - 1 else inner, None) for index, text in enumerate(texts)]


def _newline_of(hostfile: Hostfile) -> str:
    """How the file ends its lines: as the last line that has a newline, `\\n` when none has."""
    return next((line.newline for line in reversed(hostfile.lines) if line.newline), "\n")


def _reparsed(hostfile: Hostfile, lines: Sequence[Line]) -> Hostfile:
    return parse_hostfile(replace(hostfile, lines=tuple(lines)).render(), hostfile.source)


def _names(entry: Entry) -> set[str]:
    return {host.name.lower() for host in entry.hosts}


def _line_numbers(hostfile: Hostfile) -> dict[str, int]:
    numbered = enumerate(hostfile.lines, start=1)
    return {name: number for number, line in numbered if line.entry for name in _names(line.entry)}


def _find(hostfile: Hostfile, pattern: str) -> set[str]:
    """The names (in lower case) that the pattern stands for; all of them are in the file."""
    try:
        return {host.name.lower() for host in resolve(pattern, hostfile.hosts)}
    except Problem as problem:
        raise _refusal(problem) from None


def _read_words(words: Sequence[str]) -> Entry:
    """The entry that these command line words make. Raises HostfileError for anything but exactly that."""
    for word in words:
        if not word or re.search(r"\s", word) or word.startswith("#"):
            fix = "give the host and each key=value as an argument of its own, without spaces"
            raise HostfileError.mismatch(COMMAND_LINE, "a host or key=value", quoted(word), fix)
    (line,) = parse_hostfile(" ".join(words), COMMAND_LINE).lines
    assert line.entry is not None
    return line.entry


def _read_changes(pattern: str, assignments: Sequence[str]) -> dict[str, str]:
    """key -> new value, empty to remove it."""
    changes: dict[str, str] = {}
    for word in assignments:
        try:
            key, value = split_option(word)
        except Problem as problem:
            raise _refusal(problem) from None
        if key in changes:
            raise HostfileError.mismatch(COMMAND_LINE, f"{key}= once", quoted(word), "remove one of the two")
        changes[key] = value
    _read_words([pattern, *(word for word in assignments if not word.endswith("="))])
    return changes


def _refusal(problem: Problem) -> UsageError:
    return HostfileError.mismatch(COMMAND_LINE, problem.expected, problem.found, problem.fix)
