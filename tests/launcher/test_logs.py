"""What ranks print: kept byte for byte, shown on a pipe in full, on a terminal safely, and never waited for."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import tty
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import lab
from dstrain.launcher.console_screens import ConsoleOptions, TerminalScreen
from dstrain.runtime.spec.frames import Stream

pytestmark = pytest.mark.lab

SGR = re.compile(rb"\x1b\[[0-9;]*m")
PLAIN = ("--no-python", sys.executable, "-u")  # an interpreter that imports no torch: these scripts need none


def lines_of(data: bytes) -> list[bytes]:
    """The lines, the last one also if it has no newline."""
    return data.removesuffix(b"\n").split(b"\n") if data else []


def shown_by(printed: bytes, name: str) -> list[bytes]:
    """The lines behind `[name] `."""
    prefix = f"[{name}] ".encode()
    return [line.removeprefix(prefix) for line in lines_of(printed) if line.startswith(prefix)]


# --- bytes ----------------------------------------------------------------------------------------------------

BYTES = '''
import os, random, sys


def written(rank):
    """(stdout or stderr, bytes) in the order of writing."""
    own = random.Random(rank)
    yield 1, b"\\xff\\xfe\\x80 not UTF-8 \\xed\\xa0\\x80\\n"
    yield 1, b"\\x1b]0;title\\x07\\x1b[2J\\x1b[31mred\\x1b[0m\\n"
    yield 1, b"NUL \\0\\0 and \\x7f\\n\\n\\r\\n"
    for number in range(200):
        yield 1 + number % 2, b"line %d of both streams\\n" % number
    for number in range(0, 101, 5):
        yield 2, b"\\r%3d%% %s" % (number, b"#" * (number // 5))
    yield 2, b"\\n"
    yield 1, b"x" * 10_000_000 + b"\\n"
    yield 2, bytes(byte for byte in own.randbytes(300_000) if byte != 10) + b"\\n"
    yield 1, own.randbytes(2_000_000)
    yield 1, b"\\nand the last without a newline"
    yield 2, b"so here"


if __name__ == "__main__":
    for fd, data in written(int(os.environ["RANK"])):
        while data:
            data = data[os.write(fd, data) :]
'''


@pytest.mark.parametrize("ssh", ["paramiko", "openssh"])
def test_every_byte_is_kept_and_shown(light, start, script, ssh):
    run = start("-H", light.hostfile(1, ["h1", "h2"]), "--ssh", ssh, *PLAIN, script(BYTES), env=light.env)
    assert run.wait() == 0, run.err[-2000:]
    namespace: dict[str, Any] = {"__name__": "again"}
    exec(BYTES, namespace)
    shown = {1: (run.folder / "stdout").read_bytes(), 2: (run.folder / "stderr").read_bytes()}
    for rank in range(2):
        for fd, suffix in ((1, "out"), (2, "err")):
            expected = b"".join(data for stream, data in namespace["written"](rank) if stream == fd)
            found = run.log(f"h{rank + 1}", rank, suffix)
            assert hashlib.sha256(found).hexdigest() == hashlib.sha256(expected).hexdigest()
            assert shown_by(shown[fd], f"h{rank + 1}:{rank}") == lines_of(expected)


FLOOD = """
import os, sys
rank, count = os.environ["RANK"], int(sys.argv[1])
for number in range(count):
    print(f"{rank} {number:07d} " + "x" * 69)
sys.stdout.flush()
open(rank + ".ready", "w").close()
import time
while not os.path.exists("go"):
    time.sleep(0.02)
"""


def peak_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


@pytest.mark.slow
@pytest.mark.parametrize("count", [200_000, pytest.param(1_000_000, marks=[pytest.mark.slow, pytest.mark.alone])])
def test_a_flood_of_lines_arrives_in_full_and_takes_no_memory(light, start, script, tmp_path, count):
    run = start("-H", light.hostfile(1, ["h1", "h2"]), script(FLOOD), count, env=light.env)
    expected = {rank: b"".join(b"%d %07d %s\n" % (rank, n, b"x" * 69) for n in range(count)) for rank in range(2)}
    whole = sum(map(len, expected.values())) + 2 * count * len("[h1:0] ")
    lab.wait_for(lambda: (tmp_path / "stdout").stat().st_size >= whole, f"all lines\n{run.err}", 120)
    peaks = {name: peak_bytes(pid) for name, pid in (("console", run.process.pid), ("supervisor", run.supervisor))}
    (tmp_path / "go").touch()
    assert run.wait() == 0, run.err
    shown = (tmp_path / "stdout").read_bytes()
    for rank, data in expected.items():
        assert run.log(f"h{rank + 1}", rank) == data
        assert shown_by(shown, f"h{rank + 1}:{rank}") == lines_of(data)
    assert len(shown) == whole
    assert sum(peaks.values()) < 200e6, peaks


def test_a_line_is_shown_while_its_rank_runs(light, start, script, tmp_path):
    text = "import os, time\nprint('early')\nwhile not os.path.exists('go'):\n    time.sleep(0.02)\n"
    run = start("--hosts", "h1:1", script(text), env=light.env)
    lab.wait_for(lambda: run.out == "[h1:0] early\n", f"the line\n{run.err}")
    assert run.process.poll() is None
    (tmp_path / "go").touch()
    assert run.wait() == 0, run.err


def test_what_a_child_writes_after_its_rank_belongs_to_the_rank(start):
    body = 'if [ "$RANK" = 0 ]; then (while [ ! -e left ]; do :; done; echo late; touch said) & echo early; '
    body += "else while [ ! -e said ]; do :; done; fi"
    run = start("-n", "2", "--no-python", "sh", "-c", body)
    events = run.directory / "events.jsonl"
    lab.wait_for(lambda: events.exists() and '"rank_exit"' in events.read_text(), "rank 0's end")
    (run.folder / "left").touch()
    assert run.wait() == 0, run.err
    assert run.log("localhost", 0) == b"early\nlate\n"
    assert run.out == "[localhost:0] early\n[localhost:0] late\n"


def test_a_child_that_writes_without_end_is_ended_without_complaint(start):
    run = start("-n", "1", "--no-python", "sh", "-c", "yes & sleep 0.3", stdout=subprocess.DEVNULL)
    assert run.wait() == 0, run.err
    assert "cannot be written" not in run.err
    log = run.log("localhost", 0)
    assert log[: len(log) // 2 * 2] == b"y\n" * (len(log) // 2)


# --- what can be chosen ---------------------------------------------------------------------------------------

BOTH = """
import os, sys
for number in range(2):
    print("out", os.environ["RANK"], number)
print("err", os.environ["RANK"], "\\x1b[0m\\udcff", file=sys.stderr)
"""


def test_some_ranks_only(start, script):
    run = start("-n", "4", "--ranks", "1,3", *PLAIN, script(BOTH))
    assert run.wait() == 0, run.err
    assert sorted(run.out.splitlines()) == [f"[localhost:{rank}] out {rank} {n}" for rank in (1, 3) for n in range(2)]
    assert not re.search(r"\[localhost:[02]\]", run.err)
    assert run.log("localhost", 2) == b"out 2 0\nout 2 1\n"


def test_quiet_shows_nothing_but_errors(start, script):
    run = start("-q", *PLAIN, script(BOTH))
    assert run.wait() == 0
    assert (run.out, run.err) == ("", "")
    assert run.log("localhost", 1) == b"out 1 0\nout 1 1\n"
    run = start("-q", *PLAIN, script("raise SystemExit('the reason')"), folder=run.folder / "again")
    assert run.wait() == 1
    assert run.out == ""
    assert "exit code 1" in run.err


def test_timestamps(start, script):
    run = start("--timestamps", *PLAIN, script(BOTH))
    assert run.wait() == 0, run.err
    assert len(run.out.splitlines()) == 4
    assert all(re.fullmatch(r"\d\d:\d\d:\d\d \[localhost:\d\] out \d \d", line) for line in run.out.splitlines())


def test_json_is_one_object_a_line(start, script):
    event = 'import os; os.write(int(os.environ["DSTRAIN_EVENT_FD"]), b\'{"kind": "step", "loss": 1.5}\\n\')'
    run = start("--json", *PLAIN, script(f"{BOTH}\n{event}"))
    assert run.wait() == 0, run.err
    objects = [json.loads(line) for line in run.out.splitlines()]
    outputs = [one for one in objects if one["kind"] == "output"]
    for rank in range(2):
        mine = [(one["stream"], one["line"]) for one in outputs if one["rank"] == rank]
        assert [line for stream, line in mine if stream == "stdout"] == [f"out {rank} 0", f"out {rank} 1"]
        assert [line for stream, line in mine if stream == "stderr"] == [f"err {rank} \x1b[0m\\udcff"]
    assert [one["loss"] for one in objects if one["kind"] == "step"] == [1.5, 1.5]
    assert objects[-1]["kind"] == "result"
    assert objects[-1]["exit_code"] == 0
    assert {one["host"] for one in outputs} == {"localhost"}
    assert run.err == ""


# --- a terminal -----------------------------------------------------------------------------------------------


class Terminal:
    """`dstrain run` on a terminal of 80 columns. `shown`: every byte that has reached it."""

    def __init__(self, folder: Path, words: list[Any], env: dict[str, str], streams: dict[str, Any]) -> None:
        self.master, slave = pty.openpty()
        tty.setraw(slave)  # bytes as the console writes them, no \r\n
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
        own = {"XDG_STATE_HOME": str(folder / "state"), "TERM": "xterm-256color"}
        self.folder = folder
        self.process = subprocess.Popen(
            [lab.DSTRAIN, "run", *map(str, words)],
            cwd=folder,
            env={name: value for name, value in os.environ.items() if name != "NO_COLOR"} | own | env,
            start_new_session=True,
            **{"stdin": slave, "stdout": slave, "stderr": slave, **streams},
        )
        os.close(slave)
        self._shown = bytearray()
        self.reading = threading.Event()
        self.reading.set()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # EIO: nobody has it open any more
            while data := (self.reading.wait() and os.read(self.master, 1 << 16)):
                self._shown += data

    @property
    def shown(self) -> bytes:
        return bytes(self._shown)

    def wait(self, timeout_s: float = 60.0) -> int:
        code = self.process.wait(timeout_s)
        self._thread.join(10)
        return code

    def log(self, host: str, rank: int) -> Path:
        run = lab.wait_for(lambda: next(iter((self.folder / "runs").glob("*")), None), "the run directory")
        return run / "logs" / "attempt-0" / host / f"rank-{rank}.out"

    def end(self) -> None:
        self.reading.set()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(20)
            self.process.kill()
            self.process.wait()
        self._thread.join()
        os.close(self.master)

    @property
    def plain(self) -> list[str]:
        """The lines without colours; nothing else that could move a cursor is left."""
        return [line.decode() for line in lines_of(SGR.sub(b"", self.shown))]


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    started: list[Terminal] = []

    def _terminal(*words: Any, env: dict[str, str] | None = None, folder: Path = tmp_path, **streams: Any) -> Terminal:
        folder.mkdir(exist_ok=True)
        started.append(Terminal(folder, list(words), env or {}, streams))
        return started[-1]

    yield _terminal
    for one in started:
        one.end()


WAIT = """
import os, sys, time
def wait(name):
    open(os.environ["RANK"] + ".ready", "w").close()
    while not os.path.exists(name):
        time.sleep(0.02)
"""
HOSTILE = f"""{WAIT}
rank = os.environ["RANK"]
wait("go")
print("same on all")
if rank in "12":
    print("on two")
print("own", rank)
print("\\x1b[31mred\\x1b[0m \\x1b]0;owned\\x07 \\x1b[2J\\x1b[10;10H\\x1b[3A \\x9b31m \\x00 \\x7f \\u202e")
sys.stdout.buffer.write(b"\\xff\\xfe bad\\n")
print("L" * 5000)
print("last")
"""


def ready(folder: Path, ranks: int) -> Callable[[], bool]:
    return lambda: all((folder / f"{rank}.ready").exists() for rank in range(ranks))


def test_terminal_folds_escapes_and_shortens(light, terminal, script, tmp_path):
    shell = terminal("-H", light.hostfile(names=["h1", "h2"]), *PLAIN, script(HOSTILE), env=light.env)
    lab.wait_for(ready(tmp_path, 4), "the ranks", 40)
    shell.process.send_signal(signal.SIGSTOP)  # so that it finds everything at once, however slow the machine
    (tmp_path / "go").touch()
    logs = [shell.log(f"h{rank // 2 + 1}", rank) for rank in range(4)]
    lab.wait_for(lambda: all(log.exists() and log.read_bytes().endswith(b"last\n") for log in logs), "the logs")
    shell.process.send_signal(signal.SIGCONT)
    assert shell.wait() == 0
    lines = shell.plain
    assert lines[0] == "dstrain: 4 ranks on h[1-2]"
    assert lines[1] == "[all 4] same on all"
    assert "[h[1-2]:1-2] on two" in lines
    assert [line for line in lines if " own " in line] == [f"[h{n // 2 + 1}:{n}] own {n}" for n in range(4)]
    escaped = r"red \x1b]0;owned\x07 \x1b[2J\x1b[10;10H\x1b[3A \x9b31m \x00 \x7f \u202e"
    assert lines.count(f"[all 4] {escaped}") == 1
    assert r"[all 4] \xff\xfe bad" in lines
    assert "[all 4] " + "L" * 1000 + " … (4000 more characters, in the log)" in lines
    assert lines[-1].startswith("dstrain: done in ")
    assert b"\x1b" not in SGR.sub(b"", shell.shown)
    assert b"\x1b[31mred\x1b[0m" in shell.shown
    assert b"\x1b[36m[h1:0]\x1b[0m own 0" in shell.shown
    assert b"\x1b[33m[h2:2]\x1b[0m own 2" in shell.shown


BAR = f"""{WAIT}
sys.stderr.write("\\r 10% #")
sys.stderr.write("\\r 50% " + "#" * 200 + "\\x1b[2J")
sys.stderr.flush()
wait("go")
sys.stderr.write("\\r100% done\\n")
"""


def test_terminal_shows_a_progress_bar_in_one_line(terminal, script, tmp_path):
    shell = terminal("-n", "1", *PLAIN, script(BAR))
    lab.wait_for(lambda: b"50%" in shell.shown, "the bar")
    bar = shell.shown.rpartition(b"\n")[2].rpartition(b"\r\x1b[K")[2]  # 10% may have been drawn, and wiped
    assert bar == b"[localhost:0]  50% " + b"#" * (79 - len("[localhost:0]  50% "))
    (tmp_path / "go").touch()
    assert shell.wait() == 0
    after = shell.shown.partition(bar)[2]
    assert after.startswith(b"\r\x1b[K\x1b[36m[localhost:0]\x1b[0m 100% done\n")
    assert after.count(b"\x1b[K") == 1


ERROR = (
    'import sys\nprint("warned \\x1b]0;owned\\x07", file=sys.stderr)\nraise ValueError("\\x1b]0;owned\\x07\\x1b[2J")'
)


def test_root_cause_cannot_act_on_the_terminal(terminal, script):
    shell = terminal("-n", "1", script(ERROR))
    assert shell.wait() == 1
    assert b"\x1b" not in SGR.sub(b"", shell.shown)
    assert b"\x07" not in shell.shown
    assert shell.shown.count(rb"ValueError: \x1b]0;owned\x07\x1b[2J") >= 2  # the rank's own, and the cause


@pytest.mark.parametrize("piped", ["stdout", "stderr"])
def test_one_stream_on_a_terminal_and_one_not(terminal, script, tmp_path, piped):
    """The pipe gets every byte, the terminal nothing raw."""
    text = 'import sys\nfor stream in (sys.stdout, sys.stderr):\n    print("\\x1b]0;owned\\x07", file=stream)\n'
    with (tmp_path / "file").open("wb") as file:
        shell = terminal("-n", "1", *PLAIN, script(text), **{piped: file})
        assert shell.wait() == 0
    lines = (tmp_path / "file").read_bytes().splitlines()
    assert b"[localhost:0] \x1b]0;owned\x07" in lines
    assert r"[localhost:0] \x1b]0;owned\x07" in shell.plain
    assert b"\x1b" not in SGR.sub(b"", shell.shown)
    words = [line for line in (lines if piped == "stderr" else shell.shown.splitlines()) if b"dstrain:" in line]
    assert len(words) == 2  # the first and the last line, on stderr wherever it leads
    both = b"".join(lines) + shell.shown
    assert both.count(b"1 rank on localhost") == both.count(b"done in") == 1


@pytest.mark.parametrize(
    ("variables", "colours", "bar"),
    [({}, True, True), ({"NO_COLOR": "1"}, False, True), ({"TERM": "dumb"}, False, False)],
)
def test_colours_and_bars_as_the_terminal_wants_them(monkeypatch, variables, colours, bar):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    master, slave = pty.openpty()
    try:
        tty.setraw(slave)
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
        screen = TerminalScreen(ConsoleOptions(), slave)
        screen.message({"kind": "start", "attempt": 0, "world_size": 1, "hosts": {"h1": [0]}, "spares": []})
        log = {"index": 0, "host": "h1", "rank": 0, "stream": int(Stream.STDOUT)}
        screen.output(log, b"\x1b[31mred\x1b[0m\n\r 50%")
        lab.wait_for(lambda: screen.tick() is None, "the drawing")
        screen.finish()
        os.write(slave, b"END")
        shown = b""
        while not shown.endswith(b"END"):
            shown += os.read(master, 4096)
    finally:
        os.close(master)
        os.close(slave)
    assert (b"\x1b[31mred" in shown) == colours
    assert (b"\r\x1b[K" in shown) == bar
    assert (b"[h1:0]  50%\r\x1b[K" in shown) == bar
    assert (b"\x1b" in shown) == (colours or bar)
    assert SGR.sub(b"", shown).startswith(b"dstrain: 1 rank on h1\n[h1:0] red\n")


LINES = 40_000
TIMED = f"""{WAIT}
rank = os.environ["RANK"]
wait("go")
began = time.perf_counter()
for number in range({LINES}):
    print(f"{{rank}} {{number:07d}} " + "x" * 60)
sys.stdout.flush()
took = time.perf_counter() - began
with open(rank + ".part", "w") as file:
    file.write(str(took))
os.rename(rank + ".part", rank + ".took")
wait("end")
"""


def seconds_of(folder: Path) -> float:
    """How long the slower rank has printed."""
    paths = [folder / f"{rank}.took" for rank in range(2)]
    lab.wait_for(lambda: all(path.exists() for path in paths), "ranks that print", 60)
    return max(float(path.read_text()) for path in paths)


@pytest.mark.slow
def test_a_held_up_terminal_does_not_slow_a_rank(light, terminal, script, tmp_path):
    """5.7 MB of output: ranks finish while the terminal is held up, about as fast as when it is not."""
    path, hosts = script(TIMED), light.hostfile(1, ["h1", "h2"])

    def begin(name: str) -> Terminal:
        shell = terminal("-H", hosts, "--no-python", sys.executable, path, env=light.env, folder=tmp_path / name)
        lab.wait_for(ready(shell.folder, 2), "the ranks", 40)
        return shell

    def print_on(shell: Terminal) -> float:
        (shell.folder / "go").touch()
        (shell.folder / "end").touch()
        return seconds_of(shell.folder)

    free = begin("free")
    free_s = print_on(free)
    assert free.wait() == 0

    stopped, unread = begin("stopped"), begin("unread")
    stopped.process.send_signal(signal.SIGSTOP)
    unread.reading.clear()
    for shell in (stopped, unread):
        assert print_on(shell) <= 2 * free_s + 1.0
        report = lab.wait_for(lambda shell=shell: list(shell.folder.glob("runs/*/report.json")), "the end of the run")
        assert json.loads(report[0].read_text())["exit_code"] == 0
        assert shell.process.poll() is None
        assert all(shell.log(f"h{rank + 1}", rank).stat().st_size == LINES * 71 for rank in range(2))

    unread.reading.set()
    stopped.process.send_signal(signal.SIGCONT)
    for shell in (free, stopped, unread):
        assert shell.wait() == 0
        for rank in range(2):
            mine = [line.partition("] ")[2] for line in shell.plain if line.startswith(f"[h{rank + 1}:{rank}]")]
            assert mine == [f"{rank} {number:07d} " + "x" * 60 for number in range(LINES)]


COUNTING = f"""{WAIT}
number = 0
while not os.path.exists("end"):
    print("tick", number := number + 1, flush=True)
    with open("count.part", "w") as file:
        file.write(str(number))
    os.rename("count.part", "count")
    time.sleep(0.02)
"""


def test_ctrl_z_stops_the_console_and_not_the_training(light, script, tmp_path):
    """In a shell with job control: ^Z, the ranks go on; fg, and every line is there."""
    path, (master, slave) = script(COUNTING), pty.openpty()
    own = {"XDG_STATE_HOME": str(tmp_path / "state"), "PS1": "$ ", "TERM": "dumb"}
    shell = subprocess.Popen(
        ["bash", "--norc", "--noprofile", "-i"],
        cwd=tmp_path,
        env=os.environ | own | light.env,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(slave)
    os.set_blocking(master, False)
    shown = bytearray()

    def seen(text: bytes) -> bool:
        with contextlib.suppress(BlockingIOError):
            shown.extend(os.read(master, 1 << 16))
        return text in shown

    def count() -> int:
        file = tmp_path / "count"
        return int(file.read_text()) if file.exists() else 0

    try:
        os.write(master, f"{lab.DSTRAIN} run --hosts h1:1 --no-python {sys.executable} {path}\n".encode())
        lab.wait_for(lambda: seen(b"tick 3"), "the first lines", 40)
        os.write(master, b"\x1a")
        lab.wait_for(lambda: seen(b"Stopped"), "the shell to say that the console is stopped")
        stopped_at = count()
        lab.wait_for(lambda: count() > stopped_at + 20, "the training to go on")
        os.write(master, b"fg\n")
        lab.wait_for(lambda: seen(f"tick {stopped_at + 20}".encode()), "what was printed meanwhile")
        (tmp_path / "end").touch()
        lab.wait_for(lambda: seen(b"dstrain: done"), "the end")
        os.write(master, b"exit $?\n")
        assert shell.wait(20) == 0
    finally:
        shell.kill()
        shell.wait()
        os.close(master)
    ticks = [int(number) for number in re.findall(rb"tick (\d+)", bytes(shown))]
    assert ticks == list(range(1, count() + 1))


def test_terminal_draws_during_a_flood(light, terminal, script, tmp_path):
    """Lines come out while more of them come in, and what waits to be drawn is little."""
    text = 'print("x" * 60, flush=True)\nimport sys, os\nwhile not os.path.exists("go"):\n    print("y" * 60)\n'
    shell = terminal("--hosts", "h1:1", *PLAIN, script(text), env=light.env)
    lab.wait_for(lambda: len(shell._shown) > 3_000_000, "a flood on the terminal")
    peak = peak_bytes(shell.process.pid)
    (tmp_path / "go").touch()
    assert shell.wait() == 0
    assert peak < 120e6
