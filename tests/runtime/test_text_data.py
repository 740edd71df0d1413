"""Text through a tokenizer: the tokens of the whole text, from pieces of it, made once."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dstrain.runtime.data import text as text_module
from dstrain.runtime.data.host_cache import HostCache
from dstrain.runtime.data.text import TextFormat
from dstrain.runtime.spec.errors import UsageError

TEXT = (
    "Ein Text mit Wörtern, Zahlen (12 345) und 漢字 – und  Lücken.\n\nDann\tein Absatz, der   länger ist:\n"
    "    eingerückt, <|end|> und so weiter!\n" * 40
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE with a special token, trained on the text; truncation is on, as in many published files."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [TEXT],
        trainers.BpeTrainer(vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False),
    )
    bpe.enable_truncation(16)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    bpe.save(str(path))
    return path


def format_of(tokenizer: Path, tmp_path: Path) -> TextFormat:
    return TextFormat(tokenizer, HostCache(tmp_path / "cache"))


def tokens_of(text_format: TextFormat, path: Path) -> list[int]:
    return [int(number) for numbers in text_format.open(path, "data.path").tokens.all() for number in numbers]


def ids(tokenizer: Path, text: str) -> list[int]:
    plain = Tokenizer.from_file(str(tokenizer))
    plain.no_truncation()
    return list(plain.encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize(("read", "piece"), [(1 << 20, 1 << 14), (1000, 100), (333, 7)])
def test_pieces_have_the_tokens_of_the_whole(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: int, piece: int
) -> None:
    monkeypatch.setattr(text_module, "READ_BYTES", read)
    monkeypatch.setattr(text_module, "PIECE_BYTES", piece)
    (tmp_path / "text").write_text(TEXT)
    assert tokens_of(format_of(tokenizer, tmp_path), tmp_path / "text") == ids(tokenizer, TEXT)


def test_text_without_spaces_is_cut_between_characters(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_module, "READ_BYTES", 100)
    monkeypatch.setattr(text_module, "PIECE_BYTES", 10)
    text = "漢字é🙂" * 100
    (tmp_path / "text").write_text(text)
    text_format = format_of(tokenizer, tmp_path)
    assert text_format.decode(tokens_of(text_format, tmp_path / "text")) == text


def test_a_corpus_is_tokenised_once_for_its_content(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a").write_text("ein Text")
    (folder / "b").write_text(" und noch einer")
    first = tokens_of(format_of(tokenizer.parent, tmp_path), folder)
    assert first == ids(tokenizer, "ein Text") + ids(tokenizer, " und noch einer")
    assert capsys.readouterr().err == "dstrain: data.path: 0.0 MB of text become tokens, once on this host\n"
    (folder / "a").rename(folder / "aa")  # another state, the same content
    assert tokens_of(format_of(tokenizer, tmp_path), folder) == first
    assert capsys.readouterr().err == ""
    (folder / "b").write_text(" und doch einer")
    assert tokens_of(format_of(tokenizer, tmp_path), folder) != first
    changed = json.loads(tokenizer.read_text())
    changed["truncation"] = None
    (tmp_path / "other.json").write_text(json.dumps(changed))
    tokens_of(format_of(tmp_path / "other.json", tmp_path), folder)
    assert capsys.readouterr().err.count("become tokens") == 2


def test_a_torn_cache_file_is_not_used(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(TEXT)
    expected = tokens_of(format_of(tokenizer, tmp_path), tmp_path / "text")
    [entry] = (tmp_path / "cache").glob("*.npy")
    content = entry.read_bytes()
    entry.write_bytes(content[:-1])
    assert tokens_of(format_of(tokenizer, tmp_path), tmp_path / "text") == expected
    assert entry.read_bytes() == content


@pytest.mark.parametrize(("words", "dtype"), [(65536, np.uint16), (65537, np.uint32)])
def test_tokens_are_as_wide_as_the_vocabulary_asks(tmp_path: Path, words: int, dtype: type) -> None:
    """words: the vocabulary; its last word has the highest token."""
    vocabulary = {f"w{number}": number for number in range(words)}
    level = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    level.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    level.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text").write_text(f"w1 w{words - 1} w7")
    corpus = format_of(tmp_path, tmp_path).open(tmp_path / "text", "data.path")
    assert corpus.vocabulary == words
    assert corpus.tokens.read(0, 3).dtype == dtype
    assert corpus.tokens.read(0, 3).tolist() == [1, words - 1, 7]


def test_decoding_and_describing(tokenizer: Path, tmp_path: Path) -> None:
    text_format = format_of(tokenizer, tmp_path)
    assert text_format.decode(ids(tokenizer, "Wörter <|end|> und")) == "Wörter <|end|> und"
    assert text_format.describe(1_234_567) == "1.23 M tokens"


def refusal(tokenizer: Path, tmp_path: Path, content: bytes = b"text") -> str:
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(UsageError) as caught:
        format_of(tokenizer, tmp_path).open(tmp_path / "text", "data.path")
    return str(caught.value)


def test_what_is_no_text_is_named_with_its_place(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_module, "READ_BYTES", 100)
    monkeypatch.setattr(text_module, "PIECE_BYTES", 10)
    expected = f"at 5000 of {tmp_path / 'text'}; convert it, or use data.format: bytes"
    content = b"words " * 1000
    assert refusal(tokenizer, tmp_path, content[:5000] + b"\xff" + content[5000:]) == (
        f"data.path: expected UTF-8 text, found byte 0xff {expected}"
    )
    assert not list((tmp_path / "cache").glob("*.npy*[!k]"))  # nothing but locks


def test_a_text_without_tokens_is_refused(tmp_path: Path) -> None:
    level = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    level.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    level.save(str(tmp_path / "tokenizer.json"))
    assert refusal(tmp_path, tmp_path, b" \n ") == (
        f"data.path: expected text, found 3 bytes that have no tokens in {tmp_path}"
    )


def test_a_tokenizer_that_is_none(tokenizer: Path, tmp_path: Path) -> None:
    assert refusal(tmp_path / "nowhere", tmp_path) == (
        f"data.tokenizer: cannot read {tmp_path / 'nowhere'}: No such file or directory"
    )
    assert refusal(tmp_path, tmp_path) == (
        f"data.tokenizer: cannot read {tmp_path / 'tokenizer.json'}: No such file or directory"
    )
    (tmp_path / "tokenizer.json").write_text("{}")
    assert refusal(tmp_path, tmp_path).startswith(
        f"data.tokenizer: expected a tokenizer.json, found {tmp_path / 'tokenizer.json'}: "
    )


def test_a_missing_library_is_named(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tokenizers.__version__
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert refusal(tokenizer, tmp_path) == (
        "data.format: expected the package tokenizers, found it is not installed; "
        "pip install 'dstrain[text]' on every host"
    )
