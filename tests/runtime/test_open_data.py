"""The whole room: each kind of data, in any number of ranks, from any step on."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from dstrain.runtime.comm import Communicator
from dstrain.runtime.data import agreement
from dstrain.runtime.data.data import Data, open_data
from dstrain.runtime.data.loader import Loader
from dstrain.runtime.data.sampler import BatchLayout
from dstrain.runtime.spec.data_config import DataConfig, SourceConfig
from dstrain.runtime.spec.errors import UsageError

RunRanks = Callable[..., list[Any]]

LENGTH = 8


def numbers(size: int) -> list[int]:
    """The factory under test."""
    return list(range(size))


def stream(size: int) -> Any:
    """The factory under test, of an iterable."""
    return iter(range(size))


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "factory_under_test", sys.modules[__name__])


def save_tokenizer(folder: Path) -> Path:
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(300)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def configurations(folder: Path) -> dict[str, dict[str, Any]]:
    """Some data of each kind; none fills six steps of twelve samples, so that epochs are passed."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, 300, 400)
    (folder / "bytes").write_bytes(bytes((tokens % 256).tolist()))
    (folder / "more").write_bytes(bytes((tokens[::-1] % 256).tolist()))
    (folder / "text").write_text(" ".join(f"w{token}" for token in tokens))
    tokens.astype("<u4").tofile(folder / "tokens.bin")
    sources = tuple(SourceConfig(path=folder / name, weight=weight) for name, weight in (("bytes", 0.7), ("more", 0.3)))
    return {
        "bytes": {"path": folder / "bytes"},
        "unshuffled": {"path": folder / "bytes", "shuffle": False},
        "tokens": {"path": folder / "tokens.bin", "format": "tokens", "token_type": "uint32"},
        "text": {"path": folder / "text", "format": "text", "tokenizer": save_tokenizer(folder)},
        "sources": {"sources": sources},
        "validation_path": {"path": folder / "bytes", "validation_path": folder / "more"},
        "numbers": {"factory": "factory_under_test:numbers", "args": {"size": 50}},
        "stream": {"factory": "factory_under_test:stream", "args": {"size": 50}},
    }


KINDS = ["bytes", "unshuffled", "tokens", "text", "sources", "validation_path", "numbers", "stream"]


@pytest.fixture
def open_kind(tmp_path: Path) -> Callable[..., Data]:
    made = configurations(tmp_path)

    def _open(kind: str, **keys: Any) -> Data:
        config = DataConfig(**{"seed": 7, "cache": tmp_path / "cache", "validation_fraction": 0.1} | made[kind] | keys)
        with Communicator.connect({}) as comm:
            return open_data(config, LENGTH, comm)

    return _open


def steps(data: Callable[[], Data], ranks: int, micro: int, first: int, last: int) -> list[list[Any]]:
    """All samples of steps first to last − 1 of 12 samples, as `ranks` ranks load them."""
    found: list[list[Any]] = [[] for _ in range(first, last)]
    for rank in range(ranks):
        layout = BatchLayout(rank, ranks, micro, 12 // (ranks * micro))
        with Loader(data().training, layout, first, 2, torch.device("cpu")) as loader:
            for step in range(first, last):
                for micro_batch in range(layout.accumulation):
                    batch: Any = loader.next()
                    assert len(batch) == micro
                    found[step - first] += zip(layout.samples(step, micro_batch), batch.tolist(), strict=True)
    return [[sample for _, sample in sorted(step)] for step in found]


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_is_the_same_in_any_layout_and_from_any_step(kind: str, open_kind: Callable[..., Data]) -> None:
    expected = steps(lambda: open_kind(kind), 1, 12, 0, 6)
    assert len({str(step) for step in expected}) == 6
    for ranks, micro, first in [(1, 3, 0), (2, 3, 0), (3, 2, 4), (4, 3, 0), (4, 1, 1), (2, 6, 5)]:
        assert steps(lambda: open_kind(kind), ranks, micro, first, 6) == expected[first:]
    seeded = steps(lambda: open_kind(kind, seed=8), 1, 12, 0, 6)
    assert (seeded == expected) == (kind in ("unshuffled", "stream"))


@pytest.mark.parametrize("kind", ["path", "sources", "validation_path"])
def test_training_and_validation_have_no_token_in_common(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where all tokens differ, so do those of the parts."""
    np.arange(1000, dtype="<u4").tofile(tmp_path / "a.bin")
    np.arange(1000, 2000, dtype="<u4").tofile(tmp_path / "b.bin")
    keys = {
        "sources": {"sources": (SourceConfig(path=tmp_path / "a.bin"), SourceConfig(path=tmp_path / "b.bin"))},
        "validation_path": {"path": tmp_path / "a.bin", "validation_path": tmp_path / "b.bin"},
    }.get(kind, {"path": tmp_path / "a.bin"})
    config = DataConfig(format="tokens", token_type="uint32", cache=tmp_path / "cache", validation_fraction=0.1, **keys)
    with Communicator.connect({}) as comm:
        data = open_data(config, LENGTH, comm)
    assert data.validation is not None
    trained = set(np.asarray(data.training.batch(range(3 * len(data.training)))).ravel().tolist())
    held_out = set(np.concatenate(list(data.validation.batches(300, 0, 1, 300))).ravel().tolist())  # type: ignore[misc]
    assert not trained & held_out
    whole = 2000 if kind in ("sources", "validation_path") else 1000
    assert whole - 2 * (LENGTH + 1) * 2 <= len(trained | held_out) <= whole
    assert data.vocabulary == whole


def test_what_the_data_say_of_themselves(open_kind: Callable[..., Data]) -> None:
    said = {kind: (open_kind(kind).description, open_kind(kind).vocabulary) for kind in KINDS}
    assert said == {
        "bytes": ("0.0 MB of text", 256),
        "unshuffled": ("0.0 MB of text", 256),
        "tokens": ("0.00 M tokens", 300),
        "text": ("0.00 M tokens", 300),
        "sources": ("0.0 MB of text", 256),
        "validation_path": ("0.0 MB of text", 256),
        "numbers": ("50 samples of factory_under_test:numbers", None),
        "stream": ("an iterable of factory_under_test:stream", None),
    }
    decodes = {kind: open_kind(kind).decode for kind in KINDS}
    assert [kind for kind in KINDS if decodes[kind] is None] == ["tokens", "numbers", "stream"]
    assert decodes["bytes"]([104, 105]) == "hi"  # type: ignore[misc]
    assert decodes["text"]([3, 4]) == "w3 w4"  # type: ignore[misc]


def refusal(config: DataConfig, length: int | None = LENGTH) -> str:
    with Communicator.connect({}) as comm, pytest.raises(UsageError) as caught:
        open_data(config, length, comm)
    return str(caught.value)


def test_errors_name_the_key(tmp_path: Path) -> None:
    nowhere, short = tmp_path / "nowhere", tmp_path / "short"
    short.write_bytes(b"text")
    (tmp_path / "long").write_bytes(b"text" * 100)
    missing = f"cannot read {nowhere}: No such file or directory"
    assert refusal(DataConfig(path=nowhere)) == f"data.path: {missing}"
    assert refusal(DataConfig(path=tmp_path / "long", validation_path=nowhere)) == f"data.validation_path: {missing}"
    sources = (SourceConfig(path=tmp_path / "long"), SourceConfig(path=nowhere))
    assert refusal(DataConfig(sources=sources, validation_fraction=0.5)) == f"data.sources.1.path: {missing}"
    assert refusal(DataConfig(path=short)).startswith("data.path: expected at least 16 tokens (twice sequence_length)")
    assert refusal(DataConfig(path=tmp_path / "long", validation_path=short)).startswith(
        "data.validation_path: expected at least 16 tokens"
    )
    assert refusal(DataConfig(path=short), length=None) == (
        "data.sequence_length: expected tokens of one sample, found none, nor a model that says it"
    )


def test_ranks_tokenise_once_and_agree_or_refuse_together(
    run_ranks: RunRanks, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text(" ".join(f"w{number % 300}" for number in range(5000)))
    for rank in range(3):
        (tmp_path / str(rank)).write_bytes(b"text" * 100 if rank != 1 else b"another text" * 100)
    tokenizer = save_tokenizer(tmp_path)

    def message(config: DataConfig, comm: Communicator) -> str:
        with pytest.raises(UsageError) as caught:
            open_data(config, LENGTH, comm)
        return str(caught.value)

    def work(rank: int) -> Any:
        agreement.POLL_S = 0.01  # so that waiting ranks are asked more than once
        sys.modules["factory_under_test"] = sys.modules[__name__]
        with Communicator.connect() as comm:
            text = DataConfig(path=tmp_path / "text", format="text", tokenizer=tokenizer, cache=tmp_path / "cache")
            batch: Any = open_data(text, LENGTH, comm).training.batch(range(5))
            missing = tmp_path / ("nowhere" if rank == 2 else "0")
            factory = DataConfig(factory="factory_under_test:numbers", args={"size": 5 + rank % 2})
            return (
                batch.tolist(),
                message(DataConfig(path=tmp_path / str(rank)), comm),
                message(DataConfig(path=missing), comm),
                message(factory, comm),
            )

    batches, differing, missing, lengths = zip(*run_ranks(3, work), strict=True)
    assert batches[0] == batches[1] == batches[2]
    assert capfd.readouterr().err.count("become tokens, once on this host") == 1
    host = os.uname().nodename
    assert len(set(differing)) == len(set(lengths)) == 1
    start = "data.path: expected the same data on all ranks, found sha256 "
    assert differing[0].startswith(start)
    assert f"… (400 tokens) on rank 0 ({host}) and sha256 " in differing[0]
    assert f"… (1200 tokens) on rank 1 ({host}); copy one to all hosts; the default corpus " in differing[0]
    own = f"data.path: cannot read {tmp_path / 'nowhere'}: No such file or directory"
    assert missing == (f"rank 2 ({host}): {own}", f"rank 2 ({host}): {own}", own)
    assert lengths[0] == (
        f"data.factory: expected the same data on all ranks, found 5 samples on rank 0 ({host}) and 6 samples on "
        f"rank 1 ({host}); a factory must return the same data on every rank"
    )
