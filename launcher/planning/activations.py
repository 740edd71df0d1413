"""What forwards keep for backwards: by layer, by stage, and at the peak of a schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from dstrain.runtime.spec.model_shapes import LayerShape, ModelShapes
from dstrain.runtime.spec.schedule import Action, Kind

Spec = str | int | tuple[str, ...] | None
"""`train.activation_checkpointing`."""


class Kept(NamedTuple):
    """Of one sample: bytes that a stage keeps between forward and backward, and what the largest of its layers that
    computes again needs besides while it does."""

    held: float
    again: float


def recomputed(shapes: ModelShapes, spec: Spec) -> frozenset[str]:
    """Layers that keep only their inputs. Patterns that name modules inside of a layer name none of these."""
    names = [layer.name for layer in shapes.layers]
    if isinstance(spec, tuple):
        return frozenset(name for name in names if any(fnmatchcase(name, pattern) for pattern in spec))
    if spec is None:
        return frozenset()
    every = spec if isinstance(spec, int) else 1
    return frozenset(shapes.blocks[every - 1 :: every]) & frozenset(names)


def kept_by(layers: Sequence[LayerShape], again: frozenset[str]) -> Kept:
    """again: layers that are recomputed."""
    held = sum(layer.input_bytes if layer.name in again else layer.saved_bytes for layer in layers)
    besides = (layer.saved_bytes - layer.input_bytes for layer in layers if layer.name in again)
    return Kept(held, max(besides, default=0.0))


def peak_bytes(row: Sequence[Action], bytes_of: Mapping[int, float]) -> float:
    """The most that a rank's row of actions has in flight: forward begun, last gradient not yet done.

    bytes_of: of each of its stages, for one micro-batch."""
    held = peak = 0.0
    for action in row:
        if action.kind is Kind.FORWARD:
            held += bytes_of[action.stage]
            peak = max(peak, held)
        elif action.kind is not Kind.INPUT_GRADIENT:
            held -= bytes_of[action.stage]
    return peak
