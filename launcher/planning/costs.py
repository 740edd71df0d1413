"""What a micro-batch costs in seconds: by operations, or as a person has measured it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dstrain.launcher.planning.parts import Part
from dstrain.runtime.spec.errors import UsageError
from dstrain.runtime.spec.model_shapes import LayerShape
from dstrain.runtime.spec.schedule import Costs
from dstrain.runtime.spec.trace import Measured, read_trace

KEYS = ("forward", "input_gradient", "weight_gradient", "message")


class StageCosts(NamedTuple):
    """Seconds of one micro-batch, for each stage; messages: for each boundary between two."""

    forward: list[float]
    input_gradient: list[float]
    weight_gradient: list[float]
    message: list[float]

    @property
    def backward(self) -> list[float]:
        """Both gradients."""
        return [one + other for one, other in zip(self.input_gradient, self.weight_gradient, strict=True)]

    @property
    def whole(self) -> list[float]:
        """Of each stage, forward and backward."""
        return [one + other for one, other in zip(self.forward, self.backward, strict=True)]

    def for_simulator(self) -> Costs:
        """The same, as a schedule's simulation takes it."""
        return Costs(*self)


@dataclass(frozen=True)
class GivenCosts:
    """By `--costs`: each one number, or one for each stage (of messages: boundary); None: estimated. traced: where they
    come from a trace."""

    forward: float | list[float]
    input_gradient: float | list[float]
    weight_gradient: float | list[float]
    message: float | list[float] | None
    traced: Measured | None = None


def estimated(parts: Sequence[Part], again: frozenset[str], micro: int, tflops: float) -> StageCosts:
    """By operations; messages: none. again: layers whose backward computes their forward again."""
    of_stage = {s: layers for part in parts for s, layers in zip(part.stages, part.layers, strict=True)}
    rate = tflops * 1e12 / micro
    ordered = [of_stage[stage] for stage in range(len(of_stage))]
    return StageCosts(
        forward=[sum(map(_forward, layers)) / rate for layers in ordered],
        input_gradient=[
            sum(
                layer.weight_flops + 2 * layer.other_flops + _forward(layer) * (layer.name in again) for layer in layers
            )
            / rate
            for layers in ordered
        ],
        weight_gradient=[sum(layer.weight_flops for layer in layers) / rate for layers in ordered],
        message=[0.0] * (len(ordered) - 1),
    )


def _forward(layer: LayerShape) -> float:
    return layer.weight_flops + layer.other_flops


def apply_given(given: GivenCosts | None, costs: StageCosts) -> StageCosts:
    """What was given in place of what was estimated. Raises UsageError where it does not fit the stages."""
    if given is None:
        return costs
    stages = len(costs.forward)
    counts = (stages, stages, stages, stages - 1)
    values = (given.forward, given.input_gradient, given.weight_gradient, given.message)
    found = [
        estimate if value is None else _each(key, value, count)
        for key, value, count, estimate in zip(KEYS, values, counts, costs, strict=True)
    ]
    return StageCosts(*found)


def read_costs(text: str) -> GivenCosts:
    """`F,I,W` or `F,I,W,MESSAGE` in seconds; or a JSON file of lists with the names in KEYS, or of `run --trace`.

    Raises UsageError.
    """
    words = text.split(",")
    if len(words) in (3, 4):
        numbers = [_seconds(word, "--costs") for word in words]
        return GivenCosts(numbers[0], numbers[1], numbers[2], numbers[3] if len(numbers) == 4 else None)
    form = "F,I,W or F,I,W,MESSAGE in seconds, or a JSON file of what was measured"
    try:
        values = json.loads(Path(text).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError.mismatch("--costs", form, f"{text!r} ({error.strerror})") from None
    except ValueError as error:
        raise UsageError.mismatch(f"--costs {text}", "JSON", str(error)) from None
    if isinstance(values, dict) and "traceEvents" in values:
        return _traced(Path(text))
    if not isinstance(values, dict) or set(values) - set(KEYS) or not set(KEYS[:3]) <= set(values):
        found = ", ".join(values) if isinstance(values, dict) else type(values).__name__
        raise UsageError.mismatch(f"--costs {text}", f"an object with {', '.join(KEYS)}", found)
    return GivenCosts(*(_listed(values.get(key), f"--costs {text}: {key}") for key in KEYS))  # type: ignore[arg-type] # only message may lack


def _traced(path: Path) -> GivenCosts:
    traced = read_trace(path)
    costs = traced.costs
    if costs is None:
        fix = "trace a job with parallel.pipeline"
        raise UsageError.mismatch(f"--costs {path}", "forwards and backwards of all stages", "others", fix)
    values = costs.forward, costs.input_gradient, costs.weight_gradient, costs.message
    forward, inputs, weights, message = (value if isinstance(value, float) else list(value) for value in values)
    return GivenCosts(forward, inputs, weights, message, traced)


def _listed(value: object, where: str) -> float | list[float] | None:
    if value is None:
        return None
    if isinstance(value, list):
        return [_seconds(one, where) for one in value]
    return _seconds(value, where)


def _seconds(value: object, where: str) -> float:
    try:
        seconds = float(value)  # type: ignore[arg-type] # what is no number is told below
    except (TypeError, ValueError):
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise UsageError.mismatch(where, "seconds, at least 0", repr(value))
    return seconds


def _each(key: str, value: float | list[float], count: int) -> list[float]:
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        of = "boundaries between stages" if key == "message" else "stages"
        raise UsageError.mismatch(f"--costs: {key}", f"{count} numbers, one for each of the {of}", str(len(value)))
    return value
