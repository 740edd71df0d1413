"""Every key of a DeepSpeed configuration: a key of ours, something we do anyway, or refused with its reason."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstrain.runtime.spec.deepspeed import general
from dstrain.runtime.spec.deepspeed.batch import KEYS as BATCH_KEYS
from dstrain.runtime.spec.deepspeed.batch import judge_batch
from dstrain.runtime.spec.deepspeed.optimizer import judge_optimizer
from dstrain.runtime.spec.deepspeed.precision import (
    autocast_rules,
    bf16_rules,
    data_type_rules,
    fp16_rules,
    is_enabled,
)
from dstrain.runtime.spec.deepspeed.scheduler import judge_scheduler
from dstrain.runtime.spec.deepspeed.verdict import (
    AUTO,
    Entry,
    Fate,
    Rule,
    Rules,
    Verdict,
    honoured,
    mapped,
    refused,
    wrong,
)
from dstrain.runtime.spec.deepspeed.zero import ALIASES, offload_flag, offload_rules, old_form, stage_of, zero_rules
from dstrain.runtime.spec.document import show
from dstrain.runtime.spec.errors import ConfigError
from dstrain.runtime.spec.load import job_of

_OFF = "without effect: the section is not enabled"
_SECTIONS = {
    "tensorboard": general.TENSORBOARD,
    "wandb": general.WANDB,
    "activation_checkpointing": general.ACTIVATIONS,
    "checkpoint": general.CHECKPOINT,
    "data_types": data_type_rules(),
}
_OFFLOADS = {"offload_optimizer": "optimizer", "offload_param": "parameters"}
_OPTIONAL = ("tensorboard", "wandb")
"""Sections that their key `enabled` turns on."""

Judged = Iterator[tuple[str, Any, Verdict]]


@dataclass(frozen=True)
class Imported:
    """values: the job as nested plain values. entries: one for every key of the input, in its order."""

    values: dict[str, Any]
    entries: tuple[Entry, ...]

    def refused(self, *, harmless: bool) -> list[Entry]:
        """Those without which numbers, or what fits into memory, differ; or the others."""
        return [e for e in self.entries if e.verdict.fate is Fate.REFUSED and e.verdict.harmless == harmless]

    def listing(self) -> list[str]:
        """A line for each key, and one that counts them."""
        fates = [entry.verdict.fate for entry in self.entries]
        counts = ", ".join(f"{fates.count(fate)} {fate.value}" for fate in Fate)
        changing = len(self.refused(harmless=False))
        refusals = f" ({changing} of them may change the training)" if Fate.REFUSED in fates else ""
        return [*map(str, self.entries), f"{len(fates)} keys: {counts}{refusals}"]


def read_deepspeed(path: Path) -> dict[str, Any]:
    """The JSON of a file. Raises ConfigError where there is none, or a key stands twice."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except OSError as error:
        raise ConfigError(f"{path}: expected a readable DeepSpeed configuration, found: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}:{error.colno}: expected JSON, found {error.msg}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: expected JSON in UTF-8 with each key once, found {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of keys, found {show(values)}")
    return values


def import_deepspeed(config: Mapping[str, Any], ranks: int | None = None, name: str = "config") -> Imported:
    """The job of a DeepSpeed configuration, and the verdict on each of its keys.

    ranks: of the job, where batch sizes follow from it. Raises ConfigError, with the numbers, where the batch sizes
    contradict one another.
    """
    batch = {key: (value, verdict) for key, value, verdict in judge_batch(config, ranks, name)}
    entries: list[Entry] = []
    for key, value in config.items():
        judged = [("", *batch[key])] if key in BATCH_KEYS else list(_judge(key, value, config))
        for inner, found, verdict in judged or [("", value, honoured("empty"))]:
            entries.append(Entry(f"{key}.{inner}".rstrip("."), _shown(found), verdict))
    if "gradient_clipping" not in config:
        absent = mapped({"train.clip": 1.0}, general.NO_CLIPPING_KEY)
        entries.append(Entry("gradient_clipping", "nothing", absent))
    values: dict[str, Any] = {}
    _put(values, {"schedule.name": "constant"})
    for entry in sorted(entries, key=lambda entry: entry.key.startswith("scheduler.")):  # whose peak is the last word
        _put(values, entry.verdict.values)
    job_of(values, name)  # whatever we print is a job
    return Imported(values, tuple(entries))


def _judge(key: str, value: Any, config: Mapping[str, Any]) -> Judged:
    """The verdicts on one key at the top and all below it, by what stands behind its dot."""
    stage = stage_of(config.get("zero_optimization"))
    fp16, bf16 = config.get("fp16"), config.get("bf16", config.get("bfloat16"))
    if key == "zero_optimization":
        yield from _zero(value, stage)
    elif key == "gradient_clipping" and isinstance(value, Mapping):
        yield from general.judge_clipping_section(value)
    elif key in general.SIMPLE:
        yield "", value, general.SIMPLE[key].judge(value)
    elif key in general.OTHER_SECTIONS:
        yield from _foreign(value, *general.OTHER_SECTIONS[key])
    elif key in _KNOWN_SECTIONS and not isinstance(value, Mapping):
        yield "", value, wrong("a section of keys", value)
    elif key in ("optimizer", "scheduler"):
        yield from judge_optimizer(value) if key == "optimizer" else judge_scheduler(value)
    elif key == "fp16":
        yield from _section(value, fp16_rules(value, is_enabled(bf16)), key, optional=True)
    elif key in ("bf16", "bfloat16"):
        yield from _section(value, bf16_rules(), key, optional=True)
    elif key == "torch_autocast":
        on = is_enabled(value) and not is_enabled(fp16) and not is_enabled(bf16)
        dtype = {"dtype": "bf16"} if is_enabled(value) and "dtype" not in value else {}
        judged = _section({**value, **dtype}, autocast_rules(stage), key, optional=True)
        yield from judged if on or not is_enabled(value) else _all(value, refused("write only one of fp16, bf16, this"))
    elif key in _SECTIONS:
        yield from _section(value, _SECTIONS[key], key, optional=key in _OPTIONAL)
    else:
        yield from _all(value, _unknown(key, ""))


_KNOWN_SECTIONS = ("optimizer", "scheduler", "fp16", "bf16", "bfloat16", "torch_autocast", *_SECTIONS)


def _zero(value: Any, stage: int) -> Judged:
    if not isinstance(value, Mapping):
        yield "", value, old_form(value)
        return
    for key, found in value.items():
        what = _OFFLOADS.get(key)
        if what is None:
            yield from _section({key: found}, zero_rules(stage), "zero_optimization", optional=False)
        elif found == {}:
            yield key, found, honoured("without effect: nothing is offloaded")
        elif isinstance(found, Mapping):
            yield from _offload(found, what, stage, key)
        else:
            yield key, found, offload_flag(found, what, stage)


def _offload(section: Mapping[str, Any], what: str, stage: int, name: str) -> Judged:
    idle = section.get("device", "none") in ("none", None)
    rules = offload_rules(what, stage)
    for key, found, verdict in _section(section, rules, f"zero_optimization.{name}", optional=False):
        without_effect = idle and verdict.fate is Fate.REFUSED and verdict.harmless
        yield f"{name}.{key}", found, honoured("without effect: nothing is offloaded") if without_effect else verdict


def _section(section: Mapping[str, Any], rules: Rules, where: str, *, optional: bool) -> Judged:
    """optional: its key `enabled` turns it on."""
    off = optional and not is_enabled(section) and section.get("enabled", False) in (False, None)
    for key, value in section.items():
        rule = rules.get(ALIASES.get(key, key)) if where == "zero_optimization" else rules.get(key)
        if rule is None:
            yield from ((f"{key}.{k}".rstrip("."), v, verdict) for k, v, verdict in _all(value, _unknown(key, where)))
        elif off and key != "enabled":
            yield key, value, honoured(_OFF)
        else:
            yield key, value, rule.judge(value)


def _foreign(value: Any, reason: str, harmless: bool) -> Judged:
    """A section of something that we do not have."""
    if not isinstance(value, Mapping):
        off = value in (None, False, [], "")
        yield "", value, honoured("off here too") if off else refused(reason, harmless=harmless)
    elif value.get("enabled") is False:
        yield from _all(value, honoured("off here too"))
    else:
        yield from _all(value, refused(reason, harmless=harmless))


def _all(value: Any, verdict: Verdict, key: str = "") -> Judged:
    """One verdict on everything in a value."""
    if not isinstance(value, Mapping) or not value:
        yield key, value, verdict
        return
    for inner, found in value.items():
        yield from _all(found, verdict, f"{key}.{inner}".lstrip("."))


def _unknown(key: str, where: str) -> Verdict:
    """A key that DeepSpeed does not have, with the nearest that it has, first in the same section."""
    if key in general.NEVER_EXISTED:
        nearest, note = general.NEVER_EXISTED[key]
        if not nearest:
            return refused(note)
        return refused(f"{note}; the nearest is {nearest}{_here(nearest)}")
    known = _rules_by_path()
    beside = {path.rpartition(".")[2]: path for path in known if path.rpartition(".")[0] == where}
    anywhere = {path.rpartition(".")[2]: path for path in known}
    for names in (beside, anywhere):
        if close := difflib.get_close_matches(key, names, n=1, cutoff=0.7):
            return refused(f"DeepSpeed has no such key; did you mean {names[close[0]]}{_here(names[close[0]])}?")
    return refused("DeepSpeed has no such key; leave it out")


def _here(path: str) -> str:
    ours = _rules_by_path()[path].ours
    return "" if ours in ("nothing", "always so") else f", here {ours}"


def _rules_by_path() -> dict[str, Rule]:
    sections: dict[str, Rules] = {
        "": general.SIMPLE,
        "zero_optimization": zero_rules(3),
        "zero_optimization.offload_optimizer": offload_rules("optimizer", 3),
        "zero_optimization.offload_param": offload_rules("parameters", 3),
        "fp16": {key: rule for key, rule in fp16_rules({}, False).items() if key != "scale_window"},
        "bf16": bf16_rules(),
        "torch_autocast": autocast_rules(0),
        **_SECTIONS,
    }
    paths = {f"{where}.{key}".lstrip("."): rule for where, rules in sections.items() for key, rule in rules.items()}
    names = {**dict.fromkeys(BATCH_KEYS, "batch"), **{name: name for name in ("optimizer", "scheduler")}}
    names |= {"zero_optimization": "zero", "zero_optimization.offload_optimizer": "zero.offload.optimizer"}
    names |= {"zero_optimization.offload_param": "zero.offload.parameters", "fp16": "precision", "bf16": "precision"}
    names |= dict.fromkeys(_OPTIONAL, "log.trackers") | {"activation_checkpointing": "train.activation_checkpointing"}
    return paths | {name: Rule(ours, wrong_place) for name, ours in names.items()}


def wrong_place(value: Any) -> Verdict:
    """Of names that only stand in the table for those who misspelt them."""
    raise AssertionError("a section is judged by its own module")


def _put(values: dict[str, Any], dotted: Mapping[str, Any]) -> None:
    for path, value in dotted.items():
        *sections, key = path.split(".")
        inner = values
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[key] = [*inner.get(key, []), *value] if path == "log.trackers" else value


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(_shown(item) for item in value)}]"
    if value == AUTO:
        return AUTO
    if isinstance(value, float):
        return f"{value:.15g}"
    return show(value) if value is not None else "null"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"{key} twice")
        values[key] = value
    return values
