"""Lines for people: prefixes, folding, escapes, progress bars. Every property against a naive reference."""

from __future__ import annotations

import re

import pytest
from ClusterShell.NodeSet import RESOLVER_NOGROUP, NodeSet
from hypothesis import example, given
from hypothesis import strategies as st

from dstrain.launcher.console_text import (
    MAX_LINE_CHARACTERS,
    Folder,
    Prefixer,
    clean,
    escape,
    fold_hosts,
    fold_numbers,
)

SGR = re.compile(r"\x1b\[[0-9;]*m")
FORBIDDEN = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
PIECES = st.lists(st.sampled_from([b"a", b"b", b"\n", b"\n", b"\r", b"\xff", b"\x1b[31m", b"\x1b]0;t\x07", b" 50%"]))
CHUNKS = st.lists(PIECES.map(b"".join), max_size=8)


@given(CHUNKS)
@example([b"", b"\n", b"\n\n", b"x", b"y\nz", b""])
def test_prefixer_is_the_naive_prefix_for_any_chunking(chunks):
    whole = b"".join(chunks)
    prefixer = Prefixer(b"[h:0] ")
    shown = b"".join(map(prefixer.feed, chunks)) + prefixer.finish()
    lines = whole.removesuffix(b"\n").split(b"\n") if whole else []
    assert shown == b"".join(b"[h:0] " + line + b"\n" for line in lines)


@given(st.binary(max_size=300), st.booleans())
def test_a_line_can_do_nothing_to_a_terminal(raw, colour):
    shown = clean(raw.replace(b"\n", b""), colour)
    assert not FORBIDDEN.search(SGR.sub("", shown) if colour else shown)
    if colour and SGR.search(shown):
        assert shown.endswith("\x1b[0m")


@pytest.mark.parametrize(
    ("raw", "colour", "shown"),
    [
        (b"plain\ttext \xc3\xbc", False, "plain\ttext ü"),
        (b"\x1b[1;31mred\x1b[0m", True, "\x1b[1;31mred\x1b[0m\x1b[0m"),
        (b"\x1b[1;31mred\x1b[0m", False, "red"),
        (b"\x1b]0;title\x07", True, r"\x1b]0;title\x07"),
        (b"\x1b[2J\x1b[3A\x1b[10;10H", True, r"\x1b[2J\x1b[3A\x1b[10;10H"),
        (b"\x1b[38;5;1", True, r"\x1b[38;5;1"),
        (b"\x9b31m \xc2\x9b31m", True, r"\x9b31m \x9b31m"),
        (b"\xff\xfe\x00\x08\x7f", False, r"\xff\xfe\x00\x08\x7f"),
        ("a\u202eb\u2066c".encode(), False, r"a\u202eb\u2066c"),
        (b"10%\r50%\r100%\r\r", False, "100%"),
        (b"windows\r", False, "windows"),
    ],
)
def test_clean(raw, colour, shown):
    assert clean(raw, colour) == shown


def test_a_long_line_is_shortened_and_says_so():
    assert clean(b"x" * MAX_LINE_CHARACTERS, False) == "x" * MAX_LINE_CHARACTERS
    shown = clean(b"x" * 10_000_000, False)
    assert shown == "x" * MAX_LINE_CHARACTERS + f" … ({10_000_000 - MAX_LINE_CHARACTERS} more characters, in the log)"


def test_words_of_the_launcher_are_escaped_too():
    assert escape("the host said \x1b]0;t\x07\n\x9b") == r"the host said \x1b]0;t\x07\n\x9b"


@given(st.frozensets(st.integers(0, 60), min_size=1))
@example(frozenset({3}))
def test_folded_numbers_can_be_read_back(numbers):
    back: list[int] = []
    for part in fold_numbers(numbers).split(","):
        first, _, last = part.partition("-")
        back += range(int(first), int(last or first) + 1)
    assert back == sorted(numbers)


def test_fold_numbers():
    assert fold_numbers([5, 0, 1, 2]) == "0-2,5"


@given(st.frozensets(st.integers(1, 30), min_size=1), st.sampled_from(["gpu{}", "n{:02d}.rack", "10.0.0.{}"]))
def test_folded_hosts_can_be_read_back(numbers, form):
    names = {form.format(number) for number in numbers}
    assert set(NodeSet(fold_hosts(names), resolver=RESOLVER_NOGROUP)) == names


def test_hosts_that_cannot_be_folded_are_listed():
    assert fold_hosts({"h1", "h2"}) == "h[1-2]"
    assert fold_hosts({"fe80::1", "fe80::2"}) in ("fe80::[1-2]", "fe80::1,fe80::2")
    assert fold_hosts({"alone"}) == "alone"


# --- folding --------------------------------------------------------------------------------------------------

STEPS = st.lists(st.tuples(st.integers(0, 3), PIECES.map(b"".join)) | st.none(), max_size=30)  # None: flush


@given(STEPS, st.booleans())
def test_folding_keeps_each_ranks_lines_and_their_order(steps, colour):
    shown: list[tuple[frozenset[int], str]] = []
    folder = Folder(lambda ranks, text: shown.append((ranks, text)), colour)
    written = dict.fromkeys(range(4), b"")
    for step in steps:
        if step is None:
            folder.flush()
            assert not folder.waiting
        else:
            folder.feed(f"h{step[0]}", *step)
            written[step[0]] += step[1]
    folder.finish()
    for rank, data in written.items():
        lines = data.split(b"\n")
        expected = [clean(line, colour) for line in (lines if lines[-1] else lines[:-1])]
        assert [text for ranks, text in shown if rank in ranks] == expected


@given(st.lists(st.sampled_from("abc"), max_size=20), st.integers(2, 5))
def test_equal_lines_of_all_ranks_become_one(lines, ranks):
    shown = []
    folder = Folder(lambda *one: shown.append(one), False)
    for rank in range(ranks):
        folder.feed("h", rank, "".join(f"{line}\n" for line in lines).encode())
    folder.flush()
    assert shown == [(frozenset(range(ranks)), line) for line in lines]


def test_a_line_more_on_one_rank_does_not_end_the_folding():
    shown = []
    folder = Folder(lambda *one: shown.append(one), False)
    folder.feed("h", 0, b"extra\nsame\nend\n")
    folder.feed("h", 1, b"same\nend\n")
    folder.flush()
    assert shown == [(frozenset({0}), "extra"), (frozenset({0, 1}), "same"), (frozenset({0, 1}), "end")]


@given(PIECES.map(lambda pieces: b"".join(pieces).replace(b"\n", b"")), st.integers(1, 5))
def test_progress_is_the_newest_state(data, size):
    folder = Folder(lambda *_: None, False)
    for start in range(0, len(data), size):
        folder.feed("h", 3, data[start : start + size])
    assert list(folder.progress()) == ([(3, clean(data, False))] if b"\r" in data else [])


def test_a_progress_bar_of_many_hours_takes_no_memory():
    shown = []
    folder = Folder(lambda *one: shown.append(one), False)
    for step in range(100_000):
        folder.feed("h", 0, b"\r%6d/100000 " % step + b"#" * 100)
    assert len(folder._sources[0].partial) < 200
    assert list(folder.progress()) == [(0, " 99999/100000 " + "#" * 100)]
    folder.feed("h", 0, b"\rdone\n")
    folder.flush()
    assert shown == [(frozenset({0}), "done")]
