"""From the command line, the environment and the job file to a `Request`. Reads files, contacts no host."""

from __future__ import annotations

import fnmatch
import json
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from dstrain.launcher.hostfile import Host, load_hostfile, parse_hosts_expression
from dstrain.launcher.hostfile_store import find_hostfile
from dstrain.launcher.plan import JOB_FILE_ENDINGS, Request, Target
from dstrain.launcher.selection import SelectedHost, select
from dstrain.runtime.spec.errors import UsageError

if TYPE_CHECKING:
    from dstrain.runtime.spec.config import JobConfig, RunConfig

TRAINER = "dstrain.runtime.trainer"
RUNTIME_REQUIREMENTS = ("numpy", "pydantic", "safetensors", "yaml")  # what dstrain.runtime imports besides torch
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_RESERVED = re.compile(
    r"RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|GROUP_RANK|GROUP_WORLD_SIZE|NODE_RANK|ROLE_RANK|"
    r"ROLE_WORLD_SIZE|ROLE_NAME|MASTER_ADDR|MASTER_PORT|TORCHELASTIC_\w+|DSTRAIN_\w+"
)


@dataclass(frozen=True)
class RunOptions:
    """The options of `dstrain run` as typed; None or empty: not given, so the job file or a default decides."""

    hostfile: Path | None = None
    hosts: str | None = None
    include: str | None = None
    exclude: str | None = None
    nproc_per_node: str | None = None
    overrides: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    env_files: tuple[Path, ...] = ()
    pass_env: tuple[str, ...] = ()
    cwd: str | None = None
    python: str | None = None
    prologue: str | None = None
    master_address: str | None = None
    master_port: int = 0
    interface: str | None = None
    max_restarts: int | None = None
    min_nodes: int | None = None
    grace_s: float | None = None
    hang_s: float | None = None
    preload: bool = True
    config: Path | None = None
    resume: str | None = None
    trace: bool = False


@dataclass(frozen=True)
class Job:
    """The job file, resolved; `text`: its JSON for the workers."""

    name: str | None
    run: RunConfig
    text: str


def build_request(options: RunOptions, target: Target) -> tuple[Request, str | None]:
    """The request, and the job's name. A target that ends in .yaml is our trainer on that job."""
    config = options.config
    if options.resume == "":
        raise UsageError.mismatch("--resume", "auto, a step or a path", "nothing")
    if target.kind == "script" and target.name.endswith(JOB_FILE_ENDINGS):
        if target.arguments:
            found = " ".join(target.arguments)
            raise UsageError.mismatch("arguments", f"nothing behind {target.name}", found, "keys are set by --set")
        config, target = Path(target.name), Target("module", TRAINER)
    elif options.resume is not None and config is None:
        raise UsageError.mismatch("--resume", "a job.yaml that says where checkpoints are", f"target {target.name}")
    elif options.trace and config is None:
        fix = "give -c job.yaml if the script trains by dstrain's engine; nothing else is traced"
        raise UsageError.mismatch("--trace", "a job.yaml", f"target {target.name}", fix)
    elif options.overrides and config is None:
        raise UsageError.mismatch("--set", "a job.yaml to change", f"target {target.name}", "give -c job.yaml")
    for_trainer = target == Target("module", TRAINER)
    resume = [f"checkpoint.resume={json.dumps(options.resume)}"] if options.resume is not None else []
    job = _load(config, [*options.overrides, *resume], for_trainer, options.trace) if config else None
    run = job.run if job else None
    environment, secrets = _environment(options, run)
    cwd = options.cwd or (str(run.cwd) if run and run.cwd else str(Path.cwd()))
    if not os.path.isabs(cwd):  # noqa: PTH117 - it may exist only on the hosts
        raise UsageError.mismatch("--cwd", "an absolute path (it is used on every host)", cwd)
    request = Request(
        target=_checked_target(target, cwd),
        hosts=(),
        cwd=cwd,
        nproc_per_node=_nproc(options.nproc_per_node) or (run.nproc_per_node if run else None),
        environment=environment,
        secret_names=secrets,
        pass_environment=_passed((*options.pass_env, *(run.pass_env if run else ()))),
        python=options.python or (run.python if run else None),
        prologue=options.prologue or (run.prologue if run else None),
        master_address=options.master_address,
        master_port=options.master_port,
        interface=options.interface,
        max_restarts=_first(options.max_restarts, run.max_restarts if run else None, 0),
        min_nodes=options.min_nodes or (run.min_nodes if run else None),
        grace_s=_first(options.grace_s, run.grace_s if run else None, 10.0),
        hang_s=_hang_s(options.hang_s, run),
        preload=options.preload,
        requirements=RUNTIME_REQUIREMENTS if job else (),
        job=job.text if job else None,
    )
    hosts, excluded = _hosts(options, run, request)
    made = _with_hosts(replace(request, excluded_slots=excluded), hosts, options)
    return made, job.name if job else None


T = TypeVar("T")


def _first(*values: T | None) -> T:
    return next(value for value in values if value is not None)


def _hang_s(option: float | None, run: RunConfig | None) -> float | None:
    if option is None:
        return run.hang_s if run else None
    if not math.isfinite(option):
        raise UsageError.mismatch("--hang-timeout", "a number of seconds, or 0 for never", str(option))
    return option


def _load(path: Path, overrides: Sequence[str], for_trainer: bool, trace: bool) -> Job:
    """trace: as the job says which steps, or a few."""
    from dstrain.runtime.spec.load import load_job
    from dstrain.runtime.spec.training_config import default_trace

    job: JobConfig = load_job(path, overrides, for_trainer=for_trainer)
    if trace and job.log.trace is None:
        chosen = f"log.trace={default_trace(job.train.steps)}"
        job = load_job(path, [*overrides, chosen], for_trainer=for_trainer)
    return Job(job.name, job.run, job.model_dump_json(by_alias=True, exclude={"run"}))  # run.env may hold secrets


def _checked_target(target: Target, cwd: str) -> Target:
    """A script that is missing here and would be looked for here is a slip of the hand: say so before any host."""
    if target.kind != "script":
        return target
    here = Path(target.name)
    if Path(cwd) == Path.cwd() and not here.is_file():
        if here.is_dir():
            raise UsageError.mismatch("target", "a script or a job.yaml", f"the folder {target.name}")
        hint = ""
        if shutil.which(target.name) and "/" not in target.name:
            hint = f"to start the program {target.name}: --no-python {target.name}"
        raise UsageError.mismatch("target", "a script.py or a job.yaml", f"no file {target.name}", hint)
    return target


def _nproc(text: str | None) -> int | Literal["auto"] | None:
    if text is None:
        return None
    if text == "auto":
        return "auto"
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 4096:
        raise UsageError.mismatch("-n/--nproc-per-node", "a number from 1 to 4096, or auto", text)
    return int(text)


# --- hosts ---------------------------------------------------------------------------------------------------


def _hosts(
    options: RunOptions, run: RunConfig | None, request: Request
) -> tuple[tuple[Host, ...], dict[str, tuple[int, ...]]]:
    """The hosts of the run, and the slots to leave out where nobody knows yet how many there are."""
    if options.hostfile and options.hosts:
        raise UsageError.mismatch("hosts", "either --hostfile or --hosts", "both")
    if options.hosts:
        hosts = parse_hosts_expression(options.hosts)
    elif options.hostfile:
        hosts = load_hostfile(options.hostfile).hosts
    elif run and run.hosts:
        hosts = parse_hosts_expression(run.hosts)
    elif run and run.hostfile:
        hosts = load_hostfile(run.hostfile).hosts
    elif path := find_hostfile(None, os.environ):
        hosts = load_hostfile(path).hosts
    else:
        hosts = (Host("localhost", transport="local"),)
    if not hosts:
        raise UsageError.mismatch(str(options.hostfile), "at least one host", "none", "dstrain hosts add HOST")
    selected = select(hosts, options.include, options.exclude)
    chosen = tuple(_with_slots(one, request) for one in selected)
    return chosen, {one.host.name: one.excluded_slot_ids for one in selected if one.excluded_slot_ids}


def _with_hosts(request: Request, hosts: tuple[Host, ...], options: RunOptions) -> Request:
    """With the hosts of the first attempt, and the spares; without restarts nobody needs those."""
    used, spares = (tuple(host for host in hosts if host.spare is spare) for spare in (False, True))
    if not used:
        found = f"spares alone, {', '.join(host.written_name for host in spares[:8])}"
        raise UsageError.mismatch("hosts", "at least one host that is no spare", found, "take spare off one")
    if request.min_nodes is not None and request.min_nodes > len(used):
        expected = f"at most the number of hosts, {len(used)}"
        raise UsageError.mismatch("--min-nodes, run.min_nodes", expected, str(request.min_nodes))
    if request.max_restarts:
        return replace(request, hosts=used, spares=spares)
    if options.min_nodes is not None:
        raise UsageError.mismatch("--min-nodes", "restarts, which it is for", "none", "give --max-restarts")
    count = "1 spare host is" if len(spares) == 1 else f"{len(spares)} spare hosts are"
    notes = (f"{count} not used: without --max-restarts there is nothing to wait for",) if spares else ()
    return replace(request, hosts=used, notes=notes)


def _with_slots(selected: SelectedHost, request: Request) -> Host:
    """The host with the slots that were chosen; on this machine the GPUs are counted at once."""
    host = selected.host
    if selected.slot_ids is not None and not selected.excluded_slot_ids:
        host = replace(host, slots=len(selected.slot_ids), gpus=selected.slot_ids)
    if host.transport == "local" and request.slots(host) is None:
        from dstrain.launcher.agent.host_facts import count_gpus

        gpus = count_gpus({**os.environ, **request.pass_environment, **request.environment})
        ids = tuple(gpu for gpu in range(gpus) if gpu not in selected.excluded_slot_ids)
        host = replace(host, slots=len(ids) or DEFAULT_CPU_RANKS, gpus=ids if selected.excluded_slot_ids else host.gpus)
    return host


DEFAULT_CPU_RANKS = 2  # on this machine, without GPUs and without a word from the user


# --- environment ---------------------------------------------------------------------------------------------


def _environment(options: RunOptions, run: RunConfig | None) -> tuple[dict[str, str], frozenset[str]]:
    """job.yaml's run.env, then --env-file, then --env; and the names whose values are secret."""
    environment: dict[str, str] = dict(run.env) if run else {}
    secrets: set[str] = set()
    for name in environment:
        _check_name(name, "run.env")
    for path in options.env_files:
        read = read_env_file(path)
        environment |= read
        secrets |= set(read)
    for item in options.env:
        name, equals, value = item.partition("=")
        _check_name(name, "--env")
        if not equals:
            if name not in os.environ:
                raise UsageError.mismatch(f"--env {name}", "a variable of this shell", "none of that name", "export it")
            value = os.environ[name]
            secrets.add(name)
        environment[name] = value
    return environment, frozenset(secrets)


def _check_name(name: str, where: str) -> None:
    if not _NAME.fullmatch(name):
        raise UsageError.mismatch(where, "NAME=VALUE or NAME", ascii(name))
    if _RESERVED.fullmatch(name):
        fix = "it is set by the launcher"
        if name.startswith("MASTER_"):
            fix = f"use --{name.lower().replace('_', '-')}"
        raise UsageError.mismatch(where, "a variable of your own", name, fix)


def read_env_file(path: Path) -> dict[str, str]:
    """NAME=VALUE lines; `#` comments and empty lines are skipped, quotes around a whole value are taken off.

    Any byte but NUL and newline stands for itself in a quoted value. An error never shows a line: it may be a secret.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UsageError.mismatch("--env-file", "a file that can be read", f"{path}: {error.strerror}") from None
    values = {}
    for number, raw in enumerate(lines, 1):
        line = os.fsdecode(raw).strip(" \t\r").removeprefix("export ")
        if not line or line.startswith("#"):
            continue
        name, equals, value = line.partition("=")
        name, where = name.strip(" \t"), f"{path}:{number}"
        if not equals or not _NAME.fullmatch(name):
            raise UsageError.mismatch(where, "NAME=VALUE", "a line without a name" if equals else "a line without =")
        if "\0" in value:
            raise UsageError.mismatch(where, "NAME=VALUE", "a NUL byte, which no environment can hold")
        _check_name(name, where)
        if len(value) >= 2 and value[0] == value[-1] and value[0] in "'\"":
            value = value[1:-1]
        values[name] = value
    return values


def _passed(patterns: Sequence[str], environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The caller's variables that match a pattern; those that the launcher sets are never passed."""
    return {
        name: value
        for name, value in environ.items()
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns) and not _RESERVED.fullmatch(name)
    }
