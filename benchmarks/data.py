"""How long the data keep a rank waiting, for a corpus of 1 GB.

    python benchmarks/data.py first [ROUNDS]    opening the data to the first batch, a new process each (bar: 1 s)
    python benchmarks/data.py text [ROUNDS]     the same of text that was tokenised before; doing so takes minutes
    python benchmarks/data.py wait [ROUNDS]     share of a step that waits for data (bar: 1 %)

`first` and `text` are measured with the corpus in the page cache and, in alternating rounds, dropped from it. A batch
is 8 samples of 1024 tokens. `wait` computes for a given time in each step (products of matrices, on one thread).
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from dstrain.runtime.comm import Communicator
from dstrain.runtime.data.data import open_data
from dstrain.runtime.data.loader import Loader
from dstrain.runtime.data.sampler import BatchLayout
from dstrain.runtime.spec.data_config import DataConfig
from measure import Series, describe, report_one

CORPUS_BYTES = 1 << 30
SEQUENCE_LENGTH, MICRO = 1024, 8
WAIT_STEPS = 200
COMPUTE_MS = (1, 5, 20, 100)
VOCABULARY = 8192


def main(what: str, rounds: int) -> None:
    describe()
    with tempfile.TemporaryDirectory() as name:
        measures = {"first": measure_first, "text": measure_text, "wait": measure_wait}
        measures[what](Path(name), rounds)


def measure_first(folder: Path, rounds: int) -> None:
    corpus = write_numbers(folder / "corpus.bin")
    for kind in ("bytes", "tokens"):
        first_batches(folder, corpus, kind, rounds)


def measure_text(folder: Path, rounds: int) -> None:
    corpus = write_text(folder / "corpus.txt")
    begun = time.perf_counter()
    child(folder, corpus, "text")
    seconds = time.perf_counter() - begun
    print(f"{CORPUS_BYTES / 1e6:.0f} MB become tokens, once: {seconds:.0f} s, {CORPUS_BYTES / 1e6 / seconds:.1f} MB/s")
    first_batches(folder, corpus, "text", rounds)


def first_batches(folder: Path, corpus: Path, kind: str, rounds: int) -> None:
    child(folder, corpus, kind)  # fills our cache
    warm, cold = Series(f"{kind}, in the page cache"), Series(f"{kind}, dropped from the page cache")
    for _ in range(rounds):
        warm.values.append(child(folder, corpus, kind))
        drop_from_page_cache([corpus, *folder.glob("cache/*.npy")])
        cold.values.append(child(folder, corpus, kind))
        child(folder, corpus, kind)
    report_one(warm)
    report_one(cold)


def measure_wait(folder: Path, rounds: int) -> None:
    torch.set_num_threads(1)
    corpus = write_numbers(folder / "corpus.bin")
    with Communicator.connect({}) as comm:
        data = open_data(configuration(folder, corpus, "tokens"), SEQUENCE_LENGTH, comm)
    for compute_ms in COMPUTE_MS:
        shares = []
        for round_ in range(rounds):
            layout = BatchLayout(rank=0, ranks=1, micro=MICRO, accumulation=1)
            with Loader(data.training, layout, round_ * WAIT_STEPS, 2, torch.device("cpu")) as loader:
                loader.next()
                loader.take_wait_s()
                begun = time.perf_counter()
                for _ in range(WAIT_STEPS):
                    compute(compute_ms / 1000)
                    loader.next()
                shares.append(100 * loader.take_wait_s() / (time.perf_counter() - begun))
        low, middle, high = statistics.quantiles(shares, n=4)
        print(
            f"waiting in a step of {compute_ms:3} ms of compute: median {middle:.2f} %   "
            f"quartiles {low:.2f} to {high:.2f}   rounds {rounds} of {WAIT_STEPS} steps"
        )


def compute(seconds: float) -> None:
    matrix, deadline = torch.ones(128, 128), time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        torch.mm(matrix, matrix)


def child(folder: Path, corpus: Path, kind: str) -> float:
    """Seconds from opening the data to the first batch, in a process of its own that has imported all."""
    command = [sys.executable, __file__, "child", str(folder), str(corpus), kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(done.stderr[-2000:])
    return float(done.stdout)


def first_batch(folder: Path, corpus: Path, kind: str) -> None:
    """In the child: open, load one batch, print the seconds."""
    layout = BatchLayout(rank=0, ranks=1, micro=MICRO, accumulation=1)
    begun = time.perf_counter()
    with Communicator.connect({}) as comm:
        data = open_data(configuration(folder, corpus, kind), SEQUENCE_LENGTH, comm)
        with Loader(data.training, layout, 0, 2, comm.device) as loader:
            loader.next()
            print(time.perf_counter() - begun)


def configuration(folder: Path, corpus: Path, kind: str) -> DataConfig:
    tokenizer = folder / "tokenizer.json" if kind == "text" else None
    return DataConfig.model_validate(
        {"path": corpus, "format": kind, "tokenizer": tokenizer, "cache": folder / "cache"}
    )


def write_numbers(path: Path) -> Path:
    block = np.random.default_rng(0).integers(0, 50_000, 1 << 23, dtype="<u2").tobytes()
    with path.open("wb") as file:
        for _ in range(CORPUS_BYTES // len(block)):
            file.write(block)
        os.fsync(file.fileno())
    return path


def write_text(path: Path) -> Path:
    """The standard library's top modules over and over, and a byte-level BPE that was trained on them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.train([str(module) for module in modules], trainers.BpeTrainer(vocab_size=VOCABULARY, show_progress=False))
    bpe.save(str(path.parent / "tokenizer.json"))
    text = b"".join(module.read_bytes() for module in modules)
    with path.open("wb") as file:
        while file.tell() < CORPUS_BYTES:
            file.write(text)
        os.fsync(file.fileno())
    return path


def drop_from_page_cache(files: list[Path]) -> None:
    for file in files:
        with file.open("rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    if sys.argv[1] == "child":
        first_batch(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
    else:
        main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 15)
