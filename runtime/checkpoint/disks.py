"""Which ranks see the same folder of checkpoints: a network disk that all share, or each host's own."""

from __future__ import annotations

import contextlib
import platform
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dstrain.runtime.comm import Communicator
from dstrain.runtime.spec.errors import CheckpointError

Place = tuple[str, int, int]
"""A folder for one kernel: boot, device, inode."""


@dataclass(frozen=True)
class Disks:
    """of: for each rank the first rank that sees its folder, the keeper. hosts: their names."""

    of: tuple[int, ...]
    hosts: tuple[str, ...]

    @property
    def keepers(self) -> list[int]:
        """One rank for each disk."""
        return sorted(set(self.of))

    def next_of(self, rank: int) -> int:
        """A rank at the next disk, for a second copy of what `rank` writes; the ranks of a disk take turns."""
        keepers = self.keepers
        following = keepers[(keepers.index(self.of[rank]) + 1) % len(keepers)]
        here = [other for other, keeper in enumerate(self.of) if keeper == self.of[rank]]
        there = [other for other, keeper in enumerate(self.of) if keeper == following]
        return there[here.index(rank) % len(there)]


def find_disks(root: Path, comm: Communicator) -> Disks:
    """Make `root`, try what a save begins with, and find out who shares it; all ranks call it.

    Two or three small collectives of objects. Raises CheckpointError on all ranks, before anything is trained, where a
    folder cannot be written.
    """
    problem, place = "", None
    try:
        root.mkdir(parents=True, exist_ok=True)
        trial = root / f"step-0.tmp-{secrets.token_hex(8)}"
        trial.mkdir()
        trial.rmdir()
        place = place_of(root)
    except OSError as error:
        problem = f"{error.strerror or error}: {root}"
    everyone = comm.all_gather_object((place, problem, platform.node(), secrets.token_hex(8)))
    hosts = tuple(host for _, _, host, _ in everyone)
    for _, said, host, _ in everyone:
        if said:
            where = f" on {host}" if len(set(hosts)) > 1 else ""
            fix = "nothing was trained; give another checkpoint.dir"
            raise CheckpointError(f"checkpoint.dir: expected a folder that can be written, found {said}{where}; {fix}")
    places = [found for found, _, _, _ in everyone if found is not None]
    firsts = firsts_of(places)
    if len(set(firsts)) > 1:
        firsts = _merged(root, comm, firsts, [token for _, _, _, token in everyone])
    return Disks(tuple(firsts), hosts)


def place_of(folder: Path) -> Place:
    """The same for all processes of this machine that see this folder. Raises OSError."""
    found = folder.stat()
    return _boot(), found.st_dev, found.st_ino


def firsts_of(places: Sequence[object]) -> list[int]:
    """For each rank the first rank at the same place."""
    return [places.index(place) for place in places]


def is_first_there(folder: Path, comm: Communicator) -> bool:
    """Whether this rank is the first on its machine that sees this folder; all ranks call it."""
    place: object = comm.rank
    with contextlib.suppress(OSError):
        place = place_of(folder)
    return firsts_of(comm.all_gather_object(place))[comm.rank] == comm.rank


def _boot() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return platform.node()


def _merged(root: Path, comm: Communicator, firsts: list[int], tokens: list[str]) -> list[int]:
    """Two machines share a disk if one sees what the other has just written there."""
    names = {first: f".dstrain-{tokens[first]}" for first in set(firsts)}
    mine = root / names[comm.rank] if comm.rank in names else None
    try:
        if mine is not None:
            with contextlib.suppress(OSError):  # not seen then, and taken for a disk of its own
                mine.touch()
        comm.all_gather_object(None)
        seen = {first for first, name in names.items() if mine is not None and (root / name).exists()}
        views = comm.all_gather_object(seen)
    finally:
        if mine is not None:
            with contextlib.suppress(OSError):
                mine.unlink()
    keeper = {first: min({first, *(o for o in views[first] if first in views[o])}) for first in names}
    return [keeper[first] for first in firsts]
