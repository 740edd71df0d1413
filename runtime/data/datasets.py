"""What a `data.factory` returns, as samples by global index.

A torch Dataset, or anything else with a length and samples by number, is shuffled by the seed and read where the
ranks need it. An iterable is taken as it comes: each rank reads past the samples of the others, going on in the
middle reads past what was used, and at its end it starts again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from torch.utils.data import DataLoader, IterableDataset, default_collate

from dstrain.runtime.data.samples import Batch, Samples, Validation, share_of
from dstrain.runtime.data.shuffle import Order
from dstrain.runtime.imports import call_object
from dstrain.runtime.spec.data_config import DataConfig
from dstrain.runtime.spec.errors import UsageError

KEY = "data.factory"


@runtime_checkable
class Numbered(Protocol):
    """Samples by number, from 0."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Any: ...


class FactoryData(NamedTuple):
    """What a factory returned; length: of the numbered samples to train on, the same on all ranks."""

    training: Samples
    validation: Validation | None
    length: int | None


class NumberedSamples:
    """A dataset of numbered samples: Samples and Validation. [Note: sample order]

    Samples are made in a thread: one that draws random numbers should use a generator of its own.
    """

    def __init__(self, dataset: Numbered, seed: int, shuffle: bool) -> None:
        """Raises UsageError where the dataset is empty."""
        if not len(dataset):
            raise UsageError.mismatch(KEY, "samples", f"an empty {type(dataset).__name__}")
        self._dataset, self._seed, self._shuffle = dataset, seed, shuffle

    def __len__(self) -> int:
        return len(self._dataset)

    def batch(self, samples: Sequence[int]) -> Batch:
        """See Samples."""
        epochs, numbers = np.divmod(np.asarray(samples, dtype=np.int64), len(self))
        if self._shuffle:
            for epoch in np.unique(epochs):
                mine = epochs == epoch
                numbers[mine] = Order(self._seed, int(epoch), len(self)).at(numbers[mine])
        return self._collated(numbers.tolist())

    def batches(self, count: int, rank: int, ranks: int, micro: int) -> Iterator[Batch]:
        """See Validation; of a small dataset each sample once."""
        count = min(count, len(self))
        last = len(self) - 1
        for share in share_of(count, rank, ranks, micro):
            yield self._collated([last * number // max(1, count - 1) for number in share])

    def _collated(self, numbers: Sequence[int]) -> Batch:
        return _collated([self._dataset[number] for number in numbers])


class StreamedSamples:
    """An iterable: Samples and Validation. Asked for in rising order it is read once; to go back it starts again."""

    def __init__(self, start: Callable[[], Iterable[Any]]) -> None:
        """start: gives the iterable from its beginning, each time the same."""
        self._start = start
        self._iterator: Iterator[Any] = iter(())
        self._position: int | None = None  # of the iterator's next sample; None before the first one

    def __len__(self) -> int:
        raise UsageError(f"{KEY}: expected a Dataset with a length to know an epoch, found an iterable")

    def batch(self, samples: Sequence[int]) -> Batch:
        """See Samples; `samples` rise. Raises UsageError where the iterable is empty."""
        return _collated([self._sample(number) for number in samples])

    def batches(self, count: int, rank: int, ranks: int, micro: int) -> Iterator[Batch]:
        """See Validation; the first `count` samples, in place of evenly spaced ones."""
        mine = islice(self._start(), rank, count, ranks)
        while some := list(islice(mine, micro)):
            yield _collated(some)

    def _sample(self, number: int) -> Any:
        if self._position is None or self._position > number:
            self._iterator, self._position = iter(self._start()), 0
        while True:
            sample = self._next()
            self._position += 1
            if self._position > number:
                return sample

    def _next(self) -> Any:
        for sample in self._iterator:
            return sample
        self._iterator = iter(self._start())
        for sample in self._iterator:
            return sample
        raise UsageError.mismatch(KEY, "samples", "an iterable that is empty, or empty when it is started again")


def open_factory(config: DataConfig) -> FactoryData:
    """Call `data.factory` and look at what it returns. Raises UsageError where that is no data."""
    assert config.factory is not None
    call = partial(call_object, config.factory, config.args, KEY)
    made = call()
    if not isinstance(made, tuple):
        training = _samples(made, call, config)
        return FactoryData(training, None, _length(training))
    if len(made) != 2:
        raise UsageError.mismatch(KEY, "data, or a pair (training, validation)", f"a tuple of {len(made)}")
    training = _samples(made[0], lambda: call()[0], config)
    validation = _samples(made[1], lambda: call()[1], config)
    return FactoryData(training, validation, _length(training))


def _samples(made: object, again: Callable[[], Iterable[Any]], config: DataConfig) -> NumberedSamples | StreamedSamples:
    """again: calls the factory once more, for an iterator cannot start again by itself."""
    if isinstance(made, DataLoader):
        raise UsageError.mismatch(KEY, "samples", "a DataLoader of batches", "return its dataset")
    if not isinstance(made, str | bytes | Mapping):
        if isinstance(made, Numbered) and not isinstance(made, IterableDataset):
            return NumberedSamples(made, config.seed, config.shuffle)
        if isinstance(made, Iterator):
            return StreamedSamples(again)
        if isinstance(made, Iterable):
            return StreamedSamples(lambda: made)
    raise UsageError.mismatch(
        KEY, "a Dataset with a length, an iterable, or a pair of them", f"{type(made).__name__} from {config.factory}"
    )


def _collated(samples: list[Any]) -> Batch:
    """One batch of them. Raises UsageError where they do not go together."""
    try:
        collated: Batch = default_collate(samples)
    except (TypeError, RuntimeError, KeyError, IndexError) as error:
        expected = "samples of tensors, arrays or numbers, of one shape, that torch's default_collate puts together"
        found = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UsageError.mismatch(KEY, expected, found) from error
    return collated


def _length(samples: NumberedSamples | StreamedSamples) -> int | None:
    return len(samples) if isinstance(samples, NumberedSamples) else None
