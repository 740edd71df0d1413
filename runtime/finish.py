"""How a forked rank ends: everything that a user can observe of an interpreter's end, without its price.

[Note: the end of a fork]
`Py_Finalize` clears every module, so each of 16 forks copies all pages of torch that it shared with the zygote: 4.7 s
on 2 cores for 16 ranks. What the user's own code relies on happens here as it does there, in the same order:
non-daemon threads are waited for, atexit handlers run, open files are flushed, the user's modules are let go, cycles
among the user's objects are collected, and the streams of Python and C are flushed. Only the modules that the zygote
had imported stay as they are.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import io
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable
from typing import NoReturn


def run_and_finish(run: Callable[[], None]) -> NoReturn:
    """Call `run`, then end the process with the code that the interpreter would end with."""
    preloaded = set(sys.modules)
    code = _code_of(run)
    try:
        threading._shutdown()  # type: ignore[attr-defined]  # what the interpreter itself calls
        atexit._run_exitfuncs()
    except BaseException:
        sys.excepthook(*sys.exc_info())
    _flush_files()
    _clear_modules([name for name in sys.modules if name not in preloaded])
    if not _flush() and code == 0:
        code = 120  # as python ends when its last output cannot be written
    if code == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code & 0xFF)


def _code_of(run: Callable[[], None]) -> int:
    """0, or what SystemExit says, or 1 behind a traceback; -SIGINT: python then kills itself with that signal."""
    try:
        run()
    except SystemExit as leave:
        if leave.code is None:
            return 0
        if isinstance(leave.code, int):
            return leave.code
        print(leave.code, file=sys.stderr)
        return 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    return 0


_MAIN = ("__main__", "__mp_main__")  # multiprocessing's other name for it


def _clear_modules(names: list[str]) -> None:
    """Let go of the user's modules, newest first and `__main__` before them; clear what something still holds.

    As in CPython's finalize_modules: most modules die with the last reference to them, so that a `__del__` still
    sees its globals.
    """
    held = [weakref.ref(sys.modules.pop(name)) for name in [*_MAIN, *reversed(names)] if name in sys.modules]
    gc.collect()  # what the zygote had is frozen and not looked at
    for reference in held:
        namespace = getattr(reference(), "__dict__", {})
        for private in (True, False):
            for key in [key for key in namespace if key.startswith("_") is private and not key.startswith("__")]:
                namespace[key] = None
    gc.collect()


def _flush_files() -> None:
    """Every file that the rank has left open, text before bytes: the collector may end their layers in any order."""
    kinds = (io.TextIOWrapper, io.BufferedWriter)
    files = [thing for thing in gc.get_objects() if issubclass(type(thing), kinds)]  # `isinstance` asks a dead proxy
    for file in sorted(files, key=lambda thing: not isinstance(thing, io.TextIOWrapper)):
        with contextlib.suppress(OSError, ValueError):
            file.flush()


def _flush() -> bool:
    """False when standard output could not be written."""
    written = True
    for stream in (sys.stdout, sys.stderr):
        if stream is None or getattr(stream, "closed", False):
            continue
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            written = written and stream is not sys.stdout
    with contextlib.suppress(OSError):
        ctypes.CDLL(None).fflush(None)
    return written
