"""What becomes of one key of a DeepSpeed configuration, and the rules that most keys need."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from dstrain.runtime.spec.document import show

AUTO = "auto"
AUTO_NOTE = "'auto' is filled in by Hugging Face's Trainer from its own arguments; write the value itself"


class Fate(Enum):
    """honoured: so it is here, without a key. mapped: keys of ours say it. refused: it has no place in the job."""

    HONOURED = "honoured"
    MAPPED = "mapped"
    REFUSED = "refused"


@dataclass(frozen=True)
class Verdict:
    """values: keys of a job, dotted, with what they become. harmless: refused, but no number changes without it."""

    fate: Fate
    note: str
    values: Mapping[str, Any] = field(default_factory=dict)
    harmless: bool = False


@dataclass(frozen=True)
class Entry:
    """The verdict on the key `key` (dotted), whose value was `found` (as a message names it)."""

    key: str
    found: str
    verdict: Verdict

    def __str__(self) -> str:
        """`mapped    zero_optimization.stage: 3 → zero.stage: 3 (why)`."""
        verdict = self.verdict
        ours = ", ".join(f"{key}: {_plain(value)}" for key, value in verdict.values.items())
        note = f"no number changes without it: {verdict.note}" if verdict.harmless else verdict.note
        line = f"{verdict.fate.value:9} {self.key}: {self.found}" + (f" → {ours}" if ours else "")
        return line + (f" ({note})" if note else "")


@dataclass(frozen=True)
class Rule:
    """ours: what stands for the key here, in words for somebody who misspelt it. judge: of its value."""

    ours: str
    judge: Callable[[Any], Verdict]


Rules = Mapping[str, Rule]


def _plain(value: Any) -> str:
    match value:
        case None:
            return "null"
        case str():
            return value
        case list():
            return f"[{', '.join(map(_plain, value))}]"
        case _:
            return show(value)


def honoured(note: str) -> Verdict:
    return Verdict(Fate.HONOURED, note)


def mapped(values: Mapping[str, Any], note: str = "") -> Verdict:
    return Verdict(Fate.MAPPED, note, values)


def refused(note: str, *, harmless: bool = False) -> Verdict:
    return Verdict(Fate.REFUSED, note, harmless=harmless)


def wrong(expected: str, value: Any) -> Verdict:
    """A value that DeepSpeed does not take either."""
    return refused(AUTO_NOTE if value == AUTO else f"expected {expected}, found {show(value)}")


def integer(value: Any, at_least: int = 0) -> int | None:
    """The number, which DeepSpeed also takes as 5e8; None if it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value or abs(value) > 1 << 62:
        return None
    return int(value) if value == int(value) and value >= at_least else None


def number(value: Any) -> float | None:
    """The finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
        return None
    return float(value)


def always(ours: str, note: str) -> Rule:
    """True is what we do anyway; false changes no number."""

    def judge(value: Any) -> Verdict:
        if not isinstance(value, bool):
            return wrong("true or false", value)
        return honoured(note) if value else refused(f"{note}; there is no switch", harmless=True)

    return Rule(ours, judge)


def never(ours: str, reason: str, *, harmless: bool = False) -> Rule:
    """False, nothing and an empty section are what we do anyway; everything else is refused for the reason."""

    def judge(value: Any) -> Verdict:
        if value is None or value is False or value == {}:
            return honoured("off here too")
        return refused(AUTO_NOTE if value == AUTO else reason, harmless=harmless)

    return Rule(ours, judge)


def only(ours: str, default: Any, note: str, reason: str, *, harmless: bool = False) -> Rule:
    """The default is what we do anyway; everything else is refused for the reason."""

    def judge(value: Any) -> Verdict:
        if value == default and isinstance(value, bool) == isinstance(default, bool):
            return honoured(note)
        return refused(AUTO_NOTE if value == AUTO else reason, harmless=harmless)

    return Rule(ours, judge)


def own_way(ours: str, reason: str) -> Rule:
    """How DeepSpeed does something that we do in another way, with the same numbers."""
    return Rule(ours, lambda value: refused(AUTO_NOTE if value == AUTO else reason, harmless=value != AUTO))


def count(key: str, note: str = "", at_least: int = 1) -> Rule:
    """An integer that one key of ours takes as it is."""

    def judge(value: Any) -> Verdict:
        whole = integer(value, at_least)
        return wrong(f"an integer of at least {at_least}", value) if whole is None else mapped({key: whole}, note)

    return Rule(key, judge)
