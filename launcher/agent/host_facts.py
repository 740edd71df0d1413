"""What a host is like: environment, cores, GPUs, interpreter, working directory, script. Standard library only."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import IO

from dstrain.launcher.agent import rendezvous
from dstrain.runtime.spec.frames import HostFacts, Prepare

PROLOGUE_TIMEOUT_S = 60.0


class PrologueError(Exception):
    """The prologue ended with an error; the message is its own words."""


def job_environment(prepare: Prepare, login: dict[str, str]) -> dict[str, str]:
    """The environment that ranks inherit: login, then prologue, then passed variables, then the job's own."""
    environment = _after_prologue(prepare.prologue, prepare.cwd, login) if prepare.prologue else dict(login)
    environment.update(prepare.pass_environment)
    environment.update(prepare.environment)
    return environment


def _after_prologue(prologue: str, cwd: str, login: dict[str, str]) -> dict[str, str]:
    """What `bash -l` has in its environment after the prologue (a login shell: `module` is defined there).

    Both outputs go to files: a pipe would wait for a daemon that the prologue starts, or fill up.
    """
    shell = shutil.which("bash", path=login.get("PATH")) or "/bin/sh"
    with tempfile.NamedTemporaryFile() as found, tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [shell, "-l", "-c", f'{prologue}\n[ $? -eq 0 ] && exec env -0 >"$DSTRAIN_PROLOGUE_OUT"'],
            env={**login, "DSTRAIN_PROLOGUE_OUT": found.name},
            cwd=cwd if Path(cwd).is_dir() else "/",
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
        try:
            process.wait(PROLOGUE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise PrologueError(f"did not end within {PROLOGUE_TIMEOUT_S:.0f} s") from None
        environment, last = Path(found.name).read_bytes(), _last_line(said)
    if process.returncode != 0 or not environment:
        raise PrologueError(f"exit {process.returncode}: {last or 'it printed nothing'}")
    pairs = (os.fsdecode(item).partition("=") for item in environment.split(b"\0") if item)
    return {name: value for name, _, value in pairs if name != "DSTRAIN_PROLOGUE_OUT"}


def _last_line(file: IO[bytes]) -> str:
    file.seek(0)
    lines = file.read().strip().splitlines()
    return os.fsdecode(lines[-1]) if lines else ""


def gather(
    prepare: Prepare, login: dict[str, str], environment: dict[str, str], prologue_error: str | None
) -> HostFacts:
    """Everything that preflight and plan need to know of this host and that takes no import of torch."""
    gpus = count_gpus(environment)
    slots = prepare.slots
    if slots is None:
        chosen = chosen_gpus(prepare, gpus)
        slots = len(chosen) if chosen is not None else gpus or prepare.fallback_slots
    target = _target_path(prepare, environment)
    return HostFacts(
        hostname=socket.gethostname(),
        cores=len(os.sched_getaffinity(0)),
        slots=slots,
        gpus=gpus,
        addresses=rendezvous.candidate_addresses(),
        clock_ns=time.time_ns(),
        cwd=prepare.cwd if os.access(prepare.cwd, os.X_OK) and Path(prepare.cwd).is_dir() else None,
        target_sha256=_sha256(target) if target else None,
        target_path=str(target) if target else None,
        python=find_python(_brought_python(prepare, login, environment) + prepare.python, environment),
        prologue_error=prologue_error,
    )


def _brought_python(prepare: Prepare, login: dict[str, str], environment: dict[str, str]) -> list[str]:
    """The python3 that the prologue has put first in PATH (`conda activate`, `module load python`), if it has."""
    if prepare.python_named or not prepare.prologue:
        return []
    before, after = (shutil.which("python3", path=each.get("PATH")) for each in (login, environment))
    return [after] if after and after != before else []


def find_python(candidates: list[str], environment: dict[str, str]) -> str | None:
    """The first candidate that exists here; a bare name is looked up in the job's PATH."""
    for candidate in candidates:
        found = shutil.which(str(Path(candidate).expanduser()), path=environment.get("PATH"))
        if found:
            return found
    return None


def makes_an_optimizer(prepare: Prepare) -> bool:
    """Our trainer does, so all ranks share the import of torch._dynamo that its first optimizer asks for.

    A script imports it itself, in its own order. In a plain interpreter that is behind init_process_group, and then
    the default arguments of torch.distributed.nn.functional keep the process group to the end. Imported before, they
    do not: DDP's Reducer becomes the last owner, and its destructor joins Gloo's threads while it holds the GIL that
    they wait for. Measured on a busy machine with torch 2.13: 5 of 12 DDP scripts then hang at their end.
    """
    return prepare.kind != "script" and prepare.job is not None


def count_gpus(environment: dict[str, str]) -> int:
    """GPUs that a rank here could use, without asking a driver (which takes seconds): device files or sysfs."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([item for item in visible.split(",") if item.strip() not in ("", "-1")])
    nvidia = [name for name in os.listdir("/dev") if re.fullmatch(r"nvidia\d+", name)]
    if nvidia:
        return len(nvidia)
    amd = 0
    with contextlib.suppress(OSError):
        for node in Path("/sys/class/kfd/kfd/topology/nodes").iterdir():
            amd += (node / "gpu_id").read_text().strip() != "0"
    return amd


def chosen_gpus(prepare: Prepare, gpus: int) -> list[int] | None:
    """The GPUs that the ranks may see; None: all."""
    if prepare.gpus is None and prepare.excluded_slots:
        return [gpu for gpu in range(gpus) if gpu not in prepare.excluded_slots]
    return prepare.gpus


def _target_path(prepare: Prepare, environment: dict[str, str]) -> Path | None:
    if prepare.kind == "module":
        return None
    if prepare.kind == "program" and "/" not in prepare.target:
        found = shutil.which(prepare.target, path=environment.get("PATH"))
        return Path(found) if found else None
    path = Path(prepare.cwd) / prepare.target
    return path if path.is_file() else None


def _sha256(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None
