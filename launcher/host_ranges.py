"""Ranges of names: `gpu[01-16]`, `rack[1-2]n[1-4]`, `gpu[0-8/2]`, and back.

ClusterShell's NodeSet does the expanding and folding, always with RESOLVER_NOGROUP: its default resolver
expands `@group` by running a shell. The grammar is checked and the hosts are counted before it sees
anything, so that `a[1-999999999]` is refused at once. It is imported only where there is a range, to start
quickly without.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from contextlib import suppress

from dstrain.launcher.host_grammar import Host, Problem, check_characters, nearest, parse_name, quoted

MAX_HOSTS = 10_000
MAX_PATTERN_LENGTH = 1024

_BRACKETS = re.compile(r"\[([^\[\]]*)\]")
_NUMBER = re.compile(r"(?<![/0-9])[0-9]+")  # not a step
_GLUED = re.compile(r"\][\[0-9]")  # ClusterShell takes digits on both sides of a range for the range's own
_ITEM = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9})(?:/([0-9]{1,9}))?)?")


def expand(pattern: str) -> tuple[str, ...]:
    """The names that a pattern stands for, in ascending order; a plain name stands for itself.

    Raises Problem for what is no name, for a range that is not ascending or names a host twice, and for more
    than MAX_HOSTS hosts.
    """
    if len(pattern) > MAX_PATTERN_LENGTH:
        expected = f"a name or range of at most {MAX_PATTERN_LENGTH} characters"
        raise Problem(expected, f"{len(pattern)}", "split it into several lines")
    if not is_range(pattern):
        return (parse_name(pattern),)
    _check_outside(pattern)
    count = 1
    for brackets in _BRACKETS.finditer(pattern):
        behind_digit = pattern[: brackets.start()][-1:].isdigit()
        count *= _count(brackets[1], brackets.start(1), behind_digit)
        if count > MAX_HOSTS:
            fix = "name fewer hosts, or write several hostfiles"
            raise Problem(f"at most {MAX_HOSTS:,} hosts", f"{count:,} in {quoted(pattern)}", fix)
    from ClusterShell.NodeSet import RESOLVER_NOGROUP, NodeSet, NodeSetException

    names: tuple[str, ...] = ()
    with suppress(NodeSetException):
        names = tuple(parse_name(str(name)) for name in NodeSet(pattern, resolver=RESOLVER_NOGROUP))
    if len(names) != count:  # our grammar should leave ClusterShell no choice; never guess if it does
        fix = "write these hosts on lines of their own"
        raise Problem(f"a range of {count} hosts", f"{quoted(pattern)}, which ClusterShell reads otherwise", fix)
    return names


def fold(names: Iterable[str]) -> tuple[str, ...]:
    """The fewest patterns that ClusterShell finds for these names (which `expand` returned), in its order."""
    names = list(names)
    addresses = tuple(f"[{name}]" for name in names if ":" in name)
    names = [name for name in names if ":" not in name]
    if len(names) < 2:
        return (*names, *addresses)
    from ClusterShell.NodeSet import RESOLVER_NOGROUP, NodeSet

    folded = str(NodeSet.fromlist(names, resolver=RESOLVER_NOGROUP))
    return (*split_outside_brackets(folded, ","), *addresses)


def resolve(pattern: str, hosts: Sequence[Host]) -> tuple[Host, ...]:
    """The hosts that the pattern names. Raises Problem for one that is not among them, and lists them."""
    known = {host.name.lower(): host for host in hosts}
    names = expand(pattern)
    unknown = next((name for name in names if name.lower() not in known), None)
    if unknown is None:
        return tuple(known[name.lower()] for name in names)
    close = nearest(unknown, tuple(known))
    there = fold(host.name for host in hosts)
    listed = ", ".join(there[:8]) + (f" and {len(there) - 8} more" if len(there) > 8 else "") or "none"
    fix = (f"did you mean {known[close].written_name}? " if close else "") + f"hosts there: {listed}"
    raise Problem("a known host", quoted(unknown), fix)


def is_range(pattern: str) -> bool:
    """Whether the pattern has a range in it: a bracket that is not the one of an IPv6 address."""
    return "[" in pattern and not (pattern.startswith("[") and ":" in pattern)


def split_outside_brackets(text: str, separator: str) -> tuple[str, ...]:
    """`text` split at every `separator` character that stands outside of brackets."""
    parts = [""]
    depth = 0
    for character in text:
        depth += (character == "[") - (character == "]")
        if character == separator and depth <= 0:
            parts.append("")
        else:
            parts[-1] += character
    return tuple(parts)


def _check_outside(pattern: str) -> None:
    """The text around the brackets must be of a name's characters; the expanded names are checked in full."""
    glued = _GLUED.search(pattern)
    if glued is not None:
        fix = "put the numbers into one range, as in gpu[10,20]"
        raise Problem("a letter or '-', '_', '.' behind a range", quoted(pattern), fix, glued.start() + 1)
    outside = _BRACKETS.sub(lambda brackets: "0" * len(brackets[0]), pattern)
    if "[" in outside:
        raise Problem("a closed range", quoted(pattern), "a range is gpu[1-4]", outside.index("["))
    check_characters(outside)


def _count(body: str, offset: int, behind_digit: bool) -> int:
    """How many numbers the inside of one pair of brackets stands for; `offset` is where it starts.

    Leading zeros, or a digit before the bracket, ask for numbers of one width: ClusterShell reads a1[8-12] as
    a[18-112].
    """
    count, previous = 0, -1
    width = _fixed_width(body, behind_digit)
    for item in body.split(","):
        match = _ITEM.fullmatch(item)
        if match is None:
            fix = "write numbers of at most 9 digits, as in gpu[1-4,7] or gpu[0-8/2]"
            raise Problem("a number or a range of numbers", quoted(item), fix, offset)
        low, high, step = match[1], match[2] or match[1], match[3] or "1"
        if width and {len(low), len(high)} != {width}:
            raise Problem("numbers of one width", quoted(item), "pad all with zeros, as in [08-12]", offset)
        first, last = int(low), int(high)
        if first <= previous or last < first:
            raise Problem("ascending numbers, each once", quoted(item), "sort them, as in [1,3-4]", offset)
        if int(step) == 0:
            raise Problem("a step from 1", quoted(item), "write it like [0-8/2]", offset)
        count, previous = count + (last - first) // int(step) + 1, last
        offset += len(item) + 1
    return count


def _fixed_width(body: str, behind_digit: bool) -> int:
    """The width that all numbers must have; 0 when they need not have one."""
    numbers = _NUMBER.findall(body)
    padded = [number for number in numbers if len(number) > 1 and number[0] == "0"]
    if behind_digit:
        padded += numbers
    return len(padded[0]) if padded else 0
