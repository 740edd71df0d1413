"""Tokens in files, seen as one flat sequence: memory-mapped, so that nothing is copied but what is read."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from dstrain.runtime.spec.errors import UsageError

Numbers = npt.NDArray[np.unsignedinteger[Any]]

STRETCH_TOKENS = 1 << 20
"""The held-out part is the end of each stretch of this length, so that it is like the rest of the corpus."""

MAPPED_FILES = 256
"""Files mapped at once: each mapping holds a descriptor, of which a process often has 1,024. Mapping takes 20 µs."""

HASHED_WHOLE_TOKENS = 1 << 24
"""A corpus up to this length is hashed whole (0.1 s), of a longer one `HASHED_PIECES` pieces."""

HASHED_PIECES, HASHED_PIECE_TOKENS = 256, 1 << 12

_READ_TOKENS = 1 << 20
"""Tokens at once where all are read."""


class Tokens(Protocol):
    """A flat sequence of tokens."""

    def __len__(self) -> int:
        """Tokens in all."""

    def read(self, start: int, length: int) -> Numbers:
        """Tokens start to start + length − 1; all of them must exist. Perhaps a view of a file: not to write to."""


class TokenFile(NamedTuple):
    """A flat little-endian array of numbers in a file; key: the configuration's key that led to it."""

    path: Path
    dtype: str
    offset_bytes: int
    tokens: int
    key: str


class TokenFiles:
    """Several files, one behind the other. May be read by several threads."""

    def __init__(self, files: Sequence[TokenFile]) -> None:
        self._files = files
        self._ends = list(accumulate(file.tokens for file in files))
        self._mapped = lru_cache(maxsize=MAPPED_FILES)(_mapped)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, start: int, length: int) -> Numbers:
        """See Tokens. Raises UsageError where a file can no longer be read."""
        pieces, position, end = [], start, start + length
        while position < end:
            number = bisect_right(self._ends, position)
            file = self._files[number]
            begin = self._ends[number] - file.tokens
            piece = self._mapped(file)[position - begin : end - begin]
            pieces.append(piece)
            position += len(piece)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def all(self) -> Iterator[Numbers]:
        """All tokens, some at a time: read and not mapped, for the kernel then reads ahead."""
        for file in self._files:
            with _reading(file), file.path.open("rb") as handle:
                handle.seek(file.offset_bytes)
                for start in range(0, file.tokens, _READ_TOKENS):
                    yield np.fromfile(handle, file.dtype, min(_READ_TOKENS, file.tokens - start))

    def fingerprint(self) -> str:
        """Sixteen hex digits that differ between different corpora.

        It covers the lengths of all files, and of their content everything up to `HASHED_WHOLE_TOKENS` tokens. Of a
        larger corpus only pieces are hashed, evenly spaced with the first and the last among them: a change that
        keeps all lengths and misses the pieces goes unnoticed. In exchange it takes milliseconds at any size.
        """
        digest = hashlib.sha256(repr([(file.tokens, file.dtype) for file in self._files]).encode())
        if len(self) <= HASHED_WHOLE_TOKENS:
            pieces = self.all()
        else:
            last = len(self) - HASHED_PIECE_TOKENS
            starts = (last * piece // (HASHED_PIECES - 1) for piece in range(HASHED_PIECES))
            pieces = (self.read(start, HASHED_PIECE_TOKENS) for start in starts)
        for piece in pieces:
            digest.update(np.ascontiguousarray(piece).data)
        return digest.hexdigest()[:16]


class Part:
    """The same share of each stretch of a sequence, as one sequence: arithmetic on indices, no copy."""

    def __init__(self, tokens: Tokens, begin: float, end: float) -> None:
        """begin, end: the share's bounds in each stretch, from 0 to 1; the last stretch may be shorter."""
        self._tokens = tokens
        self._stretches, rest = divmod(len(tokens), STRETCH_TOKENS)
        self._begin, self._kept = _bounds(STRETCH_TOKENS, begin, end)
        self._last_begin, self._last_kept = _bounds(rest, begin, end)

    def __len__(self) -> int:
        return self._stretches * self._kept + self._last_kept

    def read(self, start: int, length: int) -> Numbers:
        """See Tokens."""
        pieces, position, end = [], start, start + length
        while position < end:
            where, left = self._place(position)
            pieces.append(self._tokens.read(where, min(left, end - position)))
            position += left
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _place(self, position: int) -> tuple[int, int]:
        """Where a token of this part stands in the whole, and how many follow it there, itself included."""
        stretch = min(position // self._kept, self._stretches) if self._kept else self._stretches
        into = position - stretch * self._kept
        begin, kept = (self._begin, self._kept) if stretch < self._stretches else (self._last_begin, self._last_kept)
        return stretch * STRETCH_TOKENS + begin + into, kept - into


def split(tokens: Tokens, validation_fraction: float) -> tuple[Part, Part]:
    """What to train on, and what to validate on: the last `validation_fraction` of each stretch."""
    cut = 1 - validation_fraction
    return Part(tokens, 0, cut), Part(tokens, cut, 1)


def _bounds(length: int, begin: float, end: float) -> tuple[int, int]:
    first, last = round(length * begin), round(length * end)
    return first, last - first


def _mapped(file: TokenFile) -> Numbers:
    with _reading(file):
        with file.path.open("rb") as handle:
            content = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        content.madvise(mmap.MADV_RANDOM)  # a window is a page or two; reading ahead may fetch megabytes for each
        numbers: Numbers = np.frombuffer(content, file.dtype, file.tokens, file.offset_bytes)
    return numbers


@contextlib.contextmanager
def _reading(file: TokenFile) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"{file.key}: cannot read {file.path}: {error.strerror}") from None
    except ValueError:  # of frombuffer and of mmap
        raise UsageError(f"{file.key}: {file.path} has become shorter since the job began") from None
