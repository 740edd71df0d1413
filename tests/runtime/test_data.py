"""Which bytes a rank trains on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dstrain.runtime.comm import Communicator
from dstrain.runtime.data import corpus as corpus_module
from dstrain.runtime.data.corpus import check_same_on_all_ranks, load_corpus, split
from dstrain.runtime.data.sampler import BatchLayout, TokenWindows
from dstrain.runtime.spec.config import DataConfig
from dstrain.runtime.spec.errors import UsageError

RunRanks = Callable[..., list[Any]]


def test_default_corpus_is_the_standard_librarys_source() -> None:
    text = load_corpus(DataConfig())
    assert text == load_corpus(DataConfig())
    assert 5_000_000 < len(text) < 50_000_000
    assert b"class OrderedDict(dict):" in text  # collections/__init__.py
    assert b"class TestCase(object):" in text  # unittest: a folder named like tests is no reason to leave it out
    assert b"class DataParallelEngine" not in text  # site-packages


def test_a_folder_is_read_in_sorted_order_and_a_file_alone(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"<{name}>")
    assert load_corpus(DataConfig(path=tmp_path)) == b"<a.txt><b.txt><c/d.txt>"
    assert load_corpus(DataConfig(path=tmp_path / "b.txt")) == b"<b.txt>"


def test_a_corpus_that_cannot_be_read_or_is_empty_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"data\.path: cannot read .*nowhere: No such file or directory"):
        load_corpus(DataConfig(path=tmp_path / "nowhere"))
    with pytest.raises(UsageError, match=r"data\.path: expected text, found nothing in "):
        load_corpus(DataConfig(path=tmp_path))


def test_ranks_with_different_corpora_refuse_to_train(run_ranks: RunRanks) -> None:
    def work(rank: int) -> str:
        with Communicator.connect() as comm:
            check_same_on_all_ranks(b"the same", comm)
            with pytest.raises(UsageError) as caught:
                check_same_on_all_ranks(b"a longer text" if rank == 1 else b"text", comm)
            return str(caught.value)

    messages = run_ranks(3, work)
    assert len(set(messages)) == 1
    for part in ("sha256 982d9e3eb996f559… (4 bytes) on rank 0 (", "(13 bytes) on rank 1 ("):
        assert part in messages[0]


def test_split_holds_out_the_end_of_each_stretch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "STRETCH_BYTES", 10)
    parts = split(bytes(range(25)), 0.2)
    assert parts.validation.tolist() == [8, 9, 18, 19, 24]
    assert parts.train.tolist() == [*range(8), *range(10, 18), *range(20, 24)]


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


def test_an_epoch_visits_every_window_once_in_an_order_of_its_own() -> None:
    tokens, length = torch.arange(103), 10
    windows = TokenWindows(tokens, length, seed=3)
    epochs = [windows.shuffled(range(9 * epoch, 9 * (epoch + 1))) for epoch in range(3)]
    for samples in epochs:
        assert samples.shape == (9, length + 1)
        assert samples.dtype == torch.int64
        assert (samples.diff(dim=1) == 1).all()  # neighbours in the corpus, the last one as label only
        starts = samples[:, 0].sort().values
        assert (starts.diff() == length).all()
    assert len({tuple(samples[:, 0].tolist()) for samples in epochs}) == 3


def test_samples_follow_from_seed_and_index_alone() -> None:
    tokens = torch.arange(1000)
    expected = TokenWindows(tokens, 10, seed=1).shuffled(range(150, 160))
    windows = TokenWindows(tokens, 10, seed=1)
    one_by_one = [windows.shuffled(range(i, i + 1)) for i in reversed(range(150, 160))]
    assert torch.equal(torch.cat(one_by_one[::-1]), expected)
    assert not torch.equal(TokenWindows(tokens, 10, seed=2).shuffled(range(150, 160)), expected)


def test_validation_samples_span_the_tokens_and_their_parts_make_the_whole() -> None:
    windows = TokenWindows(torch.arange(1000), 10, seed=0)
    whole = windows.evenly_spaced(7)
    assert whole[0, 0] == 0
    assert whole[-1, -1] == 999
    parts = [windows.evenly_spaced(7, slice(rank, None, 8)) for rank in range(8)]
    assert torch.equal(torch.cat(parts).sort(dim=0).values, whole)
    assert parts[7].shape == (0, 11)


def test_too_few_tokens_for_a_window() -> None:
    with pytest.raises(UsageError, match=r"expected at least 20 tokens .*, found 19; give more text"):
        TokenWindows(torch.arange(19), 10, seed=0)
    assert TokenWindows(torch.arange(20), 10, seed=0).shuffled(range(3)).shape == (3, 11)
