"""From files to tokens: formats, memory-mapping, the held-out share, and what cannot be read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dstrain.runtime.data import tokens as tokens_module
from dstrain.runtime.data.corpus import ByteFormat, TokenFormat
from dstrain.runtime.data.host_cache import HostCache
from dstrain.runtime.data.sampler import TokenWindows
from dstrain.runtime.data.tokens import TokenFile, TokenFiles, split
from dstrain.runtime.spec.errors import UsageError

NOBODY = 65534


def everything(tokens: TokenFiles) -> list[int]:
    return [int(number) for numbers in tokens.all() for number in numbers]


def byte_files(folder: Path, contents: list[bytes]) -> TokenFiles:
    for number, content in enumerate(contents):
        (folder / f"{number:04}").write_bytes(content)
    return ByteFormat().open(folder, "data.path").tokens


def token_format(tmp_path: Path, token_type: str = "uint16") -> TokenFormat:
    return TokenFormat(token_type, HostCache(tmp_path / "cache"))


def refusal(action: Any, *arguments: object) -> str:
    with pytest.raises(UsageError) as caught:
        action(*arguments)
    return str(caught.value)


def test_default_corpus_is_the_standard_librarys_source() -> None:
    corpus = ByteFormat().open(None, "data.path")
    assert corpus.vocabulary == 256
    text = b"".join(bytes(numbers) for numbers in corpus.tokens.all())
    assert 5_000_000 < len(text) < 50_000_000
    assert b"class OrderedDict(dict):" in text  # collections/__init__.py
    assert b"class TestCase(object):" in text  # unittest: a folder named like tests is no reason to leave it out
    assert b"class DataParallelEngine" not in text  # site-packages


def test_a_folder_is_read_in_sorted_order_and_a_file_alone(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c/d.txt", "c!.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"<{name}>")
    (tmp_path / "empty").touch()
    tokens = ByteFormat().open(tmp_path, "data.path").tokens
    assert bytes(everything(tokens)) == b"<a.txt><b.txt><c/d.txt><c!.txt>"  # a folder's files stay together
    assert bytes(everything(ByteFormat().open(tmp_path / "b.txt", "data.path").tokens)) == b"<b.txt>"


def test_any_stretch_of_several_files_can_be_read(tmp_path: Path) -> None:
    contents = [b"0123456789", b"abc", b"x", b"ABCDEFGH"]
    whole, tokens = b"".join(contents), byte_files(tmp_path, contents)
    assert len(tokens) == len(whole)
    for start in range(len(whole)):
        for length in range(1, len(whole) - start + 1):
            assert tokens.read(start, length).tobytes() == whole[start : start + length]


def test_a_corpus_larger_than_the_memory_is_opened_without_reading_it(tmp_path: Path) -> None:
    size = 1 << 40
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(size)
        file.seek(size - 3)
        file.write(b"end")
    tokens = ByteFormat().open(tmp_path / "sparse", "data.path").tokens
    assert len(tokens.fingerprint()) == 16
    assert tokens.read(size - 4, 4).tobytes() == b"\0end"
    kept, held_out = split(tokens, 0.05)
    assert TokenWindows(kept, 1024, seed=0).batch(range(8)).shape == (8, 1025)
    assert bytes(TokenWindows(held_out, 3, seed=0).evenly_spaced([1], 2)[0].tolist()) == b"\0end"


def test_many_files_need_few_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens_module, "MAPPED_FILES", 8)
    tokens = byte_files(tmp_path, [b"%04d" % number for number in range(100)])
    before = len(list(Path("/proc/self/fd").iterdir()))
    kept = [tokens.read(4 * number, 4).tobytes() for number in range(100)]
    assert kept == [b"%04d" % number for number in range(100)]
    assert before < len(list(Path("/proc/self/fd").iterdir())) <= before + 8


@pytest.mark.parametrize("size", [1, 9, 10, 25, 30, 31])
def test_split_holds_out_the_end_of_each_stretch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(tokens_module, "STRETCH_TOKENS", 10)
    whole = list(range(size))
    tokens = byte_files(tmp_path, [bytes(whole[:7]), bytes(whole[7:])])
    kept, held_out = split(tokens, 0.2)
    stretches = [whole[start : start + 10] for start in range(0, size, 10)]
    expected = [
        [number for stretch in stretches for number in stretch[: round(len(stretch) * 0.8)]],
        [number for stretch in stretches for number in stretch[round(len(stretch) * 0.8) :]],
    ]
    for part, numbers in zip((kept, held_out), expected, strict=True):
        assert len(part) == len(numbers)
        for start in range(len(part)):
            for length in range(1, len(part) - start + 1):
                assert part.read(start, length).tolist() == numbers[start : start + length]


def test_a_share_too_small_for_a_stretch_holds_out_nothing_of_it(tmp_path: Path) -> None:
    kept, held_out = split(byte_files(tmp_path, [bytes(100)]), 1e-9)
    assert (len(kept), len(held_out)) == (100, 0)


def test_fingerprints_see_content_lengths_and_order(tmp_path: Path) -> None:
    corpora = [[b"text"], [b"texT"], [b"te", b"xt"], [b"xt", b"te"], [b"text", b"more"]]
    found = []
    for number, contents in enumerate(corpora):
        (tmp_path / str(number)).mkdir()
        found.append(byte_files(tmp_path / str(number), contents).fingerprint())
    assert len(set(found)) == len(corpora)
    (tmp_path / "elsewhere").mkdir()
    assert byte_files(tmp_path / "elsewhere", [b"te", b"xt"]).fingerprint() == found[2]


def test_the_fingerprint_of_a_large_corpus_covers_pieces_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens_module, "HASHED_WHOLE_TOKENS", 100)
    monkeypatch.setattr(tokens_module, "HASHED_PIECES", 3)
    monkeypatch.setattr(tokens_module, "HASHED_PIECE_TOKENS", 10)
    content = bytearray(210)  # hashed: 0 to 9, 100 to 109, 200 to 209
    plain = byte_files(tmp_path, [content]).fingerprint()
    seen = []
    for position in range(210):
        content[position] = 1
        seen.append(byte_files(tmp_path, [content]).fingerprint() != plain)
        content[position] = 0
    assert [position for position in range(210) if seen[position]] == [*range(10), *range(100, 110), *range(200, 210)]


@pytest.mark.parametrize("token_type", ["uint16", "uint32"])
def test_token_files(tmp_path: Path, token_type: str) -> None:
    first, second = np.array([1, 2, 65535]), np.array([7, 0])
    first.astype(np.dtype(token_type).newbyteorder("<")).tofile(tmp_path / "a.bin")
    np.save(tmp_path / "b.npy", second.astype(token_type))
    (tmp_path / "meta.pkl").write_bytes(b"of another program")
    corpus = token_format(tmp_path, token_type).open(tmp_path, "data.path")
    assert everything(corpus.tokens) == [1, 2, 65535, 7, 0]
    assert corpus.vocabulary == 65536
    alone = token_format(tmp_path, token_type).open(tmp_path / "b.npy", "data.path")
    assert (everything(alone.tokens), alone.vocabulary) == ([7, 0], 8)


def test_the_highest_token_is_looked_for_again_only_when_a_file_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.bin"
    np.array([3, 9], dtype="<u2").tofile(file)
    assert token_format(tmp_path).open(file, "data.path").vocabulary == 10
    with monkeypatch.context() as patch:
        patch.setattr(TokenFiles, "all", None)
        assert token_format(tmp_path).open(file, "data.path").vocabulary == 10
        with pytest.raises(TypeError):
            token_format(tmp_path, "uint32").open(file, "data.path")  # the same bytes are other numbers
    np.array([3, 11], dtype="<u2").tofile(file)
    os.utime(file, ns=(1, 1))
    assert token_format(tmp_path).open(file, "data.path").vocabulary == 12


def test_formats_describe_and_decode(tmp_path: Path) -> None:
    assert ByteFormat().describe(12_345_678) == "12.3 MB of text"
    assert ByteFormat().decode([72, 105, 256 + 33, 0xFF]) == "Hi!\ufffd"
    assert token_format(tmp_path).describe(12_345_678) == "12.35 M tokens"
    assert token_format(tmp_path).decode([1]) is None


def test_a_corpus_that_cannot_be_read_or_is_empty_is_named(tmp_path: Path) -> None:
    nowhere, empty = tmp_path / "nowhere", tmp_path / "empty"
    empty.touch()
    bytes_of = ByteFormat().open
    assert refusal(bytes_of, nowhere, "data.path") == f"data.path: cannot read {nowhere}: No such file or directory"
    assert refusal(bytes_of, tmp_path, "data.path") == f"data.path: expected text, found nothing in {tmp_path}"
    assert refusal(bytes_of, empty, "data.validation_path") == (
        f"data.validation_path: expected text, found nothing in {empty}"
    )
    assert refusal(token_format(tmp_path).open, tmp_path, "data.path") == (
        f"data.path: expected text, found nothing in {tmp_path} (.bin, .npy)"
    )


def test_token_files_that_are_none(tmp_path: Path) -> None:
    odd, wide, torn = tmp_path / "odd.bin", tmp_path / "wide.npy", tmp_path / "torn.npy"
    odd.write_bytes(b"123")
    np.save(wide, np.zeros((2, 3), dtype=np.int64))
    np.save(torn, np.zeros(1000, dtype=np.uint16))
    os.truncate(torn, 1000)
    tokens_of = token_format(tmp_path).open
    assert refusal(tokens_of, odd, "data.path") == (
        f"data.path: expected a multiple of 2 bytes (data.token_type uint16), found 3 in {odd}"
    )
    assert refusal(tokens_of, wide, "data.path") == (
        f"data.path: expected a flat array of uint8, uint16 or uint32, found int64 of shape (2, 3) in {wide}; "
        "convert it with .ravel().astype('uint16')"
    )
    assert refusal(tokens_of, torn, "data.path").startswith(f"data.path: expected a whole *.npy, found {torn}: ")


def test_a_file_that_goes_or_shrinks_while_the_job_runs(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"12345678")
    assert refusal(TokenFiles([TokenFile(file, "u1", 0, 9, "data.path")]).read, 0, 9) == (
        f"data.path: {file} has become shorter since the job began"
    )
    file.unlink()
    assert refusal(TokenFiles([TokenFile(file, "u1", 0, 9, "data.path")]).read, 0, 9) == (
        f"data.path: cannot read {file}: No such file or directory"
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become nobody")
def test_what_permissions_keep_from_us_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = [folder for folder in (tmp_path, *tmp_path.parents) if folder.stat().st_mode & 0o777 == 0o700]
    for folder in own:  # pytest's, one more of them where it runs in parallel
        folder.chmod(0o755)
    file, locked = tmp_path / "file", tmp_path / "folder" / "locked"
    file.write_bytes(b"text")
    locked.mkdir(parents=True)
    file.chmod(0)
    locked.chmod(0)
    os.setresuid(NOBODY, NOBODY, 0)
    try:
        assert refusal(ByteFormat().open, file, "data.path") == f"data.path: cannot read {file}: Permission denied"
        assert refusal(ByteFormat().open, tmp_path / "folder", "data.path") == (
            f"data.path: cannot read {locked}: Permission denied"
        )
    finally:
        os.setresuid(0, 0, 0)
