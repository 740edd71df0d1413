"""What a person is told when model and loss do not take the first batch."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dstrain.runtime.spec.errors import UsageError

_SHOWN = 300
"""Characters of a batch, and of what the model said."""

_HERE = Path(__file__).parent
_TORCH = Path(torch.__file__).parent


@contextlib.contextmanager
def explained(batch: Any, device: torch.device, what: str = "the first batch") -> Iterator[None]:
    """Around a first forward and its loss: a batch that does not fit is the likeliest reason to fail there.

    Raises UsageError in place of TypeError, RuntimeError, IndexError and ValueError: one line, and behind it the
    traceback through the user's code, who may have to find a bug of their own. Want of memory, and what communication
    raised, stay what they are.
    """
    try:
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # an index out of range shows only now
    except (TypeError, RuntimeError, IndexError, ValueError) as error:
        if _is_other(error):
            raise
        said = f"{type(error).__name__}: {_shortened(str(error))}"
        line = UsageError.mismatch(what, "what model and loss take", f"{describe(batch)}, and {said}")
        raise UsageError(f"{line}\n{_traceback(error)}") from error


def describe(batch: Any) -> str:
    """Shapes and dtypes: `(float32 [8, 64], int64 [8])`."""
    return _shortened(_described(batch))


def _described(batch: Any) -> str:
    if isinstance(batch, Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')} {list(batch.shape)}"
    if isinstance(batch, Mapping):
        return "{" + ", ".join(f"{key}: {_described(value)}" for key, value in batch.items()) + "}"
    if isinstance(batch, tuple | list):
        return "(" + ", ".join(map(_described, batch)) + ")"
    return type(batch).__name__


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


_OF_OTHER_RANKS = [
    _HERE / name
    for name in ("comm.py", "comm_group.py", "comm_edge.py", "pipeline/messages.py", "pipeline/gradients.py")
]
"""What fails there, others have failed before."""


def _is_other(error: Exception) -> bool:
    if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
        return True
    return any(
        file.is_relative_to(_TORCH / "distributed") or file in _OF_OTHER_RANKS
        for file in (Path(frame.f_code.co_filename) for frame, _ in traceback.walk_tb(error.__traceback__))
    )


def _traceback(error: Exception) -> str:
    """The frames of the user's code, and the last one of all; every frame where none is the user's."""
    made = traceback.TracebackException.from_exception(error)
    *above, last = made.stack
    if own := [frame for frame in above if not _is_ours(Path(frame.filename))]:
        made.stack = traceback.StackSummary.from_list([*own, last])
    return "".join(made.format()).rstrip("\n")


def _is_ours(file: Path) -> bool:
    """torch's, or the trainer's."""
    return file.is_relative_to(_TORCH) or (file.is_relative_to(_HERE) and not file.is_relative_to(_HERE / "models"))
