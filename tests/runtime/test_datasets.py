"""What a user's factory may return, and how its samples are numbered."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from dstrain.runtime.data.datasets import FactoryData, open_factory
from dstrain.runtime.spec.data_config import DataConfig
from dstrain.runtime.spec.errors import UsageError


class Squares(Dataset[dict[str, Any]]):
    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {"x": torch.tensor([float(number)]), "square": number * number}


class Stream(IterableDataset[int]):
    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.size))


class Endless(Dataset[int]):
    def __getitem__(self, number: int) -> int:
        return number


GENERATORS = []


def generator(size: int) -> Iterator[int]:
    GENERATORS.append(size)
    yield from range(size)


def make(kind: str) -> Any:
    """The factory under test."""
    return {
        "squares": lambda: Squares(10),
        "list": lambda: [3, 1, 4, 1, 5],
        "tensors": lambda: TensorDataset(torch.arange(6), torch.arange(6) * 2),
        "stream": lambda: Stream(5),
        "generator": lambda: generator(5),
        "pair": lambda: (Squares(10), Squares(4)),
        "streams": lambda: (generator(5), generator(7)),
        "empty": list,
        "empty stream": lambda: iter(()),
        "endless": Endless,
        "triple": lambda: (1, 2, 3),
        "loader": lambda: DataLoader(Squares(10)),
        "number": lambda: 7,
        "text": lambda: "text",
        "dict": lambda: {"a": 1},
    }[kind]()


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "factory_under_test", sys.modules[__name__])


def opened(kind: str, **keys: Any) -> FactoryData:
    return open_factory(DataConfig(factory="factory_under_test:make", args={"kind": kind}, **keys))


def test_a_dataset_is_shuffled_anew_in_each_epoch_and_collated() -> None:
    data = opened("squares", seed=3)
    assert (len(data.training), data.length, data.validation) == (10, 10, None)
    batch: Any = data.training.batch(range(30))
    numbers = batch["x"][:, 0].long().tolist()
    epochs = [numbers[:10], numbers[10:20], numbers[20:]]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert batch["square"].tolist() == [number * number for number in numbers]
    again: Any = opened("squares", seed=3).training.batch(range(8, 13))
    assert again["x"][:, 0].tolist() == numbers[8:13]
    other: Any = opened("squares", seed=4).training.batch(range(30))
    assert other["x"][:, 0].tolist() != numbers


def test_without_shuffle_a_dataset_comes_as_it_stands() -> None:
    batch: Any = opened("list", shuffle=False).training.batch(range(3, 12))
    assert batch.tolist() == [1, 5, 3, 1, 4, 1, 5, 3, 1]
    first, second = opened("tensors", shuffle=False).training.batch([4, 2])
    assert (first.tolist(), second.tolist()) == ([4, 2], [8, 4])


@pytest.mark.parametrize("kind", ["stream", "generator"])
def test_an_iterable_comes_in_its_order_and_starts_again(kind: str) -> None:
    training = opened(kind).training
    mine: list[Any] = [training.batch(range(start, start + 2)).tolist() for start in range(0, 14, 4)]  # type: ignore[union-attr]
    assert mine == [[0, 1], [4, 0], [3, 4], [2, 3]]
    resumed: Any = opened(kind).training.batch(range(12, 14))
    assert resumed.tolist() == [2, 3]
    back: Any = training.batch([1])
    assert back.tolist() == [1]


def test_a_pair_gives_validation_samples_that_are_evenly_spaced() -> None:
    validation = opened("pair").validation
    assert validation is not None

    def numbers(count: int, ranks: int) -> list[list[int]]:
        return [
            [int(number) for batch in validation.batches(count, rank, ranks, micro=2) for number in batch["x"]]  # type: ignore[call-overload]
            for rank in range(ranks)
        ]

    assert numbers(2, 1) == [[0, 3]]
    assert numbers(4, 3) == [[0, 3], [1], [2]]
    assert numbers(100, 1) == [[0, 1, 2, 3]]  # each sample once
    assert numbers(1, 2) == [[0], []]


def test_a_stream_validates_on_its_first_samples_each_time() -> None:
    GENERATORS.clear()
    data = opened("streams")
    assert data.validation is not None
    for _ in range(2):
        shares = [[batch.tolist() for batch in data.validation.batches(6, rank, 2, micro=2)] for rank in range(2)]  # type: ignore[union-attr]
        assert shares == [[[0, 2], [4]], [[1, 3], [5]]]
    assert [batch.tolist() for batch in data.validation.batches(100, 0, 1, micro=5)] == [[0, 1, 2, 3, 4], [5, 6]]  # type: ignore[union-attr]
    assert GENERATORS == [7] * 5


FORM = "data.factory: expected {}, found {}"
USUAL = "a Dataset with a length, an iterable, or a pair of them"


@pytest.mark.parametrize(
    ("kind", "expected", "found"),
    [
        ("empty", "samples", "an empty list"),
        ("endless", USUAL, "Endless from factory_under_test:make"),
        ("number", USUAL, "int from factory_under_test:make"),
        ("text", USUAL, "str from factory_under_test:make"),
        ("dict", USUAL, "dict from factory_under_test:make"),
        ("triple", "data, or a pair (training, validation)", "a tuple of 3"),
        ("loader", "samples", "a DataLoader of batches; return its dataset"),
    ],
)
def test_what_is_no_data_is_refused(kind: str, expected: str, found: str) -> None:
    with pytest.raises(UsageError) as caught:
        opened(kind)
    assert str(caught.value) == FORM.format(expected, found)


def test_an_iterable_has_no_epochs_to_count_and_may_not_be_empty() -> None:
    with pytest.raises(UsageError) as caught:
        len(opened("stream").training)
    assert str(caught.value) == FORM.format("a Dataset with a length to know an epoch", "an iterable")
    with pytest.raises(UsageError) as caught:
        opened("empty stream").training.batch([0])
    assert str(caught.value) == FORM.format("samples", "an iterable that is empty, or empty when it is started again")


def test_the_factory_may_stand_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_data.py").write_text("def make(size):\n    return list(range(size))\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert open_factory(DataConfig(factory="my_own_data:make", args={"size": 3})).length == 3
    with pytest.raises(UsageError, match=r"^data\.args: expected arguments of my_own_data:make\(size\), found length "):
        open_factory(DataConfig(factory="my_own_data:make", args={"length": 3}))
