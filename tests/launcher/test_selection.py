"""--include and --exclude: which hosts and slots stay, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dstrain.launcher.hostfile import parse_hosts_expression
from dstrain.launcher.selection import SelectedHost, select
from dstrain.runtime.spec.errors import UsageError

HOSTS = (*parse_hosts_expression("a:4,gpu[1-3]:8,[fd00::1]:2,auto"),)


def chosen(include: str | None = None, exclude: str | None = None) -> list[tuple[str, tuple[int, ...] | None]]:
    return [(s.host.name, s.slot_ids) for s in select(HOSTS, include, exclude)]


def test_neither_keeps_all():
    assert chosen() == [(host.name, None) for host in HOSTS]


@pytest.mark.parametrize(
    ("include", "result"),
    [
        ("a", [("a", None)]),
        ("gpu2@a:2,0", [("a", (0, 2)), ("gpu2", None)]),
        ("a:0,1,2,3", [("a", None)]),
        ("gpu[1-2]:7@GPU3", [("gpu1", (7,)), ("gpu2", (7,)), ("gpu3", None)]),
        ("[fd00::1]:1@a", [("a", None), ("fd00::1", (1,))]),
        ("[fd00:0::1]", [("fd00::1", None)]),
        ("auto:5", [("auto", (5,))]),
    ],
)
def test_include(include, result):
    assert chosen(include=include) == result


@pytest.mark.parametrize(
    ("exclude", "result"),
    [
        ("gpu[1-3]@auto@[fd00::1]", [("a", None)]),
        ("gpu[1-3]:0,1,2,3,4,5,6@auto@[fd00::1]:0@a:0,1,2,3", [(f"gpu{i}", (7,)) for i in (1, 2, 3)]),
    ],
)
def test_exclude(exclude, result):
    assert [item for item in chosen(exclude=exclude) if item[0] != "fd00::1"] == result


def test_slots_are_gpu_numbers():
    (box,) = parse_hosts_expression("box")
    box = replace(box, slots=3, gpus=(5, 0, 2))
    (selected,) = select([box], "box:0,5", None)
    assert selected.slot_ids == (5, 0)
    assert selected.resolve_slots(8) == (5, 0)
    with pytest.raises(UsageError, match=r"expected slots 5, 0, 2, found slot 1 of 'box'"):
        select([box], "box:1", None)


def test_slots_of_a_host_that_counts_are_checked_after_the_count():
    (included,) = select(HOSTS, "auto:1,6", None)
    assert included.resolve_slots(8) == (1, 6)
    with pytest.raises(UsageError, match="expected slots 0 to 3, found slot 6 of auto; choose among these"):
        included.resolve_slots(4)
    excluded = select(HOSTS, None, "auto:1")[-1]
    assert excluded == SelectedHost(HOSTS[-1], None, (1,))
    assert excluded.resolve_slots(3) == (0, 2)
    with pytest.raises(UsageError, match="expected slot 0, found slot 1 of auto"):
        excluded.resolve_slots(1)
    with pytest.raises(UsageError, match="auto: expected at least one slot, found none of slots 0 to 1"):
        select(HOSTS, None, "auto:0,1")[-1].resolve_slots(2)
    with pytest.raises(UsageError, match="auto: expected at least one slot, found none of no slots"):
        select(HOSTS, "auto", None)[0].resolve_slots(0)


def test_a_known_number_of_slots_wins_over_the_count():
    assert select(HOSTS, "a", None)[0].resolve_slots(1) == (0, 1, 2, 3)
    assert select(HOSTS, None, "a:1")[0].resolve_slots(1) == (0, 2, 3)


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ("", "1:1: expected a host, found nothing; write host or host:slot,slot"),
        ("a@", "1:3: expected a host, found nothing"),
        ("a@@b", "1:3: expected a host, found nothing"),
        (
            "b",
            "1:1: expected a known host, found 'b'; hosts there: a, auto, gpu[1-3], [fd00::1]",
        ),
        ("a@gpu4", "1:3: expected a known host, found 'gpu4'; did you mean gpu3? hosts there: "),
        ("gpu[1-9]", "1:1: expected a known host, found 'gpu4'"),
        ("a:4", "1:3: expected slots 0 to 3, found slot 4 of 'a'; choose among these"),
        ("gpu1@a:1,7", "1:8: expected slots 0 to 3, found slot 7 of 'a'"),
        ("a:1,1", "1:5: expected each slot once, found 1 again; remove one of the two"),
        ("a:", "1:3: expected slots from 0 to 4095, found ''; write a decimal number"),
        ("a:x", "1:3: expected slots from 0 to 4095, found 'x'"),
        ("a:1x", "1:4: expected slots from 0 to 4095, found '1x'; remove 'x'"),
        ("a:0-3", "1:4: expected slots from 0 to 4095, found '0-3'"),
        ("a:0@a:1", "1:5: expected each host once, found 'a' again (first at column 1); join its slots"),
        ("gpu[1-3]@gpu2:0", "1:10: expected each host once, found 'gpu2' again (first at column 1)"),
        ("a b", "1:2: expected a host name, found ' ' in 'a b'"),
        ("-oX=y", "1:1: expected a host name, found '-oX=y'"),
        ("$(x)", "1:1: expected a host name, found '$' in '$(x)'"),
        ("a\n", "1:2: expected a host name, found '\\n' in 'a\\n'"),
        ("gpu[1-999999999]", "1:1: expected at most 10,000 hosts"),
    ],
)
@pytest.mark.parametrize("option", ["include", "exclude"])
def test_errors(option, selection, message):
    with pytest.raises(UsageError) as caught:
        select(HOSTS, **{"include": None, "exclude": None, option: selection})
    assert str(caught.value).startswith(f"--{option}:{message}")
    assert str(caught.value).isprintable()


def test_both_or_nothing_left_is_refused():
    with pytest.raises(UsageError, match="expected at most one of the two, found both"):
        select(HOSTS, "a", "a")
    with pytest.raises(UsageError, match="--exclude: expected at least one host left, found none"):
        select(HOSTS, None, "a@gpu[1-3]@[fd00::1]:0,1@auto")


@settings(deadline=None, max_examples=100)
@given(st.dictionaries(st.sampled_from(HOSTS[:-1]), st.sets(st.integers(0, 1)), min_size=1))
def test_include_and_exclude_divide_the_slots(choices):
    text = "@".join(
        host.written_name + (f":{','.join(map(str, sorted(slots)))}" if slots else "")
        for host, slots in choices.items()
    )

    def slots(selected: tuple[SelectedHost, ...]) -> set[tuple[str, int]]:
        return {(s.host.name, slot) for s in selected for slot in s.resolve_slots(6)}

    included, excluded = slots(select(HOSTS, text, None)), slots(select(HOSTS, None, text))
    assert not included & excluded
    assert included | excluded == slots(select(HOSTS, None, None))
