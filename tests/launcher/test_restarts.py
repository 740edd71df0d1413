"""The pure parts of restarts: alike or not, how long to wait, whom to suspect, and a job for other ranks."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lab
from dstrain.launcher.hostfile import Host
from dstrain.launcher.node import Node
from dstrain.launcher.plan import Request, Target, make_plan
from dstrain.launcher.preflight import HostReport
from dstrain.launcher.replan import fit, micro_batch, regroup, spread
from dstrain.launcher.restarts import LONG_S, AttemptRecord, Furthest, History, delay_s, exception_line, kind_of
from dstrain.launcher.root_cause import Cause, Failure, root_cause
from dstrain.launcher.store_address import who_cannot_meet
from dstrain.launcher.supervisor import Supervisor
from dstrain.launcher.team import Team
from dstrain.runtime.spec.frames import Dialled, Listening

TRACEBACK = "Traceback (most recent call last):\n  File 'x', line {}\n    go()\n{}\n"


def failed(rank: int = 0, status: int = 1, stderr: str = "") -> Cause:
    return root_cause([Failure(rank, f"h{rank}", status, 0, stderr)])


def raised(error: str, rank: int = 0, line: int = 7) -> Cause:
    return failed(rank, 1, TRACEBACK.format(line, error))


def lost(host: str) -> Cause:
    return Cause(200, "launcher", f"host {host} was lost: nothing heard from it for 9 s", host=host)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (raised("ValueError: at 0x7f12ab, step 3"), raised("ValueError: at 0x7f99cd, step 41", rank=3, line=8)),
        (raised("RuntimeError: [10.0.0.1]:4567 gone"), raised("RuntimeError: [10.0.0.22]:99 gone")),
        (raised("KeyError: 'a'\nmore of it 1"), raised("KeyError: 'a'\nmore of it: 2")),
        (failed(0, -9, "step 3\n"), failed(2, -9, "quite another last line\n")),
        (failed(0, 2, "dstrain: batch.global: 3\n"), failed(1, 2, "noise\ndstrain: batch.global: 3\n")),
    ],
)
def test_failures_that_are_alike(one, other):
    assert kind_of(one) == kind_of(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (raised("ValueError: a"), raised("KeyError: a")),
        (raised("ValueError: a"), raised("ValueError: b")),
        (failed(0, 3), failed(0, 4)),
        (failed(0, -9), failed(0, -11)),
        (failed(0, -9), failed(0, 1)),
        (lost("gpu1"), lost("gpu2")),
    ],
)
def test_failures_that_differ(one, other):
    assert kind_of(one) != kind_of(other)


def test_the_line_that_says_what_was_raised():
    first, second = TRACEBACK.format(1, "KeyError: 'a'"), TRACEBACK.format(2, "Own.Error: b\nmore")
    chain = f"{first}\nDuring handling of …\n\n{second}"
    assert exception_line(f"dstrain: first\n{chain}") == "Own.Error: b"
    assert exception_line("one\n\nlast \n") == "last"
    assert exception_line("") == ""


# --- history -------------------------------------------------------------------------------------------------


def history(*failures: tuple[Cause, bytes], max_restarts: int = 9, seconds: float = 1.0) -> History:
    """Attempts that failed so, each behind these events of rank 0."""
    made = History(max_restarts)
    for number, (cause, events) in enumerate(failures):
        made.begin(AttemptRecord(number, ["h0"], 1, "plan.json", started=100.0 * number))
        made.furthest.take(events)
        made.end(cause, 100.0 * number + seconds)
    return made


def event(kind: str, step: int) -> bytes:
    return json.dumps({"ts": 1, "rank": 0, "kind": kind, "step": step}).encode() + b"\n"


def test_events_say_how_far_it_has_come():
    furthest = Furthest()
    assert furthest.silent
    furthest.take(b'{"kind":"start","step":9}\n' + event("step", 4) + event("checkpoint", 3) + event("step", 2))
    assert (furthest.step, furthest.checkpoint, furthest.silent) == (4, 3, False)


ALIKE = raised("ValueError: same 1")


@pytest.mark.parametrize(
    ("attempts", "stops"),
    [
        ([(ALIKE, b"")], False),
        ([(ALIKE, b""), (raised("ValueError: same 2"), b"")], True),
        ([(ALIKE, b""), (raised("KeyError: 1"), b"")], False),
        ([(ALIKE, b""), (raised("KeyError: 1"), b""), (ALIKE, b"")], False),
        ([(ALIKE, event("step", 5)), (ALIKE, event("step", 5))], True),
        ([(ALIKE, event("step", 5)), (ALIKE, event("step", 6))], False),
        ([(ALIKE, event("step", 9)), (ALIKE, event("step", 7) + event("checkpoint", 7))], False),
        ([(ALIKE, event("step", 9) + event("checkpoint", 8)), (ALIKE, event("checkpoint", 8))], True),
        ([(lost("a"), b""), (lost("b"), b"")], False),
    ],
)
def test_two_failures_alike_without_progress_end_it(attempts, stops):
    assert (history(*attempts).same_again() is not None) == stops


def test_a_silent_script_that_ran_long_got_somewhere():
    assert history((ALIKE, b""), (ALIKE, b""), seconds=LONG_S - 1).same_again() == (
        "failed with exit code 1: ValueError: same 1"
    )
    assert history((ALIKE, b""), (ALIKE, b""), seconds=LONG_S).same_again() is None
    assert history((ALIKE, event("step", 1)), (ALIKE, b""), seconds=LONG_S).same_again() is not None


@pytest.mark.parametrize(
    ("progress", "seconds"),
    [
        ([False], 0),
        ([True], 0),
        ([False, False], 1),
        ([False] * 4, 4),
        ([False] * 8, 60),
        ([False] * 5000, 60),
        ([False] * 8 + [True], 0),
        ([True, False, False, False], 2),
    ],
)
def test_waits_grow_until_there_is_progress(progress, seconds):
    assert delay_s(progress) == seconds


def test_a_host_is_suspected_when_its_ranks_fail_twice_in_a_row():
    one, other = raised("A: 1", rank=1), raised("B: 1", rank=2)
    assert history((one, b"")).suspect() is None
    assert history((other, b""), (one, b""), (one, b"")).suspect() == "h1"
    assert history((one, b""), (other, b"")).suspect() is None
    assert history((one, b""), (lost("h1"), b"")).suspect() is None
    assert history((lost("h1"), b""), (lost("h1"), b"")).suspect() is None


def test_restarts_that_are_left_and_hosts_set_aside():
    made = history((ALIKE, b""), max_restarts=1)
    assert made.left == 1
    assert made.take_aside({"a": "lost"}) == {"a": "lost"}
    made.begin(AttemptRecord(1, ["h0"], 1, "plan.json", started=5.0))
    assert made.left == 0
    first, second = made.close(None, {"a": "lost", "b": "slow"}, 7.0)
    assert (first["set_aside"], second["set_aside"]) == ({"a": "lost"}, {"b": "slow"})
    assert (first["cause"]["code"], second["cause"], second["ended"]) == (1, None, 7.0)
    assert History(1).close(None, {}, 1.0) == []


# --- a job for other ranks -----------------------------------------------------------------------------------


def job(whole: int, micro: int, **parallel: int) -> str:
    return json.dumps({"name": "x", "batch": {"global": whole, "micro": micro}, "parallel": parallel})


def test_the_same_slots_ask_for_nothing():
    text = job(7, 3)  # which does not even fit: that is for the first attempt to say
    found = fit(text, [2, 1], [1, 2], 2)
    assert found is not None
    assert (found.slots, found.job, found.changes) == ((1, 2), text, ())


@pytest.mark.parametrize(
    ("whole", "micro", "first", "offered", "least", "slots", "new_micro"),
    [
        (12, 4, [1, 1, 1], [1, 1], 2, (1, 1), 3),  # a smaller micro-batch that divides
        (12, 2, [1, 1, 1], [1, 1], 2, (1, 1), 2),  # accumulation alone
        (24, 2, [2, 2, 2], [2, 2], 1, (2, 2), 2),
        (8, 2, [2, 2, 2], [2, 1], 1, (2, 0), 2),  # 3 do not divide 8: a host is not needed
        (8, 2, [2, 2, 2], [2, 2, 1], 3, (2, 1, 1), 2),  # but here three hosts are asked for
        (8, 8, [1], [1, 1], 1, (1, 0), 8),  # never more ranks than at first
        (6, 1, [2, 2, 2], [2, 3], 1, (2, 1), 1),
        (512, 16, [8] * 8, [8] * 7, 4, (8, 8, 8, 8, 0, 0, 0), 16),
    ],
)
def test_the_global_batch_is_kept(whole, micro, first, offered, least, slots, new_micro):
    found = fit(job(whole, micro), first, offered, least)
    assert found is not None
    assert found.job is not None
    assert found.slots == slots
    assert json.loads(found.job)["batch"] == {"global": whole, "micro": new_micro}
    assert whole % (sum(slots) * new_micro) == 0


def test_what_has_changed_is_said():
    found = fit(job(12, 4, data_shard=3), [1, 1, 1], [1, 1], 2)
    assert found is not None
    assert found.changes == (
        "batch.global stays 12: 2 ranks × 2 × 3 samples (batch.micro was 4)",
        "parallel: one group of all 2 ranks, which the size of the groups before does not divide",
    )
    assert json.loads(found.job or "")["parallel"] == {"data_shard": None, "data_replicate": None}
    found = fit(job(12, 2, pipeline=2, data_shard=3), [2, 2, 2], [2, 2], 1)
    assert found is not None
    assert found.changes[0] == "batch.global stays 12: 2 data ranks × 3 × 2 samples"
    assert found.changes[1].startswith("parallel: one group of all 2 data ranks, which")
    found = fit(job(8, 2), [1, 1, 1, 1], [1, 1, 1], 1)
    assert found is not None
    assert found.changes[1] == "2 of 3 slots are used, so that batch.global divides"


@pytest.mark.parametrize(
    ("whole", "micro", "first", "offered", "slots", "new_micro", "parallel"),
    [
        (12, 1, [4, 4], [4, 2], (4, 0), 1, {}),  # 6 ranks are no two pipelines of 4
        (8, 4, [4, 4, 4, 4], [4, 4, 4], (4, 4, 0), 4, {}),  # 3 data ranks do not divide 8
        (9, 1, [4, 4], [4], (4,), 1, {}),  # 1 data rank, though 4 ranks do not divide 9
        (12, 2, [4, 4, 4, 4], [4, 4], (4, 4), 2, {"data_replicate": 2, "data_shard": 2}),
    ],
)
def test_a_pipeline_keeps_its_length(whole, micro, first, offered, slots, new_micro, parallel):
    found = fit(job(whole, micro, pipeline=4, **parallel), first, offered, 1)
    assert found is not None
    assert found.slots == slots
    values = json.loads(found.job or "")
    assert values["batch"]["micro"] == new_micro
    shrunk = {"data_replicate": 1, "data_shard": 2} if parallel else {}
    assert values["parallel"] == {"pipeline": 4, **shrunk}


def test_a_pipeline_without_ranks_enough_is_no_way():
    assert fit(job(8, 1, pipeline=4), [2, 2], [2], 1) is None


def test_a_plain_script_takes_what_there_is():
    for text in (None, '{"name": "x", "batch": null, "parallel": {}}'):
        found = fit(text, [4, 4], [3, 4], 1)
        assert found is not None
        assert (found.slots, found.changes) == ((3, 4), ())


def test_there_is_not_always_a_way():
    assert fit(job(8, 2), [1, 1, 1], [1, 1], 3) is None  # too few hosts
    assert fit(job(2, 1), [1, 1, 1, 1], [1, 1, 1], 3) is None  # too few samples


@given(st.integers(1, 200), st.integers(1, 20), st.integers(1, 40))
def test_micro_batches_divide_and_never_grow(whole, micro, ranks):
    found = micro_batch(whole, micro, ranks)
    if whole % ranks:
        assert found is None
    else:
        assert found is not None
        assert 1 <= found <= micro
        assert whole % (found * ranks) == 0
        better = [size for size in range(found + 1, micro + 1) if whole % (size * ranks) == 0]
        assert better == []


@given(st.lists(st.integers(1, 8), min_size=1, max_size=6), st.data())
def test_slots_are_spread_over_enough_hosts(offered, data):
    ranks, least = data.draw(st.integers(1, sum(offered))), data.draw(st.integers(1, len(offered)))
    found = spread(offered, ranks, least)
    assert (found is None) == (ranks < least)
    if found is not None:
        assert sum(found) == ranks
        assert all(0 <= count <= slots for count, slots in zip(found, offered, strict=True))
        assert sum(count > 0 for count in found) >= least


@pytest.mark.parametrize(
    ("parallel", "first", "ranks", "changed"),
    [
        ({}, 8, 6, {}),
        ({"data_shard": 2}, 8, 6, {}),
        ({"data_shard": 4}, 8, 6, {"data_shard": None, "data_replicate": None}),
        ({"data_shard": 2, "data_replicate": 4}, 8, 6, {"data_replicate": 3}),
        ({"data_replicate": 2}, 8, 4, {"data_replicate": 1}),
        ({"data_replicate": 8}, 8, 6, {"data_replicate": 6}),  # stage 0: groups of one
        ({"data_replicate": 2}, 8, 8, {}),
    ],
)
def test_groups_keep_their_size_or_become_one(parallel: dict[str, Any], first, ranks, changed):
    assert regroup(parallel, first, ranks) == changed


# --- hosts that do not meet ----------------------------------------------------------------------------------


def reports(listening: list[str] | None, *reached: list[str] | None) -> list[HostReport]:
    """Rank 0's host a and the others b, c, …: what it listens at, and what each of them has dialled."""
    first = HostReport(Host("a"))
    first.listening = None if listening is None else Listening([(x, 5) for x in listening], {}, {"1.1.1.1": "taken"})
    made = [first]
    for name, addresses in zip("bcdef", reached, strict=False):
        dialled = None if addresses is None else Dialled(dict.fromkeys(addresses, "eth0"), {"1.1.1.1": "no route"})
        made.append(HostReport(Host(name), dialled=dialled))
    return made


@pytest.mark.parametrize(
    ("found", "blamed"),
    [
        (reports(None, None, None), ["a"]),
        (reports([], None, None), ["a"]),
        (reports(["1.1.1.1"], ["1.1.1.1"], []), ["c"]),
        (reports(["1.1.1.1"], []), ["b"]),  # one of two: the other keeps the checkpoints
        (reports(["1.1.1.1"], None, ["1.1.1.1"], ["1.1.1.1"]), ["b"]),
        (reports(["1.1.1.1"], [], None, ["1.1.1.1"]), ["a"]),  # most cannot
        (reports(["1.1.1.1", "2.2.2.2"], ["1.1.1.1"], ["2.2.2.2"]), []),
    ],
)
def test_who_is_to_blame_when_hosts_do_not_meet(found, blamed):
    assert list(who_cannot_meet(found)) == blamed
    assert all(who_cannot_meet(found).values())


# --- hosts that were set aside -------------------------------------------------------------------------------


def team_of(*names: str) -> tuple[Team, list[Node], list[str]]:
    """A team of hosts that are well, and the names of those whose connection was closed."""
    closed: list[str] = []

    def node(name: str) -> Node:
        session: Any = SimpleNamespace(close=lambda: closed.append(name), heard_at=time.monotonic())
        return Node(session, HostReport(Host(name, slots=1)), connected=True, ended_attempt=0)

    nodes = [node(name) for name in names]
    request = Request(Target("script", "x.py"), tuple(one.report.host for one in nodes), "/job", max_restarts=1)
    return Team(request, nodes, lambda text: None), nodes, closed


@pytest.mark.parametrize("keep_connected", [True, False])
def test_a_host_that_is_well_keeps_its_connection(keep_connected: bool):
    """It takes no part any more, but its disk does."""
    team, (first, second), closed = team_of("a", "b")
    team.set_aside(second, "its ranks were the root cause twice in a row", keep_connected)
    assert team.active == [first]
    assert list(team.aside) == ["b"]
    assert (second.gone is None) is keep_connected
    lab.wait_for(lambda: closed == ([] if keep_connected else ["b"]), "the connection", 5.0)
    second.gone = "nothing heard from it for 9 s"
    team.drop(0)
    assert (team.active, team.fence) == ([first], 0.0)


def test_the_next_attempt_begins_when_a_host_that_was_cut_off_has_surely_ended():
    team, (_, second), _ = team_of("a", "b")
    second.gone = "nothing heard from it for 8 s"
    team.drop(0)
    assert team.fence == second.session.heard_at + (12 + 2 * 1 + 5)


def test_a_clock_is_of_the_host_that_has_rank_0_now():
    team, nodes, _ = team_of("a", "b")
    for node, ahead_s in zip(nodes, (5, 7), strict=True):
        node.clock_offset_ns = ahead_s * 10**9
    team.set_aside(nodes[0], "it was lost", keep_connected=True)
    plan = make_plan(Request(Target("script", "x.py"), (Host("b", slots=1),), "/job"), "id", [1])
    written: list[dict[str, Any]] = []
    events = SimpleNamespace(begin_attempt=lambda: None, write=lambda number, kind, **fields: written.append(fields))
    console = SimpleNamespace(send=lambda kind, **fields: None)
    supervisor: Any = SimpleNamespace(plan=plan, nodes=nodes, team=team, events=events, console=console)
    Supervisor._say_start(supervisor, 1)
    assert [event["clock_offset_s"] for event in written] == [7.0]
