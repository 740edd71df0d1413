"""The shapes of a job's model: of our GPT by formulas, of any other by a process that may import torch."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from dstrain.runtime.spec.config import JobConfig
from dstrain.runtime.spec.errors import UsageError
from dstrain.runtime.spec.gpt_shapes import gpt_shapes
from dstrain.runtime.spec.model_shapes import ModelShapes

MODULE = "dstrain.runtime.pipeline.shapes"
FORMAT = 3
"""Of a cached file: raised with every change of what stands in it, or of how it is found."""
TIMEOUT_S = 300.0
"""Importing torch and transformers from a cold network disk takes a minute."""


def find_shapes(job: JobConfig) -> ModelShapes:
    """Raises UsageError for a job without a model, and for a model that cannot be made."""
    if job.model is None:
        raise UsageError.mismatch("model", "a section with gpt, hf or factory", "none")
    precision = job.precision
    if job.model.gpt is not None:
        length = job.data.sequence_length or job.model.gpt.context
        item_bytes = 4 if precision.autocast or precision.dtype == "fp32" else 2
        shapes = gpt_shapes(job.model.gpt, length, item_bytes)
    else:
        shapes = _cached(job)
    if precision.autocast:
        unknown = (*shapes.unknown, "activations under autocast (counted as in fp32)")
        shapes = replace(shapes, unknown=unknown)
    return shapes


def _cached(job: JobConfig) -> ModelShapes:
    """A factory's code is no part of its configuration: what it makes is looked at each time."""
    assert job.model is not None
    if job.model.factory is not None or job.data.factory is not None:
        return _looked_at(job)
    path = cache_folder() / f"{_key(job)}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        return ModelShapes.from_json(json.loads(path.read_text(encoding="utf-8")))
    shapes = _looked_at(job)
    with suppress(OSError):  # a plan without a cache is only slower
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(shapes.to_json()), encoding="utf-8")
        part.replace(path)
    return shapes


def cache_folder() -> Path:
    """Where shapes are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "dstrain" / "shapes"


def _key(job: JobConfig) -> str:
    """Of all that the shapes depend on, the contents of a model's own config.json among it."""
    assert job.model is not None
    values = {
        "format": FORMAT,
        "model": job.model.model_dump(mode="json"),
        "sequence_length": job.data.sequence_length,
        "precision": [job.precision.dtype, job.precision.autocast],
        "loss": job.train.loss,
        "file": _config_file(job),
    }
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _config_file(job: JobConfig) -> str | None:
    assert job.model is not None
    hf = job.model.hf
    path = hf.path or (hf.config if isinstance(hf.config, Path) else None) if hf is not None else None
    if path is None:
        return None
    with suppress(OSError):
        return (path / "config.json" if path.is_dir() else path).read_text(encoding="utf-8")
    return None


def _looked_at(job: JobConfig) -> ModelShapes:
    command = [sys.executable, "-m", MODULE]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    try:
        done = subprocess.run(
            command,
            input=job.model_dump_json(by_alias=True, exclude={"run"}),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UsageError.mismatch(
            "model", f"its shapes within {TIMEOUT_S:.0f} s", "none", "make a smaller one"
        ) from None
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
        reason = last[0] if last else f"exit code {done.returncode}"
        raise UsageError(reason if done.returncode == 2 else f"model: cannot be made here to look at it: {reason}")
    return ModelShapes.from_json(json.loads(done.stdout.splitlines()[-1]))
