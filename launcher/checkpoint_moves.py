"""Checkpoint files that only hosts outside of an attempt hold are brought to a host of it.

Without a shared file system each host's disk holds the files of its own ranks, and a manifest. What lies on the hosts
of an attempt its ranks exchange among themselves; what lies on a host that is connected and takes no part (a spare, one
set aside) must be carried over before. Where hosts share the folder there is nothing to do: all of them hold all of it.

The plan is pure. A failure leaves no half file, is told, and is planned around: another source, another target, at last
an older checkpoint.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import NamedTuple

from dstrain.launcher import file_transfer
from dstrain.launcher.event_loop import EventLoop
from dstrain.launcher.file_transfer import Parcel, TransferError, TransferStopped
from dstrain.launcher.node import Node
from dstrain.launcher.session import HostSession
from dstrain.runtime.checkpoint.manifest import FILE_NAME, PREFIX
from dstrain.runtime.spec.file_frames import DropFiles, StepFiles

Inventories = Mapping[str, Mapping[int, StepFiles]]
"""By host, then by step."""


class Wanted(NamedTuple):
    """A folder of checkpoints, as the ranks would open it; step: None for the newest."""

    folder: str
    step: int | None = None


@dataclass(frozen=True)
class Copy:
    """A file to carry from one host to another."""

    name: str
    size: int
    source: str
    target: str


@dataclass(frozen=True)
class MovePlan:
    """What makes checkpoint `step` complete on the hosts of the attempt; no copies: it is. manifest: its checksum."""

    step: int
    manifest: str
    copies: tuple[Copy, ...] = ()

    def __str__(self) -> str:
        size = sum(copy.size for copy in self.copies) / 1e6
        count = f"{len(self.copies)} {'file' if len(self.copies) == 1 else 'files'}"
        sources = ", ".join(dict.fromkeys(copy.source for copy in self.copies))
        targets = ", ".join(dict.fromkeys(copy.target for copy in self.copies))
        return f"checkpoint {PREFIX}{self.step}: bringing {count} ({size:.1f} MB) from {sources} to {targets}"


@dataclass(frozen=True)
class Refusals:
    """What has failed before. targets: hosts that could not take files. files: (host, step, name) that could not be
    read."""

    targets: frozenset[str] = frozenset()
    files: frozenset[tuple[str, int, str]] = frozenset()


def wanted_of(job: str | None, attempt: int, has_saved: bool) -> tuple[Wanted, ...]:
    """What the ranks of an attempt may go on from; by the resolved job, as runtime/checkpoint/resume.py does: from what
    this run has saved, if it has, else as `checkpoint.resume` says.

    has_saved: the run is known to have saved; that it has not is not known, for a rank may die before it says so.
    """
    section = json.loads(job) if job else {}
    checkpoint = section.get("checkpoint")
    if checkpoint is None:
        return ()
    root = checkpoint["dir"] or f"checkpoints/{section['name']}"
    newest = [Wanted(root)] if attempt > 0 else []
    word = None if attempt > 0 and has_saved else checkpoint["resume"]
    named = [] if word is None else [_named(root, word)]
    return tuple(dict.fromkeys([*newest, *named]))


def _named(root: str, word: str) -> Wanted:
    """What `checkpoint.resume` names."""
    if word == "auto":
        return Wanted(root)
    if word.isdigit():
        return Wanted(root, int(word))
    path = PurePath(word)
    digits = path.name.removeprefix(PREFIX)
    if path.name.startswith(PREFIX) and digits.isdecimal():
        return Wanted(str(path.parent), int(digits))
    return Wanted(word)


# --- the plan --------------------------------------------------------------------------------------------------


def plan_moves(
    inventories: Inventories,
    participating: Sequence[str],
    step: int | None = None,
    refusals: Refusals = Refusals(),
) -> MovePlan | None:
    """How to make the newest checkpoint that is complete over all hosts complete over the participating ones.

    Of two of the same step it is the one that was saved last, as the ranks take it. inventories: of all hosts that can
    be asked. step: that one alone. None: there is no checkpoint that can be made so.
    """
    steps = {held for inventory in inventories.values() for held in inventory}
    for number in sorted(steps if step is None else steps & {step}, reverse=True):
        for version in _versions(inventories, number):
            plan = version.plan(participating, refusals)
            if plan is not None:
                return plan
    return None


@dataclass(frozen=True)
class _Version:
    """One checkpoint as it lies on the hosts that have its manifest: others may have another one of the same step."""

    step: int
    manifest: str
    hosts: Mapping[str, StepFiles]

    def plan(self, participating: Sequence[str], refusals: Refusals) -> MovePlan | None:
        expected = next(iter(self.hosts.values())).expected  # the same everywhere: the manifest is
        holders = {name: self._holders(name, refusals) for name in (FILE_NAME, *expected)}
        missing = [name for name in expected if not set(holders[name]) & set(participating)]
        targets = [host for host in participating if host not in refusals.targets]
        if not all(holders.values()) or (missing and not targets):
            return None
        copies = self._copies(missing, holders, targets)
        lacking = dict.fromkeys(copy.target for copy in copies if copy.target not in self.hosts)
        manifests = [self._copy(FILE_NAME, holders[FILE_NAME][0], target) for target in lacking]
        return MovePlan(self.step, self.manifest, (*manifests, *copies))

    def _holders(self, name: str, refusals: Refusals) -> list[str]:
        return [
            host
            for host, files in self.hosts.items()
            if name in files.held
            and (name == FILE_NAME or files.held[name] == files.expected[name])
            and (host, self.step, name) not in refusals.files
        ]

    def _copies(
        self, missing: Sequence[str], holders: Mapping[str, Sequence[str]], targets: Sequence[str]
    ) -> list[Copy]:
        """Large files first, each to whom the least is carried; of equals, to whom has most of the checkpoint."""
        carried, sent = dict.fromkeys(targets, 0), dict.fromkeys(self.hosts, 0)
        held = {host: sum(self.hosts[host].held.values()) if host in self.hosts else 0 for host in targets}
        copies = []
        for name in sorted(missing, key=lambda name: self._size(name, holders[name][0]), reverse=True):
            target = min(targets, key=lambda host: (carried[host], -held[host]))
            source = min(holders[name], key=lambda host: sent[host])
            copies.append(self._copy(name, source, target))
            carried[target] += copies[-1].size
            sent[source] += copies[-1].size
        return copies

    def _copy(self, name: str, source: str, target: str) -> Copy:
        return Copy(name, self._size(name, source), source, target)

    def _size(self, name: str, host: str) -> int:
        return self.hosts[host].held[name]


def _versions(inventories: Inventories, step: int) -> list[_Version]:
    """Saved last first."""
    hosts: dict[str, dict[str, StepFiles]] = {}
    for host, inventory in inventories.items():
        if step in inventory:
            hosts.setdefault(inventory[step].manifest, {})[host] = inventory[step]
    saved_at = {manifest: next(iter(held.values())).saved_at for manifest, held in hosts.items()}
    newest_first = sorted(hosts, key=lambda manifest: saved_at[manifest], reverse=True)
    return [_Version(step, manifest, hosts[manifest]) for manifest in newest_first]


# --- the carrying ----------------------------------------------------------------------------------------------


def bring_checkpoints(nodes: Sequence[Node], participating: Sequence[Node], wanted: Wanted, loop: EventLoop) -> None:
    """Before an attempt that goes on from a checkpoint: let its hosts hold all of it, if hosts outside of it do.

    nodes: all hosts of the run; one that still connects is not waited for. Returns at once where all of them take part.
    What fails is told, and left to the ranks: they go on from what they have. Raises StopRequested.
    """
    inside = {id(node) for node in participating}
    answering = [node for node in nodes if node.gone is None and node.report.facts is not None]
    if all(id(node) in inside for node in answering):
        return
    mover = _Mover(answering, [node.report.host.name for node in participating], wanted, loop)
    thread = threading.Thread(target=mover.run, name="checkpoint files", daemon=True)
    thread.start()
    try:
        loop.wait(mover.ended.is_set)
    finally:
        mover.stop.set()


class _Mover:
    """In a thread of its own, with one more for each target."""

    def __init__(self, nodes: Sequence[Node], participating: Sequence[str], wanted: Wanted, loop: EventLoop) -> None:
        self._sessions = {node.report.host.name: node.session for node in nodes}
        self._participating, self._wanted, self._loop = participating, wanted, loop
        self.stop, self.ended = threading.Event(), threading.Event()

    def run(self) -> None:
        try:
            self._bring()
        except TransferStopped:
            pass
        finally:
            self.ended.set()
            self._loop.wake()

    def _bring(self) -> None:
        """Plan and carry until there is nothing left to carry, or nobody left to try."""
        refusals, began = Refusals(), time.monotonic()
        while True:
            inventories = self._inventories()
            inside = [host for host in self._participating if host in inventories]
            plan = plan_moves(inventories, inside, self._wanted.step, refusals)
            if plan is None or not plan.copies:
                return
            self._note(str(plan))
            failures = self._carry(plan)
            if not failures:
                self._note(f"checkpoint {PREFIX}{plan.step}: brought in {time.monotonic() - began:.1f} s")
                return
            targets, files = set(refusals.targets), set(refusals.files)
            for error, copy in failures:
                self._note(f"checkpoint {PREFIX}{plan.step}: {copy.name} from {copy.source} to {copy.target}: {error}")
                if error.host == copy.source:
                    files.add((copy.source, plan.step, copy.name))
                else:
                    targets.add(copy.target)
            refusals = Refusals(frozenset(targets), frozenset(files))

    def _note(self, text: str) -> None:
        self._loop.post(-1, text)

    def _inventories(self) -> Inventories:
        """Of all hosts that answer, asked at once."""
        found: dict[str, Mapping[int, StepFiles]] = {}

        def ask(host: str, session: HostSession) -> None:
            try:
                found[host] = file_transfer.list_checkpoints(session, self._wanted.folder, self.stop)
            except TransferError as error:
                self._note(f"checkpoints in {self._wanted.folder}: {error}")
                self._sessions.pop(host, None)
            except TransferStopped:
                pass

        _all_at_once([threading.Thread(target=ask, args=pair, daemon=True) for pair in list(self._sessions.items())])
        return {host: found[host] for host in self._sessions if host in found}

    def _carry(self, plan: MovePlan) -> list[tuple[TransferError, Copy]]:
        """All copies, one after the other to each target, the targets at once."""
        failures: list[tuple[TransferError, Copy]] = []
        filled: list[str] = []

        def fill(copies: Sequence[Copy]) -> None:
            staging = f"{PREFIX}{plan.step}.tmp-{secrets.token_hex(4)}"
            target = self._sessions[copies[0].target]
            try:
                for copy in copies:
                    parcel = Parcel(self._wanted.folder, plan.step, copy.name, copy.size, staging)
                    file_transfer.carry(self._sessions[copy.source], target, parcel, self.stop)
                file_transfer.keep(target, parcel, plan.manifest, self.stop)
                filled.append(copy.target)
            except (TransferError, TransferStopped) as error:
                target.send(DropFiles(0, self._wanted.folder, staging))
                if isinstance(error, TransferError):
                    failures.append((error, copy))

        by_target: dict[str, list[Copy]] = {}
        for copy in plan.copies:
            by_target.setdefault(copy.target, []).append(copy)
        _all_at_once([threading.Thread(target=fill, args=(copies,), daemon=True) for copies in by_target.values()])
        if self.stop.is_set():
            raise TransferStopped
        assert len(filled) + len(failures) == len(by_target)
        return failures


def _all_at_once(threads: Sequence[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
