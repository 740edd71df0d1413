"""The corpus: bytes of real text, the same on every rank.

Without `data.path` it is the source of the Python standard library: on every host, and nothing to download.
"""

from __future__ import annotations

import hashlib
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dstrain.runtime.comm import Communicator
from dstrain.runtime.spec.config import DataConfig
from dstrain.runtime.spec.errors import UsageError

STRETCH_BYTES = 1 << 20
"""The held-out part is the end of each stretch of this length, so that it is like the rest of the corpus."""

_NOT_SOURCE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings"}
"""Folders in the standard library's path that are left out: installed packages, tests, character tables."""


class Split(NamedTuple):
    """The bytes to train on and those held out; uint8, one dimension."""

    train: Tensor
    validation: Tensor


def load_corpus(config: DataConfig) -> bytes:
    """All bytes of the corpus. Raises UsageError where nothing can be read."""
    files = list(_standard_library() if config.path is None else _files_of(config.path))
    try:
        corpus = b"".join(file.read_bytes() for file in files)
    except OSError as error:
        raise UsageError(f"data.path: cannot read {error.filename}: {error.strerror}") from None
    if not corpus:
        raise UsageError(f"data.path: expected text, found nothing in {config.path}")
    return corpus


def check_same_on_all_ranks(corpus: bytes, comm: Communicator) -> None:
    """Refuse ranks that would train on different data: UsageError on all ranks. One small collective."""
    digest = hashlib.sha256(corpus).hexdigest()[:16]
    everyone = comm.all_gather_object((platform.node(), digest, len(corpus)))
    first_host, first_digest, first_bytes = everyone[0]
    for rank, (host, digest, size) in enumerate(everyone):
        if digest != first_digest:
            raise UsageError(
                f"data.path: expected the same corpus on all ranks, found sha256 {first_digest}… "
                f"({first_bytes} bytes) on rank 0 ({first_host}) and {digest}… ({size} bytes) on rank {rank} "
                f"({host}); copy one to all hosts; the default corpus asks for the same Python everywhere"
            )


def split(corpus: bytes, validation_fraction: float) -> Split:
    """Hold out the last `validation_fraction` of each stretch."""
    train, held_out = [], []
    for start in range(0, len(corpus), STRETCH_BYTES):
        stretch = corpus[start : start + STRETCH_BYTES]
        cut = round(len(stretch) * (1 - validation_fraction))
        train.append(stretch[:cut])
        held_out.append(stretch[cut:])
    return Split(_tensor(train), _tensor(held_out))


def _tensor(pieces: list[bytes]) -> Tensor:
    joined = bytearray().join(pieces)
    return torch.frombuffer(joined, dtype=torch.uint8) if joined else torch.empty(0, dtype=torch.uint8)


def _standard_library() -> Iterator[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    return (f for f in sorted(root.rglob("*.py")) if not _NOT_SOURCE & set(f.relative_to(root).parts))


def _files_of(path: Path) -> Iterator[Path]:
    if path.is_dir():
        return (file for file in sorted(path.rglob("*")) if file.is_file())
    return iter([path])
