"""One attempt: what every rank has come to, when the attempt is over, and what was to blame."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from dstrain.launcher import stacks
from dstrain.launcher.blame import Standing
from dstrain.launcher.hang import Finding, HangWatch
from dstrain.launcher.inquiry import Inquiry
from dstrain.launcher.logs import LogFiles
from dstrain.launcher.node import Node
from dstrain.launcher.plan import LaunchPlan
from dstrain.launcher.root_cause import Cause, Failure, Weight, root_cause
from dstrain.runtime.spec import frames
from dstrain.runtime.spec.exit_codes import ExitCode
from dstrain.runtime.spec.frames import Stream

PAUSED_NOTE_S = 2.0
PAUSED_LIMIT_S = 10.0  # a stopped rank is named as hung well within 30 s
STALLED_S = 7.0  # after a rank left: all others quiet this long are asked where they stand
STALLED_BLIND_S = 30.0  # the same for programs that cannot be asked
ASK_AGAIN_S = 10.0
OWN_SETTLE_S = 0.3  # an exception is rarely beaten by an earlier one that is still on its way
VICTIM_SETTLE_S = 2.0  # "closed by peer" is worth waiting for the peer's own words
SILENT_SETTLE_S = 9.0  # a host that has been silent may be what they lost
WAITING = re.compile(r"torch/(distributed|nn/parallel|autograd/graph)|deepspeed/comm")


@dataclass(frozen=True)
class Outcome:
    """How an attempt, or the run, ended. ranks: exit status by rank. not_started: host -> why a rank did not run."""

    cause: Cause
    attempt: int = 0
    may_restart: bool = False
    ranks: dict[int, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    not_started: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return self.cause.code == ExitCode.OK


class Attempt:
    """Takes the agents' messages; `finished` says whether it is over, `explained` whether more is worth waiting for."""

    def __init__(
        self, number: int, plan: LaunchPlan, nodes: list[Node], logs: LogFiles, note: Callable[[str], None]
    ) -> None:
        self.number, self.plan = number, plan
        self.ending = False  # we end it ourselves: what dies now is no failure
        self._nodes, self._logs, self._note = nodes, logs, note
        self.statuses: dict[int, int] = {}
        self.failures: list[Failure] = []
        self.left: list[tuple[int, str]] = []
        self.notes: list[str] = []
        self._failed_at: float | None = None
        self._paused: dict[int, float] = {}
        self._quiet: dict[int, float] = {}
        self._stall_asked_at = 0.0
        self._stalled: Cause | None = None
        self._watch = HangWatch(plan.hang_s)
        self._inquiry = Inquiry(nodes)
        self._asks_for_stall = False
        self._hung: Cause | None = None
        self._finding: Finding | None = None  # what `_hung` is made of, but for a rank that is stopped

    # --- what the agents say ---------------------------------------------------------------------------------

    def take(self, node: Node, message: object) -> None:
        """Take a message in."""
        match message:
            case frames.Exited():
                self._take_exit(node, message)
            case frames.StartFailed(rank, reason):
                self.statuses[rank] = 127
                self._fail(Failure(rank, node.report.host.name, 127, time.time_ns(), "", start_error=reason))
            case frames.Paused(seconds):
                self._take_paused(node, {int(rank): value for rank, value in seconds.items()})
            case frames.Quiet(seconds):
                self._quiet.update((int(rank), value) for rank, value in seconds.items())
                if self._should_ask():
                    self._inquiry.ask()
                    self._asks_for_stall = True
            case frames.Stacks():
                self._take_stacks(node, message)

    def _take_exit(self, node: Node, message: frames.Exited) -> None:
        rank, host = message.rank, node.report.host.name
        self.statuses[rank] = message.status
        if message.status == 0:
            if not self.ending:
                self.left.append((rank, host))
            return
        if self.ending or message.swept:
            return
        stderr = self._logs.tail(self.number, rank, Stream.STDERR)
        at_ns = message.clock_ns - node.clock_offset_ns
        self._fail(Failure(rank, host, message.status, at_ns, stderr, out_of_memory=message.out_of_memory))

    def _fail(self, failure: Failure) -> None:
        self.failures.append(failure)
        self._failed_at = self._failed_at or time.monotonic()

    def _take_paused(self, node: Node, seconds: dict[int, float]) -> None:
        mine = {spec.rank for part in self.plan.nodes if part.host == node.report.host.name for spec in part.processes}
        for rank, value in seconds.items():
            if value >= PAUSED_NOTE_S > self._paused.get(rank, 0.0):
                self._remember(f"rank {rank} on {node.report.host.name} is stopped (SIGSTOP): the others wait for it")
        self._paused = {rank: v for rank, v in self._paused.items() if rank not in mine} | seconds

    def _remember(self, note: str) -> None:
        self.notes.append(note)
        self._note(note)

    # --- ranks that left while others wait -------------------------------------------------------------------

    def _running(self) -> list[int]:
        return [rank for rank in range(self.plan.world_size) if rank not in self.statuses]

    def _should_ask(self) -> bool:
        running = self._running()
        if not self.left or not running or time.monotonic() - self._stall_asked_at < ASK_AGAIN_S:
            return False
        if all(self._quiet.get(rank, 0.0) >= STALLED_S for rank in running):
            self._stall_asked_at = time.monotonic()
            return True
        return False

    def _take_stacks(self, node: Node, message: frames.Stacks) -> None:
        self._inquiry.take(node, message)
        if self._hung is not None:
            self._keep_stacks(self._standings([message]), self._hung.headline)
            self._complete_cause(message)
        elif self._asks_for_stall:
            self._weigh_stall(message)
        self._weigh_answers()

    def _weigh_stall(self, message: frames.Stacks) -> None:
        """A rank that stands in a collective waits for who has left; one that cannot say gets more time."""
        running, texts = self._running(), message.frames
        quiet_s = min((self._quiet.get(rank, 0.0) for rank in running), default=0.0)
        waiting = [text for text in texts.values() if WAITING.search(text) or stacks.waits(stacks.main_thread(text))]
        blind = not texts and quiet_s >= STALLED_BLIND_S
        if running and (waiting or blind):
            self._stalled = self._left_early(f"quiet for {quiet_s:.0f} s", next(iter(waiting), ""))

    def _left_early(self, sign: str, text: str) -> Cause:
        running, (rank, host) = self._running(), self.left[0]
        stuck = ", ".join(map(str, running[:8])) + (" …" if len(running) > 8 else "")
        return Cause(
            ExitCode.LEFT_EARLY,
            "launcher",
            f"rank {rank} on {host} left early with exit code 0; ranks {stuck} wait for it ({sign})",
            stacks.shown(text),
            "every rank must take part in every collective: look for an early return or a shorter data loader",
            host,
            rank,
            len(running),
        )

    # --- steps that do not come ------------------------------------------------------------------------------

    def take_event(self, rank: int, event: Mapping[str, Any]) -> None:
        """An event of a rank: it lives."""
        self._watch.progress.take(rank, event, time.monotonic())

    def look(self) -> None:
        """Once a second: does a rank hang? It is stopped, or steps do not come."""
        if self.ending or self._hung is not None or self.failures or self._stalled is not None:
            return
        running = self._running()
        for rank, seconds in self._paused.items():
            if seconds >= PAUSED_LIMIT_S and rank in running and self.plan.hang_s != 0:
                self._hung = self._stopped(rank, seconds)
                self._inquiry.ask(all_threads=True)
                return
        if self._inquiry.is_open:
            self._weigh_answers()
        elif self._watch.should_ask(running, time.monotonic()):
            self._inquiry.ask()

    def _weigh_answers(self) -> None:
        if not self._inquiry.is_open or not self._inquiry.is_complete():
            return
        self._inquiry.is_open = self._asks_for_stall = False
        if self.ending or self._hung is not None or self.failures or self._stalled is not None:
            return
        ranks = self._standings(self._inquiry.answers.values())
        finding = self._watch.judge(ranks, self._running(), time.monotonic())
        if finding is None:
            return
        if not finding.is_hang:
            self._keep_stacks(ranks, finding.note())
            self._remember(finding.note())
        elif self.left and finding.blame.all_wait:
            self._stalled = self._left_early(f"no step for {finding.silent_s:.0f} s", ranks[0].text)
        else:
            self._finding, self._hung = finding, finding.cause("", self._logs.stacks_of(self.number))
            self._inquiry.ask(all_threads=True)

    def _standings(self, answers: Collection[frames.Stacks]) -> list[Standing]:
        running, steps = set(self._running()), self._watch.progress.steps
        texts = {int(rank): text for answer in answers for rank, text in answer.frames.items()}
        states = {int(rank): state for answer in answers for rank, state in answer.states.items()}
        return [
            Standing(rank, self.plan.host_of(rank).host, states[rank], texts.get(rank, ""), steps.get(rank))
            for rank in sorted(running & states.keys())
        ]

    def _keep_stacks(self, ranks: list[Standing], why: str) -> None:
        for one in ranks:
            known = "" if one.step is None else f", step {one.step} done"
            text = f"{why}\nprocess state {one.state}{known}\n{one.text or 'no answer'}\n"
            self._logs.write_stack(self.number, one.host, one.rank, text)

    def _complete_cause(self, message: frames.Stacks) -> None:
        """What all threads of the rank that hangs say may be more than its main thread did."""
        if self._finding is not None and (text := message.frames.get(str(self._finding.blame.behind[0].rank))):
            self._hung = self._finding.cause(text, self._logs.stacks_of(self.number))

    # --- the end ---------------------------------------------------------------------------------------------

    def finished(self) -> Outcome | None:
        """None while it runs well."""
        cause, may_restart = self._cause()
        if cause is None:
            return None
        not_started = {failure.host: failure.start_error for failure in self.failures if failure.start_error}
        ranks = dict(sorted(self.statuses.items()))
        return Outcome(cause, self.number, may_restart, ranks, self.notes, not_started)

    def _cause(self) -> tuple[Cause | None, bool]:
        if self._hung is not None:
            return self._hung, True
        own = any(failure.weight is Weight.OWN for failure in self.failures)
        lost = lost_host(self._nodes)
        if lost is not None and not own:
            return lost, True
        if self.failures:
            return root_cause(self.failures, self.left, len(self._running())), True
        if self._stalled is not None:
            return self._stalled, False
        ended = all(node.ended_attempt == self.number for node in self._nodes)
        if ended and not self._running():
            return Cause(ExitCode.OK, "worker", "all ranks ended with 0"), False
        return None, False

    def _stopped(self, rank: int, seconds: float) -> Cause:
        host = self.plan.host_of(rank).host
        headline = f"rank {rank} on {host} hangs: it is stopped (SIGSTOP) since {seconds:.0f} s"
        return Cause(ExitCode.HANG, "launcher", headline, "", "who stopped it? kill -CONT lets it go on", host, rank)

    def explained(self) -> bool:
        """Has everything arrived that could change the root cause?"""
        if self._hung is not None:
            return self._inquiry.is_complete()
        if self._failed_at is None or not self._running() or any(node.gone for node in self._nodes):
            return True
        passed = time.monotonic() - self._failed_at
        if any(failure.weight is Weight.OWN for failure in self.failures):
            return passed >= OWN_SETTLE_S
        silent = max(time.monotonic() - node.session.heard_at for node in self._nodes)
        return passed >= (SILENT_SETTLE_S if silent > VICTIM_SETTLE_S else VICTIM_SETTLE_S)

    explanation_s = SILENT_SETTLE_S + 1.0


def lost_host(nodes: list[Node]) -> Cause | None:
    """Why the first host that we have lost was lost; None: all are there."""
    for node in nodes:
        host = node.report.host.name
        if node.agent_error is not None:
            reason = node.agent_error.splitlines()[-1]
            headline = f"the agent on {host} gave up: {reason}"
            return Cause(ExitCode.AGENT_LOST, "launcher", headline, node.agent_error, "", host)
        if node.gone is None:
            continue
        if node.agent_lost:
            headline = f"the agent on {host} was lost ({node.gone})"
            fix = "was it killed? its warden has ended the ranks there"
            return Cause(ExitCode.AGENT_LOST, "launcher", headline, "", fix, host)
        headline = f"host {host} was lost: {node.gone}"
        fix = "it ends its own ranks when it is cut off; look at its network and power"
        return Cause(ExitCode.HOST_UNREACHABLE, "launcher", headline, "", fix, host)
    return None
