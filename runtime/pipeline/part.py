"""The part of a model that one pipeline rank holds: one stage, or several.

[Note: elsewhere]
Modules of other ranks' layers are replaced by ones without parameters that give back their first argument. Those of
this rank's other stages are replaced in the same way while one of its stages runs. The names of what stays are those of
the whole model, so that a checkpoint does not know of stages. A parameter that is tied (an embedding that is the
head too) is on each stage that uses it, under the first of its names: the module that it is named by stays too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dstrain.runtime.elsewhere import Elsewhere
from dstrain.runtime.pipeline.cuts import Chain
from dstrain.runtime.pipeline.holding import ending_stage, tied_ranks
from dstrain.runtime.spec.errors import UsageError
from dstrain.runtime.spec.schedule import Schedule, endings


class _Zero(nn.Module):
    """What is added to the entry, and is in it already."""

    def forward(self, given: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.zeros((), device=given.device)


class _Received(nn.Module):
    """The entry of a stage that is not the first: what the stage before has given."""

    def __init__(self) -> None:
        super().__init__()
        self.value: Any = None

    def forward(self, *_: Any, **__: Any) -> Any:
        if self.value is None:
            expected = "a model whose embedding runs once in a forward"
            raise UsageError.mismatch("parallel.pipeline", expected, "it runs twice", "leave out token_type_ids")
        value, self.value = self.value, None
        return value


class _Place(NamedTuple):
    """Of a layer, in its parent. silent: what stands there while another stage runs."""

    parent: nn.Module
    child: str
    real: nn.Module
    silent: nn.Module


class ModelPart:
    """The stages of one rank, in one module.

    model: what is left of the whole. tied_ranks: names of parameters that stages of several pipeline ranks have, each
    with those ranks; the same on all ranks. elsewhere: an empty stand-in for each trained parameter of other ranks, for
    the optimizer, whose groups are the same everywhere. aliases: names of the whole model that mean a tensor of another
    name.
    """

    def __init__(
        self, model: nn.Module, chain: Chain, layers: Sequence[range], schedule: Schedule, pipeline_rank: int
    ) -> None:
        """layers: of each stage. pipeline_rank: this one. Takes the model apart."""
        self.model, self.chain, self.layers = model, chain, list(layers)
        self.own = own = schedule.stages_on(pipeline_rank)
        self._ended = list(endings(schedule.ranks[pipeline_rank]))
        self._received = _Received()
        modules = dict(model.named_modules(remove_duplicate=False))
        stage_of = {
            name: stage
            for stage, places in enumerate(layers)
            for place in places
            for name in chain.layers[place].modules
        }
        holders: dict[nn.Parameter, set[int]] = {}
        for name, stage in stage_of.items():
            for parameter in modules[name].parameters():
                holders.setdefault(parameter, set()).add(stage)
        names = {parameter: name for name, parameter in model.named_parameters()}
        everything = model.state_dict(keep_vars=True)
        first = {id(tensor): name for name, tensor in reversed(everything.items())}
        self.aliases = {name: first[id(tensor)] for name, tensor in everything.items() if first[id(tensor)] != name}
        self._stages_of = {names[parameter]: sorted(stages) for parameter, stages in holders.items()}
        self.tied_ranks = tied_ranks(self._stages_of, schedule.rank_of)
        places: dict[str, _Place] = {}
        mine = set(own)
        for name, stage in stage_of.items():
            parent, _, child = name.rpartition(".")
            real = modules[name]
            silent: nn.Module = _Zero() if name in chain.zeros else Elsewhere()
            if name == chain.entry:
                silent = self._received
            needed = any(mine & holders[parameter] for parameter in real.parameters())
            if stage not in mine and not needed:
                modules[parent]._modules[child] = real = Elsewhere()
            elif stage not in mine:
                _keep(real, lambda parameter: bool(mine & holders[parameter]))
            places[name] = _Place(modules[parent], child, real, silent)
        self._stage_of = stage_of
        self._others = {stage: [place for name, place in places.items() if stage_of[name] != stage] for stage in own}
        own_names = {name for name, _ in model.named_parameters()}
        self.elsewhere = [
            (name, _stand_in(parameter))
            for parameter, name in names.items()
            if parameter.requires_grad and name not in own_names
        ]

    def stage_of(self, name: str) -> int:
        """Which of this rank's stages gives the last part of a parameter's gradient in a step."""
        return ending_stage(self._stages_of[name], self._ended)

    def parameters_of(self, stage: int) -> list[nn.Parameter]:
        """What a stage of this rank has."""
        return [parameter for name, parameter in self.model.named_parameters() if stage in self._stages_of[name]]

    def is_counted(self, name: str) -> bool:
        """Whether this rank is the one, of those that have a tensor, that counts and saves it: the first of them."""
        if name in self._stages_of:
            return self._stages_of[name][0] in self.own
        of_layer = [stage for module, stage in self._stage_of.items() if name.startswith(f"{module}.")]
        return (of_layer or [0])[0] in self.own

    def run(self, forward: Any, stage: int, received: tuple[Tensor, ...], batch: tuple[Any, Mapping[str, Any]]) -> Any:
        """One forward of a stage. forward: the model's. received: of the stage before, on all but the first. batch:
        the model's own arguments."""
        args, words = batch
        others = self._others[stage]
        for parent, child, _, silent in others:
            parent._modules[child] = silent
        try:
            is_last = stage == len(self.layers) - 1
            if stage == 0:
                return forward(*args, **(words if is_last or not self.chain.entry else _without_targets(words)))
            value = received[0] if len(received) == 1 else received
            if self.chain.entry:
                self._received.value = value
                return forward(*args, **(words if is_last else _without_targets(words)))
            return forward(value)
        finally:
            for parent, child, real, _ in others:
                parent._modules[child] = real
            self._received.value = None


def _keep(module: nn.Module, keeps: Callable[[nn.Parameter], bool]) -> None:
    """Drop the other parameters of a module that is never run."""
    for inner in module.modules():
        for name, parameter in inner._parameters.items():
            if parameter is not None and not keeps(parameter):
                inner._parameters[name] = None


def _stand_in(parameter: nn.Parameter) -> nn.Parameter:
    """Empty, of as many dimensions."""
    shape = (0, *parameter.shape[1:])
    stand_in = nn.Parameter(torch.empty(shape))
    stand_in.whole_shape = parameter.shape  # type: ignore[attr-defined] # rules of groups look at it
    return stand_in


def _without_targets(words: Mapping[str, Any]) -> dict[str, Any]:
    """A model that is told its targets would take what it hands on for its result."""
    return {name: value for name, value in words.items() if name != "labels"}


def tensors_of(output: Any, where: str) -> tuple[Tensor, ...]:
    """What a stage gives to the next: a tensor, several, or a transformers output's. Raises UsageError."""
    if isinstance(output, Tensor):
        return (output,)
    if hasattr(output, "logits"):
        return (output.logits,)
    if isinstance(output, tuple | list) and len(output) > 1 and all(isinstance(one, Tensor) for one in output):
        return tuple(output)
    expected = "a tensor or a tuple of several tensors between two stages"
    found = f"{type(output).__name__} of {len(output)}" if isinstance(output, tuple | list) else type(output).__name__
    raise UsageError.mismatch(f"parallel.pipeline: {where}", expected, found)
