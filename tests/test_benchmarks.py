"""The training benchmarks still run: a round each of a tiny model. Their figures mean nothing here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def run(script: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / script), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
@pytest.mark.alone
def test_the_table_of_stages() -> None:
    done = run("zero.py", "table", "1", "ddp", "stage0", "stage3", "--tiny")
    assert done.returncode == 0, done.stderr
    assert "stage3 step / ddp" in done.stdout
    assert "stage0 bytes sent / bound        1.000" in done.stdout


@pytest.mark.slow
@pytest.mark.alone
def test_the_memory_of_a_large_model() -> None:
    done = run("zero.py", "large", "1", "--tiny")
    assert done.returncode == 0, done.stderr
    assert "stage3 peak / their sum" in done.stdout


@pytest.mark.slow
@pytest.mark.alone
def test_saves() -> None:
    done = run("checkpoint.py", "save", "2", "--tiny")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ratio") == 3
    assert "dd with fsync" in done.stdout


@pytest.mark.slow
@pytest.mark.alone
def test_what_comparing_replicas_costs() -> None:
    done = run("train.py", "checks", "1", "--tiny")
    assert done.returncode == 0, done.stderr
    assert "step that compares replicas" in done.stdout


@pytest.mark.slow
@pytest.mark.alone
def test_two_ranks_that_share_a_device() -> None:
    done = run("gpu.py", "two", "--tiny")
    assert done.returncode == 0, done.stderr
    assert "losses agree: ddp, stage0, stage1, stage2, stage3" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.alone
def test_the_gpu_benchmark_says_that_there_is_none() -> None:
    done = run("gpu.py", "step")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "gpu.py: expected a CUDA GPU, found none; --tiny tries all of it on the CPU",
    ]
