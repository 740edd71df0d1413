"""Another attempt on other hosts: how many ranks on each, and a job that fits them. Pure.

batch.global is never changed: it is what the training means. Accumulation makes up for fewer ranks; where the ranks do
not divide it, batch.micro falls, and only where no micro-batch does, fewer slots are used; a pipeline keeps its length.
Never more ranks than in the first attempt, never a larger micro-batch, so memory does not rise but by what is sharded
over fewer ranks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Fit:
    """slots: ranks on each host that was offered, 0: it is not needed. changes: what the user should know, a line each.

    job: the job's JSON with the keys that had to change.
    """

    slots: tuple[int, ...]
    job: str | None
    changes: tuple[str, ...] = ()


def fit(job: str | None, first: Sequence[int], offered: Sequence[int], least_hosts: int) -> Fit | None:
    """As many ranks as possible on at least so many hosts; None: there is no way.

    job: as it was requested. first: ranks on each host of the first attempt. offered: slots of each host there is now.
    """
    if sorted(offered) == sorted(first):
        return Fit(tuple(offered), job)
    if len(offered) < least_hosts:
        return None
    values: dict[str, Any] = json.loads(job) if job else {}
    batch, parallel = values.get("batch"), values.get("parallel") or {}
    pipeline = parallel.get("pipeline") or 1
    most = min(sum(offered), sum(first))
    for ranks in range(most - most % pipeline, 0, -pipeline):
        data_ranks = ranks // pipeline
        micro = micro_batch(batch["global"], batch["micro"], data_ranks) if batch else 0
        slots = spread(offered, ranks, least_hosts) if micro is not None else None
        if slots is None or micro is None:
            continue
        changes, noun = [], "ranks" if pipeline == 1 else "data ranks"
        if batch and (ranks, micro) != (sum(first), batch["micro"]):
            changes.append(_batch_line(batch, micro, data_ranks, noun))
        if ranks < most:
            why = "batch.global divides" if pipeline == 1 else "batch.global and parallel.pipeline divide"
            changes.append(f"{ranks} of {sum(offered)} slots are used, so that {why}")
        if batch:
            values["batch"] = batch | {"micro": micro}
        if grouped := regroup(parallel, sum(first) // pipeline, data_ranks):
            values["parallel"] = parallel | grouped
            changes.append(_group_line(grouped, data_ranks, noun))
        return Fit(slots, json.dumps(values) if job else None, tuple(changes))
    return None


def spread(offered: Sequence[int], ranks: int, least_hosts: int) -> tuple[int, ...] | None:
    """Ranks on each host: whole hosts from the front, or, where those are too few, what is too much taken off the
    fullest ones. None: it takes fewer hosts than `least_hosts` all the same."""
    left, filled = ranks, []
    for slots in offered:
        filled.append(min(slots, left))
        left -= filled[-1]
    if sum(count > 0 for count in filled) >= least_hosts:
        return tuple(filled)
    level = list(offered)
    while sum(level) > ranks:
        fullest = max(range(len(level)), key=lambda index: (level[index], index))
        level[fullest] -= 1
    return tuple(level) if sum(count > 0 for count in level) >= least_hosts else None


def micro_batch(whole: int, micro: int, ranks: int) -> int | None:
    """The largest micro-batch, at most `micro`, with which `ranks` data ranks make up `whole` samples."""
    if whole % ranks:
        return None
    return next(size for size in range(min(micro, whole // ranks), 0, -1) if (whole // ranks) % size == 0)


def regroup(parallel: dict[str, Any], first_ranks: int, ranks: int) -> dict[str, int | None]:
    """The keys of `parallel` that must change, for so many data ranks: groups keep their size, or become one of all,
    which needs the least memory."""
    shard, replicate = parallel.get("data_shard"), parallel.get("data_replicate")
    if shard is None and replicate is None:
        return {}
    size = shard or max(1, first_ranks // (replicate or 1))
    if ranks % size:
        return {"data_shard": None, "data_replicate": None}
    groups = ranks // size
    return {"data_replicate": groups} if replicate not in (None, groups) else {}


def _batch_line(batch: dict[str, Any], micro: int, ranks: int, noun: str) -> str:
    count = batch["global"] // (micro * ranks)
    was = f" (batch.micro was {batch['micro']})" if micro != batch["micro"] else ""
    return f"batch.global stays {batch['global']}: {ranks} {noun} × {count} × {micro} samples{was}"


def _group_line(grouped: dict[str, int | None], ranks: int, noun: str) -> str:
    if "data_shard" in grouped:
        return f"parallel: one group of all {ranks} {noun}, which the size of the groups before does not divide"
    return f"parallel.data_replicate is now {grouped['data_replicate']}"
