"""The pure parts: root cause, preflight, plan, the command line's split, the environment."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.launcher import preflight
from dstrain.launcher.agent import host_facts
from dstrain.launcher.cli.run import split_target
from dstrain.launcher.hostfile import Host
from dstrain.launcher.plan import Request, Target, make_plan
from dstrain.launcher.request import RunOptions, build_request, read_env_file
from dstrain.launcher.root_cause import Failure, root_cause, traceback_of
from dstrain.runtime.spec.errors import UnreachableError, UsageError
from dstrain.runtime.spec.frames import Dialled, HostFacts, Listening, PreloadFacts

PEER = "Traceback (most recent call last):\n  File 'x'\nRuntimeError: [gloo] Connection closed by peer [10.0.0.1]:2\n"
OWN = "Traceback (most recent call last):\n  File 'x'\nValueError: mine\n"


def failure(rank: int, status: int, at: int, stderr: str = "", **more: object) -> Failure:
    return Failure(rank, f"host{rank}", status, at, stderr, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("failures", "rank"),
    [
        ([failure(0, 1, 10, OWN), failure(1, 1, 5, OWN)], 1),  # the earlier one
        ([failure(0, 1, 1, PEER), failure(1, 1, 5, OWN)], 1),  # its own doing, though later
        ([failure(0, 1, 1, PEER), failure(1, -signal.SIGKILL, 5)], 1),  # a signal, though later
        ([failure(0, 1, 7, PEER), failure(1, 1, 5, PEER)], 1),  # nobody knows: the first
        ([failure(1, 2, 1), failure(0, 2, 5, "dstrain: wrong\n")], 0),  # failed alike, and says why
        ([failure(1, 3, 1), failure(0, 2, 5, "dstrain: wrong\n")], 1),  # failed otherwise, in silence
        ([failure(1, -signal.SIGKILL, 1), failure(0, -signal.SIGKILL, 5, "words")], 1),  # nobody says why it was killed
        ([failure(0, -signal.SIGABRT, 1, "Watchdog caught collective operation timeout"), failure(1, 3, 9)], 1),
        ([failure(0, 1, 1, "torch.distributed.DistStoreError: Timed out after 61 seconds"), failure(1, 9, 2)], 1),
    ],
)
def test_root_cause_is_weighed_before_it_is_timed(failures, rank):
    cause = root_cause(failures)
    assert cause.rank == rank
    assert cause.victims == len(failures) - 1


def test_an_error_that_only_mentions_a_peer_in_its_traceback_is_its_own():
    text = "Traceback (most recent call last):\n  File 'closed by peer.py'\nValueError: mine\n"
    assert root_cause([failure(0, 1, 1, PEER), failure(1, 1, 5, text)]).rank == 1


def test_ranks_that_differ_are_called_so():
    cause = root_cause([failure(0, 209, 1, "dstrain: step 14: expected w to be the same on ranks 0, 1\n")])
    assert cause.code == 209
    assert cause.headline == "rank 0 on host0 stopped: ranks no longer hold the same parameters (exit code 209)"


def test_who_left_early_is_blamed_for_what_the_others_lost():
    cause = root_cause([failure(0, 1, 1, PEER)], [(2, "host2")])
    assert (cause.code, cause.rank, cause.origin) == (208, 2, "launcher")
    assert root_cause([failure(0, 1, 1, OWN)], [(2, "host2")]).code == 1


def test_ranks_that_run_until_they_are_ended_are_victims_too():
    assert root_cause([failure(0, 1, 1, OWN)], running=3).victims == 3
    assert root_cause([failure(0, 1, 1, PEER)], [(2, "host2")], running=2).victims == 3


def test_memory_and_signals_are_named():
    cause = root_cause([failure(0, -signal.SIGKILL, 1, out_of_memory=True)])
    assert "out of memory" in cause.headline
    assert cause.code == 137
    assert "SIGSEGV" in root_cause([failure(0, -signal.SIGSEGV, 1)]).headline


def test_our_own_line_stands_above_the_traceback():
    assert root_cause([failure(0, 2, 1, f"noise\ndstrain: the first batch\n{OWN}")]).detail == (
        f"dstrain: the first batch\n{OWN.strip()}"
    )
    assert root_cause([failure(0, 2, 1, f"dstrain: older\nnoise\n{OWN}")]).detail == OWN.strip()


def test_traceback_has_what_it_was_raised_from_and_is_shortened():
    chain = f"noise\n{OWN}\nThe above exception was the direct cause of the following exception:\n\n{PEER}"
    assert traceback_of(f"an older one\n{OWN}\nbetween\n{chain}")[2:] == chain.strip().splitlines()[3:]
    assert traceback_of("nothing here") == []
    long = "Traceback (most recent call last):\n" + "  File 'x'\n" * 500 + "ValueError: end"
    assert len(traceback_of(long)) == 41
    assert traceback_of(long)[-1] == "ValueError: end"


# --- preflight -----------------------------------------------------------------------------------------------

FACTS = HostFacts("h", 8, 2, 0, ["10.0.0.1"], 0, "/job", "abc", "/job/x.py", "/usr/bin/python3", None)
TORCH = PreloadFacts("3.11.7", "2.13.0")


def request(*names: str, **changes: object) -> Request:
    hosts = tuple(Host(name, slots=2) for name in names)
    return dataclasses.replace(Request(Target("script", "x.py"), hosts, "/job"), **changes)  # type: ignore[arg-type]


def report(name: str, **changes: object) -> preflight.HostReport:
    facts = dataclasses.replace(FACTS, **changes)  # type: ignore[arg-type]
    return preflight.HostReport(Host(name, slots=2), facts=facts, preload=TORCH, dialled=Dialled({"10.0.0.1": "e"}, {}))


def problems(*reports: preflight.HostReport, address: str | None = "10.0.0.1") -> list[preflight.Problem]:
    return preflight.check_all(request(*(one.host.name for one in reports)), list(reports), address)


def test_good_hosts_have_no_problems():
    assert problems(report("a"), report("b")) == []


def test_slots_beyond_the_gpus_are_refused():
    assert problems(report("a", gpus=2)) == []
    found = problems(report("a", gpus=1), report("b", gpus=2))
    assert [(one.host, one.check) for one in found] == [("a", "slots")]
    assert "slots=1" in found[0].remedy


def test_a_gpu_that_is_not_there_is_refused():
    one = report("a", gpus=2)
    one.host = dataclasses.replace(one.host, gpus=(0, 3))
    assert "GPU 3" in problems(one)[0].found


def test_codes():
    lost = preflight.HostReport(Host("a"), error=UnreachableError("a", "no answer", "look"))
    assert preflight.exit_code(problems(lost, report("b"))) == 200
    assert preflight.exit_code(problems(lost, report("b", cwd=None))) == 202


def test_address_is_one_that_all_can_dial():
    reports = [report("a"), report("b"), report("c")]
    reports[0].listening = Listening([("1.1.1.1", 5), ("2.2.2.2", 6)], {}, {})
    reports[1].dialled = Dialled({"1.1.1.1": "e", "2.2.2.2": "e"}, {})
    reports[2].dialled = Dialled({"2.2.2.2": "e"}, {"1.1.1.1": "no route"})
    assert preflight.choose_address(request("a"), reports) == ("2.2.2.2", 6)


# --- plan and command line -----------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any))
def test_ranks_are_numbered_host_by_host(slots):
    names = [f"h{index}" for index in range(len(slots))]
    plan = make_plan(request(*names), "id", slots)
    specs = [spec for node in plan.nodes for spec in node.processes]
    assert [spec.rank for spec in specs] == list(range(sum(slots)))
    groups = {spec.environment["GROUP_RANK"] for spec in specs}
    assert groups == {str(index) for index in range(sum(count > 0 for count in slots))}
    for node, count in zip(plan.nodes, slots, strict=True):
        assert [spec.local_rank for spec in node.processes] == list(range(count))
        assert all(spec.environment["LOCAL_WORLD_SIZE"] == str(count) for spec in node.processes)


def test_a_world_without_ranks_is_refused():
    with pytest.raises(UsageError, match="at least one rank"):
        make_plan(request("a"), "id", [0])


TAKES = {"-H": True, "--hostfile": True, "-n": True, "--quiet": False, "-q": False, "--env": True}


@pytest.mark.parametrize(
    ("words", "ours", "kind", "rest"),
    [
        (["x.py"], [], "script", ["x.py"]),
        (["-n", "2", "x.py", "-n", "3"], ["-n", "2"], "script", ["x.py", "-n", "3"]),
        (["-n2", "x.py"], ["-n2"], "script", ["x.py"]),
        (["--env=A=-m", "x.py"], ["--env=A=-m"], "script", ["x.py"]),
        (["--env", "-m", "x.py"], ["--env", "-m"], "script", ["x.py"]),
        (["-q", "-m", "a.b", "-q"], ["-q"], "module", ["a.b", "-q"]),
        (["-ma.b", "-q"], [], "module", ["a.b", "-q"]),
        (["-H", "f", "--no-python", "prog", "--", "-x"], ["-H", "f"], "program", ["prog", "--", "-x"]),
        (["--", "-odd.py", "--quiet"], [], "script", ["-odd.py", "--quiet"]),
        (["--quiet"], ["--quiet"], "script", []),
        (["-n", "2", "job.yaml", "--env", "A=1", "-q"], ["-n", "2", "--env", "A=1", "-q"], "script", ["job.yaml"]),
        (["job.yml", "-q", "word", "-q"], ["-q"], "script", ["job.yml", "word", "-q"]),
        (["x.py", "job.yaml", "-q"], [], "script", ["x.py", "job.yaml", "-q"]),
    ],
)
def test_our_options_end_where_pythons_do(words, ours, kind, rest):
    assert split_target(words, TAKES) == (ours, kind, rest)


def test_env_files(tmp_path: Path):
    path = tmp_path / "env"
    path.write_text("# a comment\n\nA=1\nexport B='two words'\nC=a=b\n")
    assert read_env_file(path) == {"A": "1", "B": "two words", "C": "a=b"}
    path.write_text("A=1\na secret without a name\n")
    with pytest.raises(UsageError, match=r"env:2: expected NAME=VALUE") as caught:
        read_env_file(path)
    assert "secret without" not in str(caught.value)


def test_values_of_the_environment_override_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "x.py").touch()
    (tmp_path / "env").write_text("A=file\nB=file\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("RANK", "9")
    monkeypatch.setenv("C", "shell")
    options = RunOptions(env=("A=word", "C"), env_files=(tmp_path / "env",), pass_env=("NCCL_*", "RANK"))
    made, _ = build_request(options, Target("script", "x.py"))
    assert made.environment == {"A": "word", "B": "file", "C": "shell"}
    assert made.pass_environment == {"NCCL_DEBUG": "INFO"}
    assert made.shown_environment() == {"NCCL_DEBUG": "***", "A": "***", "B": "***", "C": "***"}


def test_values_of_run_env_are_masked_and_not_sent_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "job.yaml").write_text(
        "run: {env: {WANDB_API_KEY: hush, LR: '1'}}\nmodel: {gpt: {layers: 1, width: 16, heads: 2, context: 8}}\n"
        "batch: {global: 2, micro: 1}\ntrain: {steps: 1}\n"
    )
    monkeypatch.chdir(tmp_path)
    made, _ = build_request(RunOptions(), Target("script", "job.yaml"))
    assert made.environment == {"WANDB_API_KEY": "hush", "LR": "1"}
    assert made.job is not None
    assert "hush" not in made.job
    assert "hush" not in json.dumps(made.to_json())
    assert made.to_json()["environment"] == {"WANDB_API_KEY": "***", "LR": "1"}


def test_restarts_are_what_spares_and_fewer_hosts_are_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "x.py").touch()
    (tmp_path / "hosts").write_text("a slots=1\nb slots=1 spare\n")
    monkeypatch.chdir(tmp_path)
    target, hostfile = Target("script", "x.py"), tmp_path / "hosts"
    with pytest.raises(UsageError, match=r"^--min-nodes: expected restarts, which it is for, found none; give --max-r"):
        build_request(RunOptions(hostfile=hostfile, min_nodes=1), target)
    made, _ = build_request(RunOptions(hostfile=hostfile), target)
    assert made.spares == ()
    assert made.notes == ("1 spare host is not used: without --max-restarts there is nothing to wait for",)
    made, _ = build_request(RunOptions(hostfile=hostfile, min_nodes=1, max_restarts=1), target)
    assert [host.name for host in made.spares] == ["b"]
    assert made.notes == ()


def test_a_resume_of_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "x.py").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"^--resume: expected auto, a step or a path, found nothing$"):
        build_request(RunOptions(resume=""), Target("script", "x.py"))


def test_a_prologue_that_hangs_or_leaves_a_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(host_facts, "PROLOGUE_TIMEOUT_S", 1.0)
    with pytest.raises(host_facts.PrologueError, match="did not end within 1 s"):
        host_facts._after_prologue("sleep 60", str(tmp_path), {"PATH": "/usr/bin:/bin"})
    many = "; ".join(f"export BIG{number}=$(printf '%050000d' 0)" for number in range(4))
    made = host_facts._after_prologue(f"sleep 3 & {many}", str(tmp_path), {"PATH": "/usr/bin:/bin"})
    assert len(made["BIG3"]) == 50_000


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("bastion", Host("bastion")),
        ("me@bastion:2222", Host("bastion", user="me", port=2222)),
        ("ssh://bastion:22", Host("bastion", port=22)),
        ("me@[::1]:22", Host("::1", user="me", port=22)),
    ],
)
def test_proxy_jumps(text, host):
    from dstrain.launcher.transport.ssh import parse_jump

    assert parse_jump(text) == host


def test_a_database_that_refuses_is_the_ranks_own_trouble():
    text = "Traceback (most recent call last):\n  File 'x.py'\nConnectionRefusedError: [Errno 111] Connection refused\n"
    cause = root_cause([failure(1, 3, 1, text)], [(0, "host0")])
    assert (cause.code, cause.rank) == (3, 1)
