"""The checks before any rank starts: pure functions over what the agents found. All failures come in one table."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dstrain.launcher.hostfile import Host
from dstrain.launcher.plan import Request
from dstrain.runtime.spec.errors import AuthenticationError, DstrainError, HostError, HostKeyError
from dstrain.runtime.spec.exit_codes import ExitCode
from dstrain.runtime.spec.frames import Dialled, HostFacts, Listening, PreloadFacts


@dataclass(frozen=True)
class Problem:
    """One row of the table. `code`: what the run returns if all problems are of this kind."""

    host: str
    check: str
    found: str
    remedy: str
    code: int = ExitCode.PREFLIGHT


@dataclass
class HostReport:
    """What is known of one host; None: it did not get that far."""

    host: Host
    error: DstrainError | None = None
    facts: HostFacts | None = None
    preload: PreloadFacts | None = None
    listening: Listening | None = None
    dialled: Dialled | None = None
    problems: list[Problem] = field(default_factory=list)


def check_all(request: Request, reports: list[HostReport], address: str | None) -> list[Problem]:
    """Every problem of every host, in the hosts' order. address: rank 0's, as chosen; None: no host could dial it."""
    torch = _expected([r.preload.torch_version for r in reports if r.preload and r.preload.torch_version])
    digest = _expected_digest(request, reports)
    problems: list[Problem] = []
    for report in reports:
        name = report.host.name
        if report.error is not None:
            problems.append(_connection_problem(name, report.error))
            continue
        checks = [_check_place(request, report, digest), _check_python(request, report, torch)]
        checks += [_check_slots(request, report)]
        if len(reports) > 1:
            checks.append(_check_dialled(request, report, reports[0], address))
        problems += [Problem(name, *row) for rows in checks for row in rows]
    return problems


def exit_code(problems: list[Problem]) -> int:
    """200 or 201 when nothing else is wrong, else 202; a fixed port that cannot be had: 205."""
    codes = {problem.code for problem in problems}
    return codes.pop() if len(codes) == 1 else ExitCode.PREFLIGHT


def choose_address(request: Request, reports: list[HostReport]) -> tuple[str, int] | None:
    """The first address of rank 0's host that every other host has dialled; for one host its loopback."""
    listening = reports[0].listening
    if listening is None:
        return None
    others = [report for report in reports[1:] if report.error is None]
    for address, port in listening.addresses:
        if all(report.dialled and address in report.dialled.interfaces for report in others):
            return address, port
    return None


Row = tuple[str, str, str, int] | tuple[str, str, str]


def _connection_problem(host: str, error: DstrainError) -> Problem:
    if isinstance(error, HostError):
        check = {HostKeyError: "host key", AuthenticationError: "login"}.get(type(error), "reachable")
        return Problem(host, check, error.cause, error.remedy, int(error.exit_code))
    return Problem(host, "reachable", str(error), "", int(error.exit_code))


def _check_place(request: Request, report: HostReport, digest: str | None) -> Iterator[Row]:
    facts = report.facts
    if facts is None:
        yield ("agent", "it gave no answer", f"try: ssh {report.host.name} true")
        return
    if facts.prologue_error:
        yield ("prologue", facts.prologue_error, f"run it there by hand: {request.prologue}")
    if facts.cwd is None:
        yield ("directory", f"{request.cwd} is not there", "copy or mount it there, or name another with --cwd")
        return
    target = request.target
    if target.kind == "module":
        return
    if facts.target_sha256 is None and not (target.kind == "program" and facts.target_path):
        fix = "install it there" if target.kind == "program" else "copy it there, or share the folder"
        where = "" if target.kind == "program" and "/" not in target.name else f" in {request.cwd}"
        yield (target.kind, f"{target.name} is not there{where}", fix)
    elif target.kind == "script" and digest and facts.target_sha256 != digest:
        yield ("script", f"{target.name} differs from the others' (sha256 {str(facts.target_sha256)[:12]})", "copy it")


def _check_python(request: Request, report: HostReport, torch: str | None) -> Iterator[Row]:
    facts, preload = report.facts, report.preload
    if facts is None or facts.cwd is None or facts.prologue_error:
        return
    if facts.python is None:
        yield ("python", "no such interpreter", "give python=PATH in the hostfile, or --python")
        return
    if request.target.kind == "program":
        return  # what it needs is its own affair
    if preload is None:
        yield ("torch", "importing torch has not ended in time", f"try there: {facts.python} -c 'import torch'")
        return
    if preload.error:
        yield ("torch", preload.error.strip().splitlines()[-1], f"try there: {facts.python} -c 'import torch'")
        return
    version = preload.python_version
    if version and tuple(int(part) for part in version.split(".")[:2]) < (3, 11):
        yield ("python", f"{facts.python} is {version}", "3.11 or newer is needed: python=PATH in the hostfile")
    if preload.missing:
        names = " ".join(preload.missing)
        yield ("dependencies", f"{facts.python} lacks {names}", f"install there: {facts.python} -m pip install {names}")
    if preload.torch_version is None:
        fix = f"install it there ({facts.python} -m pip install torch), or give python=PATH"
        yield ("torch", f"{facts.python} has no torch", fix)
    elif torch is not None and preload.torch_version != torch:
        yield ("torch", f"version {preload.torch_version}, the others have {torch}", f"install torch {torch} there")


def _check_slots(request: Request, report: HostReport) -> Iterator[Row]:
    facts, host = report.facts, report.host
    if facts is None or facts.gpus == 0:
        return
    chosen = [gpu for gpu in host.gpus or () if gpu >= facts.gpus]
    if chosen:
        yield ("slots", f"GPU {chosen[0]} was asked for, it has {facts.gpus}", "mend gpus= or --include")
    elif facts.slots > facts.gpus:
        fix = f"slots={facts.gpus} in the hostfile, or -n {facts.gpus}"
        yield ("slots", f"{facts.slots} ranks were asked for, it has {facts.gpus} GPUs", fix)


def _check_dialled(request: Request, report: HostReport, first: HostReport, address: str | None) -> Iterator[Row]:
    if report is first:
        if first.listening is not None and not first.listening.addresses:
            code = ExitCode.RENDEZVOUS if request.master_port or request.master_address else ExitCode.PREFLIGHT
            tried = "; ".join(f"{name}: {why}" for name, why in first.listening.errors.items()) or "no address at all"
            yield ("rendezvous", f"no socket for the store ({tried})", "another --master-addr or --master-port", code)
        return
    if address is not None or report.dialled is None or first.listening is None:
        return
    if not report.dialled.interfaces and report.dialled.errors:
        tried = "; ".join(f"{name}: {why}" for name, why in report.dialled.errors.items())
        fix = f"open the way between the hosts, or give addr= for {first.host.name}, --interface or --master-addr"
        yield ("rendezvous", f"cannot dial rank 0's host ({tried})", fix)
    elif report.dialled.interfaces:
        reached = ", ".join(report.dialled.interfaces)
        yield ("rendezvous", f"reaches rank 0's host only at {reached}, others do not", "give --master-addr")


def _expected(values: list[str]) -> str | None:
    """What most hosts have; the first of them where that is even."""
    return Counter(values).most_common(1)[0][0] if values else None


def _expected_digest(request: Request, reports: list[HostReport]) -> str | None:
    """This machine's own script where it has one, else what most hosts have."""
    own = Path(request.cwd) / request.target.name
    if request.target.kind == "script" and own.is_file():
        return hashlib.sha256(own.read_bytes()).hexdigest()
    return _expected([r.facts.target_sha256 for r in reports if r.facts and r.facts.target_sha256])
