"""Bytes that a step sends, by what they are for, and over which links.

[Note: what a step sends]
Of Ψ elements of trained parameters, N ranks that share one copy, R copies, m micro-batches:
    reduction    stage 0: all-reduce over all data ranks, 2·Ψ·(NR−1)/NR; else reduce-scatter, Ψ·(N−1)/N, once, or m
                 times where `zero.accumulate` is sharded
    copies       all-reduce of each shard over the R copies, 2·Ψ/N·(R−1)/R
    gather       stages 1 and 2: updated parameters, Ψ·(N−1)/N; stage 3: 2m times that, for the forwards and the
                 backwards, and once what stays whole (all, with `zero.reshard: step`)
    stages       activations to the next pipeline stage and their gradients back, m times each
    tied         all-reduce of gradients that several stages have, 2·(k−1)/k over k ranks
A rank's a few numbers at the end of a step, and checksums, are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dstrain.launcher.planning.cluster import Cluster, Edges
from dstrain.launcher.planning.layout import Layout
from dstrain.launcher.planning.memory import StateMemory, accumulates
from dstrain.launcher.planning.parts import Part

REDUCTION, COPIES, GATHERING = "reduction of gradients", "gradients between copies", "gathering of parameters"
STAGES, TIED = "between pipeline stages", "gradients of tied parameters"
"""Names of flows, for people and in JSON."""


@dataclass(frozen=True)
class Flow:
    """Bytes of one step. [Note: what a step sends]

    rank_bytes, host_bytes: the most that one rank sends, and one host to others. inside_bytes, between_bytes: of all
    hosts. link_s: what the links need for it, if nothing else goes on."""

    name: str
    rank_bytes: float
    host_bytes: float
    inside_bytes: float
    between_bytes: float
    link_s: float


def collectives(layout: Layout, parts: Sequence[Part], state: StateMemory, cluster: Cluster) -> list[Flow]:
    """Flows over the data ranks, and those of tied parameters; the ones that send nothing are left out."""
    dims, zero = layout.dims, layout.zero
    reduced, copied, gathered = [], [], []
    for part in parts:
        sent = state.sent(part, dims, zero)
        if zero.stage == 0:
            reduced.append(2.0 * sent.sums * (dims.data - 1) / dims.data)
            continue
        others = (dims.data_shard - 1) / dims.data_shard
        times = layout.micro_batches if accumulates(zero) == "sharded" else 1
        reduced.append(sent.sums * others * times)
        copied.append(2.0 * sent.sums / dims.data_shard * (dims.data_replicate - 1) / dims.data_replicate)
        gathered.append((2 * layout.micro_batches * sent.moving + sent.staying) * others)
    shards = cluster.rings(1, dims.data if zero.stage == 0 else dims.data_shard)
    flows = [
        _flow(REDUCTION, reduced, shards),
        _flow(COPIES, copied, cluster.rings(dims.data_shard, dims.data_replicate)),
        _flow(GATHERING, gathered, shards),
        _tied(layout, parts, state, cluster),
    ]
    return [flow for flow in flows if flow is not None]


def _flow(name: str, of_parts: Sequence[float], edges: Edges) -> Flow | None:
    """of_parts: what each rank of a part sends; parts have as many ranks each."""
    if not of_parts or not max(of_parts) or not edges.inside + edges.between:
        return None
    most, mean = max(of_parts), sum(of_parts) / len(of_parts)
    return Flow(name, most, most * edges.most, mean * edges.inside, mean * edges.between, most * edges.byte_s)


def _tied(layout: Layout, parts: Sequence[Part], state: StateMemory, cluster: Cluster) -> Flow | None:
    dims = layout.dims
    ranks_of = {name: ranks for part in parts for name, ranks in part.tied.items()}
    shapes = {name: one for part in parts if part.tied for name, one in part.trained if name in ranks_of}
    total = Flow(TIED, 0.0, 0.0, 0.0, 0.0, 0.0)
    for name, shape in shapes.items():
        ranks = ranks_of[name]
        size = shape.numel() * state.sum_bytes(shape) / (1 if layout.zero.stage == 0 else dims.data_shard)
        sent = 2.0 * size * (len(ranks) - 1) / len(ranks)
        edges = cluster.across(dims.data, ranks[0], ranks[-1])
        total = Flow(
            total.name,
            total.rank_bytes + sent,
            total.host_bytes + sent * edges.most,
            total.inside_bytes + sent * edges.inside * len(ranks),
            total.between_bytes + sent * edges.between * len(ranks),
            total.link_s + sent * edges.byte_s,
        )
    return total if total.rank_bytes else None


def between_stages(
    layout: Layout, boundaries: Sequence[float], rank_of: Sequence[int], cluster: Cluster
) -> tuple[Flow | None, list[float]]:
    """The pipeline's flow, and the seconds of a message at each boundary.

    boundaries: bytes of one micro-batch, behind each stage but the last."""
    width, times = layout.dims.data, layout.micro_batches
    of_rank: dict[int, float] = {}
    of_host: dict[int, float] = {}
    inside = between = link_s = 0.0
    messages = []
    for stage, size in enumerate(boundaries):
        here, there = rank_of[stage], rank_of[stage + 1]
        messages.append(0.0)
        for source, target in ((here, there), (there, here)):
            edges = cluster.across(width, source, target)
            if here != there:
                of_rank[source] = of_rank.get(source, 0.0) + size * times
            host = cluster.host_of[source * width]
            of_host[host] = of_host.get(host, 0.0) + size * times * edges.most
            inside += size * times * edges.inside
            between += size * times * edges.between
            link_s = max(link_s, size * times * edges.byte_s)
            messages[-1] = max(messages[-1], size * edges.byte_s)
    if not of_rank:
        return None, messages
    most, host_most = max(of_rank.values()), max(of_host.values())
    return Flow(STAGES, most, host_most, inside, between, link_s), messages
