"""Jobs of the training benchmarks: each a contender on some ranks of this machine, run in interleaved rounds."""

from __future__ import annotations

import json
import os
import select
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryFile

from gpt import Work
from measure import Series
from train_rank import Found

PEERS = os.environ.get("PEERS", sys.executable)
"""The interpreter whose packages are the peers'."""

AGREEMENT = {"fp32": (1e-4, 1e-3), "bf16": (2e-2, 5e-2)}
"""How far apart the contenders' first and last losses may be: they differ by the order of their sums and by bf16's
rounding, and the updates in between carry that on."""

JOB_TIMEOUT_S = 1800


class JobFailed(SystemExit):
    """Which job's ranks ended with an error, and the end of what they wrote; ends the benchmark unless caught."""


@dataclass(frozen=True)
class Job:
    """name: in reports."""

    name: str
    contender: str
    work: Work
    ranks: int = 2

    @property
    def python(self) -> str:
        return PEERS if is_peer(self.contender) else sys.executable


@dataclass
class Figures:
    """A job's, round by round. peak: resident memory above the floor; device_peak: what torch has had of a GPU's.
    first_peak: of rank 0 alone. sent_units: of Ψ·(N-1)/N fp32 elements, in a rank's step."""

    step: Series
    peak: Series
    device_peak: Series
    sent_units: float | None = None
    losses: list[float] = field(default_factory=list)
    first_peak: Series = field(default_factory=lambda: Series("first rank", unit="MiB"))


def run_job(job: Job, python: str | None = None) -> Found:
    """Rank 0's figures, but the losses' mean over ranks, and the peaks of the rank that needed most. JobFailed."""
    environment = {
        **os.environ,
        "WORLD_SIZE": str(job.ranks),
        "LOCAL_SIZE": str(job.ranks),  # DeepSpeed's
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "DS_ACCELERATOR": job.work.device,
    }
    script = Path(__file__).with_name("train_rank.py")
    command = [python or job.python, script, job.contender, json.dumps(asdict(job.work))]
    with ExitStack() as stack:
        ranks = []
        for rank in range(job.ranks):
            local_rank = rank if job.work.device == "cpu" else 0  # one GPU for all
            own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(local_rank)}
            out, err = (stack.enter_context(TemporaryFile("w+")) for _ in range(2))  # a pipe could fill up
            process = stack.enter_context(subprocess.Popen(command, env=own, stdout=out, stderr=err))
            stack.callback(process.kill)
            ranks.append((process, out, err))
        _wait_for([process for process, _, _ in ranks])
        for _, out, err in ranks:
            out.seek(0)
            err.seek(0)
        if any(process.returncode for process, _, _ in ranks):
            errors = "\n".join(err.read()[-2000:] for _, _, err in ranks)
            raise JobFailed(f"{job.name}: exit {[process.returncode for process, _, _ in ranks]}\n{errors}")
        found = [Found(**json.loads(_answer(out.read()))) for _, out, _ in ranks]
    first = found[0]
    first.first_peak_mib = first.peak_mib
    first.losses = tuple(statistics.fmean(losses) for losses in zip(*(each.losses for each in found), strict=True))
    first.peak_mib = max(each.peak_mib for each in found)
    first.device_peak_mib = max(each.device_peak_mib for each in found)
    return first


def _wait_for(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """Until all have ended, or one has failed: the others would wait for it; the caller kills them."""
    deadline = time.monotonic() + JOB_TIMEOUT_S
    waiting = {os.pidfd_open(rank.pid): rank for rank in ranks}
    try:
        while waiting:
            ended, _, _ = select.select(list(waiting), [], [], max(0.0, deadline - time.monotonic()))
            if not ended:
                raise JobFailed(f"ranks still run after {JOB_TIMEOUT_S} s")
            codes = [waiting[descriptor].wait() for descriptor in ended]
            for descriptor in ended:
                os.close(descriptor)
                del waiting[descriptor]
            if any(codes):
                return
    finally:
        for descriptor in waiting:
            os.close(descriptor)


def interleave(jobs: Sequence[Job], rounds: int) -> dict[str, Figures]:
    """Every job once in each round, the order turned round each time; by their names. JobFailed.

    Ends the benchmark where jobs of the same work have other losses: they would not train the same.
    """
    floors = {python: floor_mib(python) for python in {job.python: None for job in jobs}}
    figures = {
        job.name: Figures(Series(job.name), Series(job.name, unit="MiB"), Series(job.name, unit="MiB")) for job in jobs
    }
    for number in range(rounds):
        for job in jobs if number % 2 == 0 else reversed(jobs):
            found, own = run_job(job), figures[job.name]
            own.step.values.append(found.step_s)
            own.peak.values.append(found.peak_mib - floors[job.python])
            own.first_peak.values.append(found.first_peak_mib - floors[job.python])
            own.device_peak.values.append(found.device_peak_mib)
            own.losses = list(found.losses)
            if found.sent_bytes is not None and job.ranks > 1:
                own.sent_units = found.sent_bytes / (4 * job.work.parameters * (job.ranks - 1) / job.ranks)
            said = f"{found.step_s:.3f} s   {own.peak.values[-1]:.1f} MiB   losses {own.losses}"
            print(f"round {number + 1:2} {job.name:18} {said}", file=sys.stderr)
        check_losses(jobs, figures)
    return figures


def check_losses(jobs: Sequence[Job], figures: dict[str, Figures]) -> None:
    for work in {job.work for job in jobs}:
        names = [job.name for job in jobs if job.work == work]
        for place, (which, bound) in enumerate(zip(("first", "last"), AGREEMENT[work.dtype], strict=True)):
            losses = {name: figures[name].losses[place] for name in names}
            if max(losses.values()) - min(losses.values()) > bound:
                raise SystemExit(f"{which} losses: expected the same within {bound}, found {losses}")


def floor_mib(python: str, jobs: int = 3) -> float:
    """The peak of a process that has imported torch and joined the other ranks."""
    return statistics.median(run_job(Job("floor", "floor", Work()), python).peak_mib for _ in range(jobs))


def with_peers(names: Sequence[str]) -> list[str]:
    """Those whose package is there; says which are left out, and the peers' versions."""
    needed = {"deepspeed" if name.startswith("deepspeed") else "torch" for name in names if is_peer(name)}
    versions = {package: version_among_peers(package) for package in sorted(needed)}
    for package, version in versions.items():
        print(f"peers' {package} {version or 'missing'}")
    missing = tuple(package for package, version in versions.items() if version is None)
    if missing:
        out = [name for name in names if name.startswith(missing)]
        print(f"left out: {', '.join(out)}; PEERS=…/bin/python is an interpreter with {', '.join(missing)}")
    return [name for name in names if not (missing and name.startswith(missing))]


def is_peer(name: str) -> bool:
    return name.startswith(("fsdp2", "deepspeed"))


def version_among_peers(package: str) -> str | None:
    code = f"from importlib.metadata import version; print(version({package!r}))"
    done = subprocess.run([PEERS, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _answer(output: str) -> str:
    """A rank's last line of JSON; packages write other lines."""
    return next(line for line in reversed(output.splitlines()) if line.startswith("{"))
