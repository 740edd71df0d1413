"""Reading hostfiles and --hosts: what they mean, and what is refused, where, and with which fix."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dstrain.launcher.host_grammar import Problem
from dstrain.launcher.host_ranges import MAX_HOSTS, expand
from dstrain.launcher.hostfile import Host, load_hostfile, parse_hostfile, parse_hosts_expression
from dstrain.launcher.hostfile_store import MAX_FILE_BYTES, find_hostfile
from dstrain.runtime.spec.errors import HostfileError, UsageError
from dstrain.runtime.spec.exit_codes import ExitCode

ROOT = Path(__file__).parents[2]
SAMPLES = sorted((ROOT / "hostfiles").iterdir())


def hosts_of(text: str) -> tuple[Host, ...]:
    return parse_hostfile(text, "hosts").hosts


def error_of(text: str) -> str:
    with pytest.raises(HostfileError) as caught:
        parse_hostfile(text, "hosts")
    assert caught.value.exit_code == ExitCode.USAGE
    return str(caught.value)


def test_every_option_is_read():
    line = (
        "box slots=2 user=al.ice_1 port=2222 addr=10.0.0.7 python=/opt/venv-3.11/bin/python "
        "key=~/.ssh/id_ed25519 gpus=3,1 transport=ssh spare=true # half of it"
    )
    assert hosts_of(line) == (
        Host(
            name="box",
            slots=2,
            user="al.ice_1",
            port=2222,
            addr="10.0.0.7",
            python="/opt/venv-3.11/bin/python",
            key="~/.ssh/id_ed25519",
            gpus=(3, 1),
            transport="ssh",
            spare=True,
        ),
    )


def test_a_bare_host_counts_its_gpus_and_listed_gpus_are_slots():
    bare, listed = hosts_of("a\nb gpus=0,2,3\n")
    assert (bare.slots, bare.gpus) == (None, None)
    assert (listed.slots, listed.gpus) == (3, (0, 2, 3))


def test_a_spare_is_a_word_or_a_key():
    hosts = hosts_of("a\nb spare slots=2\nc[1-2] spare=true\nd spare=false\nspare\n")
    assert [host.name for host in hosts if host.spare] == ["b", "c1", "c2"]


def test_files_of_deepspeed_and_open_mpi_read_as_they_do_there():
    text = "worker-0 slots=16\r\nworker-1   slots=8\r\n\r\n# cpu only\r\n10.0.0.3\tslots=04"
    assert [(host.name, host.slots) for host in hosts_of(text)] == [
        ("worker-0", 16),
        ("worker-1", 8),
        ("10.0.0.3", 4),
    ]


@pytest.mark.parametrize(
    ("line", "transport"),
    [
        ("localhost", "local"),
        ("LocalHost slots=2 gpus=0,1", "local"),
        ("localhost python=/usr/bin/python3", "local"),
        ("localhost port=2222", "ssh"),
        ("localhost user=bob", "ssh"),
        ("localhost transport=ssh", "ssh"),
        ("localhost.localdomain", "ssh"),
        ("127.0.0.1", "ssh"),
        ("127.0.0.2 transport=local", "local"),
        ("[::1]", "ssh"),
        ("box", "ssh"),
        ("box transport=local", "local"),
    ],
)
def test_only_a_plain_localhost_is_local(line, transport):
    assert hosts_of(line)[0].transport == transport


def test_names_ranges_and_addresses():
    text = "n[08-10] slots=2\nrack[1-2]n[1,3]-ib0\n10.0.0.[1-2]\n[FD00:0::1]\nx addr=fd00::2\nmy_box\n"
    hosts = hosts_of(text)
    assert [host.name for host in hosts] == [
        *("n08", "n09", "n10"),
        *("rack1n1-ib0", "rack1n3-ib0", "rack2n1-ib0", "rack2n3-ib0"),
        *("10.0.0.1", "10.0.0.2", "fd00::1", "x", "my_box"),
    ]
    assert hosts[0].slots == 2
    by_name = {host.name: host for host in hosts}
    assert (by_name["fd00::1"].written_name, by_name["x"].address) == ("[fd00::1]", "fd00::2")
    assert by_name["my_box"].address == "my_box"


KEYS = "known keys: slots, user, port, addr, python, key, gpus, transport, spare"
ERRORS = [
    ("a slot=4", "1:3: expected a known key, found 'slot'; did you mean slots=? " + KEYS),
    ("a max_slots=4", "1:3: expected a known key, found 'max_slots'; did you mean slots=? " + KEYS),
    ("a zzz=4", "1:3: expected a known key, found 'zzz'; " + KEYS),
    ("a =4", "1:3: expected a known key, found ''; " + KEYS),
    ("a slots", "1:3: expected key=value, found 'slots'; write slots=VALUE without spaces around '='"),
    ("a 4", "1:3: expected key=value, found '4'; write slots=4"),
    ("a b", "1:3: expected key=value, found 'b'; one host a line, then key=value"),
    ("a slots=", "1:9: expected a value for slots=, found nothing; write one, or remove slots="),
    (
        "a slots=0",
        "1:9: expected slots from 1, found '0'; remove the line (or use --exclude) to leave the host out; "
        "leave slots out to count its GPUs",
    ),
    ("a slots=4x", "1:10: expected slots from 1 to 4096, found '4x'; remove 'x'"),
    ("a slots=4,", "1:10: expected slots from 1 to 4096, found '4,'; remove ','"),
    ("a slots=-1", "1:9: expected slots from 1 to 4096, found '-1'; write a decimal number"),
    ("a slots=4097", "1:9: expected slots from 1 to 4096, found '4097'; write a number from 1 to 4096"),
    (
        "a slots=auto",
        "1:9: expected slots from 1, found 'auto'; leave slots out, and the host's GPUs are counted",
    ),
    ("a slots=2 slots=3", "1:11: expected slots= once, found 'slots=3'; remove one of the two"),
    ("a port=0", "1:8: expected a port from 1 to 65535, found '0'; write a number from 1 to 65535"),
    ("a port=65536", "1:8: expected a port from 1 to 65535, found '65536'; write a number from 1 to 65535"),
    ("a port=" + "9" * 5000, "1:8: expected a port from 1 to 65535, found '" + "9" * 57 + "...'"),
    ("a gpus=0,2,0", "1:12: expected each GPU once, found 0 again; remove one of the two"),
    ("a gpus=0,,1", "1:10: expected GPU numbers from 0 to 4095, found ''; write a decimal number"),
    (
        "a gpus=0,1 slots=3",
        "1:12: expected slots=2, one for each of gpus=, found slots=3; make the two agree, or",
    ),
    (
        "a user=b transport=local",
        "1:3: expected no login for transport=local, found user=; remove user= or transport=local",
    ),
    ("a spare=maybe", "1:9: expected true or false, found 'maybe'; write spare alone, or leave it out"),
    ("a spare spare=true", "1:9: expected spare= once, found 'spare=true'; remove one of the two"),
    ("a transport=rsh", "1:13: expected local or ssh, found 'rsh'"),
    ("a python=python3", "1:10: expected a path, found 'python3'; start with / or ~/; letters, digits and"),
    ("a key=~bob/id", "1:7: expected a path, found '~bob/id'; start with / or ~/"),
    ("a key=/" + "k" * 2000, "1:7: expected a path, found '/" + "k" * 56 + "...'"),
    ("a user=" + "u" * 65, "1:8: expected a user name, found '"),
    ("a[1-2] addr=b", "1:8: expected one host for one addr=, found 2; write a line for each of them"),
    ("bob@a", "1:4: expected a host name, found '@' in 'bob@a'; write `host user=NAME`"),
    ("a:4", "1:2: expected a host name, found ':' in 'a:4'; write `host slots=N` or `host port=P`"),
    ("a#b", "1:2: expected a host name, found '#' in 'a#b'; put a space before the comment"),
    ("a slots=4#b", "1:10: expected slots from 1 to 4096, found '4#b'; remove '#b'"),
    ("a,b", "1:2: expected a host name, found ',' in 'a,b'; one host a line; a range is gpu[1,3-4]"),
    ("slots=4", "1:6: expected a host name, found '=' in 'slots=4'; the host's name comes first"),
    ("a..b", "1:3: expected a host name, found an empty part in 'a..b'; put one '.' between two parts"),
    ("a.-b", "1:3: expected a host name, found 'a.-b'; each part starts with a letter or a digit"),
    ("a." + "b" * 64, "1:3: expected at most 63 characters between two dots, found 64; shorten the name"),
    (
        "a" * 60 + "." + "b" * 60 + "." + ("c" * 60 + ".") * 4 + "d",
        "1:1: expected a host name of at most 253",
    ),
    ("a" * 2000, "1:1: expected a name or range of at most 1024 characters, found 2000"),
    ("256.0.0.1", "1:1: expected an IPv4 address or a name that does not end in a number, found '256.0.0.1'"),
    ("127.1", "1:1: expected an IPv4 address or a name that does not end in a number, found '127.1'"),
    ("0x7f000001", "1:1: expected an IPv4 address or a name that does not end in a number"),
    ("[fe80::1%eth0]", "1:1: expected an IPv6 address in brackets, found '[fe80::1%eth0]'; write it like"),
    ("[::1]:22", "1:1: expected an IPv6 address in brackets, found '[::1]:22'"),
    ("[:::]", "1:1: expected an IPv6 address in brackets, found '[:::]'"),
    ("a[1-2", "1:2: expected a closed range, found 'a[1-2'; a range is gpu[1-4]"),
    ("a1-2]", "1:5: expected a host name, found ']' in 'a1-2]'; a range is gpu[1-4]"),
    ("a[]", "1:3: expected a number or a range of numbers, found ''"),
    ("a[1-b]", "1:3: expected a number or a range of numbers, found '1-b'"),
    ("a[1,3,2]", "1:7: expected ascending numbers, each once, found '2'; sort them, as in [1,3-4]"),
    ("a[1-3,3]", "1:7: expected ascending numbers, each once, found '3'"),
    ("a[4-1]", "1:3: expected ascending numbers, each once, found '4-1'"),
    ("a[0-4/0]", "1:3: expected a step from 1, found '0-4/0'"),
    ("a[08-100]", "1:3: expected numbers of one width, found '08-100'; pad all with zeros, as in [08-12]"),
    ("a1[8-12]", "1:4: expected numbers of one width, found '8-12'"),
    ("a[1-2][3-4]", "1:7: expected a letter or '-', '_', '.' behind a range, found 'a[1-2][3-4]'"),
    ("a[1-2]0", "1:7: expected a letter or '-', '_', '.' behind a range, found 'a[1-2]0'"),
    ("r[1,11]x1[1,11]", "1:13: expected numbers of one width, found '11'"),
    ("[1-4]", "1:1: expected an IPv4 address or a name that does not end in a number, found '1'"),
    (
        "a slots=2\n\n# c\n  A  slots=4",
        "4:3: expected each host once, found 'a' again (first on line 1, as 'a'); "
        "remove one of the two; slots=N gives it more ranks",
    ),
    ("n[1-4]\nn3", "2:1: expected each host once, found 'n3' again (first on line 1, as 'n[1-4]')"),
    ("n3\nn[1-4]", "2:1: expected each host once, found 'n3' again (first on line 1, as 'n3')"),
    ("[::1]\n[0::1]", "2:1: expected each host once, found '::1' again (first on line 1, as '[::1]')"),
    (
        "\n\ta\u00e9",
        "2:3: expected ASCII outside of comments, found '\\xe9'; retype the word in plain letters",
    ),
    ("\ufeffa", "1:1: expected UTF-8 without a byte-order mark, found '\\ufeff'"),
    ("a # \x1b[2J", "1:5: expected no control characters, found '\\x1b'; remove it"),
    ("a\rb", "1:2: expected no control characters, found '\\r'; remove it"),
]


@pytest.mark.parametrize(("text", "message"), ERRORS, ids=[repr(text[:30]) for text, _ in ERRORS])
def test_every_error_has_its_place_and_its_fix(text, message):
    error = error_of(text)
    assert error.startswith(f"hosts:{message}")
    assert "; " in error, "no fix"
    assert error.isascii()
    assert error.isprintable()


def test_all_problems_of_a_file_come_together_in_order():
    error = error_of("a slots=0 port=x\nok\n-b\nok\n")
    assert [line.split(": ")[0] for line in error.splitlines()] == [
        "hosts:1:9",
        "hosts:1:16",
        "hosts:3:1",
        "hosts:4:1",
    ]


def test_an_endless_list_of_problems_is_cut():
    lines = error_of("-x\n" * 500).splitlines()
    assert len(lines) == 51
    assert lines[-1] == "hosts: and 450 more"


HOSTILE = [
    "-oProxyCommand=touch${IFS}canary",
    "-l",
    "--",
    "$(touch canary)",
    "`touch canary`",
    "a;touch canary",
    "a|touch",
    "a&touch",
    "a&&touch",
    "a>canary",
    "a<x",
    "a'b",
    'a"b',
    "a\\b",
    "a*",
    "a?",
    "a!b",
    "a~b",
    "a%h",
    "a^b",
    "{a,b}",
    "@all",
    "@*",
    "a[1-2]@g",
    "a[1-2]!b",
    "a[1-$(touch canary)]",
    "a/b",
    "../a",
    "a\x00b",
    "a\x1b[31m",
    "a\x7f",
    "a\x85b",
    "a\x0bb",
    "a\x0cb",
    "a\u2028b",
    "a\u00a0b",
    "a\u200bb",
    "\u0430dmin",
    "gpu\uff11",
    "gpu\u0661",
    "a\u2010b",
    "a\ud800",
]


# Hostile as a name only: a path starts with / or ~/, and `@` and `-` mean nothing behind that.
SANE_IN_A_PATH = {"-l", "--", "a/b", "../a", "@all"}


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
@pytest.mark.parametrize("form", ["{}", "ok user={}", "ok addr={}", "ok key={}", "ok python=/bin/{}", "ok {}=1"])
def test_hostile_entries_are_refused_and_touch_nothing(text, form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if form == "ok python=/bin/{}" and text in SANE_IN_A_PATH:
        assert hosts_of(form.format(text))
        return
    error = error_of(form.format(text))
    assert error.startswith("hosts:1:")
    assert error.isascii()
    assert all(line.isprintable() for line in error.splitlines())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_hostile_expressions_are_refused(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for expression in (text, f"{text}:4", f"ok,{text}", f"{text}@ok"):
        with pytest.raises(HostfileError, match=r"^--hosts:1:"):
            parse_hosts_expression(expression)
    assert list(tmp_path.iterdir()) == []


def test_a_range_bomb_is_refused_at_once():
    begin = time.monotonic()
    for bomb in ("a[1-999999999]", "a[1-9999]b[1-9999]", "a[0-99]b[0-99]c[0-99]d[0-99]", "a[1-9999999999]"):
        assert error_of(bomb).startswith("hosts:1:")
    assert "expected at most 10,000 hosts, found 999,999,999 in 'a[1-999999999]'" in error_of("a[1-999999999]")
    assert time.monotonic() - begin < 1.0


def test_the_limit_holds_for_the_file_and_just_reaches():
    with pytest.raises(Problem, match=r"10,001 in 'a\[1-10001\]'"):
        expand("a[1-10001]")
    assert len(hosts_of(f"a[1-{MAX_HOSTS}]")) == MAX_HOSTS
    assert error_of(f"a[1-{MAX_HOSTS}]\nb\nc").startswith("hosts:2:1: expected at most 10,000 hosts")


def test_load_names_the_file_and_says_what_is_wrong_with_it(tmp_path):
    path = tmp_path / "hosts"
    with pytest.raises(UsageError, match="expected a hostfile, found no such file") as caught:
        load_hostfile(path)
    assert str(path) in str(caught.value)
    path.write_bytes(b"ok\n# B\xc3\xbcro\nab\xff\n")
    with pytest.raises(HostfileError, match=r"hosts:3:3: expected UTF-8, found byte 0xff"):
        load_hostfile(path)
    path.write_text("a slots=x")
    with pytest.raises(HostfileError, match=rf"^{path}:1:9: "):
        load_hostfile(path)
    path.write_bytes(b"#" * (MAX_FILE_BYTES + 1))
    with pytest.raises(UsageError, match="at most 4,194,304 bytes"):
        load_hostfile(path)
    with pytest.raises(UsageError, match="Is a directory"):
        load_hostfile(tmp_path)
    with pytest.raises(UsageError, match="null byte"):
        load_hostfile("a\0b")


def test_a_pipe_can_be_read():
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as pipe:
        pipe.write("a slots=2\n")
    try:
        assert [host.name for host in load_hostfile(f"/dev/fd/{reader}").hosts] == ["a"]
    finally:
        os.close(reader)


def test_which_hostfile_is_used(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_hostfile(None, {}) is None
    assert find_hostfile(None, {"DSTRAIN_HOSTFILE": ""}) is None
    assert find_hostfile(None, {"DSTRAIN_HOSTFILE": "named"}) == Path("named")
    assert find_hostfile(Path("given"), {"DSTRAIN_HOSTFILE": "named"}) == Path("given")
    Path("hostfile").write_text("a")
    assert find_hostfile(None, {}) == Path("hostfile")


def test_expressions():
    hosts = parse_hosts_expression("a:4,gpu[1-2,4]:8,bob@c,[fd00::1]:2,al@[::1],localhost")
    assert [(host.user, host.name, host.slots, host.transport) for host in hosts] == [
        (None, "a", 4, "ssh"),
        (None, "gpu1", 8, "ssh"),
        (None, "gpu2", 8, "ssh"),
        (None, "gpu4", 8, "ssh"),
        ("bob", "c", None, "ssh"),
        (None, "fd00::1", 2, "ssh"),
        ("al", "::1", None, "ssh"),
        (None, "localhost", None, "local"),
    ]


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("", "1:1: expected a host, found nothing; "),
        ("a,,b", "1:3: expected a host, found nothing; "),
        ("a,", "1:3: expected a host, found nothing; "),
        ("a, b", "1:3: expected no spaces, found ' b'; write a:4,b:4 without spaces"),
        ("a:0", "1:3: expected slots from 1, found '0'"),
        ("a:4,b:4x", "1:8: expected slots from 1 to 4096, found '4x'; remove 'x'"),
        ("a:", "1:3: expected a value for slots=, found nothing"),
        ("@a", "1:1: expected a value for user=, found nothing"),
        ("-oX@a", "1:1: expected a user name, found '-oX'"),
        ("bob@-oX=y", "1:5: expected a host name, found '-oX=y'"),
        ("a:4:4", "1:2: expected a host name, found ':' in 'a:4'"),
        ("::1", "1:1: expected a host name, found ':' in ':'"),
        ("a,b,x@A:2", "1:7: expected each host once, found 'a' again (first on line 1, as 'a')"),
        ("gpu[1-3],gpu2", "1:10: expected each host once, found 'gpu2' again"),
        ("gpu[1-3", "1:4: expected a closed range"),
        ("a\nb", "1:2: expected no control characters, found '\\n'"),
    ],
)
def test_errors_of_expressions(expression, message):
    with pytest.raises(HostfileError) as caught:
        parse_hosts_expression(expression)
    assert str(caught.value).startswith(f"--hosts:{message}")


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.name)
def test_the_samples_read_and_say_how_to_use_them(path):
    hostfile = load_hostfile(path)
    assert hostfile.hosts
    assert f"dstrain run -H hostfiles/{path.name} " in hostfile.render()


def test_there_is_a_sample_of_each_kind():
    names = ["behind-a-bastion", "local", "range-of-nodes", "two-gpu-boxes", "with-a-spare"]
    assert [path.name for path in SAMPLES] == names


def test_only_a_range_imports_clustershell(tmp_path):
    (tmp_path / "plain").write_text("a slots=4\n[::1] slots=2\n10.0.0.1\n")
    (tmp_path / "range").write_text("a[1-4]\n")
    code = """if True:
        import sys
        import dstrain.launcher.hostfile_edit
        import dstrain.launcher.selection
        from dstrain.launcher.hostfile import load_hostfile
        load_hostfile("plain")
        heavy = {"torch", "paramiko", "pydantic", "typer", "rich", "ClusterShell"}
        assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
        load_hostfile("range")
        assert "ClusterShell.NodeSet" in sys.modules
    """
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, check=True, timeout=60)
