"""Text through a tokenizer, once per host: the tokens are kept in a file, and read as any file of tokens.

The library `tokenizers` is an optional part of the installation; this is the only module that knows it.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from dstrain.runtime.data.corpus import Corpus, files_of, npy_file, state_of
from dstrain.runtime.data.host_cache import HostCache
from dstrain.runtime.data.tokens import TokenFiles
from dstrain.runtime.imports import optional_module
from dstrain.runtime.spec.errors import UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

READ_BYTES = 1 << 20
PIECE_BYTES = 1 << 14
"""A text is encoded in pieces of about this length, as many at once as `READ_BYTES` holds: that bounds the memory."""

_CUT = re.compile(rb"(?<=\S)(?= \S)")
"""Between two words: usual tokenizers put the space in front of a word, so a cut there changes no token."""

_CACHE_FORMAT = "1"
"""To be counted up when the same text and tokenizer shall give other tokens."""


class TextFormat:
    """UTF-8 text, encoded without special tokens around it; those that stand in the text are known."""

    def __init__(self, tokenizer: Path, cache: HostCache) -> None:
        """tokenizer: tokenizer.json or its folder. Raises UsageError where it or the library cannot be used."""
        self._cache = cache
        self._tokenizer, self._tokenizer_hash = _load(tokenizer)
        self._vocabulary = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    def open(self, path: Path | None, key: str) -> Corpus:
        """As Format. The first process on a host encodes, others wait for it; then the tokens are only mapped."""
        files = [file for file, _ in files_of(path, key)]
        identity = f"{_CACHE_FORMAT}/{self._tokenizer_hash}/{self._hash_of(files, key)}"
        name = f"{hashlib.sha256(identity.encode()).hexdigest()}.npy"
        entry = self._cache.entry(name, lambda out: self._encode(files, key, out), _is_whole)
        return Corpus(TokenFiles([npy_file(entry, "data.cache")]), self._vocabulary)

    def describe(self, tokens: int) -> str:
        return f"{tokens / 1e6:.2f} M tokens"

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(list(tokens), skip_special_tokens=False)

    def _hash_of(self, files: list[Path], key: str) -> str:
        """Of all bytes; known files are not read again."""
        entry = self._cache.entry(
            f"{state_of(files, key)}.sha256",
            lambda out: _write_hash(files, key, out),
            lambda entry: entry.stat().st_size == 64,
        )
        return entry.read_text()

    def _encode(self, files: list[Path], key: str, out: BinaryIO) -> None:
        """Write a *.npy; its header has room for any length, so it is written again when the length is known."""
        size = sum(file.stat().st_size for file in files)
        sys.stderr.write(f"dstrain: {key}: {size / 1e6:.1f} MB of text become tokens, once on this host\n")
        dtype = np.dtype("<u2" if self._vocabulary <= 1 << 16 else "<u4")
        _write_header(out, dtype, 0)
        begin = out.tell()
        for file in files:
            pieces = _pieces(file, key)
            while some := list(islice(pieces, READ_BYTES // PIECE_BYTES)):
                for encoding in self._tokenizer.encode_batch_fast(some, add_special_tokens=False):
                    out.write(np.asarray(encoding.ids, dtype).tobytes())
        tokens = (out.tell() - begin) // dtype.itemsize
        if not tokens:
            raise UsageError(f"{key}: expected text, found {size} bytes that have no tokens in {files[0].parent}")
        out.seek(0)
        _write_header(out, dtype, tokens)
        assert out.tell() == begin


def _load(path: Path) -> tuple[Tokenizer, str]:
    """The tokenizer of a file, or of a folder's tokenizer.json, and the file's SHA-256."""
    tokenizers = optional_module("tokenizers", "data.format", "text")
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UsageError(f"data.tokenizer: cannot read {file}: {error.strerror}") from None
    try:
        tokenizer: Tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library has no class of its own for it
        raise UsageError.mismatch("data.tokenizer", "a tokenizer.json", f"{file}: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer, hashlib.sha256(content).hexdigest()


def _pieces(file: Path, key: str) -> Iterator[str]:
    """The text of a file in pieces of about PIECE_BYTES, cut between words, or anywhere within READ_BYTES."""
    offset = 0
    try:
        with file.open("rb") as handle:
            text = b""
            while block := handle.read(READ_BYTES):
                text += block
                begin = 0
                while (cut := _cut(text, begin)) is not None:
                    yield _decoded(text[begin:cut], file, key, offset + begin)
                    begin = cut
                text, offset = text[begin:], offset + begin
            if text:
                yield _decoded(text, file, key, offset)
    except OSError as error:
        raise UsageError(f"{key}: cannot read {file}: {error.strerror}") from None


def _cut(text: bytes, begin: int) -> int | None:
    """Where the piece from `begin` ends; None where more text is wanted to say."""
    if match := _CUT.search(text, begin + PIECE_BYTES):
        return match.start()
    if len(text) - begin <= READ_BYTES:
        return None
    end = begin + READ_BYTES
    while text[end] & 0xC0 == 0x80 and end > begin + READ_BYTES - 4:  # not within a character
        end -= 1
    return end


def _decoded(text: bytes, file: Path, key: str, offset: int) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        found = f"byte 0x{text[error.start]:02x} at {offset + error.start} of {file}"
        raise UsageError.mismatch(key, "UTF-8 text", found, "convert it, or use data.format: bytes") from None


def _write_header(out: BinaryIO, dtype: np.dtype[np.generic], tokens: int) -> None:
    np.lib.format.write_array_header_1_0(out, {"descr": dtype.str, "fortran_order": False, "shape": (tokens,)})


def _write_hash(files: list[Path], key: str, out: BinaryIO) -> None:
    whole = hashlib.sha256()
    try:
        for file in files:
            with file.open("rb") as handle:
                whole.update(hashlib.file_digest(handle, "sha256").digest())
    except OSError as error:
        raise UsageError(f"{key}: cannot read {error.filename}: {error.strerror}") from None
    out.write(whole.hexdigest().encode())


def _is_whole(entry: Path) -> bool:
    try:
        npy_file(entry, "data.cache")
    except UsageError:
        return False
    return True
