"""The three places where output may have to wait: the agent's outbox, the log files, the link to the console."""

from __future__ import annotations

import fcntl
import json
import os
import random
import socket
import time
from pathlib import Path

import pytest

from dstrain.launcher.agent.outbox import HIGH_WATER_BYTES, Outbox
from dstrain.launcher.agent.ranks import FLOOD_BYTES, GATHER_S, SIZABLE_PART, Ranks
from dstrain.launcher.agent.workers import open_worker
from dstrain.launcher.console_link import ConsoleLink
from dstrain.launcher.logs import LogFile, LogFiles
from dstrain.launcher.run_dir import RunDir
from dstrain.runtime.spec.frames import Close, FrameReader, Heartbeat, Output, ProcessSpec, Stream


def test_outbox_keeps_order_says_when_it_is_full_and_lets_the_heartbeat_pass():
    read, write = os.pipe()
    try:
        outbox, own = Outbox(write), random.Random(1)
        sent: list[object] = []
        while not outbox.full:
            sent.append(Output(len(sent), Stream.STDOUT, own.randbytes(own.randrange(1, 200_000))))
            outbox.output(sent[-1].rank, sent[-1].stream, sent[-1].data)
            outbox.flush()
        outbox.message(Close())
        outbox.message(Heartbeat())
        waiting = sum(len(frame.data) for frame in sent)
        assert HIGH_WATER_BYTES < waiting < HIGH_WATER_BYTES + 500_000
        reader, arrived = FrameReader(), []
        while outbox.pending:
            arrived += reader.feed(os.read(read, 1 << 16))
            outbox.flush()
        os.close(write)
        while data := os.read(read, 1 << 16):
            arrived += reader.feed(data)
        assert not outbox.full
        assert [frame for frame in arrived if frame != Heartbeat()] == [*sent, Close()]
        assert arrived.index(Heartbeat()) <= 2  # behind what was already on its way
    finally:
        os.close(read)


def test_a_trickle_is_gathered_and_a_flood_is_not():
    """What one line a moment costs on its way is the same for ten; a full pipe would slow its rank."""
    outbox = Outbox(os.open("/dev/null", os.O_WRONLY))
    ranks = Ranks(outbox, warden=0, spared=set)
    worker, ends = open_worker(ProcessSpec(0, 0, {}), preloaded=True)
    try:
        for fd in worker.pipes:
            ranks.watch_pipe(fd, worker)
        now = time.monotonic()
        os.write(ends[0], b"a line\n")
        ranks.read()
        assert worker.output_bytes == 7
        assert now + GATHER_S <= ranks.read_at <= time.monotonic() + GATHER_S
        ranks.read_at = 0.0
        os.write(ends[0], b"x" * FLOOD_BYTES)
        ranks.read()
        assert worker.output_bytes == 7 + FLOOD_BYTES
        assert ranks.read_at == 0.0
    finally:
        for fd in (*worker.pipes, *ends, worker.stacks, outbox.fd):
            os.close(fd)


def test_a_piece_that_fills_a_small_pipe_is_a_flood():
    """Beyond fs.pipe-user-pages-soft pipes are so small that no rank ever writes FLOOD_BYTES in GATHER_S."""
    outbox = Outbox(os.open("/dev/null", os.O_WRONLY))
    ranks = Ranks(outbox, warden=0, spared=set)
    worker, ends = open_worker(ProcessSpec(0, 0, {}), preloaded=True)
    small = 2 * os.sysconf("SC_PAGESIZE")
    try:
        for fd in worker.pipes:
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, small)
            ranks.watch_pipe(fd, worker)
        os.write(ends[0], b"x" * (small // SIZABLE_PART))
        ranks.read()
        assert ranks.read_at == 0.0
        ranks.read()  # nothing came, but the flood was a moment ago
        assert ranks.read_at == 0.0
    finally:
        for fd in (*worker.pipes, *ends, worker.stacks, outbox.fd):
            os.close(fd)


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return RunDir.create(tmp_path, "run")


def test_bytes_behind_the_end_of_an_attempt_are_kept(run_dir: RunDir):
    complaints: list[str] = []
    logs = LogFiles(run_dir, lambda: None, complaints.append)
    logs.append(0, "h", 3, Stream.STDOUT, b"first ")
    logs.close_attempt(0)
    logs.append(0, "h", 3, Stream.STDOUT, b"late")
    assert [(log.rank, log.length) for log in logs.take_grown()] == [(3, 10)]
    assert run_dir.log(0, "h", 3, Stream.STDOUT).read_bytes() == b"first late"
    assert logs.tail(0, 3, Stream.STDOUT, 4) == "late"
    logs.close_attempt(0)
    assert complaints == []


def test_a_log_that_cannot_be_written_is_told_once(run_dir: RunDir):
    complaints: list[str] = []
    logs = LogFiles(run_dir, lambda: None, complaints.append)
    (run_dir.path / "logs").write_text("a file where the folder should be")
    for rank in range(3):
        logs.append(0, "h", rank, Stream.STDERR, b"lost")
    assert len(complaints) == 1
    assert "output is being lost" in complaints[0]
    assert logs.take_grown() == []


def test_a_console_that_does_not_read_costs_the_supervisor_a_few_numbers():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        link = ConsoleLink(ours)
        files = [LogFile(rank, 0, "h", rank, Stream.STDOUT, f"/logs/{rank}") for rank in range(8)]
        for step in range(1, 50_001):
            for log in files:
                log.length = 100 * step
            link.grown(files)
            link.flush()
        assert link.wants_to_write
        assert len(link._out) < 10_000
        link.send("note", text="end")
        data = b""
        theirs.setblocking(False)
        while link.wants_to_write or b'"end"' not in data:
            link.flush()
            data += theirs.recv(1 << 16)
        messages = [json.loads(line) for line in data.splitlines()]
        known: dict[int, int] = {}
        for message in messages:
            if message["kind"] == "grown":
                assert all(length > known.get(index, 0) for index, length in message["lengths"])
                known |= dict(message["lengths"])
        assert {message["index"]: message["path"] for message in messages if message["kind"] == "file"} == {
            rank: f"/logs/{rank}" for rank in range(8)
        }
        assert known == dict.fromkeys(range(8), 5_000_000)
