"""The files of one DeepSpeed checkpoint: found, checked to be all, and opened.

[Note: DeepSpeed's layout]
    FOLDER/latest                                     a line: the name of the newest tag
    FOLDER/global_step20/
      mp_rank_00_model_states.pt                      stages 1 and 2; of stage 3 each rank has its own:
      zero_pp_rank_R_mp_rank_00_model_states.pt
      [bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt

A model file has `module` (the state_dict; in stage 3 its parameters are empty), `param_shapes` (a mapping from name to
shape for each group of the optimizer, in the order of the flat vectors), `buffer_names`, `shared_params` (alias: name),
`frozen_param_shapes` and `frozen_param_fragments`, `global_steps`, `ds_version`. An optimizer file has
`optimizer_state_dict` with `zero_stage`, `partition_count` and, of this rank:

- stages 1 and 2: `single_partition_of_fp32_groups`, an interval of each group's parameters, laid end to end over all
  ranks (padding at the end is cut off or not; `param_alignment_paddings` stand behind single parameters), and
  `base_optimizer_state`, where a group is one parameter;
- stage 3: `fp32_flat_groups`, of each parameter the rank's part (its elements divided by the ranks, rounded up), laid
  end to end; and `optimizer_state_dict`, likewise.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstrain.runtime.checkpoint.foreign import DEEPSPEED_LATEST
from dstrain.runtime.checkpoint.torch_files import StandIn, load_torch_file
from dstrain.runtime.spec.errors import CheckpointError, UsageError

_OPTIMIZER_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MODEL_FILE = "mp_rank_00_model_states.pt"
_OTHER_LAYOUTS = {
    r"layer_.*_expert_.*|expp_rank_.*": "experts in files of their own",
    r"layer_.*": "the layers of a pipeline",
    r"(.*_)?mp_rank_(0[1-9]|[1-9]\d+)_.*": "the parts of several tensor parallel ranks",
    r"zero": "a universal checkpoint",
}


@dataclass(frozen=True)
class DeepSpeedFiles:
    """stage: 0 where no rank has shards. ranks: `optimizer_state_dict` of each rank. models: what the model files hold:
    one, in stage 3 one of each rank. [Note: DeepSpeed's layout]"""

    folder: Path
    stage: int
    ranks: Sequence[Mapping[str, Any]]
    models: Sequence[Mapping[str, Any]]

    @classmethod
    def open(cls, path: Path) -> DeepSpeedFiles:
        """`path`: a tag's folder, or the one above it, whose `latest` says which. Raises UsageError for what is not
        understood, CheckpointError where a file is missing, cut off, or does not fit the others."""
        folder = _tag_folder(path)
        _refuse_other_layouts(folder)
        ranks = [_optimizer_state(file) for file in _optimizer_files(folder)]
        stage = 0
        if ranks:
            stage = number_of(ranks[0].get("zero_stage", 1))  # absent where BF16_Optimizer saved: laid out as stage 1
            _check_count(folder, ranks[0], len(ranks))
        return cls(folder, stage, ranks, _model_states(folder, stage, len(ranks)))


def number_of(value: Any) -> int:
    """Of an int, a tensor, or a stand-in for an enumeration."""
    return int(value.arguments[0] if isinstance(value, StandIn) else value)


def _tag_folder(path: Path) -> Path:
    latest = path / DEEPSPEED_LATEST
    if not latest.is_file():
        return path
    try:
        tag = latest.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{latest}: expected the name of a folder, found {error}") from None
    if tag in ("", ".", "..") or Path(tag).name != tag or not (path / tag).is_dir():
        raise CheckpointError(f"{latest}: expected the name of a folder beside it, found {tag!r}; give a folder itself")
    return path / tag


def _refuse_other_layouts(folder: Path) -> None:
    names = sorted(each.name for each in folder.iterdir())
    for pattern, found in _OTHER_LAYOUTS.items():
        for name in names:
            if re.fullmatch(pattern, name):
                expected = "a checkpoint of ZeRO stage 1, 2 or 3 by data parallel ranks alone"
                raise UsageError.mismatch(f"SOURCE: {folder}", expected, f"{found}, {name}")


def _optimizer_files(folder: Path) -> list[Path]:
    """By rank. Raises CheckpointError where one of them is missing."""
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        match = _OPTIMIZER_FILE.fullmatch(path.name)
        if match and found.setdefault(int(match[1]), path) != path:
            both = f"{found[int(match[1])].name} and {path.name}"
            raise CheckpointError(f"{folder}: expected one optimizer file of rank {match[1]}, found {both}")
    for rank in range(max(found, default=-1) + 1):
        if rank not in found:
            name = re.sub(r"rank_\d+_mp", f"rank_{rank}_mp", next(iter(found.values())).name)
            raise CheckpointError(f"{folder}: expected {name}, found no such file")
    return [found[rank] for rank in sorted(found)]


def _check_count(folder: Path, rank_0: Mapping[str, Any], found: int) -> None:
    counts = rank_0.get("partition_count", found)
    counts = list(counts) if isinstance(counts, list | tuple) else [counts]
    if any(count != found for count in counts):
        said = " and ".join(sorted({str(count) for count in counts}))
        raise CheckpointError(f"{folder}: expected optimizer files of {said} ranks, found {found}; is one missing?")


def _optimizer_state(path: Path) -> Mapping[str, Any]:
    held = load_torch_file(path)
    state = held.get("optimizer_state_dict") if isinstance(held, Mapping) else None
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path}: expected optimizer_state_dict of DeepSpeed, found none")
    return state


def _model_states(folder: Path, stage: int, ranks: int) -> list[Mapping[str, Any]]:
    names = [f"zero_pp_rank_{rank}_{_MODEL_FILE}" for rank in range(ranks)] if stage == 3 else [_MODEL_FILE]
    models = []
    for name in names:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: expected {name}, found no such file")
        held = load_torch_file(folder / name)
        if not isinstance(held, Mapping) or not isinstance(held.get("module"), Mapping):
            raise CheckpointError(f"{folder / name}: expected a module's state_dict of DeepSpeed, found none")
        models.append(held)
    return models
