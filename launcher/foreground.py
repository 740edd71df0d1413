"""The foreground of `dstrain run`: checks of its own options, then supervisor and console, two processes."""

from __future__ import annotations

import os
import re
import resource
import signal
import socket
import sys
import tempfile
import traceback
from pathlib import Path

from dstrain.launcher.console import Console, ConsoleOptions, exit_quietly_on_closed_pipe
from dstrain.launcher.console_views import show_plan
from dstrain.launcher.plan import Request, Target, make_plan
from dstrain.launcher.planning.layout_check import check_layout
from dstrain.launcher.run_dir import RunDir, new_run_id
from dstrain.launcher.transport import ConnectOptions, SshProgram
from dstrain.runtime.spec.errors import UsageError

SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
MAX_OPEN_FILES = 16384


def target(kind: str, words: list[str]) -> Target:
    """The target from the words behind our options."""
    if not words:
        wanted = {"module": "a module behind -m", "program": "a program behind --no-python"}.get(kind, "a target")
        fix = "dstrain run job.yaml, dstrain run script.py, dstrain run -m MODULE, or --no-python PROGRAM"
        raise UsageError.mismatch("dstrain run", wanted, "none", fix)
    if kind == "script":
        return Target("script", words[0], tuple(words[1:]))
    if kind == "module":
        return Target("module", words[0], tuple(words[1:]))
    return Target("program", words[0], tuple(words[1:]))


def ssh_program(text: str) -> SshProgram:
    if text == "paramiko":
        return "paramiko"
    if text == "openssh":
        return "openssh"
    raise UsageError.mismatch("--ssh", "paramiko or openssh", text)


def rank_set(text: str | None) -> frozenset[int] | None:
    """`0,4-7` as numbers."""
    if text is None:
        return None
    numbers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part.strip(), re.ASCII)
        if match is None:
            raise UsageError.mismatch("--ranks", "numbers and ranges such as 0,4-7", text)
        first = int(match[1])
        numbers.update(range(first, int(match[2] or first) + 1))
    return frozenset(numbers)


def run_name(text: str | None) -> str | None:
    if text is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", text, re.ASCII):
        raise UsageError.mismatch("--name", "up to 64 letters, digits, '.', '_' or '-'", ascii(text))
    return text


def dry_run(request: Request, ssh: SshProgram, as_json: bool) -> int:
    """Print the plan. Hosts are contacted only if their GPUs must be counted."""
    slots = [request.slots(host) for host in request.hosts]
    check_layout(request, slots)
    if None in slots:
        with tempfile.TemporaryDirectory() as folder:
            options = ConsoleOptions(quiet=not as_json, json=as_json)
            return run(request, ssh, options, Path(folder), None, plan_only=True)
    plan = make_plan(request, new_run_id(None), [count for count in slots if count is not None])
    show_plan(plan.to_json(), as_json)
    return 0


def run(
    request: Request,
    ssh: SshProgram,
    shown: ConsoleOptions,
    base: Path,
    name: str | None,
    plan_only: bool = False,
) -> int:
    """Start the supervisor as a process of its own and be the console; returns the exit code. Raises UsageError, before
    any host is touched, for a job whose layout fits no such ranks."""
    check_layout(request, [request.slots(host) for host in request.hosts])
    _raise_file_limit()
    run_id = new_run_id(name)
    run_directory = RunDir.create(base, run_id)
    run_directory.write_json("job.json", request.to_json())
    ours, theirs = socket.socketpair()
    sys.stdout.flush()
    sys.stderr.flush()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until console and supervisor are ready for them
    supervisor = os.fork()
    if supervisor == 0:
        ours.close()
        _supervise(request, run_directory, run_id, theirs, ConnectOptions(ssh=ssh), plan_only)
    theirs.close()
    try:
        return Console(ours, supervisor, run_directory, shown).run()
    except BrokenPipeError:
        exit_quietly_on_closed_pipe()
        raise AssertionError("it has exited") from None


def _supervise(
    request: Request, run: RunDir, run_id: str, link: socket.socket, options: ConnectOptions, plan_only: bool
) -> None:
    code = 1
    try:
        from dstrain.launcher.supervisor import run_supervised

        code = run_supervised(request, run, run_id, link, options, plan_only)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _raise_file_limit() -> None:
    """Two log files a rank: hundreds of ranks need more descriptors than the usual 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < min(hard, MAX_OPEN_FILES):
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, MAX_OPEN_FILES), hard))
