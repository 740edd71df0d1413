"""The zygote: imports torch once on a host and forks every rank from there, attempt after attempt.

The agent executes it with the job's whole environment (OMP_NUM_THREADS or LD_* set after a fork would be ignored)
and speaks frames with it over a socket. A forked rank then becomes what a plain interpreter would be:

    its own session, its own stdin/stdout/stderr, fresh random seeds, `__main__` and sys.argv of its script,
    and the normal end of an interpreter (atexit, buffers, non-daemon threads).

[Note: fork after importing torch]
Safe as long as the zygote has one thread and no CUDA context. OpenBLAS, whose threads numpy starts at import, ends
them before each fork and starts them again when somebody multiplies (its pthread_atfork handler), so a rank has as
many as its environment says; PYTORCH_NVML_BASED_CUDA_CHECK=1 keeps torch from touching the driver. Forked ranks share
what separate processes would not: the seeds of torch, numpy and random, so they are drawn anew from the system's
entropy.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import select
import signal
import socket
import sys
import traceback
import types
from collections import deque
from importlib.machinery import SourceFileLoader
from importlib.util import find_spec
from pathlib import Path
from pkgutil import get_importer

from dstrain.runtime import finish
from dstrain.runtime.spec.frames import (
    ALL_STACKS_SIGNAL,
    STACK_SIGNAL,
    STORE_RANK,
    Ended,
    Fork,
    Forked,
    FrameReader,
    HoldStore,
    PreloadFacts,
    encode_message,
)
from dstrain.runtime.spec.linux import die_with_parent, set_title

MAX_DESCRIPTORS = 16
_CUDA_CHECK = "PYTORCH_NVML_BASED_CUDA_CHECK"


def main(control_fd: int, requirements: list[str], optimizer: bool) -> None:
    """Import, report, then fork on request until the agent closes the socket. In a rank: run its script.

    optimizer: the target will make one, and the first one imports torch._dynamo: as much again as torch itself.
    """
    agent = os.getppid()
    die_with_parent(agent)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    control = socket.socket(fileno=control_fd)
    facts = _preload(requirements, optimizer)
    control.sendall(encode_message(facts))
    gc.collect()
    gc.freeze()  # the collector leaves the shared pages alone: they stay shared
    request = _serve(control)
    if request is not None:
        fork, descriptors = request
        control.close()
        _become_rank(fork, descriptors)
        finish.run_and_finish(lambda: run_target(fork.kind, fork.target, fork.arguments))


def _preload(requirements: list[str], optimizer: bool) -> PreloadFacts:
    """Import what the ranks will need. Every error becomes a fact: the agent reports it before any rank starts."""
    version = ".".join(map(str, sys.version_info[:3]))
    missing = [name for name in requirements if not _can_find(name)]
    users_check = os.environ.get(_CUDA_CHECK)
    os.environ.setdefault(_CUDA_CHECK, "1")
    try:
        if not _can_find("torch"):
            return PreloadFacts(version, None, missing)
        with contextlib.suppress(ImportError):
            import numpy  # noqa: F401
        import torch
        import torch.distributed

        if optimizer:
            import torch._dynamo
    except BaseException:
        return PreloadFacts(version, None, missing, traceback.format_exc(limit=-3))
    finally:
        if users_check is None:
            del os.environ[_CUDA_CHECK]
    return PreloadFacts(version, torch.__version__, missing)


def _can_find(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _serve(control: socket.socket) -> tuple[Fork, list[int]] | None:
    """The loop of the zygote. Returns None at the end of the job, and a request in each forked rank."""
    wake_read, wake_write = socket.socketpair()
    wake_write.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_write.fileno(), warn_on_full_buffer=False)
    ranks: dict[int, int] = {}
    reader, descriptors = FrameReader(), deque[int]()
    while True:
        ready, _, _ = select.select([control, wake_read], [], [])
        if wake_read in ready:
            wake_read.recv(4096)
            _report_ended(control, ranks)
        if control not in ready:
            continue
        data, received, _, _ = socket.recv_fds(control, 1 << 20, MAX_DESCRIPTORS)
        descriptors.extend(received)
        if not data:
            return None
        for message in reader.feed(data):
            assert isinstance(message, HoldStore | Fork)
            rank = STORE_RANK
            if isinstance(message, HoldStore):
                pid = _fork_store(message, descriptors.popleft())
            else:
                rank, mine = message.rank, [descriptors.popleft() for _ in range(4)]
                zygote, pid = os.getpid(), os.fork()
                if pid == 0:
                    signal.set_wakeup_fd(-1)
                    die_with_parent(zygote)
                    wake_read.close()
                    wake_write.close()
                    return message, mine
                for fd in mine:
                    os.close(fd)
            ranks[pid] = rank
            control.sendall(encode_message(Forked(rank, pid, message.attempt)))


def _report_ended(control: socket.socket, ranks: dict[int, int]) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        if pid in ranks:
            control.sendall(encode_message(Ended(ranks.pop(pid), pid, os.waitstatus_to_exitcode(status))))


def _fork_store(message: HoldStore, listening: int) -> int:
    """The process that holds the store of one attempt. It serves until the agent ends it."""
    zygote, pid = os.getpid(), os.fork()
    if pid:
        os.close(listening)
        return pid
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        die_with_parent(zygote)
        os.setsid()
        set_title("dstrain store")
        from torch.distributed import TCPStore  # type: ignore[attr-defined]  # it is public, but not in __all__

        store = TCPStore(
            message.address, message.port, is_master=True, wait_for_workers=False, master_listen_fd=listening
        )
        while store:
            signal.pause()
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def _become_rank(fork: Fork, descriptors: list[int]) -> None:
    """From a copy of the zygote to a fresh process with its own streams, environment and seeds."""
    os.setsid()
    with Path(os.devnull).open("rb") as null:
        os.dup2(null.fileno(), 0)
    out, err, events, stacks = descriptors
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.close(out)
    os.close(err)
    os.environ.update(fork.environment)
    os.environ["DSTRAIN_EVENT_FD"] = str(events)
    set_title(f"dstrain rank {fork.rank}: {fork.target}")
    for number in (signal.SIGCHLD, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(line_buffering=True)
    faulthandler.register(STACK_SIGNAL, file=stacks, all_threads=False, chain=False)
    faulthandler.register(ALL_STACKS_SIGNAL, file=stacks, all_threads=True, chain=False)
    _reseed()


def _reseed() -> None:
    import random

    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    if "torch" in sys.modules:
        sys.modules["torch"].seed()


def run_target(kind: str, target: str, arguments: list[str]) -> None:
    """Run a script or module as `__main__`, as `python target arguments…` does. Returns, or raises as it does."""
    import runpy

    sys.excepthook = _show_without_us
    main_module = types.ModuleType("__main__")  # a fresh one: it can die at the end as an interpreter's does
    namespace, born_with = main_module.__dict__, sys.modules["__main__"].__dict__
    namespace |= {name: born_with[name] for name in ("__annotations__", "__builtins__") if name in born_with}
    sys.modules |= dict.fromkeys({"__main__", "__mp_main__"} & set(sys.modules), main_module)
    sys.argv = [target, *arguments]
    sys.orig_argv = [sys.executable, *(["-m"] if kind == "module" else []), *sys.argv]
    if kind == "module":
        _put_first_on_path(str(Path.cwd()))
        runpy._run_module_as_main(target)  # type: ignore[attr-defined]  # what `python -m` itself calls
        return
    path = os.path.abspath(target)  # noqa: PTH100 - as python has it in __file__: links are not resolved
    if get_importer(path) is not None:  # a zip file with a __main__.py
        sys.path.insert(0, path)
        runpy._run_module_as_main("__main__", alter_argv=False)  # type: ignore[attr-defined]
    else:
        _put_first_on_path(os.path.dirname(os.path.realpath(target)))  # noqa: PTH120 - as python has it
        namespace |= {"__file__": path, "__cached__": None, "__loader__": SourceFileLoader("__main__", path)}
        exec(compile(Path(path).read_bytes(), path, "exec", dont_inherit=True), namespace)


def _put_first_on_path(folder: str) -> None:
    if not sys.flags.safe_path:
        sys.path.insert(0, folder)


def _show_without_us(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
    """The traceback as a plain interpreter prints it: it begins in the user's file, not in ours."""
    inner = trace
    while inner is not None and inner.tb_frame.f_code.co_filename in _OUR_FILES:
        inner = inner.tb_next
    shown = error if inner is None else error.with_traceback(inner)
    sys.__excepthook__(kind, shown, shown.__traceback__)


_OUR_FILES = {__file__, finish.__file__, "<string>", "<frozen runpy>"}
