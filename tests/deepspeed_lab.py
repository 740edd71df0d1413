"""Checkpoint folders as DeepSpeed 0.19 writes them, by torch.save alone: the same names, keys and layouts.

Compared with real ones of stages 1, 2 and 3; see [Note: DeepSpeed's layout] in runtime/checkpoint/deepspeed_files.py.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


class LossScaler:
    """As DeepSpeed's own, an object with attributes."""

    def __init__(self) -> None:
        self.cur_scale, self.dynamic = 1.0, False


class ZeroStageEnum(int, Enum):
    disabled = 0
    optimizer_states = 1
    gradients = 2
    weights = 3


@dataclass
class fragment_address:  # its name in the pickle
    numel: int
    start: int


_PLACES = {
    "deepspeed.runtime.fp16.loss_scaler": LossScaler,
    "deepspeed.runtime.zero.config": ZeroStageEnum,
    "deepspeed.utils.tensor_fragment": fragment_address,
}


@contextmanager
def deepspeed_names() -> Iterator[None]:
    """While a file is written, the classes are where DeepSpeed has them."""
    before = dict(sys.modules)
    for place, each in _PLACES.items():
        steps = place.split(".")
        for end in range(1, len(steps) + 1):
            name = ".".join(steps[:end])
            sys.modules[name] = sys.modules.get(name) or ModuleType(name)
        setattr(sys.modules[place], each.__name__, each)
        each.__module__, each.__qualname__ = place, each.__name__
    try:
        yield
    finally:
        for name in set(sys.modules) - set(before):
            del sys.modules[name]


@dataclass
class Training:
    """What was trained. groups: names of parameters for each group of the optimizer. moments: by kind and name."""

    parameters: dict[str, Tensor]
    groups: list[list[str]]
    frozen: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    moments: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    dtype: torch.dtype = torch.bfloat16
    step: int = 6

    @classmethod
    def random(cls, seed: int = 0) -> Training:
        """Two groups, odd sizes, a scalar, a tied name, a frozen parameter, buffers."""
        torch.manual_seed(seed)
        shapes = {"embed.weight": (11, 5), "block.weight": (5, 7), "block.bias": (7,), "scale": (), "head.weight": (3,)}
        parameters = {name: torch.randn(shape) for name, shape in shapes.items()}
        return cls(
            parameters,
            groups=[["block.weight", "embed.weight", "scale"], ["head.weight", "block.bias"]],
            frozen={"frozen.weight": torch.randn(3, 3).bfloat16()},
            buffers={"running": torch.randn(3).bfloat16(), "count": torch.tensor(4)},
            tied={"out.weight": "embed.weight"},
            moments={
                key: {name: torch.rand(shape) for name, shape in shapes.items()} for key in ("exp_avg", "exp_avg_sq")
            },
        )

    def expected(self) -> dict[str, Tensor]:
        """By the names that an import gives."""
        floats = {
            name: t.float() if t.is_floating_point() else t for name, t in {**self.frozen, **self.buffers}.items()
        }
        made = {f"model.{name}": tensor for name, tensor in {**self.parameters, **floats}.items()}
        for key, tensors in self.moments.items():
            made |= {f"optimizer.{name}.{key}": tensor for name, tensor in tensors.items()}
        if self.moments:
            made |= {f"optimizer.{name}.step": torch.tensor(float(self.step)) for name in self.parameters}
        return made


def save_deepspeed(
    folder: Path,
    training: Training,
    stage: int,
    ranks: int,
    *,
    prefix: str = "",
    bf16_optimizer: bool = False,
    elastic: bool = False,
    alignment: int = 0,
    zip_files: bool = True,
    change: Callable[[str, dict[str, Any]], object] = lambda name, held: None,
) -> Path:
    """FOLDER/latest and FOLDER/global_stepN. prefix: of the optimizer's files. bf16_optimizer: padding stays, no stage
    is said. elastic: states as a list, without padding. alignment: elements to which each parameter is padded.
    change: of what a file is to hold, by its name."""
    tag = folder / f"global_step{training.step}"
    tag.mkdir(parents=True)
    (folder / "latest").write_text(tag.name)
    (folder / "zero_to_fp32.py").write_text("raise SystemExit('never run')")
    layout = _by_rank(training, ranks) if stage == 3 else _by_group(training, ranks, alignment)
    with deepspeed_names():
        for rank in range(ranks):
            if stage == 3 or rank == 0:
                name = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
                state = _model_state(training, stage, rank, ranks)
                change(name, state)
                torch.save(state, tag / name, _use_new_zipfile_serialization=zip_files)
            values = [[vector[rank] for vector in kind] for kind in layout]
            if stage == 3:
                optimizer = _stage_3(training, ranks, *values)
            else:
                counts = layout[0].counts
                lean = [] if bf16_optimizer else values if elastic else values[:1]
                values = [*(_lean(each, counts, rank) for each in lean), *values[len(lean) :]]
                optimizer = _stages_1_2(training, ranks, *values)
                if elastic:
                    optimizer["base_optimizer_state"] = list(optimizer["base_optimizer_state"]["state"].values())
                if not bf16_optimizer:
                    optimizer |= {"zero_stage": ZeroStageEnum(stage), "loss_scaler": LossScaler()}
                    optimizer["param_alignment_paddings"] = layout[0].behind
            held = {"optimizer_state_dict": optimizer, "ds_config": {}, "ds_version": "0.19.8"}
            path = tag / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
            change(path.name, held)
            torch.save(held, path, _use_new_zipfile_serialization=zip_files)
    return tag


class Vectors(list[list[Tensor]]):
    """[group][rank] of stages 1 and 2. counts: elements of each group but for the padding at its end. behind:
    elements of padding behind each parameter."""

    counts: list[int]
    behind: list[list[int]]


def _by_group(training: Training, ranks: int, alignment: int) -> list[Vectors]:
    """Each group's parameters end to end, padded to a multiple of 2 × ranks, and cut for the ranks."""
    made = []
    for tensors in (training.parameters, *training.moments.values()):
        vectors = Vectors()
        vectors.behind = [
            [-tensors[name].numel() % alignment if alignment else 0 for name in names] for names in training.groups
        ]
        vectors.counts = []
        for names, behind in zip(training.groups, vectors.behind, strict=True):
            flat = torch.cat(
                [torch.cat([tensors[n].reshape(-1), torch.zeros(p)]) for n, p in zip(names, behind, strict=True)]
            )
            vectors.counts.append(flat.numel())
            padding = torch.zeros(-flat.numel() % (2 * ranks))
            vectors.append(list(torch.cat([flat, padding]).chunk(ranks)))
        made.append(vectors)
    return made


def _by_rank(training: Training, ranks: int) -> Any:
    """Of each parameter every rank has a part of the same size; [group][rank] of them end to end."""
    return [
        [
            [torch.cat([_padded(tensors[name], ranks).chunk(ranks)[rank] for name in names]) for rank in range(ranks)]
            for names in training.groups
        ]
        for tensors in (training.parameters, *training.moments.values())
    ]


def _padded(tensor: Tensor, ranks: int) -> Tensor:
    flat = tensor.reshape(-1)
    return torch.cat([flat, flat.new_zeros(-flat.numel() % ranks)])


def _model_state(training: Training, stage: int, rank: int, ranks: int) -> dict[str, Any]:
    low = {name: tensor.to(training.dtype) for name, tensor in training.parameters.items()}
    low |= {alias: low[name] for alias, name in training.tied.items()} | training.frozen
    if stage == 3:
        low = {name: torch.empty(0, dtype=tensor.dtype) for name, tensor in low.items()}
    fragments = {
        name: _padded(tensor, ranks).chunk(ranks)[rank].clone() if stage == 3 else tensor
        for name, tensor in training.frozen.items()
    }
    saves_frozen = stage >= 2
    return {
        "module": OrderedDict(low | training.buffers),
        "buffer_names": list(training.buffers),
        "optimizer": None,
        "param_shapes": [OrderedDict((name, training.parameters[name].shape) for name in g) for g in training.groups],
        "frozen_param_shapes": OrderedDict((n, t.shape) for n, t in training.frozen.items()) if saves_frozen else None,
        "shared_params": training.tied,
        "frozen_param_fragments": OrderedDict(fragments) if saves_frozen else None,
        "lr_scheduler": None,
        "global_steps": training.step,
        "dp_world_size": ranks,
        "mp_world_size": 1,
        "ds_config": {"zero_optimization": {"stage": stage}},
        "ds_version": "0.19.8",
    }


def _adam(training: Training, groups: int, moments: Sequence[Sequence[Tensor]]) -> dict[str, Any]:
    state = {
        index: {"step": torch.tensor(float(training.step))}
        | {key: kind[index] for key, kind in zip(training.moments, moments, strict=True)}
        for index in range(groups if training.moments else 0)
    }
    options = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "foreach": None}
    return {"state": state, "param_groups": [{**options, "params": [index]} for index in range(groups)]}


def _lean(parts: list[Tensor], counts: Sequence[int], rank: int) -> list[Tensor]:
    """Without the padding at the end of each group."""
    return [part[: max(count - rank * len(part), 0)] for part, count in zip(parts, counts, strict=True)]


def _stages_1_2(training: Training, ranks: int, *values: list[Tensor]) -> dict[str, Any]:
    fp32, *moments = values
    return {
        "clip_grad": 0.0,
        "base_optimizer_state": _adam(training, len(fp32), moments),
        "single_partition_of_fp32_groups": fp32,
        "group_paddings": [0] * len(fp32),
        "partition_count": [ranks] * len(fp32),
        "ds_version": "0.19.8",
        "param_slice_mappings": [OrderedDict(block=fragment_address(numel=3, start=0)) for _ in fp32],
    }


def _stage_3(training: Training, ranks: int, *values: list[Tensor]) -> dict[str, Any]:
    fp32, *moments = values
    return {
        "zero_stage": ZeroStageEnum.weights,
        "loss_scaler": LossScaler(),
        "dynamic_loss_scale": False,
        "overflow": False,
        "partition_count": ranks,
        "optimizer_state_dict": _adam(training, len(fp32), moments),
        "fp32_flat_groups": fp32,
    }
