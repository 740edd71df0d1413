"""hosts add, remove, set: the exact text that each edit leaves, and what it refuses."""

from __future__ import annotations

import pytest

from dstrain.launcher.hostfile import parse_hostfile
from dstrain.launcher.hostfile_edit import add_host, remove_hosts, set_options
from dstrain.runtime.spec.errors import HostfileError

RANGE = "# lab\n\tgpu[1-4] slots=8  # x\r\nlogin\n"


def read(text: str):
    return parse_hostfile(text, "hosts")


@pytest.mark.parametrize(
    ("before", "words", "after"),
    [
        ("", ["a"], "a\n"),
        ("a\n", ["b", "slots=4", "user=bob"], "a\nb slots=4 user=bob\n"),
        ("a\r\n", ["b"], "a\r\nb\r\n"),
        ("a\nb", ["c"], "a\nb\nc"),
        ("a\r\nb", ["c"], "a\r\nb\r\nc"),
        ("a", ["b"], "a\nb"),
        ("# only a comment\n\n", ["gpu[1-3]"], "# only a comment\n\ngpu[1-3]\n"),
    ],
)
def test_add(before, words, after):
    assert add_host(read(before), words).render() == after


@pytest.mark.parametrize(
    ("before", "patterns", "after"),
    [
        ("gpu[1-4] slots=8  # x", ["gpu2"], "gpu[1,3-4] slots=8  # x"),
        (RANGE, ["gpu4"], "# lab\n\tgpu[1-3] slots=8  # x\r\nlogin\n"),
        (RANGE, ["GPU[2-4]"], "# lab\n\tgpu1 slots=8  # x\r\nlogin\n"),
        (RANGE, ["gpu[1-4]"], "# lab\nlogin\n"),
        (RANGE, ["gpu[3-4]", "login", "gpu1"], "# lab\n\tgpu2 slots=8  # x\r\n"),
        ("a\nb", ["b"], "a\n"),
        ("a\n[fd00::1] slots=2\n", ["[fd00:0::1]"], "a\n"),
        ("n[08-11]\n", ["n09"], "n[08,10-11]\n"),
        ("n[0-6/2]\n", ["n2"], "n[0,4,6]\n"),
        ("r[1-2]n[1-2] slots=8 # x", ["r1n2"], "r[1-2]n1 slots=8 # x\nr2n2 slots=8"),
        ("a\r\nr[1-2]n[1-2] slots=8 # x\n", ["r1n2"], "a\r\nr[1-2]n1 slots=8 # x\nr2n2 slots=8\n"),
    ],
)
def test_remove(before, patterns, after):
    assert remove_hosts(read(before), patterns).render() == after


@pytest.mark.parametrize(
    ("before", "pattern", "assignments", "after"),
    [
        ("a", "a", ["slots=4"], "a slots=4"),
        ("a   # x\n", "a", ["slots=4"], "a slots=4   # x\n"),
        (" a\tslots=8\tport=22 # x\n", "a", ["slots=4"], " a\tslots=4\tport=22 # x\n"),
        ("a slots=8\tport=22 # x\n", "a", ["slots="], "a\tport=22 # x\n"),
        ("a slots=8  port=22\t# x\n", "a", ["port=", "user=bob"], "a slots=8 user=bob\t# x\n"),
        ("a slots=8 port=22\n", "a", ["port=", "slots=", "key="], "a\n"),
        ("a slots=8 port=22\n", "a", ["port=2222", "user=bob", "slots=4"], "a slots=4 port=2222 user=bob\n"),
        ("a gpus=0,1 slots=2", "a", ["gpus=0,1,2", "slots=3"], "a gpus=0,1,2 slots=3"),
        (RANGE, "gpu[1-4]", ["slots=4"], "# lab\n\tgpu[1-4] slots=4  # x\r\nlogin\n"),
        (RANGE, "gpu2", ["slots=4"], "# lab\n\tgpu[1,3-4] slots=8  # x\r\n\tgpu2 slots=4\r\nlogin\n"),
        (RANGE, "gpu1", ["slots=4"], "# lab\n\tgpu1 slots=4\r\n\tgpu[2-4] slots=8  # x\r\nlogin\n"),
        (RANGE, "gpu4", ["slots="], "# lab\n\tgpu[1-3] slots=8  # x\r\n\tgpu4\r\nlogin\n"),
        (RANGE, "gpu2", ["addr=b"], "# lab\n\tgpu[1,3-4] slots=8  # x\r\n\tgpu2 slots=8 addr=b\r\nlogin\n"),
        (RANGE, "gpu2", ["slots=8"], RANGE),
        (RANGE, "gpu2", ["port="], RANGE),
        ("gpu[1-4] # x", "gpu[3-4]", ["slots=1"], "gpu[1-2] # x\ngpu[3-4] slots=1"),
        (
            "gpu[1-2]\ngpu[3-4] slots=2 # y\n",
            "gpu[2-4]",
            ["slots=1"],
            "gpu1\ngpu2 slots=1\ngpu[3-4] slots=1 # y\n",
        ),
    ],
)
def test_set(before, pattern, assignments, after):
    assert set_options(read(before), pattern, assignments).render() == after


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda f: add_host(f, ["gpu2"]),
            "expected a new host, found 'gpu2', which hosts:2 has; change it with `dstrain hosts set gpu2 key=value`",
        ),
        (lambda f: add_host(f, ["gpu[4-5]"]), "expected a new host, found 'gpu4', which hosts:2 has"),
        (lambda f: add_host(f, ["new", "slot=2"]), "command line:1:5: expected a known key, found 'slot'"),
        (lambda f: add_host(f, ["new\nother"]), "expected a host or key=value, found 'new\\nother'"),
        (lambda f: add_host(f, ["new slots=2"]), "expected a host or key=value, found 'new slots=2'"),
        (lambda f: add_host(f, ["new", "#x"]), "expected a host or key=value, found '#x'"),
        (lambda f: add_host(f, [""]), "expected a host or key=value, found ''"),
        (lambda f: add_host(f, ["-oX=y"]), "command line:1:1: expected a host name, found '-oX=y'"),
        (lambda f: add_host(f, ["a[1-9999999]"]), "command line:1:1: expected at most 10,000 hosts"),
        (lambda f: remove_hosts(f, ["gpu2", "gpu9"]), "expected a known host, found 'gpu9'; did you"),
        (lambda f: remove_hosts(f, ["$(x)"]), "expected a host name, found '$' in '$(x)'"),
        (lambda f: set_options(f, "nobody", ["slots=2"]), "expected a known host, found 'nobody'"),
        (
            lambda f: set_options(f, "gpu2", ["slots=0"]),
            "command line:1:12: expected slots from 1, found '0'",
        ),
        (lambda f: set_options(f, "gpu2", ["slot="]), "expected a known key, found 'slot'; did you"),
        (lambda f: set_options(f, "gpu2", ["port=", "port=1"]), "expected port= once, found 'port=1'"),
        (
            lambda f: set_options(f, "gpu[1-2]", ["addr=x"]),
            "command line:1:10: expected one host for one addr=",
        ),
        (
            lambda f: set_options(f, "gpu2", ["gpus=0"]),
            "hosts:3:7: expected slots=1, one for each of gpus=, found slots=8",
        ),
        (
            lambda f: set_options(f, "gpu2", ["user=$(x)"]),
            "command line:1:11: expected a user name, found '$(x)'",
        ),
    ],
)
def test_refusals(edit, message):
    with pytest.raises(HostfileError) as caught:
        edit(read(RANGE))
    assert str(caught.value).removeprefix("command line: ").startswith(message)


def test_an_unknown_host_is_answered_with_those_there_are():
    with pytest.raises(HostfileError, match=r"did you mean gpu1\? hosts there: gpu\[1-4\], login"):
        remove_hosts(read(RANGE), ["gpu01"])
