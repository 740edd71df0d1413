"""What each pipeline rank holds of a model, by shapes alone: as runtime/pipeline/part.py takes it apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dstrain.runtime.pipeline.holding import ending_stage, sections_of, tied_ranks
from dstrain.runtime.pipeline.partition import bounds, partition
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
    def shared(self) -> list[ParameterShape]:
        """Trained ones that several stages of this rank have."""
        counts = Counter(name for layers in self.layers for name in {n for layer in layers for n in layer.parameters})
        return [one for name, one in self.trained if counts[name] > 1]

    @property
    def trained(self) -> list[Named]:
        """Parameters that have gradients."""
        return [named for named in self.parameters if named[1].requires_grad]


def counts_of(shapes: ModelShapes, stages: int, wished: str | Sequence[int]) -> list[int]:
    """Layers of each stage. wished: `parameters`, `time` (here by operations, where these are known), or the numbers.
    Raises UsageError."""
    if stages > 1 and shapes.uncut:
        raise UsageError.mismatch("parallel.pipeline", "1 for this model", str(stages), shapes.uncut)
    if wished == "time" and has_operations(shapes):
        costs = [3 * (layer.weight_flops + layer.other_flops) for layer in shapes.layers]
    else:
        sizes = {parameter.name: parameter.numel() for parameter in shapes.parameters}
        costs = [float(sum(sizes[name] for name in layer.parameters)) for layer in shapes.layers]
    return partition(wished, costs, stages)


def has_operations(shapes: ModelShapes) -> bool:
    """Whether it is known what the layers compute."""
    return any(layer.weight_flops for layer in shapes.layers)


def parts_of(
    shapes: ModelShapes, counts: Sequence[int], rank_of: Sequence[int], ended: Sequence[Sequence[int]]
) -> list[Part]:
    """counts: layers of each stage. rank_of: the pipeline rank of each stage. ended: of each rank, its stages in the
    order in which they end."""
    layers = [tuple(shapes.layers[place] for place in places) for places in bounds(counts)]
    stages_of: dict[str, list[int]] = {}
    for stage, own in enumerate(layers):
        for name in dict.fromkeys(name for layer in own for name in layer.parameters):
            stages_of.setdefault(name, []).append(stage)
    tied = tied_ranks(stages_of, rank_of)
    return [_part(shapes, rank, layers, rank_of, stages_of, tied, ended[rank]) for rank in range(len(ended))]


def _part(
    shapes: ModelShapes,
    rank: int,
    layers: Sequence[tuple[LayerShape, ...]],
    rank_of: Sequence[int],
    stages_of: Mapping[str, list[int]],
    tied: Mapping[str, list[int]],
    ended: Sequence[int],
) -> Part:
    own = tuple(stage for stage, holder in enumerate(rank_of) if holder == rank)
    here = {name for stage in own for layer in layers[stage] for name in layer.parameters}
    mine = [(one.name, one) for one in shapes.parameters if one.name in here]
    stage_of = {name: ending_stage(stages_of[name], ended) for name, _ in mine}
    sections = sections_of(stage_of, own, tied, stage_of.__getitem__) if max(rank_of) else []
    return Part(
        stages=own,
        layers=tuple(layers[stage] for stage in own),
        parameters=tuple(mine),
        sections=tuple(sections),
        tied={name: tuple(tied[name]) for name, _ in mine if name in tied},
        stage_of=stage_of,
    )
