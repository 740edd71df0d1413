"""The hosts of a plan: how many ranks each takes, how much memory each rank has, and how fast bytes move.

[Note: links]
Inside of a host every rank has a link of its own (`--node-link-gbit`). All ranks of a host share its link to the other
hosts (`--link-gbit`); what comes in does not hinder what goes out. A collective goes around a ring of neighbours: each
rank sends to the next, so that a host whose ranks are neighbours sends once, and one whose ranks each belong to another
ring sends as often as it has ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple, TypeVar

from dstrain.launcher.host_grammar import Problem
from dstrain.launcher.host_ranges import fold, resolve
from dstrain.launcher.hostfile import Host
from dstrain.launcher.planning.units import GIB, read_bytes, read_rate
from dstrain.runtime.spec.errors import UsageError

BITS = 8 / 1e9
"""Seconds for a byte at 1 Gbit/s."""
MEMORY_BYTES = 80 * GIB
"""Of a GPU: an A100's or an H100's."""
LINK_GBIT = 10.0
"""Between hosts: plain Ethernet of a machine room."""
NODE_LINK_GBIT = 200.0
"""Inside of a host: what PCIe 4.0 x16 carries in practice; NVLink carries ten times that."""
TFLOPS = {"fp32": 10.0, "bf16": 125.0, "fp16": 125.0}
"""Sustained, of one GPU: an A100's peak at 40 to 50 %."""
SUSTAINED = 0.4
"""Share of `log.peak_tflops` that a training reaches (Chowdhery et al. 2022: 46 %)."""


class Edges(NamedTuple):
    """Of ranks that each send to one other. inside, between: how many stay in a host, how many leave it; most: of those
    that leave one host; byte_s: seconds until each has sent one byte."""

    inside: int
    between: int
    most: int
    byte_s: float


@dataclass(frozen=True)
class Node:
    """One host. link_gbit: to the others; node_link_gbit: of each of its ranks, inside. [Note: links]"""

    name: str
    slots: int
    memory_bytes: int = MEMORY_BYTES
    link_gbit: float = LINK_GBIT
    node_link_gbit: float = NODE_LINK_GBIT


@dataclass(frozen=True)
class Assumed:
    """What no hostfile says. Each text is a value for all hosts, or HOSTS=VALUE for some. tflops: sustained, of one
    rank."""

    memory: tuple[str, ...] = ()
    link: tuple[str, ...] = ()
    node_link: tuple[str, ...] = ()
    tflops: float | None = None


@dataclass(frozen=True)
class Cluster:
    """All hosts, in the order in which ranks are numbered."""

    nodes: tuple[Node, ...]
    tflops: float
    _known: dict[tuple[str, int, int, int], Edges] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def host_of(self) -> list[int]:
        """For each rank the number of its host."""
        return [number for number, node in enumerate(self.nodes) for _ in range(node.slots)]

    @property
    def world_size(self) -> int:
        return len(self.host_of)

    def nodes_of(self, ranks: range) -> tuple[Node, ...]:
        """The hosts of neighbouring ranks."""
        return self.nodes[self.host_of[ranks.start] : self.host_of[ranks.stop - 1] + 1]

    def names(self, ranks: range) -> str:
        """The hosts of neighbouring ranks, folded."""
        return ",".join(fold(node.name for node in self.nodes_of(ranks)))

    def rings(self, stride: int, length: int) -> Edges:
        """Rings of `length` ranks, each `stride` behind the one before; all ranks are in one. [Note: links]"""
        key = ("ring", stride, length, 0)
        if key not in self._known:
            block, last = stride * length, stride * (length - 1)
            senders = range(self.world_size) if length > 1 else range(0)
            self._known[key] = self._edges(senders, lambda rank: rank + (stride if rank % block < last else -last))
        return self._known[key]

    def across(self, width: int, source: int, target: int) -> Edges:
        """`width` neighbouring ranks from `source` × width on send to as many from `target` × width on."""
        key = ("across", width, source, target)
        if key not in self._known:
            senders = range(source * width, (source + 1) * width) if source != target else range(0)
            self._known[key] = self._edges(senders, lambda rank: rank + (target - source) * width)
        return self._known[key]

    def _edges(self, senders: range, following: Callable[[int], int]) -> Edges:
        host_of, leaving = self.host_of, dict[int, int]()
        inside, slowest = 0, 0.0
        for rank in senders:
            host = host_of[rank]
            if host == host_of[following(rank)]:
                inside += 1
                slowest = max(slowest, BITS / self.nodes[host].node_link_gbit)
            else:
                leaving[host] = leaving.get(host, 0) + 1
        for host, count in leaving.items():
            slowest = max(slowest, count * BITS / self.nodes[host].link_gbit)
        return Edges(inside, sum(leaving.values()), max(leaving.values(), default=0), slowest)


def make_cluster(hosts: Sequence[Host], slots: Sequence[int], assumed: Assumed, tflops: float) -> Cluster:
    """The hosts with what is assumed of them. tflops: of one rank, unless `assumed` says. Raises UsageError."""
    used = [(host, count) for host, count in zip(hosts, slots, strict=True) if count]
    if not used:
        raise UsageError.mismatch("hosts", "at least one rank", "0 slots on every host", "give slots=N or -n N")
    names = [host for host, _ in used]
    memory = _by_host(assumed.memory, names, "--gpu-memory", read_bytes)
    link = _by_host(assumed.link, names, "--link-gbit", read_rate)
    inside = _by_host(assumed.node_link, names, "--node-link-gbit", read_rate)
    nodes = []
    for host, count in used:
        node = Node(host.name, count)
        nodes.append(
            replace(
                node,
                memory_bytes=memory.get(host.name, node.memory_bytes),
                link_gbit=link.get(host.name, node.link_gbit),
                node_link_gbit=inside.get(host.name, node.node_link_gbit),
            )
        )
    return Cluster(tuple(nodes), assumed.tflops or tflops)


Value = TypeVar("Value")


def _by_host(
    texts: Sequence[str], hosts: Sequence[Host], option: str, read: Callable[[str, str], Value]
) -> dict[str, Value]:
    """Values by host; later texts win. Each is VALUE, or HOSTS=VALUE."""
    found: dict[str, Value] = {}
    for text in texts:
        pattern, equals, value = text.rpartition("=")
        try:
            chosen = resolve(pattern, hosts) if equals else hosts
        except Problem as problem:
            raise UsageError.mismatch(option, problem.expected, problem.found, problem.fix) from None
        found |= dict.fromkeys((host.name for host in chosen), read(value, option))
    return found
