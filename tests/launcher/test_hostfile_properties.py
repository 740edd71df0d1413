"""What holds for any hostfile: it renders as it was, an edit changes only its line, ranges fold back."""

from __future__ import annotations

import itertools
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dstrain.launcher.host_grammar import Problem
from dstrain.launcher.host_ranges import expand, fold
from dstrain.launcher.hostfile import Hostfile, parse_hostfile
from dstrain.launcher.hostfile_edit import add_host, remove_hosts, set_options
from dstrain.runtime.spec.errors import HostfileError

some_examples = settings(deadline=None, max_examples=100)
many_examples = settings(deadline=None, max_examples=400)

SPACE = st.text(" \t", min_size=1, max_size=3)
COMMENT = st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=20).map("#".__add__)
OPTIONS = {
    "slots": st.integers(1, 4096).map(str),
    "user": st.sampled_from(["bob", "al.ice", "_x-1"]),
    "port": st.integers(1, 65535).map(str),
    "python": st.sampled_from(["/usr/bin/python3", "~/venv/bin/python", "/opt/a+b@c,d=e/python"]),
    "key": st.sampled_from(["~/.ssh/id_ed25519", "/k"]),
}


@st.composite
def brackets(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A bracket and the numbers it stands for, written as it writes them."""
    width = draw(st.sampled_from([0, 0, 2, 3]))
    low = draw(st.integers(0, 20))
    items: list[str] = []
    numbers: list[int] = []
    for _ in range(draw(st.integers(1, 3))):
        high, step = low + draw(st.integers(0, 5)), draw(st.sampled_from([1, 1, 2, 3]))
        item = str(low).zfill(width)
        if high > low:
            item += f"-{str(high).zfill(width)}" + (f"/{step}" if step > 1 else "")
        items.append(item)
        numbers += range(low, high + 1, step)
        low = high + draw(st.integers(1, 3))
    return f"[{','.join(items)}]", [str(number).zfill(width) for number in numbers]


@st.composite
def patterns(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A pattern with ranges and its names by plain multiplication; digits may touch a bracket."""
    parts: list[tuple[str, list[str]]] = []
    for _ in range(draw(st.integers(1, 3))):
        text = ("a" if not parts else "") + draw(st.text("ab019-._", max_size=4))
        parts += [(text, [text]), draw(brackets())]
    names = ["".join(choice) for choice in itertools.product(*(choices for _, choices in parts))]
    return "".join(text for text, _ in parts), names


@st.composite
def files(draw: st.DrawFn) -> str:
    """A hostfile's text: entries with ranges and options in any order and spacing, comments, all newlines."""
    text = ""
    for index in range(draw(st.integers(1, 6))):
        indent = draw(SPACE | st.just(""))
        if draw(st.booleans()):
            text += indent + draw(COMMENT | st.just("")) + draw(st.sampled_from(["\n", "\r\n"]))
        name = draw(st.sampled_from(["h{}", "h{}n[1-4]", "h{}r[1-2]n[01-03]-ib", "10.0.{}.[7-11]", "[fd00::{}]"]))
        keys = draw(st.permutations(sorted(OPTIONS)))[: draw(st.integers(0, 4))]
        words = [name.format(index + 1), *(f"{key}={draw(OPTIONS[key])}" for key in keys)]
        text += indent + "".join(word + draw(SPACE) for word in words).rstrip(" \t")
        text += draw(st.builds(str.__add__, SPACE, COMMENT) | SPACE | st.just(""))
        text += draw(st.sampled_from(["\n", "\r\n"]))
    return text if draw(st.booleans()) else text.rstrip("\r\n")


def texts(hostfile: Hostfile) -> list[str]:
    return [line.text + line.newline for line in hostfile.lines]


def changed_region(before: list[str], after: list[str]) -> tuple[list[str], list[str]]:
    """What is left when the equal lines at the start and at the end are taken away."""
    while before and after and before[0] == after[0]:
        before, after = before[1:], after[1:]
    while before and after and before[-1] == after[-1]:
        before, after = before[:-1], after[:-1]
    return before, after


def comments(hostfile: Hostfile) -> list[str]:
    """All comments, in order (entries have no `#`)."""
    return [line.text[line.text.index("#") :] for line in hostfile.lines if "#" in line.text]


def behind_first_word(line: str) -> str:
    """The line's text behind its pattern, without the newline."""
    words = line.strip(" \t\r\n")
    return words[len(words.split()[0]) :] if words else ""


@some_examples
@given(st.text() | st.text("ab[]1-3=#@:., \t\r\n") | files())
def test_what_reads_renders_as_it_was(text):
    with suppress(HostfileError):
        assert parse_hostfile(text, "hosts").render() == text


@some_examples
@given(files())
def test_every_generated_file_reads(text):
    hostfile = parse_hostfile(text, "hosts")
    assert hostfile.render() == text
    assert len({host.name for host in hostfile.hosts}) == len(hostfile.hosts) > 0


@some_examples
@given(files(), st.data())
def test_removing_a_host_changes_only_its_line(text, data):
    before = parse_hostfile(text, "hosts")
    host = data.draw(st.sampled_from(before.hosts))
    after = remove_hosts(before, [host.written_name])
    rest = [other for other in before.hosts if other != host]
    assert sorted(after.hosts, key=str) == sorted(rest, key=str)
    removed, instead = changed_region(texts(before), texts(after))
    assert len(removed) <= 1
    assert all(behind_first_word(line) == behind_first_word(removed[0]) for line in instead[:1])


@some_examples
@given(files(), st.data())
def test_setting_an_option_changes_only_its_line(text, data):
    before = parse_hostfile(text, "hosts")
    host = data.draw(st.sampled_from(before.hosts))
    key = data.draw(st.sampled_from(sorted(OPTIONS)))
    value = data.draw(OPTIONS[key] | st.just(""))
    after = set_options(before, host.written_name, [f"{key}={value}"])
    changed = next(other for other in after.hosts if other.name == host.name)
    expected = int(value) if key in ("slots", "port") and value else value or None
    assert getattr(changed, key) == expected
    others = [other for other in before.hosts if other != host]
    assert sorted((other for other in after.hosts if other.name != host.name), key=str) == sorted(others, key=str)
    removed, _ = changed_region(texts(before), texts(after))
    assert len(removed) <= 1
    assert comments(after) == comments(before)
    again = set_options(after, host.written_name, [f"{key}={value}"])
    assert again.render() == after.render(), "setting what is set changes nothing"


@some_examples
@given(files(), st.sampled_from(["new", "new[1-3]", "[fd01::1]"]))
def test_adding_a_host_only_appends(text, name):
    before = parse_hostfile(text, "hosts")
    after = add_host(before, [name, "slots=2"])
    assert after.render().startswith(text)
    added = after.render()[len(text) :]
    assert added.strip("\r\n") == f"{name} slots=2"
    assert text.endswith("\n") == after.render().endswith("\n")
    assert remove_hosts(after, [name]).render().rstrip("\r\n") == text.rstrip("\r\n")


@many_examples
@given(patterns(), st.data())
def test_ranges_multiply_and_fold_back(pattern_and_names, data):
    pattern, names = pattern_and_names
    try:
        expanded = expand(pattern)
    except Problem:
        return
    assert list(expanded) == names
    some = data.draw(st.lists(st.sampled_from(names), unique=True, min_size=1))
    for chosen in (names, some):
        back = [name for folded in fold(chosen) for name in expand(folded)]
        assert sorted(back) == sorted(chosen)


@pytest.mark.parametrize("pattern", ["gpu[01-16]", "r[1-2]n[1-4]-ib0", "node1[01-16]", "10.0.0.1[0-3]", "a[9-11].b"])
def test_the_usual_ranges_are_among_those_that_read(pattern):
    assert fold(expand(pattern)) == (
        pattern.replace("10.0.0.1[0-3]", "10.0.0.[10-13]").replace("1[01-16]", "[101-116]"),
    )
