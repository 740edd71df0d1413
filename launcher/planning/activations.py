"""What forwards keep for backwards: by layer, by stage, and at the peak of a schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from dstrain.runtime.spec.model_shapes import LayerShape, ModelShapes
from dstrain.runtime.spec.schedule import Action, Kind

AHEAD = 2
"""Receives that are posted before their turn: as runtime/pipeline/executor.py has it."""
Spec = str | int | tuple[str, ...] | None
"""`train.activation_checkpointing`."""


class Kept(NamedTuple):
    """Of one sample, of a stage: bytes that it keeps between forward and backward; what the largest of its layers that
    computes again needs besides, while it does; what a split backward leaves. ready: besides that, of however many
    samples."""

    held: float
    again: float
    left: float
    ready: float


def recomputed(shapes: ModelShapes, spec: Spec) -> frozenset[str]:
    """Layers that keep only their inputs. Patterns that name modules inside of a layer name none of these."""
    names = [layer.name for layer in shapes.layers]
    if isinstance(spec, tuple):
        return frozenset(name for name in names if any(fnmatchcase(name, pattern) for pattern in spec))
    if spec is None:
        return frozenset()
    every = spec if isinstance(spec, int) else 1
    return frozenset(shapes.blocks[every - 1 :: every]) & frozenset(names)


def kept_by(layers: Sequence[LayerShape], again: frozenset[str], rebuilds: bool = False) -> Kept:
    """again: layers that are recomputed. rebuilds: as pipelines do."""
    held = sum(
        layer.input_bytes if layer.name in again else layer.saved_bytes - layer.rebuilt_bytes * rebuilds
        for layer in layers
    )
    besides = (layer.saved_bytes - layer.input_bytes for layer in layers if layer.name in again)
    return Kept(
        held=held,
        again=max(besides, default=0.0),
        left=sum(layer.left_bytes for layer in layers),
        ready=sum(layer.ready_bytes for layer in layers),
    )


def peak_bytes(row: Sequence[Action], kept: Mapping[int, Kept], micro: int) -> float:
    """The most that a rank's row of actions has in flight, between two of them: forward begun, last gradient not yet
    done.

    kept: of each of its stages. micro: samples of a micro-batch."""
    held = peak = 0.0
    for kind, stage, _ in row:
        whole, left = micro * kept[stage].held, micro * kept[stage].left + kept[stage].ready
        match kind:
            case Kind.FORWARD:
                held += whole
            case Kind.BACKWARD:
                held -= whole
            case Kind.INPUT_GRADIENT:
                held += left - whole
            case Kind.WEIGHT_GRADIENT:
                held -= left
        peak = max(peak, held)
    return peak


def message_bytes(row: Sequence[Action], rank_of: Sequence[int], boundaries: Sequence[float]) -> float:
    """The most that a rank has of messages: room for those that come before their turn, and in each direction the last
    one that it has sent, as runtime/pipeline/executor.py and messages.py have them.

    rank_of: of each stage. boundaries: bytes of a message behind each stage but the last."""
    last, own = len(rank_of) - 1, {action.stage for action in row}

    def across(stage: int) -> float:
        """Of the boundary behind a stage; nothing is sent between two stages of one rank."""
        return boundaries[stage] if rank_of[stage] != rank_of[stage + 1] else 0.0

    def received(action: Action) -> float | None:
        kind, stage, _ = action
        if kind is Kind.FORWARD:
            return across(stage - 1) if stage else None
        return across(stage) if kind is not Kind.WEIGHT_GRADIENT and stage < last else None

    found = [received(action) for action in row]
    sizes = [size for size in found if size is not None]
    most, taken = 0.0, 0
    for size in found:
        taken += size is not None
        most = max(most, sum(sizes[taken : taken + AHEAD + (size is None)]))
    sent = sum(across(stage) * (stage in own) + across(stage) * (stage + 1 in own) for stage in range(last))
    return most + sent
