"""From a file or folder to tokens: the formats of `data.format`.

Without `data.path` the corpus is the source of the Python standard library: on every host, and nothing to download.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np

from dstrain.runtime.data.host_cache import HostCache
from dstrain.runtime.data.tokens import TokenFile, TokenFiles
from dstrain.runtime.spec.errors import UsageError
from dstrain.runtime.spec.model_config import BYTE_VALUES

_NOT_SOURCE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings"}
"""Folders in the standard library's path that are left out: installed packages, tests, character tables."""

_HIGHEST_BYTES = 8
"""Of the cached highest number of token files, little-endian."""


class Corpus(NamedTuple):
    """Tokens, and how many a model must know: the highest that can occur, plus 1."""

    tokens: TokenFiles
    vocabulary: int


class Format(Protocol):
    """How files become tokens. `key` is the configuration's key that an error names."""

    def open(self, path: Path | None, key: str) -> Corpus:
        """The corpus of a file or folder. Raises UsageError where it is empty or cannot be read."""

    def describe(self, tokens: int) -> str:
        """So much text, for people."""

    def decode(self, tokens: Sequence[int]) -> str | None:
        """Text of tokens, or None where nobody knows it."""


class ByteFormat:
    """Each byte is a token."""

    def open(self, path: Path | None, key: str) -> Corpus:
        files = [TokenFile(file, "u1", 0, size, key) for file, size in files_of(path, key)]
        return Corpus(TokenFiles(files), BYTE_VALUES)

    def describe(self, tokens: int) -> str:
        return f"{tokens / 1e6:.1f} MB of text"

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(token % BYTE_VALUES for token in tokens).decode(errors="replace")


class TokenFormat:
    """Flat arrays of numbers: *.npy, and any other file as little-endian numbers of one type."""

    def __init__(self, token_type: str, cache: HostCache) -> None:
        self._dtype, self._cache = np.dtype(token_type).newbyteorder("<"), cache

    def open(self, path: Path | None, key: str) -> Corpus:
        """As Format; of a folder, all *.bin and *.npy. The highest token is looked for once per host and file."""
        sized = files_of(path, key, suffixes=(".bin", ".npy"))
        tokens = TokenFiles([self._token_file(file, size, key) for file, size in sized])

        def find(out: BinaryIO) -> None:
            out.write(max(int(numbers.max()) for numbers in tokens.all()).to_bytes(_HIGHEST_BYTES, "little"))

        paths = [file for file, _ in sized]
        name = f"{state_of(paths, key, str(self._dtype))}.highest"
        entry = self._cache.entry(name, find, lambda entry: entry.stat().st_size == _HIGHEST_BYTES)
        return Corpus(tokens, int.from_bytes(entry.read_bytes(), "little") + 1)

    def describe(self, tokens: int) -> str:
        return f"{tokens / 1e6:.2f} M tokens"

    def decode(self, tokens: Sequence[int]) -> None:
        return None

    def _token_file(self, file: Path, size: int, key: str) -> TokenFile:
        if file.suffix == ".npy":
            return npy_file(file, key)
        tokens, rest = divmod(size, self._dtype.itemsize)
        if rest:
            raise UsageError.mismatch(
                key,
                f"a multiple of {self._dtype.itemsize} bytes (data.token_type {self._dtype.name})",
                f"{size} in {file}",
            )
        return TokenFile(file, self._dtype.str, 0, tokens, key)


def npy_file(file: Path, key: str) -> TokenFile:
    """A *.npy of unsigned integers in one dimension. Raises UsageError where it is none, or not whole."""
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UsageError.mismatch(key, "a whole *.npy", f"{file}: {error}") from None
    if not isinstance(array, np.memmap) or array.ndim != 1 or array.dtype.kind != "u" or array.dtype.itemsize > 4:
        raise UsageError.mismatch(
            key,
            "a flat array of uint8, uint16 or uint32",
            f"{array.dtype} of shape {array.shape} in {file}",
            "convert it with .ravel().astype('uint16')",
        )
    return TokenFile(file, array.dtype.str, array.offset, len(array), key)


def files_of(path: Path | None, key: str, suffixes: tuple[str, ...] = ()) -> list[tuple[Path, int]]:
    """The files of a corpus in their order, with their bytes; none is empty.

    path: a file; a folder, of whose files those with one of `suffixes` count, if any are given; None for the standard
    library. Raises UsageError where nothing is found or a file cannot be read.
    """
    try:
        found = [(file, file.stat().st_size) for file in _candidates(path, suffixes)]
    except OSError as error:
        raise UsageError(f"{key}: cannot read {error.filename}: {error.strerror}") from None
    for file, _ in found:
        if not os.access(file, os.R_OK):
            raise UsageError(f"{key}: cannot read {file}: Permission denied")
    sized = [(file, size) for file, size in found if size]
    if not sized:
        kinds = f" ({', '.join(suffixes)})" if suffixes else ""
        raise UsageError(f"{key}: expected text, found nothing in {path}{kinds}")
    return sized


def state_of(files: Sequence[Path], key: str, *more: str) -> str:
    """A hash of the files' places, sizes and times of change: on one host, the same only while they are the same."""
    try:
        stats = [(str(file.resolve()), (stat := file.stat()).st_size, stat.st_mtime_ns, stat.st_ino) for file in files]
    except OSError as error:
        raise UsageError(f"{key}: cannot read {error.filename}: {error.strerror}") from None
    return hashlib.sha256(repr((stats, more)).encode()).hexdigest()


def _candidates(path: Path | None, suffixes: tuple[str, ...]) -> list[Path]:
    if path is None:
        library = Path(sysconfig.get_path("stdlib"))
        return [file for file in _files_below(library, leave_out=_NOT_SOURCE) if file.suffix == ".py"]
    if path.is_dir():
        return [file for file in _files_below(path) if file.suffix.endswith(suffixes or "")]
    return [path]


def _files_below(root: Path, leave_out: Collection[str] = ()) -> list[Path]:
    """All files in sorted order, but for folders of those names. Raises OSError for a folder that cannot be read."""

    def refuse(error: OSError) -> None:
        raise error

    found = []
    for folder, inner, files in os.walk(root, onerror=refuse):
        inner[:] = [name for name in inner if name not in leave_out]  # they are not even looked into
        found += [path for name in files if (path := Path(folder, name)).is_file()]
    return sorted(found)
