"""The three batch sizes and their identity: global = micro × accumulation × ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dstrain.runtime.spec.deepspeed.verdict import Verdict, integer, mapped, refused, wrong
from dstrain.runtime.spec.errors import ConfigError

GLOBAL, MICRO, STEPS = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"
KEYS = (GLOBAL, MICRO, STEPS)


@dataclass(frozen=True)
class Batch:
    """What the sizes say, and of how many ranks; None where only the number of ranks would tell."""

    global_: int | None
    micro: int | None
    accumulation: int | None
    ranks: int | None


def judge_batch(config: Mapping[str, Any], ranks: int | None, name: str) -> Iterator[tuple[str, Any, Verdict]]:
    """Key, value and verdict of each size that is given. Raises ConfigError where the identity is violated."""
    given = {key: config[key] for key in KEYS if config.get(key) is not None}
    bad = {key: value for key, value in given.items() if integer(value, 1) is None}
    batch = None if bad else solve({key: int(value) for key, value in given.items()}, ranks, name)
    for key in (key for key in KEYS if key in config):
        value = config[key]
        if value is None:
            yield key, value, mapped({}, "nothing: by the other two")
        elif key in bad:
            yield key, value, wrong("an integer of at least 1", value)
        elif batch is None:
            yield key, value, refused(f"needs {', '.join(bad)}")
        else:
            yield key, value, _verdict(key, batch)


def _verdict(key: str, batch: Batch) -> Verdict:
    if batch.global_ is None or batch.micro is None:
        return refused("the batch follows from the number of ranks only: give --ranks N")
    values = {"batch.global": batch.global_, "batch.micro": batch.micro}
    shown = " × ".join(
        str(n) if n else word for n, word in ((batch.accumulation, "accumulation"), (batch.ranks, "ranks"))
    )
    return mapped(values, f"{batch.global_} = {batch.micro} × {shown}")


def solve(given: Mapping[str, int], ranks: int | None, name: str) -> Batch:
    """The sizes that are not given from those that are. Raises ConfigError, with the numbers, where nothing fits."""
    whole, micro, steps = (given.get(key) for key in KEYS)
    if whole is None and micro is None:
        if steps is None:
            return Batch(None, None, None, ranks)
        raise ConfigError(f"{name}: {MICRO}: expected it or {GLOBAL} beside {STEPS}, found neither")
    if whole is not None and micro is not None:
        together = micro * (steps or 1) * (ranks or 1)
        if whole % together or (steps and ranks and whole != together):
            raise ConfigError(_violation(whole, micro, steps, ranks, name))
        if steps and not ranks:
            ranks = whole // together
        return Batch(whole, micro, steps or (whole // together if ranks else None), ranks)
    steps = steps or 1
    if ranks is None:
        return Batch(whole, micro, steps, None)
    if micro is not None:
        return Batch(micro * steps * ranks, micro, steps, ranks)
    assert whole is not None
    if whole % (steps * ranks):
        raise ConfigError(
            f"{name}: {GLOBAL}: expected a multiple of {STEPS} × ranks = {steps} × {ranks} = {steps * ranks}, "
            f"found {whole}"
        )
    return Batch(whole, whole // (steps * ranks), steps, ranks)


def _violation(whole: int, micro: int, steps: int | None, ranks: int | None, name: str) -> str:
    factors = [(MICRO, micro), (STEPS, steps), ("ranks", ranks)]
    known = [(word, number) for word, number in factors if number]
    product = micro * (steps or 1) * (ranks or 1)
    words, numbers = " × ".join(word for word, _ in known), " × ".join(str(number) for _, number in known)
    exactly = f"{words} = {numbers} = {product}" if len(known) > 1 else f"{words} = {product}"
    multiple = "" if len(known) == len(factors) else "a multiple of "
    return f"{name}: {GLOBAL}: expected {multiple}{exactly}, found {whole}"
