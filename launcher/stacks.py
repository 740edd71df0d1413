"""What a rank's stack says: where it stands, whether it waits for other ranks, whether it may take long there. Pure.

Stacks are faulthandler's text: a section for each thread, the innermost frame first.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

SHOWN_LINES = 40
_SECTION = re.compile(r"^(Current thread|Stack)?.*\(most recent call first\):$")
_FRAME = re.compile(r'^\s+File "(.*)", line (\d+) in (.*)$')
_STANDARD = re.compile(r"^<|/lib(64)?/python3[^/]*/(?!(site|dist)-packages/)")
_LIBRARY = re.compile(rf"{_STANDARD.pattern}|/(site|dist)-packages/|(^|/)dstrain/(launcher|runtime)/")
_BELOW_SCRIPT = re.compile(r"^<(string|frozen runpy)>$|(^|/)dstrain/runtime/(zygote|finish)\.py$")
_COLLECTIVE = re.compile(
    r"/torch/(distributed/(?!checkpoint/)|nn/parallel/|autograd/graph\.py|cuda/)|/deepspeed/comm/|"
    r"(^|/)dstrain/runtime/(comm\w*\.py|engine\.py|gradients\.py|zero/)"
)
_LONG = re.compile(
    r"/torch/(_dynamo/convert_frame|_inductor/compile_fx|distributed/checkpoint/|serialization\.py)|"
    r"/triton/(compiler|runtime/autotuner)|/safetensors/|(^|/)dstrain/runtime/checkpoint/"
)
_LONG_CALL = re.compile(r"(^|/)dstrain/runtime/trainer\.py (validate|save|_show_sample)$")
_DEBUGGER = re.compile(r"/(pdb|bdb)\.py$|/(pydevd|debugpy|ipdb|pudb)")


@dataclass(frozen=True)
class Frame:
    """One call: `function` stands at `line` of `file`."""

    file: str
    line: int
    function: str

    @property
    def place(self) -> str:
        """`load (data.py:31)`."""
        return f"{self.function} ({self.file.rpartition('/')[2]}:{self.line})"


Stack = tuple[Frame, ...]


def main_thread(text: str) -> Stack:
    """The main thread's frames; empty where there is no answer."""
    return next((frames for frames, is_main in _threads(text) if is_main), ())


def _threads(text: str) -> Iterator[tuple[Stack, bool]]:
    """(frames, whether it is the thread that the signal met: the main one)."""
    frames: list[Frame] = []
    is_main: bool | None = None
    for line in text.splitlines():
        if section := _SECTION.match(line):
            if is_main is not None:
                yield tuple(frames), is_main
            frames, is_main = [], section[1] is not None
        elif frame := _FRAME.match(line):
            frames.append(Frame(frame[1], int(frame[2]), frame[3]))
    if is_main is not None:
        yield tuple(frames), is_main


def waits(stack: Stack, is_running: bool = False) -> bool:
    """Does it wait for other ranks? Told by the innermost frame that is not of the standard library's.

    is_running: its process computes; so in a backward it is at work, where else it waits for the others' gradients.
    """
    inner = next((frame for frame in stack if not _STANDARD.search(frame.file)), None)
    if inner is None or (is_running and inner.file.endswith("/torch/autograd/graph.py")):
        return False
    return bool(_COLLECTIVE.search(inner.file))


def takes_long(stack: Stack) -> bool:
    """Is it where a rank may be for minutes: compiling, validating, saving, loading?"""
    return any(_LONG.search(frame.file) or _LONG_CALL.search(f"{frame.file} {frame.function}") for frame in stack)


def in_debugger(stack: Stack) -> bool:
    return any(_DEBUGGER.search(frame.file) for frame in stack)


def place(text: str) -> str:
    """Where it stands, in the user's own code if there is any: on the main thread, else on another; "": no answer."""
    threads = sorted(_threads(text), key=lambda thread: not thread[1])
    for library in (_LIBRARY, _STANDARD):
        for frames, _ in threads:
            if inner := next((frame for frame in frames if not library.search(frame.file)), None):
                return inner.place
    return threads[0][0][0].place if threads and threads[0][0] else ""


def shown(text: str) -> str:
    """For people: the main thread, and every other that is in the user's code, without what is below the script."""
    lines: list[str] = []
    for frames, is_main in sorted(_threads(text), key=lambda thread: not thread[1]):
        if is_main or any(not _LIBRARY.search(frame.file) for frame in frames):
            lines += [f"{'main' if is_main else 'another'} thread, most recent call first:", *_lines(frames)]
    return "\n".join([*lines[:SHOWN_LINES], "  …"] if len(lines) > SHOWN_LINES else lines)


def _lines(frames: Sequence[Frame]) -> list[str]:
    while frames and _BELOW_SCRIPT.search(frames[-1].file):
        frames = frames[:-1]
    return [f'  File "{frame.file}", line {frame.line} in {frame.function}' for frame in frames]
