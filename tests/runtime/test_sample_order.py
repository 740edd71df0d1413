"""Which samples a step has: orders, windows, mixtures."""

from __future__ import annotations

from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from dstrain.runtime.data.mixture import MixedWindows, Shares
from dstrain.runtime.data.sampler import BatchLayout, TokenWindows
from dstrain.runtime.data.shuffle import Order
from dstrain.runtime.spec.errors import UsageError


class Count:
    """The tokens first, first + 1, …"""

    def __init__(self, length: int, first: int = 0) -> None:
        self.numbers = np.arange(first, first + length, dtype=np.uint32)

    def __len__(self) -> int:
        return len(self.numbers)

    def read(self, start: int, length: int) -> npt.NDArray[np.uint32]:
        assert 0 <= start <= start + length <= len(self)
        return self.numbers[start : start + length]


def layouts(ranks: int, micro: int, global_batch: int) -> list[BatchLayout]:
    return [BatchLayout(rank, ranks, micro, global_batch // (micro * ranks)) for rank in range(ranks)]


@pytest.mark.parametrize(("ranks", "micro"), [(1, 1), (1, 12), (2, 3), (3, 2), (4, 3), (12, 1)])
def test_a_step_has_the_same_samples_in_every_layout(ranks: int, micro: int) -> None:
    for step in (0, 7):
        samples = [
            sample
            for layout in layouts(ranks, micro, 12)
            for micro_batch in range(layout.accumulation)
            for sample in layout.samples(step, micro_batch)
        ]
        assert sorted(samples) == list(range(step * 12, (step + 1) * 12))


@pytest.mark.parametrize("size", [*range(1, 40), 1000, 1025])
def test_an_order_has_each_thing_once(size: int) -> None:
    places = np.arange(size)
    for epoch in range(3):
        things = Order(5, epoch, size).at(places)
        assert sorted(things.tolist()) == places.tolist()
        assert things[::17].tolist() == [int(Order(5, epoch, size).at(np.array([i]))[0]) for i in range(0, size, 17)]


def test_orders_are_drawn_evenly_from_seed_and_epoch() -> None:
    size, draws = 10, 2000
    orders = [tuple(Order(epoch % 2, epoch // 2, size).at(np.arange(size)).tolist()) for epoch in range(draws)]
    assert len(set(orders)) > 0.999 * draws  # of 3.6 million
    for place in range(size):
        counts = Counter(order[place] for order in orders)
        # binomial: mean 200, standard deviation 13.4; five of them are passed once in a million
        assert all(abs(counts[thing] - draws / size) < 67 for thing in range(size))
    offsets = Counter(Order(0, epoch, 1).offset(4) for epoch in range(draws))
    assert all(abs(offsets[offset] - draws / 4) < 5 * 19.4 for offset in range(4))


def test_an_order_is_the_same_for_ever() -> None:
    """A job that goes on with another version of torch, numpy or dstrain must find its place again."""
    assert Order(0, 0, 10).at(np.arange(10)).tolist() == [4, 9, 1, 2, 6, 8, 7, 0, 3, 5]
    large = Order(3, 1, 10**15)
    assert large.at(np.array([0, 1, 10**15 - 1])).tolist() == [91529664075502, 720368084992762, 114209121212193]
    assert large.offset(1000) == 703


def test_an_epoch_visits_every_window_once_in_an_order_of_its_own() -> None:
    length = 10
    windows = TokenWindows(Count(103), length, seed=3)
    assert len(windows) == 9
    epochs = [windows.batch(range(9 * epoch, 9 * (epoch + 1))) for epoch in range(3)]
    for samples in epochs:
        assert samples.shape == (9, length + 1)
        assert samples.dtype == torch.int64
        assert (samples.diff(dim=1) == 1).all()  # neighbours in the corpus, the last one as label only
        starts = samples[:, 0].sort().values
        assert (starts.diff() == length).all()
    assert len({tuple(samples[:, 0].tolist()) for samples in epochs}) == 3


def test_samples_follow_from_seed_and_index_alone() -> None:
    expected = TokenWindows(Count(1000), 10, seed=1).batch(range(150, 160))  # epochs of 99 windows
    windows = TokenWindows(Count(1000), 10, seed=1)
    one_by_one = [windows.batch([i]) for i in reversed(range(150, 160))]
    assert torch.equal(torch.cat(one_by_one[::-1]), expected)
    across = TokenWindows(Count(1000), 10, seed=1).batch(range(95, 105))
    assert torch.equal(across, torch.cat([windows.batch([i]) for i in range(95, 105)]))
    assert not torch.equal(TokenWindows(Count(1000), 10, seed=2).batch(range(150, 160)), expected)


def test_without_shuffle_the_windows_come_as_they_stand() -> None:
    windows = TokenWindows(Count(50), 10, seed=1, shuffle=False)
    assert windows.batch(range(6))[:, 0].tolist() == [0, 10, 20, 30, 0, 10]


def test_validation_samples_span_the_tokens_and_their_parts_make_the_whole() -> None:
    windows = TokenWindows(Count(1000), 10, seed=0)
    whole = windows.evenly_spaced(range(7), 7)
    assert whole[0, 0] == 0
    assert whole[-1, -1] == 999
    parts = [list(windows.batches(7, rank, 8, micro=2)) for rank in range(8)]
    assert torch.equal(torch.cat([batch for part in parts for batch in part]).sort(dim=0).values, whole)
    assert parts[7] == []
    assert [len(batch) for batch in windows.batches(7, 0, 1, micro=3)] == [3, 3, 1]


def test_too_few_tokens_for_a_window() -> None:
    with pytest.raises(UsageError) as caught:
        TokenWindows(Count(19), 10, seed=0, key="data.path")
    assert str(caught.value) == (
        "data.path: expected at least 20 tokens (twice sequence_length), found 19; give more text, a shorter "
        "sequence_length or another validation_fraction"
    )
    assert TokenWindows(Count(20), 10, seed=0).batch(range(3)).shape == (3, 11)


@pytest.mark.parametrize("weights", [[1.0], [1.0, 1.0], [0.7, 0.2, 0.1], [1.0, 2.0, 3.0, 1e-3]])
def test_shares_are_exact_at_every_sample(weights: list[float]) -> None:
    shares, counted = Shares(weights), [0] * len(weights)
    for sample in range(3000):
        assert shares.counts(sample) == counted
        source, number = shares.place(sample)
        assert number == counted[source]
        counted[source] += 1
        for weight, count in zip(weights, counted, strict=True):
            assert abs(count - (sample + 1) * weight / sum(weights)) < len(weights)
    assert shares.counts(10**15)[0] == int(10**15 * weights[0] / sum(weights))


def test_a_mixture_takes_each_sources_own_samples_in_their_order() -> None:
    sources = [TokenWindows(Count(500), 10, seed=4), TokenWindows(Count(300, first=1000), 10, seed=4)]
    mixed = MixedWindows(sources, [3, 1])
    assert len(mixed) == 49 + 29
    whole = mixed.batch(range(200))
    small = whole[:, 0] >= 1000
    assert int(small.sum()) == 50
    assert torch.equal(whole[~small], sources[0].batch(range(150)))
    assert torch.equal(whole[small], sources[1].batch(range(50)))
    assert torch.equal(mixed.batch(range(120, 130)), whole[120:130])


def test_a_mixture_validates_on_its_shares() -> None:
    sources = [TokenWindows(Count(500), 10, seed=4), TokenWindows(Count(300, first=1000), 10, seed=4)]
    mixed = MixedWindows(sources, [3, 1])

    def starts(ranks: int) -> list[int]:
        batches: list[Tensor] = [batch for rank in range(ranks) for batch in mixed.batches(8, rank, ranks, 3)]
        return sorted(torch.cat(batches)[:, 0].tolist())

    expected = [*sources[0].evenly_spaced(range(6), 6)[:, 0].tolist(), 1000, 1289]
    assert starts(1) == starts(3) == starts(8) == expected
