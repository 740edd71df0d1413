"""Where the store of an attempt listens: on rank 0's host, at an address that all others have dialled."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from dstrain.launcher import preflight
from dstrain.launcher.event_loop import EventLoop
from dstrain.launcher.node import Node
from dstrain.launcher.plan import Request
from dstrain.runtime.spec import frames

DIAL_TIMEOUT_S = 3.0
ANSWER_TIMEOUT_S = 8.0

Address = tuple[str, int]


def find_address(request: Request, nodes: Sequence[Node], loop: EventLoop) -> Address | None:
    """Listen on the first host, dial from all others, choose; None: no address serves all. Fresh for each attempt."""
    first, others = nodes[0], nodes[1:]
    if first.report.error is not None:
        return None
    token = secrets.token_hex(8)
    for node in nodes:
        node.report.listening = node.report.dialled = None
    first.session.send(frames.Listen(_candidates(request, nodes), request.master_port, token))
    loop.wait(lambda: bool(first.report.listening or first.report.error or first.gone), ANSWER_TIMEOUT_S)
    if first.report.listening is None or not first.report.listening.addresses:
        return None
    callers = [node for node in others if node.report.error is None and node.gone is None]
    for node in callers:
        node.session.send(frames.Dial(first.report.listening.addresses, token, DIAL_TIMEOUT_S))
    loop.wait(lambda: all(n.report.dialled or n.report.error or n.gone for n in callers), 2 * ANSWER_TIMEOUT_S)
    return preflight.choose_address(request, [node.report for node in nodes])


def _candidates(request: Request, nodes: Sequence[Node]) -> list[str]:
    """Addresses for the store, best first: what the user says, else what the hosts say."""
    if request.master_address:
        return [request.master_address]
    if len(nodes) == 1:
        return ["127.0.0.1"]
    host, facts = nodes[0].report.host, nodes[0].report.facts
    return [*([host.addr] if host.addr else []), *(facts.addresses if facts else [])]


def who_cannot_meet(reports: Sequence[preflight.HostReport]) -> dict[str, str]:
    """Behind a search in vain, host -> why, of those without whom another may succeed; empty: nobody in particular.

    Where most others cannot dial the first host, it is the first host.
    """
    first, others = reports[0], reports[1:]
    if first.listening is None:
        return {first.host.name: "it did not answer when it was to listen"}
    if not first.listening.addresses:
        return {first.host.name: f"it has no socket for the store ({_errors(first.listening.errors)})"}
    deaf = {}
    for report in others:
        if report.dialled is None:
            deaf[report.host.name] = "it did not answer when it was to dial the store"
        elif not report.dialled.interfaces:
            deaf[report.host.name] = f"it cannot dial {first.host.name} ({_errors(report.dialled.errors)})"
    if len(deaf) > max(1, len(others) / 2):
        return {first.host.name: f"{len(deaf)} of {len(others)} others cannot dial it"}
    return deaf


def _errors(errors: dict[str, str]) -> str:
    return "; ".join(f"{name}: {why}" for name, why in errors.items()) or "no address at all"
