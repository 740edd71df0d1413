"""One host of a run as the supervisor knows it, and what it is asked to prepare."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from dstrain.launcher import preflight
from dstrain.launcher.hostfile import Host
from dstrain.launcher.plan import Request
from dstrain.launcher.session import HostSession
from dstrain.runtime.spec import frames


@dataclass
class Node:
    """One host of the run and everything that it has said."""

    session: HostSession
    report: preflight.HostReport
    connected: bool = False
    gone: str | None = None  # why the connection ended
    agent_lost: bool = False  # it ended on the far side while the way there still worked
    agent_error: str | None = None
    clock_offset_ns: int = 0  # host's clock minus ours
    ended_attempt: int = -1

    @property
    def settled_facts(self) -> bool:
        return self.report.error is not None or self.report.facts is not None

    @property
    def settled_preload(self) -> bool:
        return self.report.error is not None or self.report.preload is not None


def prepare_message(request: Request, host: Host, run_id: str) -> frames.Prepare:
    """All that an agent must know of the job before its host can be judged."""
    return frames.Prepare(
        run_id=run_id,
        host=host.name,
        python=worker_pythons(request, host),
        python_named=bool(_named_python(request, host)),
        cwd=request.cwd,
        kind=request.target.kind,
        target=request.target.name,
        arguments=list(request.target.arguments),
        environment=request.environment,
        pass_environment=request.pass_environment,
        prologue=request.prologue,
        slots=request.slots(host),
        gpus=list(host.gpus) if host.gpus is not None else None,
        fallback_slots=1,
        excluded_slots=list(request.excluded_slots.get(host.name, ())),
        preload=request.preload and request.target.kind != "program",
        requirements=list(request.requirements),
        job=request.job,
    )


def agent_pythons(request: Request, host: Host) -> list[str]:
    """Interpreters for warden and agent: any Python 3.11 does, so the host's own is a last resort."""
    return list(dict.fromkeys([*_named_python(request, host), sys.executable, "python3", "python"]))


def worker_pythons(request: Request, host: Host) -> list[str]:
    """Interpreters for the ranks: the one that was named, or the same path as here, or what PATH has."""
    return _named_python(request, host) or [sys.executable, "python3", "python"]


def _named_python(request: Request, host: Host) -> list[str]:
    named = host.python or request.python
    return [named] if named else []
