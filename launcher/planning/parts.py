"""What each pipeline rank holds of a model, by shapes alone: as runtime/pipeline/part.py takes it apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dstrain.runtime.pipeline.partition import balanced, bounds, given
from dstrain.runtime.spec.errors import UsageError
from dstrain.runtime.spec.model_shapes import LayerShape, ModelShapes, ParameterShape

Named = tuple[str, ParameterShape]


@dataclass(frozen=True, eq=False)
class Part:
    """One pipeline rank's. layers: of each of its stages, which are numbered by `stages`. parameters: in the model's
    order. sections: names that share no unit with others: those of a stage, and each that other ranks have too.
    tied: those, with the ranks. stage_of: whose backward makes a parameter's gradient last.
    """

    stages: tuple[int, ...]
    layers: tuple[tuple[LayerShape, ...], ...]
    parameters: tuple[Named, ...]
    sections: tuple[frozenset[str], ...]
    tied: Mapping[str, tuple[int, ...]]
    stage_of: Mapping[str, int]

    @property
    def trained(self) -> list[Named]:
        """Parameters that have gradients."""
        return [named for named in self.parameters if named[1].requires_grad]


def partition(shapes: ModelShapes, stages: int, wished: str | Sequence[int]) -> list[int]:
    """Layers of each stage. wished: `parameters`, `time` (here by operations), or the numbers. Raises UsageError."""
    if stages > 1 and shapes.uncut:
        raise UsageError.mismatch("parallel.pipeline", "1 for this model", str(stages), shapes.uncut)
    if not isinstance(wished, str):
        return given(wished, len(shapes.layers), stages)
    if wished == "time":
        return balanced([3 * (layer.weight_flops + layer.other_flops) for layer in shapes.layers], stages)
    sizes = {parameter.name: parameter.numel() for parameter in shapes.parameters}
    return balanced([float(sum(sizes[name] for name in layer.parameters)) for layer in shapes.layers], stages)


def parts_of(shapes: ModelShapes, counts: Sequence[int], rank_of: Sequence[int]) -> list[Part]:
    """counts: layers of each stage. rank_of: the pipeline rank of each stage."""
    layers = [tuple(shapes.layers[place] for place in places) for places in bounds(counts)]
    stages_of: dict[str, list[int]] = {}
    for stage, own in enumerate(layers):
        for name in dict.fromkeys(name for layer in own for name in layer.parameters):
            stages_of.setdefault(name, []).append(stage)
    return [_part(shapes, rank, layers, rank_of, stages_of) for rank in range(max(rank_of) + 1)]


def _part(
    shapes: ModelShapes,
    rank: int,
    layers: Sequence[tuple[LayerShape, ...]],
    rank_of: Sequence[int],
    stages_of: Mapping[str, list[int]],
) -> Part:
    own = tuple(stage for stage, holder in enumerate(rank_of) if holder == rank)
    here = {name: stage for stage in reversed(own) for layer in layers[stage] for name in layer.parameters}
    mine = [(one.name, one) for one in shapes.parameters if one.name in here]
    ranks_of = {name: tuple(sorted({rank_of[stage] for stage in stages_of[name]})) for name in here}
    tied = {name: ranks_of[name] for name, _ in mine if len(ranks_of[name]) > 1}
    sections = [frozenset(name for name, _ in mine if name not in tied and here[name] == stage) for stage in own]
    sections += [frozenset([name]) for name in tied]
    kept = tuple(section for section in sections if section) if max(rank_of) else ()
    return Part(own, tuple(layers[stage] for stage in own), tuple(mine), kept, tied, here)
