"""The data of a job: what `data` in its configuration says, opened."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dstrain.runtime.comm import Communicator
from dstrain.runtime.data.agreement import check_same_on_all_ranks, together
from dstrain.runtime.data.corpus import ByteFormat, Format, TokenFormat
from dstrain.runtime.data.host_cache import HostCache
from dstrain.runtime.data.mixture import MixedWindows
from dstrain.runtime.data.sampler import TokenWindows
from dstrain.runtime.data.samples import Samples, Validation
from dstrain.runtime.data.tokens import Tokens, split
from dstrain.runtime.spec.data_config import DataConfig
from dstrain.runtime.spec.errors import UsageError

_COPY = "copy one to all hosts; the default corpus asks for the same Python everywhere"
_FACTORY = "a factory must return the same data on every rank"


@dataclass(frozen=True)
class Data:
    """What a job trains and validates on.

    description: so much text, for people. decode: tokens to text; None where nobody knows it. vocabulary: how many
    tokens a model must know (the highest that can occur, plus 1); None where the data may not be tokens.
    """

    training: Samples
    validation: Validation | None
    description: str
    decode: Callable[[Sequence[int]], str | None] | None
    vocabulary: int | None


def open_data(config: DataConfig, sequence_length: int | None, comm: Communicator) -> Data:
    """Open the data on all ranks; a few small collectives.

    sequence_length: tokens of one sample; only a factory does without. Raises UsageError where data are empty, cannot
    be read, do not fill a sample, or differ between ranks.
    """
    if config.factory is not None:
        return _open_factory(config, comm)
    if sequence_length is None:
        raise UsageError("data.sequence_length: expected tokens of one sample, found none, nor a model that says it")
    opened = together(lambda: _open_corpora(config, sequence_length), comm)
    check_same_on_all_ranks(opened.key, opened.identity, comm, _COPY)
    return opened.data


class _Opened(NamedTuple):
    """Data, and what must be the same on all ranks."""

    data: Data
    key: str
    identity: str


class _Parts(NamedTuple):
    """What one source gives to training and to validation."""

    training: TokenWindows
    validation: TokenWindows | None


def _open_factory(config: DataConfig, comm: Communicator) -> Data:
    from dstrain.runtime.data.datasets import open_factory  # torch.utils.data takes a while to import

    made = open_factory(config)  # in this thread, all ranks alike: it may issue collectives
    samples = "an iterable" if made.length is None else f"{made.length:,} samples"
    check_same_on_all_ranks("data.factory", samples, comm, _FACTORY)
    return Data(made.training, made.validation, f"{samples} of {config.factory}", decode=None, vocabulary=None)


def _open_corpora(config: DataConfig, length: int) -> _Opened:
    opener = _Opener(config, length)
    if config.sources:
        key, weights = "data.sources", [source.weight for source in config.sources]
        parts = [opener.source(source.path, f"{key}.{number}.path") for number, source in enumerate(config.sources)]
    else:
        key, weights = "data.path", [1.0]
        parts = [opener.source(config.path, key)]
    training = [part.training for part in parts]
    held_out = [part.validation for part in parts if part.validation is not None]
    validation = (
        _mixed(held_out, weights) if config.validation_path is None else opener.validation(config.validation_path)
    )
    data = Data(
        _mixed(training, weights),
        validation,
        opener.format.describe(opener.tokens),
        opener.format.decode if config.format != "tokens" else None,
        opener.vocabulary,
    )
    return _Opened(data, key, opener.identity)


class _Opener:
    """Opens corpora of one format, and adds up what they are."""

    def __init__(self, config: DataConfig, length: int) -> None:
        self._config, self._length = config, length
        self.format = _format(config)
        self.tokens, self.vocabulary = 0, 0
        self._fingerprints: list[str] = []

    @property
    def identity(self) -> str:
        return f"sha256 {' '.join(f'{fingerprint}…' for fingerprint in self._fingerprints)} ({self.tokens} tokens)"

    def source(self, path: Path | None, key: str) -> _Parts:
        """A corpus to train on; a share of it is held out if there is no corpus to validate on."""
        tokens = self._open(path, key)
        if self._config.validation_path is not None:
            return _Parts(self._windows(tokens, key), None)
        kept, held_out = split(tokens, self._config.validation_fraction)
        return _Parts(self._windows(kept, key), self._windows(held_out, key))

    def validation(self, path: Path) -> TokenWindows:
        """The corpus to validate on."""
        key = "data.validation_path"
        return self._windows(self._open(path, key), key)

    def _open(self, path: Path | None, key: str) -> Tokens:
        corpus = self.format.open(path, key)
        self.tokens += len(corpus.tokens)
        self.vocabulary = max(self.vocabulary, corpus.vocabulary)
        self._fingerprints.append(corpus.tokens.fingerprint())
        return corpus.tokens

    def _windows(self, tokens: Tokens, key: str) -> TokenWindows:
        return TokenWindows(tokens, self._length, self._config.seed, shuffle=self._config.shuffle, key=key)


def _mixed(windows: Sequence[TokenWindows], weights: Sequence[float]) -> TokenWindows | MixedWindows:
    return windows[0] if len(windows) == 1 else MixedWindows(windows, weights)


def _format(config: DataConfig) -> Format:
    if config.format == "bytes":
        return ByteFormat()
    cache = HostCache(config.cache)
    if config.format == "tokens":
        return TokenFormat(config.token_type, cache)
    from dstrain.runtime.data.text import TextFormat  # the only user of an optional package

    assert config.tokenizer is not None
    return TextFormat(config.tokenizer, cache)
