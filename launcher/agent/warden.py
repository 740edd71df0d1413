"""The warden: what sshd really starts on a host. It outlives everything else of the job there.

It forks the agent, and then only watches: the agent through a pipe, the head through the hang-up of stdin. When the
agent dies in any way but its own clean end, the warden kills every process of the job (see [Note: what is swept]).
When the head goes away, the agent ends the job; a warden whose agent does not (stopped, wedged) ends both.
Standard library only: it starts on a bare Python in well under 100 ms.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import tempfile
import time
from pathlib import Path

from dstrain.launcher.agent import processes
from dstrain.runtime.spec import linux
from dstrain.runtime.spec.exit_codes import ExitCode

AGENT_MUST_END_S = 4.0  # after the head's hang-up; the promise is that workers are dead after 5 s


def main(package_root: str) -> None:
    """Run as warden; never returns. package_root: where this dstrain lies on the host."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    linux.become_subreaper()
    work = tempfile.mkdtemp(prefix="dstrain-job-")
    agent_alive, agent_end = os.pipe()
    warden_alive, warden_end = os.pipe()
    warden = os.getpid()
    agent = os.fork()
    if agent == 0:
        os.close(agent_alive)
        os.close(warden_end)
        from dstrain.launcher.agent.agent import main as run_agent

        linux.set_title("dstrain-agent")
        run_agent(package_root, work, warden, warden_alive)
    os.close(agent_end)
    os.close(warden_alive)
    linux.set_title("dstrain-warden")
    status = _watch(agent, agent_alive)
    if status != 0:
        processes.sweep(_cookies(work), [warden])
    shutil.rmtree(work, ignore_errors=True)
    os._exit(0 if status == 0 else ExitCode.AGENT_LOST)


def _watch(agent: int, agent_alive: int) -> int:
    """Wait until the agent has ended; return its wait status."""
    poll = select.poll()
    poll.register(agent_alive, select.POLLIN)
    poll.register(0, select.POLLRDHUP)  # no POLLIN: the agent alone reads stdin
    deadline: float | None = None
    while True:
        wait_ms = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
        ready = dict(poll.poll(wait_ms))
        if agent_alive in ready:
            return os.waitpid(agent, 0)[1]
        if 0 in ready and deadline is None:
            poll.unregister(0)
            deadline = time.monotonic() + AGENT_MUST_END_S
        elif deadline is not None and time.monotonic() >= deadline:
            processes.kill(agent, signal.SIGKILL)
            deadline = None


def _cookies(work: str) -> list[bytes]:
    """The agent leaves the job's cookies here, as soon as it knows them and before it starts anything."""
    try:
        return (Path(work) / "cookies").read_bytes().split(b"\0")
    except OSError:
        return []
