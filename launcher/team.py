"""The hosts of a run: those of the next attempt, those that wait as spares, those that were set aside and why."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from dstrain.launcher import preflight
from dstrain.launcher.agent.agent import HEARTBEAT_S, LEASE_S
from dstrain.launcher.agent.ranks import SWEEP_TIMEOUT_S
from dstrain.launcher.node import Node
from dstrain.launcher.plan import Request
from dstrain.launcher.replan import Fit, fit

FENCE_S = LEASE_S + 2 * HEARTBEAT_S + SWEEP_TIMEOUT_S
"""After its last word a host that was cut off has ended its ranks: it may have heard us a heartbeat later than we heard
it, looks at its lease once in a heartbeat, and then sweeps."""

IDLE = -1  # in place of an attempt: it waited


class Reformed(NamedTuple):
    """The request as it is for the next team, the ranks on each of its hosts, and what had to change."""

    request: Request
    slots: list[int]
    changes: tuple[str, ...]


class Team:
    """active: in the order of the ranks. spares: best first. aside: host -> why. fence: see `drop`.

    nodes: of request.hosts, then of request.spares.
    """

    def __init__(self, request: Request, nodes: Sequence[Node], note: Callable[[str], None]) -> None:
        self._request, self._note = request, note
        self._wanted = len(request.hosts)
        self._least = request.min_nodes or self._wanted
        self._first_slots: list[int] = []
        self._ready: list[Node] = []
        self.active, self.spares = list(nodes[: self._wanted]), list(nodes[self._wanted :])
        self.aside: dict[str, str] = {}
        self.fence = 0.0

    def begin(self, slots: Sequence[int]) -> None:
        """The first attempt is about to begin, with so many ranks on each active host."""
        self._first_slots = list(slots)

    # --- spares ----------------------------------------------------------------------------------------------

    @property
    def unsettled(self) -> list[Node]:
        """Spares that are still connecting or importing torch."""
        return [node for node in self.spares if node not in self._ready]

    def look_at_spares(self) -> None:
        """Check the spares that have said what they are like; one that will not do is a warning, no more."""
        for node in self.spares:
            lost = _what_is_wrong(node, IDLE) if node.report.error is None else None
            if lost is not None:
                self.set_aside(node, lost)
            elif node not in self._ready and node.settled_facts and node.settled_preload:
                self._judge(node)

    def _judge(self, node: Node) -> None:
        reports = [*(other.report for other in self.active), node.report]
        problems = preflight.check_all(self._request, reports, "dialled when it is needed")
        mine = [problem for problem in problems if problem.host == node.report.host.name]
        if mine:
            self.set_aside(node, f"{mine[0].check}: {mine[0].found}; {mine[0].remedy}")
        else:
            self._ready.append(node)

    # --- leaving ---------------------------------------------------------------------------------------------

    def set_aside(self, node: Node, why: str, keep_connected: bool = False) -> None:
        """This host is used no more in this run: say so, and let go of it, which ends whatever it still runs.

        keep_connected: it runs nothing any more, and its disk may hold checkpoints that others need.
        """
        name = node.report.host.name
        self._note(f"{'spare ' if node in self.spares else ''}{name} is set aside: {why}")
        self.aside[name] = why
        self.active = [other for other in self.active if other is not node]
        self.spares = [other for other in self.spares if other is not node]
        self._ready = [other for other in self._ready if other is not node]
        if node.gone is None and not keep_connected:
            node.gone = "set aside"
            threading.Thread(target=node.session.close, daemon=True).start()

    def drop(self, number: int) -> None:
        """Set aside the hosts that did not come out of attempt `number` in order; IDLE: that were lost since.

        `fence`: until then (monotonic) a host behind a dead link may still run its ranks, and no attempt may begin:
        they could write into the same files.
        """
        for node in self.active:
            why = _what_is_wrong(node, number)
            if why is None:
                continue
            if node.agent_error is None and not node.agent_lost:
                since = node.session.heard_at if node.gone is not None else time.monotonic()
                self.fence = max(self.fence, since + FENCE_S)
            self.set_aside(node, why)
        self.look_at_spares()

    # --- the next team ---------------------------------------------------------------------------------------

    def can_do_without(self, names: set[str]) -> bool:
        """Would the rest, with the spares that are ready, be enough?"""
        return self._fit(self._offered(names)) is not None

    def has_enough_ready(self, without: int = 0) -> bool:
        """Are there as many hosts as at first, not counting so many of those that there are?"""
        return len(self.active) + len(self._ready) - without >= self._wanted

    def reform(self) -> Reformed | None:
        """Take spares in for the hosts that are missing; None: too few are left.

        Survivors keep their order and come first: rank 0 stays where the checkpoints are.
        """
        offered = self._offered(set())
        found = self._fit(offered)
        if found is None:
            return None
        self.active = [node for node, slots in zip(offered, found.slots, strict=True) if slots]
        waiting = [node for node in offered if node not in self.active]
        self.spares = waiting + [node for node in self.spares if node not in offered]
        self._ready = waiting + [node for node in self._ready if node not in offered]
        hosts, spares = ([node.report.host for node in nodes] for nodes in (self.active, self.spares))
        request = replace(self._request, hosts=tuple(hosts), spares=tuple(spares), job=found.job)
        return Reformed(request, [slots for slots in found.slots if slots], found.changes)

    def too_few(self) -> str:
        """Why `reform` finds no team."""
        count, ready = len(self.active), len(self._ready)
        left = f"{count} of {self._wanted} hosts left" + (f" and {ready} spare" if ready else "")
        if count + ready < self._least:
            fewer = f" or --min-nodes {count + ready}" if count + ready else ""
            return f"{left}, {self._least} needed; a spare host{fewer} would let it go on"
        return f"{left}, and no number of ranks on {self._least} hosts or more fits batch.global and parallel.pipeline"

    def _offered(self, without: set[str]) -> list[Node]:
        together = [*self.active, *(node for node in self.spares if node in self._ready)]
        return [node for node in together if node.report.host.name not in without][: self._wanted]

    def _fit(self, offered: Sequence[Node]) -> Fit | None:
        slots = [node.report.facts.slots for node in offered if node.report.facts]
        return fit(self._request.job, self._first_slots, slots, self._least)


def _what_is_wrong(node: Node, number: int) -> str | None:
    """number: the attempt that it took part in, or IDLE."""
    if node.agent_error is not None:
        return f"its agent gave up: {node.agent_error.splitlines()[-1]}"
    if node.gone is not None:
        return f"its agent was lost ({node.gone})" if node.agent_lost else f"it was lost: {node.gone}"
    if node.ended_attempt < number:
        return "its ranks could not be ended"
    return None
