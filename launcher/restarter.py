"""Between two attempts: who is left, whether to go on, how long to wait, and where the next store listens."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from dstrain.launcher.attempt import Outcome
from dstrain.launcher.console_text import fold_hosts
from dstrain.launcher.event_loop import EventLoop
from dstrain.launcher.plan import LaunchPlan, Request, make_plan
from dstrain.launcher.planning.layout_check import check_layout
from dstrain.launcher.restarts import History
from dstrain.launcher.store_address import Address, find_address, who_cannot_meet
from dstrain.launcher.team import IDLE, Reformed, Team
from dstrain.runtime.spec.errors import UsageError

SPARE_WAIT_S = 30.0  # for spares that are still importing torch when they are needed


class Next(NamedTuple):
    """The next attempt. why: as the report says it. job: the job's JSON for these hosts."""

    plan: LaunchPlan
    address: Address
    why: str
    job: str | None


class Restarter:
    """refusal: why the last call of `next` found nothing to go on with."""

    def __init__(
        self, request: Request, team: Team, history: History, loop: EventLoop, note: Callable[[str], None]
    ) -> None:
        self._request, self._team, self._history, self._loop, self._note = request, team, history, loop, note
        self._said: tuple[str, ...] = ()
        self.refusal: str | None = None

    def next(self, outcome: Outcome, run_id: str) -> Next | None:
        """What follows a failed attempt; None: nothing, see `refusal`. May raise StopRequested while it waits."""
        history, team = self._history, self._team
        before = [node.report.host.name for node in team.active]
        team.drop(outcome.attempt)
        replaced = self._set_suspects_aside(outcome)
        self.refusal = self._pointless(outcome, replaced)
        not_before = time.monotonic() + history.delay_s()
        while self.refusal is None:
            self._await_spares()
            formed = team.reform()
            if formed is None:
                self.refusal = team.too_few()
                break
            try:
                check_layout(formed.request, formed.slots)
            except UsageError as error:
                self.refusal = str(error)
                break
            wait_s = max(not_before, team.fence) - time.monotonic()
            why = self._announce(outcome, formed, before, wait_s)
            self._loop.wait(self._has_lost_one, max(0.0, wait_s))
            address = None if self._has_lost_one() else find_address(formed.request, team.active, self._loop)
            if address is not None and not self._has_lost_one():
                plan = make_plan(formed.request, run_id, formed.slots, formed.changes)
                return Next(plan, address, why, formed.request.job)
            if self._has_lost_one():
                team.drop(IDLE)
            else:
                self.refusal = self._set_deaf_aside()
        return None

    def _pointless(self, outcome: Outcome, replaced: bool) -> str | None:
        history = self._history
        if not outcome.may_restart:
            return "another attempt would end alike"
        if history.left <= 0:
            return f"{history.max_restarts} of {history.max_restarts} restarts are used"
        same = history.same_again()
        if same is not None and not replaced:
            return f"it has failed twice alike without progress ({same})"
        return None

    def _set_suspects_aside(self, outcome: Outcome) -> bool:
        """Hosts that fail again and again, if there are enough others. True: somebody else takes the place."""
        team = self._team
        suspects = {name: f"a rank could not be started: {why}" for name, why in outcome.not_started.items()}
        if (name := self._history.suspect()) is not None:
            suspects.setdefault(name, "its ranks were the root cause twice in a row")
        suspects = {name: why for name, why in suspects.items() if name not in team.aside}
        if not suspects or self._history.left <= 0 or not outcome.may_restart:
            return False
        self._await_spares(without=len(suspects))
        if not team.can_do_without(set(suspects)):
            return False
        for node in team.active:
            if node.report.host.name in suspects:
                team.set_aside(node, suspects[node.report.host.name], keep_connected=True)
        return True

    def _set_deaf_aside(self) -> str | None:
        """Who kept the others from meeting is set aside; a word if that is nobody in particular."""
        reports = [node.report for node in self._team.active]
        first = reports[0]
        fixed = self._request.master_address or self._request.master_port
        if fixed and first.listening is not None and not first.listening.addresses:
            why = "; ".join(first.listening.errors.values())
            return f"{first.host.name} cannot listen at the fixed --master-addr or --master-port ({why})"
        deaf = who_cannot_meet(reports)
        for node in self._team.active:
            if node.report.host.name in deaf:
                self._team.set_aside(node, deaf[node.report.host.name], keep_connected=True)
        return None if deaf else "no address of the first host is one that all others reach; give --master-addr"

    def _await_spares(self, without: int = 0) -> None:
        team = self._team
        self._loop.wait(lambda: team.has_enough_ready(without) or not team.unsettled, SPARE_WAIT_S)

    def _has_lost_one(self) -> bool:
        return any(node.gone is not None or node.agent_error is not None for node in self._team.active)

    def _announce(self, outcome: Outcome, formed: Reformed, before: list[str], wait_s: float) -> str:
        """Say what comes next; returns why, for the report."""
        names = [host.name for host in formed.request.hosts]
        where = "" if names == before else f" on {fold_hosts(names)}"
        when = f" in {wait_s:.0f} s" if wait_s >= 0.5 else ""
        left, most = self._history.left, self._history.max_restarts
        self._note(f"{outcome.cause.headline}; starting again{where}{when} ({left} of {most} left)")
        for line in formed.changes if formed.changes != self._said else ():
            self._note(line)
        self._said = formed.changes
        return outcome.cause.headline
