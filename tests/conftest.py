"""Fixtures for tests that start real runs: the lab's hosts, and a handle on one `dstrain run`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

import lab

hypothesis.settings.register_profile("dstrain", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("dstrain")

# Under nohup, or in the background of a script, these are ignored, and whatever a test starts would inherit that.
for _number, _usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _usual)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without root the lab's tests say why they do not run; where CI is set they must run, and fail instead."""
    reason = lab.missing_reason()
    if reason and os.environ.get("CI") != "true":
        for item in items:
            if "lab" in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def light(tmp_path_factory: pytest.TempPathFactory) -> Iterator[lab.Lab]:
    """Hosts h1, h2, h3, h4 that are this machine."""
    with lab.light_hosts(tmp_path_factory.mktemp("light"), 4) as hosts:
        yield hosts


@pytest.fixture
def net(tmp_path_factory: pytest.TempPathFactory) -> Iterator[lab.NetLab]:
    """Two hosts na and nb in namespaces of their own, fresh for each test."""
    with lab.net_hosts(tmp_path_factory.mktemp("net"), 2) as hosts:
        yield hosts


class Run:
    """One `dstrain run …`: its process, its output, and everything that can be asked about it."""

    def __init__(self, folder: Path, words: list[str], env: dict[str, str], stdout: Any = None) -> None:
        self.folder, self.token, self.mark = folder, f"lab-{uuid.uuid4().hex}", f"3600.{uuid.uuid4().int % 10**12:012}"
        own = {"XDG_STATE_HOME": str(folder / "state"), "TOKEN": self.token, "MARK": self.mark}
        environment = {**os.environ, **own, **env}
        self._out, self._err = (folder / "stdout").open("wb"), (folder / "stderr").open("wb")
        command = [lab.DSTRAIN, "run", "--pass-env", "TOKEN", "--pass-env", "MARK", *words]
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=stdout or self._out, stderr=self._err, start_new_session=True
        )

    @property
    def out(self) -> str:
        return (self.folder / "stdout").read_text(errors="replace")

    @property
    def err(self) -> str:
        return (self.folder / "stderr").read_text(errors="replace")

    def wait(self, timeout_s: float = 60.0) -> int:
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"still running after {timeout_s:.0f} s\n{self.out}\n{self.err}") from None

    @property
    def directory(self) -> Path:
        return lab.wait_for(lambda: next(iter((self.folder / "runs").glob("*")), None), "the run directory")

    @property
    def report(self) -> dict[str, Any]:
        report: dict[str, Any] = json.loads((self.directory / "report.json").read_text())
        return report

    def log(self, host: str, rank: int, suffix: str = "out", attempt: int = 0) -> bytes:
        return (self.directory / "logs" / f"attempt-{attempt}" / host / f"rank-{rank}.{suffix}").read_bytes()

    def workers(self) -> list[int]:
        """Living processes of the job on any host: they carry its token, or have its mark in their words."""
        return lab.processes_with(f"TOKEN={self.token}\0", b"DSTRAIN_HOST=", self.mark)

    def rank_pid(self, rank: int) -> int:
        """The pid, as seen from here, of a preloaded rank; waits until it runs."""
        title = f"dstrain rank {rank}:".encode()

        def find() -> int:
            return next((pid for pid in self.workers() if _words(pid).startswith(title)), 0)

        return int(lab.wait_for(find, f"rank {rank}\n{self.err}"))

    def ancestor(self, rank: int, name: str) -> int:
        """The process above a rank that is called so: dstrain-agent, dstrain-warden, sshd."""
        pid = self.rank_pid(rank)
        while pid > 1:
            pid = lab.parent(pid)
            if Path(f"/proc/{pid}/comm").read_text().strip().startswith(name):
                return pid
        raise AssertionError(f"no {name} above rank {rank}")

    @property
    def supervisor(self) -> int:
        """The console's only child."""
        pid = self.process.pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])

    def wait_ready(self, ranks: int) -> None:
        """Until every rank has written `<rank>.ready` into its directory."""
        names = [f"{rank}.ready" for rank in range(ranks)]
        lab.wait_for(lambda: all((self.folder / name).exists() for name in names), f"ranks\n{self.out}{self.err}", 40)

    def wait_gone(self, timeout_s: float, since: float | None = None) -> None:
        """Nothing of the job is left on any host within the time."""
        limit = timeout_s - (time.monotonic() - since if since else 0.0)
        try:
            lab.wait_for(lambda: not self.workers(), "the job's processes to end", limit)
        except AssertionError:
            left = [(pid, Path(f"/proc/{pid}/cmdline").read_bytes()) for pid in self.workers()]
            raise AssertionError(f"left after {timeout_s} s: {left}") from None

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(20)
            self.process.kill()
            self.process.wait()
        self._out.close()
        self._err.close()


def _words(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


Start = Callable[..., Run]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start `dstrain run` with the given words; ended and checked for leftovers behind the test."""
    runs: list[Run] = []

    def _start(*words: Any, env: dict[str, str] | None = None, folder: Path = tmp_path, stdout: Any = None) -> Run:
        folder.mkdir(exist_ok=True, parents=True)
        runs.append(Run(folder, [str(word) for word in words], env or {}, stdout))
        return runs[-1]

    yield _start
    for run in runs:
        run.end()
    for run in runs:
        run.wait_gone(15)


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., Path]:
    """Write a Python script into the test's folder."""

    def _script(text: str, name: str = "job.py") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return _script
