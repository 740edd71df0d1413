"""The few blocks that the launcher itself prints: first line, table of problems, plan, end."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from dstrain.launcher.console_text import escape, fold_hosts, fold_numbers
from dstrain.launcher.ledger import summary_line
from dstrain.launcher.plan import Target


def _console() -> Any:
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def start_line(message: Mapping[str, Any]) -> str:
    """`dstrain: 4 ranks on gpu[1-2], attempt 2; spare: gpu3`."""
    hosts = fold_hosts(message["hosts"])
    count = message["world_size"]
    again = f", attempt {message['attempt'] + 1}" if message["attempt"] else ""
    spare = f"; spare: {fold_hosts(message['spares'])}" if message["spares"] else ""
    return f"dstrain: {count} {'rank' if count == 1 else 'ranks'} on {hosts}{again}{spare}"


def show_problems(problems: Sequence[Mapping[str, Any]]) -> None:
    """All failures of all hosts in one table, on stderr; plain lines in a pipe."""
    hosts = len({problem["host"] for problem in problems})
    print(f"dstrain: not started: {_count(len(problems), 'problem')} on {_count(hosts, 'host')}", file=sys.stderr)
    if not sys.stderr.isatty():
        for p in problems:
            print(escape(f"dstrain: {p['host']}: {p['check']}: {p['found']}; {p['remedy']}"), file=sys.stderr)
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(show_lines=True)
    for name in ("host", "check", "found", "what to do"):
        table.add_column(name, overflow="fold")
    for p in problems:
        table.add_row(Text(p["host"], "bold"), p["check"], Text(escape(p["found"])), Text(escape(p["remedy"]), "green"))
    console = _console()
    console.soft_wrap = False
    console.print(table)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def show_result(report: Mapping[str, Any], run_path: str) -> None:
    """The end: one root cause with its traceback, a count of the victims, where the logs are."""
    from rich.text import Text

    console, cause, goodput = _console(), report["cause"], summary_line(report)
    if goodput:
        console.print(Text(f"dstrain: {goodput}", "dim"))
    if trace := report.get("trace"):
        console.print(Text(f"dstrain: {trace_line(trace, run_path)}", "dim"))
    if cause is None:
        took = report["ended"] - report["started"]
        console.print(Text(f"dstrain: done in {took:.1f} s; logs in {run_path}", "green"))
        return
    console.print(Text(escape(f"dstrain: {cause['headline']}"), "bold red"))
    for line in cause["detail"].splitlines():
        console.print(Text(escape(f"  {line}")))
    victims = cause.get("victims", 0)
    if victims:
        console.print(Text(f"dstrain: {_followed(victims)}", "dim"))
    if cause["remedy"]:
        console.print(Text(escape(f"dstrain: {cause['remedy']}"), "yellow"))
    console.print(Text(f"dstrain: exit code {report['exit_code']}; logs in {run_path}", "dim"))


def trace_line(trace: Mapping[str, Any], run_path: str) -> str:
    """`the timeline of 3 steps is in runs/…/trace.json, for ui.perfetto.dev; bubble 21.3 %`."""
    steps, bubble = _count(trace["steps"], "step"), trace["bubble"]
    share = "" if bubble is None else f"; bubble {bubble:.1%}"
    return f"the timeline of {steps} is in {run_path}/{trace['file']}, for ui.perfetto.dev{share}"


def _followed(victims: int) -> str:
    if victims == 1:
        return "1 other rank followed it (failed alike, lost its peer, or was ended)"
    return f"{victims} other ranks followed it (failed alike, lost their peer, or were ended)"


def show_plan(plan: Mapping[str, Any], as_json: bool) -> None:
    """What `run` would execute."""
    if as_json:
        print(json.dumps(plan, indent=2))
        return
    _say(f"run         {Target(**plan['target']).title}")
    _say(f"directory   {plan['cwd']}")
    _say(f"ranks       {plan['world_size']} on {_count(len(plan['nodes']), 'host')}")
    _say(f"rendezvous  {plan['master_address']}")
    _say(f"restarts    {plan['max_restarts']}, grace {plan['grace_s']:g} s")
    _say(f"hang after  {_hang_words(plan['hang_s'])}")
    for name, value in plan["environment"].items():
        _say(f"environment {name}={value}")
    for node in plan["nodes"]:
        ranks = fold_numbers(spec["rank"] for spec in node["processes"]) or "none"
        gpus = f", GPUs {','.join(map(str, node['gpus']))}" if node["gpus"] is not None else ""
        _say(f"host        {node['host']} ({node['transport']}): ranks {ranks}{gpus}")
    for name in plan["spares"]:
        _say(f"spare       {name}")


def _hang_words(hang_s: float | None) -> str:
    if hang_s is None:
        return "a time by the run's own steps"
    return f"{hang_s:g} s without a step" if hang_s else "no time at all: it is not looked for"


def _say(text: str) -> None:
    """A line on stdout that may hold words of any bytes."""
    print(escape(text).encode(errors="backslashreplace").decode())
