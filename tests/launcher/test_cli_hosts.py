"""`dstrain hosts`: list, add, remove and set from the command line."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dstrain.launcher.cli import hosts as cli
from dstrain.launcher.hostfile import load_hostfile
from dstrain.runtime.spec.errors import HostfileError, UsageError


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DSTRAIN_HOSTFILE", raising=False)
    return tmp_path


def run(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, arguments)
    if isinstance(result.exception, Exception):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_session():
    assert run("add", "gpu[1-3]", "slots=8") == "added gpu[1-3] to hostfile\n"
    assert run("add", "[fd00::1]", "user=bob", "gpus=0,2") == "added [fd00::1] to hostfile\n"
    assert run("remove", "gpu3") == "removed gpu3 from hostfile\n"
    assert run("set", "gpu2", "slots=4", "port=2222") == "set slots=4 port=2222 for gpu2 in hostfile\n"
    assert Path("hostfile").read_text() == ("gpu1 slots=8\ngpu2 slots=4 port=2222\n[fd00::1] user=bob gpus=0,2\n")
    assert run("set", "gpu2", "port=") == "set port= for gpu2 in hostfile\n"
    assert run("list") == (
        "gpu1\t8\t-\t-\t-\t-\t-\t-\tssh\t-\ngpu2\t4\t-\t-\t-\t-\t-\t-\tssh\t-\n"
        "[fd00::1]\t2\tbob\t-\t-\t-\t-\t0,2\tssh\t-\n"
    )


def test_json_has_every_field():
    run("add", "box", "slots=2", "gpus=1,0", "key=~/.ssh/k")
    run("add", "localhost")
    box, local = json.loads(run("list", "--json"))
    assert box == {
        "name": "box",
        "slots": 2,
        "user": None,
        "port": None,
        "addr": None,
        "python": None,
        "key": "~/.ssh/k",
        "gpus": [1, 0],
        "transport": "ssh",
        "spare": False,
    }
    assert (local["slots"], local["transport"]) == (None, "local")
    assert tuple(box) == cli.COLUMNS


def test_the_table_shows_what_is_set_and_no_markup():
    from rich.console import Console

    run("add", "gpu[1-2]", "slots=8")
    run("add", "[fd00::1]", "python=/opt/py")
    out = io.StringIO()
    hosts = load_hostfile("hostfile").hosts
    Console(file=out, width=80).print(cli._table(hosts))
    lines = [line.split() for line in out.getvalue().splitlines() if line.strip()]
    assert lines[0] == ["name", "slots", "python", "transport"]
    assert lines[2:] == [
        ["gpu1", "8", "-", "ssh"],
        ["gpu2", "8", "-", "ssh"],
        ["[fd00::1]", "auto", "/opt/py", "ssh"],
    ]
    assert cli._summary(hosts) == "3 hosts, 16 slots and the GPUs of 1 (auto)"
    assert cli._summary(hosts[:1]) == "1 host, 8 slots"


def test_spares_are_listed_and_their_slots_do_not_count():
    run("add", "gpu[1-3]", "slots=8")
    run("add", "gpu4", "slots=8", "spare")
    run("set", "gpu3", "spare")
    assert Path("hostfile").read_text() == "gpu[1-2] slots=8\ngpu3 slots=8 spare=true\ngpu4 slots=8 spare\n"
    assert [line.split("\t")[-1] for line in run("list").splitlines()] == ["-", "-", "spare", "spare"]
    assert cli._summary(load_hostfile("hostfile").hosts) == "2 hosts, 16 slots; 2 spare"
    run("set", "gpu[3-4]", "spare=")
    assert cli._summary(load_hostfile("hostfile").hosts) == "4 hosts, 32 slots"


def test_which_file_is_edited(monkeypatch):
    monkeypatch.setenv("DSTRAIN_HOSTFILE", "from-environment")
    run("add", "a")
    run("add", "b", "-H", "given")
    run("add", "c", "--hostfile", "given")
    monkeypatch.delenv("DSTRAIN_HOSTFILE")
    run("add", "d")
    texts = {path.name: path.read_text() for path in Path().iterdir()}
    assert texts == {"from-environment": "a\n", "given": "b\nc\n", "hostfile": "d\n"}


@pytest.mark.parametrize("arguments", [["list"], ["remove", "a"], ["set", "a", "slots=1"]])
def test_only_add_makes_a_file(arguments, folder):
    with pytest.raises(UsageError, match="create it with `dstrain hosts add HOST`"):
        run(*arguments)
    with pytest.raises(UsageError, match="named: expected a hostfile, found no such file"):
        run(*arguments, "-H", "named")
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["add", "--", "-oProxyCommand=touch canary"],
        ["add", "a;touch canary"],
        ["add", "b", "user=$(touch canary)"],
        ["add", "b\nc"],
        ["set", "a", "port=0"],
        ["set", "--", "a", "-x=1"],
        ["remove", "`touch canary`"],
    ],
)
def test_hostile_arguments_are_refused_and_change_nothing(arguments, folder):
    Path("hostfile").write_text("a\n")
    with pytest.raises(HostfileError, match=r"expected .*, found .*; "):
        run(*arguments)
    assert [path.name for path in folder.iterdir()] == ["hostfile"]
    assert Path("hostfile").read_text() == "a\n"


def test_options_of_ssh_are_no_options_of_ours():
    assert CliRunner().invoke(cli.app, ["add", "-oProxyCommand=x"]).exit_code == 2
    assert CliRunner().invoke(cli.app, ["set", "a"]).exit_code == 2


def test_help_names_every_command():
    for command in ("list", "add", "remove", "set"):
        assert command in run("--help")
        assert run(command, "--help")
