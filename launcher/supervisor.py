"""The supervisor: the head's side of a run, a process of its own. It never talks to a terminal.

    connect -> facts -> preflight -> attempt (-> restart -> attempt …) -> report

Each host has a thread (session.py) that posts to one loop; everything that decides happens in this one thread. What
the phases wait for is written as `loop.wait(condition)`; meanwhile messages come into the nodes' state by `_take`.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time

from dstrain.launcher import preflight
from dstrain.launcher.attempt import Attempt, Outcome
from dstrain.launcher.bundle import build_bundle
from dstrain.launcher.checkpoint_moves import bring_checkpoints, wanted_of
from dstrain.launcher.console_link import ConsoleLink
from dstrain.launcher.event_log import Event, EventLog
from dstrain.launcher.event_loop import EventLoop, StopRequested
from dstrain.launcher.ledger import Ledger
from dstrain.launcher.logs import LogFiles
from dstrain.launcher.node import Node, agent_pythons, prepare_message
from dstrain.launcher.plan import LaunchPlan, Request, attempt_environment, make_plan
from dstrain.launcher.planning.layout_check import check_layout
from dstrain.launcher.restarter import Restarter
from dstrain.launcher.restarts import LOST, AttemptRecord, History
from dstrain.launcher.root_cause import Cause
from dstrain.launcher.run_dir import RunDir
from dstrain.launcher.session import Connected, Events, Failed, Gone, HostSession
from dstrain.launcher.store_address import find_address
from dstrain.launcher.team import Team
from dstrain.launcher.trace_file import TraceFile
from dstrain.launcher.transport import ConnectOptions
from dstrain.runtime.spec import frames
from dstrain.runtime.spec.errors import UnreachableError, UsageError
from dstrain.runtime.spec.exit_codes import ExitCode

HEARTBEAT_S = 1.0
SILENCE_S = 8.0  # no byte from a host for this long: it is lost (the promise: noticed within 10 s)
LOCAL_SILENCE_S = 60.0  # of this machine: a pipe's end tells at once of a death; a busy machine may be silent for long
FACTS_TIMEOUT_S = 90.0  # connecting, sending the package, and a prologue
PRELOAD_TIMEOUT_S = 300.0  # importing torch from a cold network disk
MAX_CONNECTING = 64
CLOSE_TIMEOUT_S = 8.0
STUCK_GRACE_S = 2.0  # in place of a longer grace, for ranks that wait for a lost host while a restart waits for them
LEAVE_TIMEOUT_S = 2.0


class Supervisor:
    def __init__(
        self,
        request: Request,
        run: RunDir,
        run_id: str,
        console: socket.socket,
        options: ConnectOptions,
        plan_only: bool = False,
    ) -> None:
        self.request, self.run_dir, self.run_id, self.options = request, run, run_id, options
        self.plan_only = plan_only
        self.console = ConsoleLink(console)
        self.events = EventLog(run, run_id, self._take_event)
        self.ledger = Ledger()
        self.trace = TraceFile(run, request.job, self._note)
        self.logs = LogFiles(run, lambda: self.loop.wake(), lambda text: self.loop.post(-1, text))
        self.loop = EventLoop(self.console, self.logs.take_grown, self._take, self._look)
        self.nodes = self._make_nodes()
        self.team = Team(request, self.nodes, self._note)
        self.history = History(request.max_restarts)
        self.restarter = Restarter(request, self.team, self.history, self.loop, self._note)
        self.attempt: Attempt | None = None
        self.plan: LaunchPlan | None = None
        self.plan_file = "plan.json"
        self.job = request.job
        self.leaving = False

    def _make_nodes(self) -> list[Node]:
        bundle = build_bundle()
        nodes = []
        spares = () if self.plan_only else self.request.spares
        for index, host in enumerate((*self.request.hosts, *spares)):
            session = HostSession(index, host, bundle, agent_pythons(self.request, host), self.logs, self.loop.post)
            nodes.append(Node(session, preflight.HostReport(host)))
        return nodes

    # --- the run ---------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """From the first connection to the report. Never raises for anything that a host or a user does."""
        for number, code in ((signal.SIGTERM, ExitCode.TERMINATED), (signal.SIGINT, ExitCode.INTERRUPTED)):
            signal.signal(number, lambda *_, code=code: self.loop.request_stop(code))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
        started = time.time()
        self.events.write(0, "run_start")
        for note in self.request.notes:
            self._note(note)
        threading.Thread(target=self._beat_forever, name="heartbeat", daemon=True).start()
        try:
            self._connect()
            outcome = self._check()
            if outcome is None:
                outcome = self._attempts()
        except StopRequested as stop:
            outcome = self._stopped(stop.code)
        self._leave()
        self._report(outcome, started)
        return outcome

    def _connect(self) -> None:
        slot = threading.Semaphore(MAX_CONNECTING)
        for node in self.nodes:
            node.session.start(self.options, slot)
        self.loop.wait(lambda: all(self._settled(node) for node in self.team.active))

    def _settled(self, node: Node) -> bool:
        """Has the host said what it is like, or will it not? Its time runs from when its turn to connect came."""
        began = node.session.began_at
        if not node.settled_facts and began is not None and time.monotonic() - began > FACTS_TIMEOUT_S:
            cause = f"no answer within {FACTS_TIMEOUT_S:.0f} s"
            node.report.error = UnreachableError(node.report.host.name, cause, "does a login shell hang there?")
            node.gone = cause
            threading.Thread(target=node.session.close, daemon=True).start()
        return node.settled_facts

    def _check(self) -> Outcome | None:
        """Preflight: everything that can be found out before a rank starts. None: all is well."""
        team = self.team.active
        address = find_address(self.request, team, self.loop)
        self.loop.wait(lambda: all(node.settled_preload for node in team), PRELOAD_TIMEOUT_S)
        problems = preflight.check_all(self.request, [node.report for node in team], address and address[0])
        if not problems and address is None:
            first = team[0].report
            fix = "give --master-addr"
            problems = [preflight.Problem(first.host.name, "rendezvous", "no address that all hosts reach", fix)]
        if problems or address is None:
            self.console.send("problems", problems=[vars(problem) for problem in problems])
            code = preflight.exit_code(problems)
            rows = "\n".join(f"{p.host}: {p.check}: {p.found}; {p.remedy}" for p in problems)
            return Outcome(Cause(code, "launcher", f"{len(problems)} problems before the start", rows))
        slots = [node.report.facts.slots for node in team if node.report.facts]
        try:
            check_layout(self.request, slots)  # now that GPUs are counted
        except UsageError as error:
            headline, _, detail = str(error).partition("\n")
            return Outcome(Cause(ExitCode.USAGE, "launcher", headline, detail))
        self.team.begin(slots)
        plan = make_plan(self.request, self.run_id, slots)
        self._adopt(plan, "plan.json")
        self.address = address
        if self.plan_only:
            self.console.send("plan", plan=plan.to_json())
            return Outcome(Cause(ExitCode.OK, "launcher", "planned"))
        return None

    def _adopt(self, plan: LaunchPlan, name: str) -> None:
        """This is the plan from now on; where it is the old one, that one's file says it."""
        if self.plan == plan:
            return
        self.plan, self.plan_file = plan, name
        try:
            self.run_dir.write_json(name, plan.to_json())
        except OSError as error:
            self._note(f"the plan cannot be written: {error.strerror}: {self.run_dir.path}")

    def _attempts(self) -> Outcome:
        """Attempts with a fresh store each, until one succeeds, none is left, or going on is pointless."""
        number = 0
        why: str | None = None
        while True:
            outcome = self._run_attempt(number, why)
            if outcome.ok or not self.request.max_restarts:
                return outcome
            following = self.restarter.next(outcome, self.run_id)
            if following is None:
                self._note(f"not started again: {self.restarter.refusal}")
                return outcome
            aside = self.history.take_aside(self.team.aside)
            self.events.write(number, "restart", cause=outcome.cause.to_json(), set_aside=aside)
            number, why = number + 1, following.why
            self.address, self.job = following.address, following.job
            self._adopt(following.plan, f"plan-attempt-{number}.json")

    def _run_attempt(self, number: int, why: str | None) -> Outcome:
        assert self.plan is not None
        for wanted in wanted_of(self.request.job, number, has_saved=self.history.furthest.checkpoint >= 0):
            bring_checkpoints(self.nodes, self.team.active, wanted, self.loop)
        hosts = [node.host for node in self.plan.nodes]
        self.history.begin(AttemptRecord(number, hosts, self.plan.world_size, self.plan_file, time.time(), why))
        self.attempt = attempt = Attempt(number, self.plan, self.team.active, self.logs, self._note)
        self._start_ranks(number)
        self.loop.wait(lambda: attempt.finished() is not None)
        outcome = attempt.finished()
        assert outcome is not None
        if not outcome.ok:
            detected_ts = time.time_ns()
            self.loop.wait(attempt.explained, attempt.explanation_s)
            outcome = attempt.finished() or outcome
            self._say_failure(number, outcome.cause, detected_ts)
            is_stuck = outcome.cause.code in (*LOST, ExitCode.HANG) and self.history.left > 0
            self._end_ranks(min(self.request.grace_s, STUCK_GRACE_S) if is_stuck else self.request.grace_s)
            self.events.write(number, "ended")
        self.logs.close_attempt(number)
        self.history.end(None if outcome.ok else outcome.cause, time.time())
        self.attempt = None
        return outcome

    def _start_ranks(self, number: int) -> None:
        assert self.plan is not None
        address, port = self.address
        self._say_start(number)
        for index, (node, part) in enumerate(zip(self.team.active, self.plan.nodes, strict=True)):
            known = self.team.active[0].report.listening if index == 0 else node.report.dialled
            interface = self.request.interface or (known.interfaces.get(address, "") if known else "")
            common = attempt_environment(self.run_id, number, self.request.max_restarts, address, port, interface)
            mine = set(self.request.environment) | set(self.request.pass_environment)
            common = {name: value for name, value in common.items() if name not in mine or "IFNAME" not in name}
            node.session.attempt = number
            start = frames.Start(number, list(part.processes), common, address, port, index == 0, self.job)
            node.session.send(start)

    def _say_start(self, number: int) -> None:
        assert self.plan is not None
        self.events.begin_attempt()
        first = next(node for node, part in zip(self.team.active, self.plan.nodes, strict=True) if part.processes)
        self.events.write(
            number,
            "launch",
            world_size=self.plan.world_size,
            hosts=[node.host for node in self.plan.nodes],
            clock_offset_s=first.clock_offset_ns / 1e9,
        )
        self.console.send(
            "start",
            attempt=number,
            world_size=self.plan.world_size,
            hosts={node.host: [spec.rank for spec in node.processes] for node in self.plan.nodes},
            spares=list(self.plan.spares),
        )

    def _say_failure(self, number: int, cause: Cause, detected_ts: int) -> None:
        fields = {"code": cause.code, "headline": cause.headline, "host": cause.host, "of": cause.rank}
        self.events.write(number, "failure", detected_ts=detected_ts, **fields)

    def _end_ranks(self, grace_s: float) -> None:
        """SIGTERM, then SIGKILL after the grace; a host that does not answer is cut off when the run is left."""
        if self.attempt is None:
            return
        self.attempt.ending = True
        number = self.attempt.number
        waiting = [node for node in self.team.active if node.gone is None and node.ended_attempt < number]
        for node in waiting:
            node.session.send(frames.Stop(0.0 if self.loop.stop_times > 1 else grace_s))

        def ended() -> bool:
            return all(node.gone is not None or node.ended_attempt >= number for node in waiting)

        self.loop.wait(lambda: ended() or self.loop.stop_times > 1, grace_s + CLOSE_TIMEOUT_S, stoppable=False)
        if not ended():
            for node in waiting:
                node.session.send(frames.Stop(0.0))
            self.loop.wait(ended, LEAVE_TIMEOUT_S, stoppable=False)

    def _stopped(self, code: ExitCode) -> Outcome:
        words = {
            ExitCode.INTERRUPTED: "interrupted (Ctrl-C)",
            ExitCode.HANGUP: "the console has gone",
            ExitCode.TERMINATED: "terminated (SIGTERM)",
        }
        attempt = self.attempt
        self._end_ranks(self.request.grace_s)
        if attempt is None:
            return Outcome(Cause(code, "launcher", words[code]), max(0, len(self.history.attempts) - 1))
        return Outcome(
            Cause(code, "launcher", words[code]), attempt.number, ranks=attempt.statuses, notes=attempt.notes
        )

    def _leave(self) -> None:
        """Close every host's side; whoever is slow is cut off, which ends its job too."""
        self.leaving = True
        for node in self.nodes:
            node.session.send(frames.Close())
        self.loop.wait(
            lambda: all(node.gone is not None or not node.connected for node in self.nodes),
            LEAVE_TIMEOUT_S,
            stoppable=False,
        )
        closers = [threading.Thread(target=node.session.close, daemon=True) for node in self.nodes]
        for closer in closers:
            closer.start()
        deadline = time.monotonic() + LEAVE_TIMEOUT_S
        for closer in closers:
            closer.join(max(0.0, deadline - time.monotonic()))

    def _report(self, outcome: Outcome, started: float) -> None:
        cause, trace = outcome.cause, None if self.plan_only else self.trace.write()
        self.events.write(outcome.attempt, "run_end", exit_code=cause.code, origin=cause.origin)
        goodput = self.ledger.goodput
        report = {
            "run_id": self.run_id,
            "exit_code": cause.code,
            "origin": cause.origin,
            "cause": None if outcome.ok else cause.to_json(),
            "started": started,
            "ended": time.time(),
            "attempts": self.history.close(None if outcome.ok else cause, self.team.aside, time.time()),
            "no_restart": self.restarter.refusal,
            "world_size": self.plan.world_size if self.plan else None,
            "hosts": [node.host for node in self.plan.nodes] if self.plan else [h.name for h in self.request.hosts],
            "set_aside": self.team.aside,
            "target": self.request.target.title,
            "ranks": outcome.ranks,
            "notes": outcome.notes,
            "goodput": None if goodput is None else round(goodput, 5),
            "ledger": None if goodput is None else self.ledger.to_json(),
            "trace": trace,
        }
        self.console.grown(self.logs.take_grown())
        try:
            self.run_dir.write_json("report.json", report)
        except OSError as error:
            self._note(f"the report cannot be written: {error.strerror}: {self.run_dir.report}")
        self.console.send("result", report=report)
        self.loop.wait(lambda: self.console.gone or not self.console.wants_to_write, None, stoppable=False)

    def _beat_forever(self) -> None:
        """In a thread of its own: a disk that stalls here must not look like our death to the hosts."""
        while True:
            for node in self.nodes:
                if node.report.facts is not None and node.gone is None:
                    node.session.send(frames.Heartbeat())
            time.sleep(HEARTBEAT_S)

    def _look(self) -> None:
        """Once a second: what of the spares, does the attempt go on, who is silent."""
        if self.plan is not None and not self.leaving:
            for node in self.team.unsettled:
                self._settled(node)
            self.team.look_at_spares()
        if self.attempt is not None:
            self.attempt.look()
        self._check_silence()

    def _check_silence(self) -> None:
        for node in self.nodes:
            if node.report.facts is None or node.gone is not None:
                continue
            silent_s = node.session.silent_s()
            if silent_s > (LOCAL_SILENCE_S if node.report.host.transport == "local" else SILENCE_S):
                self._lose(node, f"nothing heard from it for {silent_s:.0f} s", agent_lost=False)

    # --- what the hosts say ----------------------------------------------------------------------------------

    def _take(self, index: int, message: object) -> None:
        if isinstance(message, str):
            self._note(message)
            return
        node = self.nodes[index]
        report = node.report
        match message:
            case Connected():
                node.connected = True
                node.session.send(prepare_message(self.request, node.report.host, self.run_id))
            case Failed(error):
                report.error = error
                node.gone = str(error)
            case Gone(complaint, _):
                self._lose(node, complaint or "the connection ended", message.program_ended)
            case frames.HostFacts():
                report.facts = message
                node.clock_offset_ns = message.clock_ns - time.time_ns()
            case frames.PreloadFacts():
                report.preload = message
            case frames.Listening():
                report.listening = message
            case frames.Dialled():
                report.dialled = message
            case frames.AgentFailed(reason):
                node.agent_error = reason.strip()
            case frames.AllEnded(number):
                node.ended_attempt = number
            case Events(rank, data):
                lines = self.events.append(rank, data)
                if rank == 0:
                    self.history.furthest.take(lines)
            case frames.Heartbeat():
                pass
            case _ if self.attempt is not None and node in self.team.active:
                self._take_of_attempt(node, self.attempt, message)

    def _take_of_attempt(self, node: Node, attempt: Attempt, message: object) -> None:
        if isinstance(message, frames.Exited):
            fields = {"status": message.status, "of": message.rank, "host": node.report.host.name}
            self.events.write(attempt.number, "rank_exit", **fields)
        attempt.take(node, message)

    def _take_event(self, event: Event) -> None:
        self.ledger.take(event)
        self.trace.take(event)
        if self.attempt is not None and event["rank"] is not None:
            self.attempt.take_event(event["rank"], event)

    def _lose(self, node: Node, why: str, agent_lost: bool) -> None:
        """The connection is over: expected at the end, the cause of the end before it."""
        if node.gone is not None:
            return
        node.gone, node.agent_lost = why, agent_lost
        if self.attempt is not None and not self.attempt.ending and node in self.team.active:
            self.events.write(self.attempt.number, "host_lost", host=node.report.host.name, why=why)
        if node.report.facts is None or (self.attempt is None and self.plan is None and node.report.error is None):
            name = node.report.host.name
            reason = node.agent_error.splitlines()[-1] if node.agent_error else why
            node.report.error = UnreachableError(name, f"lost before the start: {reason}", f"try: ssh {name}")
        threading.Thread(target=node.session.close, daemon=True).start()

    def _note(self, text: str) -> None:
        self.console.send("note", text=text)
        self.events.write(max(0, len(self.history.attempts) - 1), "note", text=text)


def run_supervised(
    request: Request, run: RunDir, run_id: str, console: socket.socket, options: ConnectOptions, plan_only: bool
) -> int:
    """The supervisor's process: a session of its own, so that nothing a terminal does concerns it."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    log = os.open(run.path / "supervisor.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for fd, source in ((0, null), (1, log), (2, log)):
        os.dup2(source, fd)
    for number in (signal.SIGHUP, signal.SIGPIPE, signal.SIGTSTP):
        signal.signal(number, signal.SIG_IGN)
    return Supervisor(request, run, run_id, console, options, plan_only).run().cause.code
