"""--include and --exclude: which hosts, and which of their slots, a run uses. Pure.

    --include 'a:0,2@b'          slots 0 and 2 of a, and all of b; nothing else
    --exclude 'gpu[1-3]:7@c'     all but slot 7 of gpu1, gpu2 and gpu3, and all of c

As in DeepSpeed: `@` between hosts, `:slot,slot` behind one. A slot's id is its GPU's number: one of `gpus=`
where the hostfile lists them, else 0 to slots-1. Hosts and slots keep the hostfile's order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dstrain.launcher.host_grammar import MAX_SLOTS, Host, Problem, parse_number, quoted
from dstrain.launcher.host_ranges import resolve, split_outside_brackets
from dstrain.runtime.spec.errors import UsageError


@dataclass(frozen=True)
class SelectedHost:
    """A host that a run uses, and which of its slots.

    slot_ids: the chosen slots; None means all. Checked already where the hostfile says how many there are.
    excluded_slot_ids: slots to leave out; only where nothing is known until the host's GPUs are counted.
    """

    host: Host
    slot_ids: tuple[int, ...] | None = None
    excluded_slot_ids: tuple[int, ...] = ()

    def resolve_slots(self, counted: int) -> tuple[int, ...]:
        """The slot ids to use, one a local rank, now that the host's agent has counted `counted` slots.

        What the hostfile says wins over the count. Raises UsageError for a chosen slot that is not there, and
        when none is left.
        """
        there = _known_ids(self.host)
        if there is None:
            there = tuple(range(counted))
        asked = (self.slot_ids or ()) + self.excluded_slot_ids
        missing = [slot for slot in asked if slot not in there]
        if missing:
            found = f"slot {missing[0]} of {self.host.written_name}"
            raise UsageError.mismatch("--include/--exclude", _listing(there), found, "choose among these")
        chosen = self.slot_ids if self.slot_ids is not None else there
        left = tuple(slot for slot in chosen if slot not in self.excluded_slot_ids)
        if not left:
            found = f"none of {_listing(there)}"
            where = self.host.written_name
            raise UsageError.mismatch(where, "at least one slot", found, "choose one, or exclude the whole host")
        return left


@dataclass(frozen=True)
class _Choice:
    """What one part of a selection says about one host. `column` counts from 1."""

    slot_ids: tuple[int, ...] | None
    column: int


def select(hosts: Sequence[Host], include: str | None, exclude: str | None) -> tuple[SelectedHost, ...]:
    """Apply --include or --exclude to the hosts of a run.

    Raises UsageError for both at once, for what cannot be read, for an unknown host or slot (it names those
    there are), for a host named twice, and when nothing is left.
    """
    if include is not None and exclude is not None:
        fix = "write it with one of the two"
        raise UsageError.mismatch("--include, --exclude", "at most one of the two", "both", fix)
    if include is not None:
        chosen = _parse(include, hosts, "--include")
        return tuple(_included(host, chosen[host.name]) for host in hosts if host.name in chosen)
    if exclude is not None:
        excluded = _parse(exclude, hosts, "--exclude")
        rest = [_excluded(host, excluded.get(host.name)) for host in hosts]
        left = tuple(selected for selected in rest if selected is not None)
        if not left:
            raise UsageError.mismatch("--exclude", "at least one host left", "none", "exclude fewer")
        return left
    return tuple(SelectedHost(host) for host in hosts)


def _included(host: Host, choice: _Choice) -> SelectedHost:
    there = _known_ids(host)
    if choice.slot_ids is None or there is None:
        return SelectedHost(host, choice.slot_ids)
    ordered = tuple(slot for slot in there if slot in choice.slot_ids)
    return SelectedHost(host, None if ordered == there else ordered)


def _excluded(host: Host, choice: _Choice | None) -> SelectedHost | None:
    """None when the whole host is left out."""
    if choice is None:
        return SelectedHost(host)
    if choice.slot_ids is None:
        return None
    there = _known_ids(host)
    if there is None:
        return SelectedHost(host, excluded_slot_ids=choice.slot_ids)
    left = tuple(slot for slot in there if slot not in choice.slot_ids)
    return SelectedHost(host, left) if left else None


def _parse(text: str, hosts: Sequence[Host], option: str) -> dict[str, _Choice]:
    """name -> choice, for the hosts that the text names."""
    choices: dict[str, _Choice] = {}
    start = 0
    for part in text.split("@"):
        try:
            _read_part(part, start + 1, hosts, choices)
        except Problem as problem:
            where = f"{option}:1:{start + problem.offset + 1}"
            raise UsageError.mismatch(where, problem.expected, problem.found, problem.fix) from None
        start += len(part) + 1
    return choices


def _read_part(part: str, column: int, hosts: Sequence[Host], choices: dict[str, _Choice]) -> None:
    if not part:
        raise Problem("a host", "nothing", "write host or host:slot,slot, with @ between hosts")
    pattern, slots, slots_offset = part, "", 0
    if not part.endswith("]") and ":" in part:
        pattern, _, slots = part.rpartition(":")
        slots_offset = len(pattern) + 1
    slot_ids = _parse_slot_ids(slots, slots_offset) if slots_offset else None
    for host in resolve(pattern, hosts):
        if host.name in choices:
            found = f"{quoted(host.name)} again (first at column {choices[host.name].column})"
            raise Problem("each host once", found, "join its slots, as in a:0,2")
        _check_known(host, slot_ids, slots_offset)
        choices[host.name] = _Choice(slot_ids, column)


def _parse_slot_ids(text: str, offset: int) -> tuple[int, ...]:
    slots: list[int] = []
    for part in split_outside_brackets(text, ","):
        try:
            slot = parse_number(part, "slots", 0, MAX_SLOTS - 1)
        except Problem as problem:
            raise problem.shifted(offset) from None
        if slot in slots:
            raise Problem("each slot once", f"{slot} again", "remove one of the two", offset)
        slots.append(slot)
        offset += len(part) + 1
    return tuple(slots)


def _check_known(host: Host, slot_ids: tuple[int, ...] | None, offset: int) -> None:
    there = _known_ids(host)
    missing = [slot for slot in slot_ids or () if there is not None and slot not in there]
    if there is not None and missing:
        found = f"slot {missing[0]} of {quoted(host.name)}"
        raise Problem(_listing(there), found, "choose among these", offset)


def _known_ids(host: Host) -> tuple[int, ...] | None:
    """The ids of the host's slots; None when only its agent can count them."""
    if host.gpus is not None:
        return host.gpus
    return None if host.slots is None else tuple(range(host.slots))


def _listing(slots: Sequence[int]) -> str:
    if not slots:
        return "no slots"
    if len(slots) > 1 and list(slots) == list(range(slots[0], slots[-1] + 1)):
        return f"slots {slots[0]} to {slots[-1]}"
    return ("slot " if len(slots) == 1 else "slots ") + ", ".join(map(str, slots))
