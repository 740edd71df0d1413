"""Checkpoint files that only a host outside of the attempt holds: planned, carried, and whole or not there at all."""

from __future__ import annotations

import hashlib
import json
import os
import queue
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lab
from dstrain.launcher import file_transfer, preflight
from dstrain.launcher import session as session_module
from dstrain.launcher.agent import files as agent_files
from dstrain.launcher.agent.files import FileWorker, inventory
from dstrain.launcher.bundle import build_bundle
from dstrain.launcher.checkpoint_moves import Refusals, Wanted, bring_checkpoints, plan_moves, wanted_of
from dstrain.launcher.event_loop import StopRequested
from dstrain.launcher.file_transfer import AHEAD, Parcel, TransferStopped
from dstrain.launcher.hostfile import Host
from dstrain.launcher.node import Node, agent_pythons, prepare_message
from dstrain.launcher.plan import Request, Target
from dstrain.launcher.session import Connected, Gone, HostSession
from dstrain.launcher.transport import ConnectOptions
from dstrain.launcher.transport import local as local_transport
from dstrain.launcher.transport.local import LocalConnection
from dstrain.runtime.checkpoint.manifest import FILE_NAME, Manifest
from dstrain.runtime.spec import file_frames as files
from dstrain.runtime.spec import frames
from dstrain.runtime.spec.errors import UnreachableError
from dstrain.runtime.spec.exit_codes import ExitCode

# --- the plan ----------------------------------------------------------------------------------------------------


def held(
    expected: dict[str, int], *names: str, manifest: str = "m", saved_at: float = 0.0, **sizes: int
) -> files.StepFiles:
    """A step's folder that has the manifest and these files, in their sizes but for `sizes`."""
    there = {name: expected[name] for name in names} | sizes
    return files.StepFiles(manifest, expected, {FILE_NAME: 100, **there}, saved_at)


TWO = {"rank-0": 10, "rank-1": 20}


def carried(plan: Any) -> set[tuple[str, str, str]]:
    return {(copy.name, copy.source, copy.target) for copy in plan.copies}


def test_what_only_a_spare_holds_is_brought():
    hosts = {"a": {5: held(TWO, "rank-0")}, "spare": {5: held(TWO, "rank-1")}}
    plan = plan_moves(hosts, ["a"])
    assert plan.step == 5
    assert carried(plan) == {("rank-1", "spare", "a")}
    assert str(plan) == "checkpoint step-5: bringing 1 file (0.0 MB) from spare to a"


def test_a_host_that_has_nothing_gets_the_manifest_too():
    hosts = {"new": {}, "spare": {5: held(TWO, "rank-0", "rank-1")}}
    expected = {(name, "spare", "new") for name in (FILE_NAME, "rank-0", "rank-1")}
    assert carried(plan_moves(hosts, ["new"])) == expected


def test_nothing_is_carried_where_hosts_share_the_folder():
    shared = {5: held(TWO, "rank-0", "rank-1"), 4: held(TWO, "rank-0")}
    assert plan_moves({"a": shared, "b": shared, "spare": shared}, ["a", "b"]).copies == ()


def test_nothing_is_carried_between_hosts_of_the_attempt():
    hosts = {"a": {5: held(TWO, "rank-0")}, "b": {5: held(TWO, "rank-1")}, "spare": {}}
    assert plan_moves(hosts, ["a", "b"]).copies == ()


@pytest.mark.parametrize(
    "newer",
    [
        {"a": held(TWO, "rank-0"), "spare": held(TWO, "rank-0")},  # nobody has rank-1
        {"a": held(TWO, "rank-0"), "spare": held(TWO, **{"rank-1": 19})},  # cut off
        {"a": held(TWO, "rank-0"), "spare": held(TWO, "rank-1", manifest="other")},  # of another run
    ],
)
def test_a_step_that_is_not_complete_is_passed_over(newer: dict[str, files.StepFiles]):
    hosts = {"a": {6: newer["a"]}, "spare": {6: newer["spare"], 5: held(TWO, "rank-0", "rank-1")}}
    assert plan_moves(hosts, ["a"]).step == 5
    assert plan_moves(hosts, ["a"], step=6) is None


@pytest.mark.parametrize(("saved_at", "newest"), [(1.0, "mine"), (3.0, "other")])
def test_two_checkpoints_of_one_step_are_not_mixed(saved_at: float, newest: str):
    """The one that was saved last is taken, as the ranks do; the other where that one cannot be made complete."""
    mine = held(TWO, "rank-0", "rank-1", manifest="mine", saved_at=2.0)
    other = held(TWO, "rank-0", "rank-1", manifest="other", saved_at=saved_at)
    from_spare = {(name, "spare", "a") for name in (FILE_NAME, "rank-0", "rank-1")}
    plan = plan_moves({"spare": {5: other}, "a": {5: mine}}, ["a"])
    assert plan.manifest == newest
    assert carried(plan) == (from_spare if newest == "other" else set())
    cut = held(TWO, "rank-0", manifest="mine", saved_at=2.0)
    plan = plan_moves({"spare": {5: other}, "a": {5: cut}}, ["a"])
    assert plan.manifest == "other"
    assert carried(plan) == from_spare


def test_it_goes_to_whom_has_most_and_evenly():
    expected = {"rank-0": 10, "rank-1": 10, "rank-2": 10, "rank-3": 10}
    hosts = {
        "a": {5: held(expected)},
        "b": {5: held(expected, "rank-0")},
        "x": {5: held(expected, "rank-1", "rank-2", "rank-3")},
        "y": {5: held(expected, "rank-1", "rank-2", "rank-3")},
    }
    plan = plan_moves(hosts, ["a", "b"])
    assert [copy.target for copy in plan.copies] == ["b", "a", "b"]
    assert [copy.source for copy in plan.copies] == ["x", "y", "x"]


def test_who_has_refused_is_not_asked_again():
    hosts = {"a": {}, "b": {}, "x": {5: held(TWO, "rank-0", "rank-1")}, "y": {5: held(TWO, "rank-0", "rank-1")}}
    plan = plan_moves(hosts, ["a", "b"], refusals=Refusals(targets=frozenset("a")))
    assert {copy.target for copy in plan.copies} == {"b"}
    assert plan_moves(hosts, ["a", "b"], refusals=Refusals(targets=frozenset("ab"))) is None
    plan = plan_moves(hosts, ["a"], refusals=Refusals(files=frozenset({("x", 5, "rank-0")})))
    assert ("rank-0", "y", "a") in carried(plan)


HOSTS = ["a", "b", "c", "d"]
NAMES = ["rank-0", "rank-1", "rank-2", "rank-3", "rank-4"]


@st.composite
def inventories(draw: st.DrawFn) -> dict[str, dict[int, files.StepFiles]]:
    names = st.sets(st.sampled_from(NAMES), min_size=1)
    expected = {step: {name: draw(st.integers(0, 50)) for name in sorted(draw(names))} for step in (1, 2)}
    some = {step: st.sets(st.sampled_from(sorted(sizes))) for step, sizes in expected.items()}
    return {
        host: {step: held(expected[step], *draw(some[step])) for step in draw(st.sets(st.sampled_from([1, 2])))}
        for host in HOSTS
    }


def complete(hosts: dict[str, dict[int, files.StepFiles]], names: list[str], step: int) -> bool:
    there = [hosts[name][step] for name in names if step in hosts[name]]
    return bool(there) and {name for one in there for name in one.held} == {FILE_NAME, *there[0].expected}


@given(hosts=inventories(), inside=st.lists(st.sampled_from(HOSTS), min_size=1, unique=True))
def test_a_plan_makes_the_newest_complete(hosts: dict[str, dict[int, files.StepFiles]], inside: list[str]):
    plan = plan_moves(hosts, inside)
    possible = [step for step in (1, 2) if complete(hosts, HOSTS, step)]
    assert (plan.step if plan else None) == max(possible, default=None)
    if plan is None:
        return
    assert (plan.copies == ()) == complete(hosts, inside, plan.step)
    load = dict.fromkeys(inside, 0)
    for copy in plan.copies:
        source, target = hosts[copy.source][plan.step], hosts[copy.target].get(plan.step)
        assert copy.target in inside
        assert source.held[copy.name] == copy.size
        assert target is None or copy.name not in target.held
        if copy.name != FILE_NAME:
            assert copy.source not in inside
            load[copy.target] += copy.size
    pairs = [(copy.name, copy.target) for copy in plan.copies]
    assert len(set(pairs)) == len(pairs)
    for name in {name for name, _ in pairs} - {FILE_NAME}:
        assert len([target for other, target in pairs if other == name]) == 1, "to one host alone"
    for copy in plan.copies:
        assert plan.step in hosts[copy.target] or (FILE_NAME, copy.target) in pairs, "with its manifest"
    after = {host: dict(steps) for host, steps in hosts.items()}
    for copy in plan.copies:
        source = hosts[copy.source][plan.step]
        old = after[copy.target].get(plan.step) or replace(source, held={})
        after[copy.target][plan.step] = replace(old, held={**old.held, copy.name: copy.size})
    assert complete(after, inside, plan.step)
    largest = max((copy.size for copy in plan.copies), default=0)
    assert max(load.values()) - min(load.values()) <= largest


@pytest.mark.parametrize(
    ("checkpoint", "attempt", "has_saved", "expected"),
    [
        (None, 1, True, ()),
        ({"dir": None, "resume": None}, 0, False, ()),
        ({"dir": None, "resume": None}, 1, False, (Wanted("checkpoints/gpt"),)),
        ({"dir": "/disk/saved", "resume": "auto"}, 0, False, (Wanted("/disk/saved"),)),
        ({"dir": "/disk/saved", "resume": "auto"}, 1, False, (Wanted("/disk/saved"),)),
        ({"dir": "saved", "resume": "20"}, 0, False, (Wanted("saved", 20),)),
        ({"dir": "saved", "resume": "20"}, 1, False, (Wanted("saved"), Wanted("saved", 20))),
        ({"dir": "saved", "resume": "20"}, 1, True, (Wanted("saved"),)),
        ({"dir": None, "resume": "other/step-30/"}, 0, False, (Wanted("other", 30),)),
        ({"dir": None, "resume": "other"}, 0, False, (Wanted("other"),)),
        ({"dir": None, "resume": "other"}, 2, False, (Wanted("checkpoints/gpt"), Wanted("other"))),
    ],
)
def test_what_an_attempt_goes_on_from(checkpoint: Any, attempt: int, has_saved: bool, expected: tuple[Wanted, ...]):
    assert wanted_of(json.dumps({"name": "gpt", "checkpoint": checkpoint}), attempt, has_saved) == expected
    assert wanted_of(None, attempt, has_saved) == ()


# --- the agent's side ----------------------------------------------------------------------------------------------


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Callable[..., list[Any]]]:
    """`worker(request, …)`: what the agent's thread answers, as many as are expected."""
    file_worker = FileWorker()

    def ask(*requests: Any, answers: int = 1) -> list[Any]:
        for request in requests:
            file_worker.ask(tmp_path, request)
        found: list[Any] = []
        lab.wait_for(lambda: found.extend(file_worker.answers()) or len(found) >= answers, "answers", 5.0)
        return found

    yield ask
    file_worker.abandon()


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def take(size: int, name: str = "rank-0") -> files.TakeFile:
    return files.TakeFile(1, "saved", "step-5.tmp-1", name, size)


def test_a_file_arrives_whole(worker: Callable[..., list[Any]], tmp_path: Path):
    chunks = [files.Chunk(1, b"abc"), files.Chunk(1, b"def")]
    found = worker(take(6), *chunks, files.EndFile(1, digest(b"abcdef")), answers=3)
    assert found == [files.Taken(1), files.Taken(1), files.Done(1)]
    assert worker(files.KeepFiles(2, "saved", "step-5.tmp-1", 5, "m")) == [files.Done(2)]
    assert (tmp_path / "saved" / "step-5" / "rank-0").read_bytes() == b"abcdef"
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["step-5"]


@pytest.mark.parametrize(
    ("sent", "sha256", "reason"),
    [
        (b"abcdeX", digest(b"abcdef"), "expected rank-0 with SHA-256 "),
        (b"abc", digest(b"abcdef"), "expected 6 bytes of rank-0, found 3"),
        (b"abcdefg", digest(b"abcdefg"), "expected 6 bytes of rank-0, found 7"),
    ],
)
def test_a_file_that_is_not_the_same_is_refused(
    worker: Callable[..., list[Any]], tmp_path: Path, sent: bytes, sha256: str, reason: str
):
    _, failed = worker(take(6), files.Chunk(1, sent), files.EndFile(1, sha256), answers=2)
    assert isinstance(failed, files.FileFailed)
    assert failed.reason.startswith(reason)
    assert not list((tmp_path / "saved" / "step-5.tmp-1").iterdir())


@pytest.mark.parametrize("name", ["../rank-0", "/etc/passwd", ".."])
def test_a_name_leads_nowhere_else(worker: Callable[..., list[Any]], tmp_path: Path, name: str):
    (failed,) = worker(take(6, name))
    assert "expected the name of a file in its folder" in failed.reason
    assert not list(tmp_path.iterdir())


def test_what_is_sent_is_read_as_it_is_asked_for(worker: Callable[..., list[Any]], tmp_path: Path):
    data = random.Random(0).randbytes(files.CHUNK_BYTES + 5)
    (tmp_path / "file").write_bytes(data)
    (first,) = worker(files.SendFile(1, ".", "file"), files.More(1, 1))
    assert first == files.Chunk(1, data[: files.CHUNK_BYTES])
    second, end = worker(files.More(1, 9), answers=2)
    assert second == files.Chunk(1, data[files.CHUNK_BYTES :])
    assert end == files.FileSent(1, len(data), digest(data))
    (failed,) = worker(files.SendFile(2, ".", "missing"))
    assert failed == files.FileFailed(2, f"No such file or directory: {tmp_path}/missing")


def test_what_cannot_be_foreseen_ends_a_talk_alone(
    worker: Callable[..., list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fails(root: Path) -> Any:
        raise RuntimeError("odd")

    monkeypatch.setattr(agent_files, "inventory", fails)
    assert worker(files.ListCheckpoints(1, ".")) == [files.FileFailed(1, "RuntimeError: odd")]
    monkeypatch.undo()
    (tmp_path / "saved").mkdir()
    assert worker(take(6), files.Chunk(1, b"abc")) == [files.Taken(1)]
    shutil.rmtree(tmp_path / "saved")
    (tmp_path / "saved").touch()  # now its file cannot even be removed
    (failed,) = worker(files.EndFile(1, ""))
    assert failed == files.FileFailed(1, "expected 6 bytes of rank-0, found 3")
    assert worker(files.ListCheckpoints(2, ".")) == [files.Inventory(2, {})]


def write_step(folder: Path, step: int, every: dict[str, bytes], *names: str, run_id: str = "") -> Path:
    """A checkpoint's folder as a host has it: the manifest, and some of the files."""
    target = folder / f"step-{step}"
    target.mkdir(parents=True)
    listed = {name: len(data) for name, data in every.items()}
    text = Manifest(step, {}, {}, (), listed, {}, run_id=run_id, saved_at=1.5).to_text()
    (target / FILE_NAME).write_text(text)
    for name in names:
        (target / name).write_bytes(every[name])
    return target


def checksum_of(folder: Path) -> str:
    return str(json.loads((folder / FILE_NAME).read_text())["checksum"])


def test_an_inventory_knows_folders_with_a_manifest(tmp_path: Path):
    every = {"rank-0": b"abc", "rank-1": b"de"}
    folder = write_step(tmp_path, 5, every, "rank-0")
    (folder / "foreign").write_text("no file of the checkpoint's")
    (write_step(tmp_path, 6, every, "rank-0") / FILE_NAME).write_text("{damaged")
    (write_step(tmp_path, 7, every, "rank-0") / FILE_NAME).unlink()
    changed = write_step(tmp_path, 10, every, "rank-0") / FILE_NAME
    changed.write_text(changed.read_text().replace('"rank-1": 2', '"rank-1": 1'))
    (write_step(tmp_path, 11, every) / FILE_NAME).write_text('{"files": {"rank-0": Infinity}, "checksum": "0"}')
    for name in ("step-8.tmp-1", "step-x", "step-09"):
        write_step(tmp_path, 8, every).rename(tmp_path / name)
    size = (folder / FILE_NAME).stat().st_size
    expected = files.StepFiles(
        checksum_of(folder), {"rank-0": 3, "rank-1": 2}, {FILE_NAME: size, "rank-0": 3}, saved_at=1.5
    )
    assert inventory(tmp_path) == {5: expected}
    assert inventory(tmp_path / "missing") == {}


def test_another_checkpoint_of_that_step_stands_aside(worker: Callable[..., list[Any]], tmp_path: Path):
    write_step(tmp_path / "saved", 5, {"rank-0": b"old"}, "rank-0", run_id="old")
    new = write_step(tmp_path / "new", 5, {"rank-0": b"new"}, "rank-0", run_id="new")
    checksum = checksum_of(new)
    new.rename(tmp_path / "saved" / "step-5.tmp-1")
    assert worker(files.KeepFiles(2, "saved", "step-5.tmp-1", 5, checksum)) == [files.Done(2)]
    assert (tmp_path / "saved" / "step-5" / "rank-0").read_bytes() == b"new"
    assert (tmp_path / "saved" / "step-5.left-1" / "rank-0").read_bytes() == b"old"


def test_an_agent_that_ends_leaves_nothing_half(tmp_path: Path):
    worker = FileWorker()
    worker.ask(tmp_path, take(6))
    worker.ask(tmp_path, files.Chunk(1, b"abc"))
    lab.wait_for(lambda: list(worker.answers()), "the chunk to be written", 5.0)
    assert (tmp_path / "saved" / "step-5.tmp-1" / "rank-0").exists()
    worker.abandon()
    assert not list((tmp_path / "saved").iterdir())


class FakeSession:
    """A host that answers as told."""

    def __init__(self, answer: Callable[[Any], list[Any]]) -> None:
        self.host, self.queue, self.answer = SimpleNamespace(name="fake"), queue.SimpleQueue[Any](), answer
        self.sent: list[Any] = []

    def begin_talk(self) -> tuple[int, Any]:
        return 1, self.queue

    def end_talk(self, talk: int) -> None:
        """Nothing to forget."""

    def send(self, message: Any) -> None:
        self.sent.append(message)
        for answer in self.answer(message):
            self.queue.put(answer)

    def send_chunk(self, talk: int, data: bytes) -> None:
        self.send(files.Chunk(talk, data))


def test_a_target_that_stalls_holds_its_source_back():
    """And the head's memory, and its heartbeats: no more than one chunk is on its way."""

    def give(message: Any) -> list[Any]:
        return [files.Chunk(1, b"x")] * message.chunks if isinstance(message, files.More) else []

    source, target, stop = FakeSession(give), FakeSession(lambda message: []), threading.Event()
    ended: list[type] = []

    def run() -> None:
        try:
            parcel = Parcel("saved", 5, "rank-0", 1000, "step-5.tmp-1")
            file_transfer.carry(source, target, parcel, stop)  # type: ignore[arg-type]
        except TransferStopped as error:
            ended.append(type(error))

    thread = threading.Thread(target=run)
    thread.start()
    time.sleep(0.5)
    assert len([message for message in target.sent if isinstance(message, files.Chunk)]) == 1
    assert sum(message.chunks for message in source.sent if isinstance(message, files.More)) == AHEAD
    stop.set()
    thread.join(5)
    assert ended == [TransferStopped]
    assert isinstance(target.sent[-1], files.Forget)


# --- hosts -------------------------------------------------------------------------------------------------------


class Loop:
    """As much of the supervisor's loop as bringing files needs: it waits, and beats."""

    def __init__(self, nodes: list[Node]) -> None:
        self.nodes, self.notes, self.stop_at = nodes, [], lambda: False

    def post(self, index: int, text: str) -> None:
        self.notes.append(text)

    def wake(self) -> None:
        """It looks often enough."""

    def wait(self, until: Callable[[], bool]) -> None:
        beat_at = 0.0
        while not until():
            if self.stop_at():
                raise StopRequested(ExitCode.INTERRUPTED)
            if time.monotonic() > beat_at:
                beat_at = time.monotonic() + 1.0
                for node in self.nodes:
                    node.session.send(frames.Heartbeat())
            time.sleep(0.005)


Fleet = Callable[..., list[Node]]


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    """`fleet(host, …)`: agents on these hosts, each of which has a folder of its own named as it is."""
    nodes: list[Node] = []
    bundle = build_bundle()

    def begin(*hosts: Host) -> list[Node]:
        request = Request(Target("program", "/bin/true"), hosts, str(tmp_path), preload=False)
        reports = {host.name: preflight.HostReport(host) for host in hosts}

        def post(index: int, message: Any) -> None:
            node, host = nodes[index], hosts[index]
            if isinstance(message, Connected):
                prepare = prepare_message(request, host, "moves")
                node.session.send(replace(prepare, cwd=str(tmp_path / host.name)))
            elif isinstance(message, frames.HostFacts):
                node.report.facts = message
            elif isinstance(message, Gone):
                node.gone = message.complaint or "gone"

        for index, host in enumerate(hosts):
            (tmp_path / host.name).mkdir(exist_ok=True)
            session = HostSession(index, host, bundle, agent_pythons(request, host), None, post)  # type: ignore[arg-type]
            nodes.append(Node(session, reports[host.name]))
        for node in nodes:
            node.session.start(ConnectOptions(), threading.Semaphore(8))
        lab.wait_for(lambda: all(node.report.facts for node in nodes), "the agents")
        return nodes

    yield begin
    for node in nodes:
        node.session.send(frames.Close())
    lab.wait_for(lambda: all(node.gone is not None for node in nodes), "the agents to end")
    for node in nodes:
        node.session.close()
        connection: Any = node.session._connection
        if node.report.host.transport == "local":  # a run ends with its process, which closes the rest
            connection.process.stdout.close()
            connection._errors.close()


def local(*names: str) -> list[Host]:
    return [Host(name, transport="local") for name in names]


def shards(count: int, size: int) -> dict[str, bytes]:
    return {f"rank-{rank}.safetensors": random.Random(rank).randbytes(size + rank) for rank in range(count)}


def step_of(folder: Path, step: int = 5) -> dict[str, bytes]:
    """The files of a step, and nothing else in the folder."""
    found = [path.name for path in (folder / "saved").iterdir()]
    assert found == [f"step-{step}"], found
    return {path.name: path.read_bytes() for path in (folder / "saved" / f"step-{step}").iterdir()}


def assert_complete(every: dict[str, bytes], *folders: Path) -> None:
    """Together, each file once."""
    there = [(name, data) for folder in folders for name, data in step_of(folder).items() if name != FILE_NAME]
    assert sorted(there) == sorted(every.items())
    assert all(FILE_NAME in step_of(folder) for folder in folders)


def test_files_of_a_spare_come_to_the_attempt(fleet: Fleet, tmp_path: Path):
    every = shards(4, 3 * files.CHUNK_BYTES)
    names = list(every)
    write_step(tmp_path / "a" / "saved", 5, every, names[0])
    write_step(tmp_path / "spare" / "saved", 5, every, *names[1:])
    nodes = fleet(*local("a", "b", "spare"))
    loop = Loop(nodes)
    bring_checkpoints(nodes, nodes[:2], Wanted("saved"), loop)  # type: ignore[arg-type]
    assert_complete(every, tmp_path / "a", tmp_path / "b")
    first, last = loop.notes
    assert first == "checkpoint step-5: bringing 4 files (0.6 MB) from a, spare to b, a"
    assert last.startswith("checkpoint step-5: brought in ")


@pytest.mark.lab
def test_the_same_over_ssh(fleet: Fleet, light: lab.Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DSTRAIN_SSH_CONFIG", str(light.config))
    every = shards(3, 20 * files.CHUNK_BYTES)
    write_step(tmp_path / "h1" / "saved", 5, every)
    write_step(tmp_path / "h3" / "saved", 5, every, *every)
    nodes = fleet(*(Host(name) for name in ("h1", "h2", "h3")))
    bring_checkpoints(nodes, nodes[:2], Wanted("saved", 5), Loop(nodes))  # type: ignore[arg-type]
    assert_complete(every, tmp_path / "h1", tmp_path / "h2")


def test_hosts_that_share_a_folder_are_left_alone(fleet: Fleet, tmp_path: Path):
    every = shards(2, 100)
    for name in ("b", "spare"):
        (tmp_path / name).symlink_to(tmp_path / "a")
    (tmp_path / "a").mkdir()
    written = write_step(tmp_path / "a" / "saved", 5, every, *every)
    before = written.stat().st_mtime_ns
    nodes = fleet(*local("a", "b", "spare"))
    loop = Loop(nodes)
    bring_checkpoints(nodes, nodes[:2], Wanted("saved"), loop)  # type: ignore[arg-type]
    assert loop.notes == []
    assert written.stat().st_mtime_ns == before


def test_nobody_is_asked_where_all_take_part():
    """Nor is a spare that still connects: it would take the question for its first word."""
    session = FakeSession(lambda message: [])
    nodes = [Node(session, preflight.HostReport(Host(name))) for name in ("a", "spare")]  # type: ignore[arg-type]
    bring_checkpoints(nodes, nodes[:1], Wanted("saved"), Loop(nodes))  # type: ignore[arg-type]
    assert session.sent == []


def test_a_host_that_never_connects_ends_its_talks(monkeypatch: pytest.MonkeyPatch):
    def connect(*words: Any) -> Any:
        raise UnreachableError("far", "no connection", "")

    monkeypatch.setattr(session_module, "connect", connect)
    posted: list[Any] = []
    logs: Any = None
    host = HostSession(0, Host("far"), build_bundle(), ["python3"], logs, lambda index, it: posted.append(it))
    _, answers = host.begin_talk()
    host.start(ConnectOptions(), threading.Semaphore(1))
    assert answers.get(timeout=5.0) is None
    assert host.begin_talk()[1].get(timeout=5.0) is None
    lab.wait_for(lambda: posted, "the failure", 5.0)


def test_a_connection_closes_beside_a_write_that_is_stuck(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(local_transport, "CLOSE_WAIT_S", 0.2)
    connection = LocalConnection(Host("here", transport="local"), "exec sleep 600")
    ended: list[type] = []

    def write() -> None:
        try:
            connection.write(bytes(1 << 20))  # more than the pipe holds, and nobody reads it
        except OSError as error:
            ended.append(type(error))

    writer = threading.Thread(target=write)
    writer.start()
    time.sleep(0.2)
    assert writer.is_alive()
    at = time.monotonic()
    connection.close()
    writer.join(2.0)
    assert ended == [BrokenPipeError]
    assert time.monotonic() - at < 5.0
    assert connection.process.stdout is not None
    connection.process.stdout.close()
    connection._errors.close()


@pytest.mark.lab
@pytest.mark.parametrize("elsewhere", [True, False])
def test_a_full_disk_leaves_nothing_half(fleet: Fleet, tmp_path: Path, elsewhere: bool):
    """Another host of the attempt takes the files, if there is one."""
    every = shards(1, 3 << 20)
    (tmp_path / "a").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path / "a")], check=True)
    try:
        write_step(tmp_path / "spare" / "saved", 5, every, *every)
        nodes = fleet(*local("a", "spare", *(["b"] if elsewhere else [])))
        loop = Loop(nodes)
        bring_checkpoints(nodes, [nodes[0], *nodes[2:]], Wanted("saved"), loop)  # type: ignore[arg-type]
        assert any("No space left on device" in note for note in loop.notes)
        lab.wait_for(lambda: not list((tmp_path / "a" / "saved").iterdir()), "the staged files to go", 5.0)
        if elsewhere:
            assert_complete(every, tmp_path / "b")
    finally:
        for node in nodes:
            node.session.send(frames.Close())
        lab.wait_for(lambda: all(node.gone is not None for node in nodes), "the agents to end")
        subprocess.run(["umount", str(tmp_path / "a")], check=True)


@pytest.mark.parametrize("twins", [False, True])
def test_a_source_that_vanishes_leaves_nothing_half(fleet: Fleet, tmp_path: Path, twins: bool):
    """Another source goes on, if there is one; else what is there stays."""
    every = shards(1, 100 << 20)
    write_step(tmp_path / "a" / "saved", 4, {"old": b"old"}, "old")
    for name in ("spare", "twin") if twins else ("spare",):
        write_step(tmp_path / name / "saved", 5, every, *every)
    nodes = fleet(*local("a", "spare", *(["twin"] if twins else [])))
    loop = Loop(nodes)
    connection: Any = nodes[1].session._connection

    def kill_in_the_middle() -> None:
        staged = lab.wait_for(lambda: list((tmp_path / "a" / "saved").glob("step-5.tmp-*/rank-0*")), "the file")
        assert staged
        os.kill(connection.process.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_in_the_middle)
    killer.start()
    bring_checkpoints(nodes, nodes[:1], Wanted("saved"), loop)  # type: ignore[arg-type]
    killer.join(10)
    assert any("rank-0.safetensors from spare to a: spare: the connection ended" in note for note in loop.notes)
    saved = tmp_path / "a" / "saved"
    if twins:
        assert (saved / "step-5" / "rank-0.safetensors").read_bytes() == every["rank-0.safetensors"]
    lab.wait_for(lambda: not list(saved.glob("*.tmp-*")), "the staged file to go", 5.0)
    assert sorted(path.name for path in saved.iterdir()) == (["step-4", "step-5"] if twins else ["step-4"])


def test_a_stop_ends_it(fleet: Fleet, tmp_path: Path):
    every = shards(1, 100 << 20)
    write_step(tmp_path / "spare" / "saved", 5, every, *every)
    nodes = fleet(*local("a", "spare"))
    loop = Loop(nodes)
    loop.stop_at = lambda: bool(list((tmp_path / "a").glob("saved/step-5.tmp-*/rank-0*")))
    with pytest.raises(StopRequested):
        bring_checkpoints(nodes, nodes[:1], Wanted("saved"), loop)  # type: ignore[arg-type]
    lab.wait_for(lambda: not list((tmp_path / "a" / "saved").iterdir()), "the staged file to go", 5.0)
