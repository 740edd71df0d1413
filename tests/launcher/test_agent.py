"""An agent driven as the head does it, by frames on its stdin, at moments that whole runs rarely meet."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dstrain.launcher
import lab
from dstrain.launcher.agent import processes
from dstrain.launcher.agent.outbox import Outbox
from dstrain.launcher.agent.ranks import FORK_TIMEOUT_S, Ranks
from dstrain.runtime.spec import frames

ROOT = str(Path(dstrain.launcher.__file__).parents[2])
RANKS = 3


class DrivenAgent:
    """A warden and its agent. `messages`: all that came but heartbeats and output; `outputs`: frames of output."""

    def __init__(self, folder: Path, kind: str, target: str, arguments: list[str]) -> None:
        code = (
            f"import sys; sys.path.insert(0, {ROOT!r}); from dstrain.launcher.agent.warden import main; main({ROOT!r})"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        self.messages: list[frames.Message] = []
        self.outputs: list[frames.Output] = []
        self.attempt = -1
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        preload = kind != "program"
        self.send(
            frames.Prepare(
                run_id=f"test-{os.getpid()}", host="h", python=[sys.executable], python_named=True, cwd=str(folder),
                kind=kind, target=target, arguments=arguments, environment={}, pass_environment={}, prologue=None,
                slots=RANKS, gpus=None, fallback_slots=1, excluded_slots=[], preload=preload, requirements=[], job=None,
            )
        )  # fmt: skip
        self.wait_for(frames.PreloadFacts, timeout_s=60.0)

    def _read(self) -> None:
        assert self.process.stdout is not None
        reader = frames.FrameReader()
        while data := os.read(self.process.stdout.fileno(), 1 << 18):
            for frame in reader.feed(data):
                if isinstance(frame, frames.Output):
                    self.outputs.append(frame)
                elif isinstance(frame, frames.Heartbeat):
                    self.send(frame)
                else:
                    self.messages.append(frame)

    def send(self, message: frames.Message) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(frames.encode_message(message))

    def start(self, ranks: int, environment: dict[str, str] | None = None, store: bool = False) -> None:
        """Begin the next attempt; what the last one said is forgotten."""
        self.attempt += 1
        self.messages.clear()
        self.outputs.clear()
        address, port = "", 0
        if store:
            self.send(frames.Listen(["127.0.0.1"], 0, "token"))
            address, port = self.wait_for(frames.Listening).addresses[0]
        specs = [frames.ProcessSpec(rank, rank, {}) for rank in range(ranks)]
        self.send(frames.Start(self.attempt, specs, environment or {}, address, port, store))

    def wait_for(self, kind: type, timeout_s: float = 20.0) -> Any:
        def found() -> object:
            return next((message for message in self.messages if isinstance(message, kind)), None)

        return lab.wait_for(found, kind.__name__, timeout_s)

    def statuses(self) -> list[int]:
        return [message.status for message in self.messages if isinstance(message, frames.Exited)]

    def printed(self, rank: int) -> bytes:
        return b"".join(frame.data for frame in self.outputs if frame.rank == rank)

    @property
    def zygote(self) -> int:
        return children(children(self.process.pid)[0])[0]

    def close(self) -> None:
        self.send(frames.Close())
        assert self.process.wait(10) == 0
        self._reader.join(5)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture(scope="module")
def forking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DrivenAgent]:
    """An agent with a zygote, ready for attempts of a script that says its attempt and sleeps for S seconds."""
    folder = tmp_path_factory.mktemp("forking")
    (folder / "job.py").write_text("import os, time; print(os.environ['ATTEMPT']); time.sleep(float(os.environ['S']))")
    agent = DrivenAgent(folder, "script", "job.py", [])
    yield agent
    agent.close()


def start_with_a_stopped_zygote(agent: DrivenAgent, grace_s: float) -> None:
    """The requests for the ranks lie in the zygote's socket when the attempt is to end."""
    os.kill(agent.zygote, signal.SIGSTOP)
    agent.start(RANKS, {"ATTEMPT": str(agent.attempt + 1), "S": "600"}, store=True)
    agent.send(frames.Stop(grace_s))


def assert_the_next_attempt_is_untouched(agent: DrivenAgent) -> None:
    agent.start(RANKS, {"ATTEMPT": str(agent.attempt + 1), "S": "0"})
    agent.wait_for(frames.AllEnded)
    assert agent.statuses() == [0] * RANKS
    assert {agent.printed(rank) for rank in range(RANKS)} == {b"%d\n" % agent.attempt}


def test_an_attempt_has_ended_only_when_its_late_ranks_have(forking: DrivenAgent):
    """And its store."""
    start_with_a_stopped_zygote(forking, grace_s=0.0)
    time.sleep(0.5)  # time enough to say what would be wrong
    assert not forking.statuses()
    os.kill(forking.zygote, signal.SIGCONT)
    assert forking.wait_for(frames.AllEnded).attempt == forking.attempt
    assert forking.statuses() == [-signal.SIGKILL] * RANKS
    lab.wait_for(lambda: not children(forking.zygote), "ranks and store to end", 1.0)
    assert_the_next_attempt_is_untouched(forking)


def test_a_late_rank_gets_its_sigterm(forking: DrivenAgent):
    start_with_a_stopped_zygote(forking, grace_s=60.0)
    time.sleep(0.5)  # for the agent to have read it
    os.kill(forking.zygote, signal.SIGCONT)
    forking.wait_for(frames.AllEnded)
    assert forking.statuses() == [-signal.SIGTERM] * RANKS
    assert_the_next_attempt_is_untouched(forking)


def test_a_zygote_that_does_not_answer_is_not_waited_for(forking: DrivenAgent):
    """What it forks later dies at once, and is not taken for a rank of the next attempt."""
    began = time.monotonic()
    start_with_a_stopped_zygote(forking, grace_s=0.0)
    forking.wait_for(frames.AllEnded)
    assert FORK_TIMEOUT_S <= time.monotonic() - began < FORK_TIMEOUT_S + 2.0
    threading.Timer(0.5, os.kill, (forking.zygote, signal.SIGCONT)).start()
    assert_the_next_attempt_is_untouched(forking)
    lab.wait_for(lambda: not children(forking.zygote), "late ranks and their store to end", 1.0)


def test_a_stop_that_crosses_the_end_leaves_nothing_due():
    """Else the agent would look every moment for what it has done already."""
    with open(os.devnull, "wb") as null:  # noqa: PTH123
        ranks = Ranks(Outbox(null.fileno()), warden=0, spared=set)
        ranks.ask_to_end(0.0)
        assert not ranks.on_time(time.monotonic() + 1.0)
        assert ranks.due_at(reading=True) == float("inf")


def test_stacks_that_nobody_waits_for_are_forgotten_with_their_attempt():
    with open(os.devnull, "wb") as null:  # noqa: PTH123
        ranks = Ranks(Outbox(null.fileno()), warden=0, spared=set)
        ranks.dump_stacks(all_threads=False)
        ranks.forget()
        assert ranks.due_at(reading=True) == float("inf")


def test_ten_lines_a_second_travel_in_five_packets(tmp_path: Path):
    text = "import time\nfor number in range(20):\n    print(number, flush=True)\n    time.sleep(0.1)\n"
    agent = DrivenAgent(tmp_path, "program", sys.executable, ["-S", "-c", text])
    try:
        agent.start(1)
        agent.wait_for(frames.AllEnded)
        assert agent.printed(0) == b"".join(b"%d\n" % number for number in range(20))
        assert len(agent.outputs) <= 12
    finally:
        agent.close()


def test_who_is_spared_is_asked_behind_every_scan():
    """One that is spared at first, and then is not, ends too."""
    with subprocess.Popen(["sh", "-c", "sleep 600 & sleep 600 & wait"], start_new_session=True) as shell:
        try:
            both = lab.wait_for(lambda: len(found := children(shell.pid)) == 2 and found, "the children")
            asked = iter([set(both[:1])])
            assert processes.sweep([], [shell.pid], spared=lambda: next(asked, set())) == set()
            assert shell.wait(5) == 0
        finally:
            shell.kill()


STANDS = """
import threading, time
def aside(): time.sleep(600)
threading.Thread(target=aside, daemon=True).start()
def here(): print("ready"); time.sleep(600)
here()
"""


def test_ranks_say_where_they_are(tmp_path: Path):
    """The main thread, or all; one that is stopped says nothing, also not what it said before."""
    (tmp_path / "job.py").write_text(STANDS)
    agent = DrivenAgent(tmp_path, "script", "job.py", [])
    try:
        agent.start(2)
        pids = agent.wait_for(frames.Started).pids
        lab.wait_for(lambda: all(agent.printed(rank) == b"ready\n" for rank in range(2)), "the ranks")

        def ask(all_threads: bool) -> frames.Stacks:
            agent.messages.clear()
            agent.send(frames.DumpStacks(all_threads))
            said: frames.Stacks = agent.wait_for(frames.Stacks)
            return said

        said = ask(all_threads=False)
        assert all("in here" in said.frames[rank] and "in aside" not in said.frames[rank] for rank in "01")
        assert all(said.states[rank].startswith("S") for rank in "01")
        said = ask(all_threads=True)
        assert all("in here" in said.frames[rank] and "in aside" in said.frames[rank] for rank in "01")
        os.kill(pids["1"], signal.SIGSTOP)
        lab.wait_for(lambda: lab.stat(pids["1"])[0] == "T", "the rank to stop")
        said = ask(all_threads=False)
        assert sorted(said.frames) == ["0"]
        assert said.states["1"] == "T"
    finally:
        agent.close()
