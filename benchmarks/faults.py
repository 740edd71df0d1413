"""How soon each fault is noticed, and gone: the table of faults, measured.

    python benchmarks/faults.py [ROUNDS]

Two hosts of two ranks each behind one sshd on this machine, and for links in network namespaces; root and
openssh-server are needed. Of each fault, from the moment that it happens: seconds until no process of the job is left
on any host, and until the command has ended with its code and the cause.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from conftest import Run

import lab
from measure import Series, describe

WAITING = """
import os, signal, subprocess
rank, mark = os.environ["RANK"], os.environ["MARK"]
subprocess.Popen(["sleep", mark])
subprocess.Popen(["setsid", "sh", "-c", f"sleep {mark} & sleep {mark}"])
open(f"{rank}.ready", "w").close()
signal.pause()
"""
IN_COLLECTIVE = """
import os, torch, torch.distributed as dist
dist.init_process_group("gloo")
dist.barrier()
open(f"{os.environ['RANK']}.ready", "w").close()
if os.environ["RANK"] == "3":
    while not os.path.exists("go"):
        pass
    raise SystemExit(0)
dist.all_reduce(torch.ones(1))
"""
NOT_FINITE = """
import os, time, torch
from dstrain.runtime import initialize
from dstrain.runtime.spec.errors import NonFiniteError
rank = os.environ["RANK"]
engine = initialize(torch.nn.Linear(4, 1), optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
open(f"{rank}.ready", "w").close()
while True:
    bad = rank == "3" and os.path.exists("go")
    engine.backward(engine(torch.full((2, 4), float("nan") if bad else 1.0)).mean())
    try:
        engine.step()
    except NonFiniteError as error:
        raise SystemExit(int(error.exit_code))
    time.sleep(0.05)
"""
STUBBORN = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + WAITING


def kill(find: Callable[[Run], int], number: int = signal.SIGKILL) -> Callable[[Run], None]:
    return lambda run: os.kill(find(run), number)


def ctrl_c_twice(run: Run) -> None:
    run.process.send_signal(signal.SIGINT)
    lab.wait_for(lambda: "stopping" in run.err, "the first Ctrl-C to be heard")
    run.process.send_signal(signal.SIGINT)


def leave(run: Run) -> None:
    (run.folder / "go").touch()


FAULTS: dict[str, tuple[str, list[str], Callable[[Run], Any], int]] = {
    "kill -9 a worker": (WAITING, [], kill(lambda run: run.rank_pid(3)), 137),
    "kill -9 the agent": (WAITING, [], kill(lambda run: run.ancestor(2, "dstrain-agent")), 207),
    "kill -9 the warden": (WAITING, [], kill(lambda run: run.ancestor(2, "dstrain-warden")), 207),
    "kill -9 sshd's session": (WAITING, [], kill(lambda run: run.ancestor(2, "sshd")), 200),
    "kill -9 the head's supervisor": (WAITING, [], kill(lambda run: run.supervisor), 137),
    "SIGSTOP a worker": (WAITING, [], kill(lambda run: run.rank_pid(1), signal.SIGSTOP), 203),
    "a rank leaves early with 0": (IN_COLLECTIVE, [], leave, 208),
    "a loss that is not finite, on one rank": (NOT_FINITE, [], leave, 206),
    "the terminal is closed": (WAITING, [], lambda run: run.process.send_signal(signal.SIGHUP), 129),
    "Ctrl-C": (WAITING, [], lambda run: run.process.send_signal(signal.SIGINT), 130),
    "Ctrl-C twice, ranks that ignore SIGTERM": (STUBBORN, ["--grace", "60"], ctrl_c_twice, 130),
}


def main(rounds: int) -> None:
    describe()
    with tempfile.TemporaryDirectory() as name:
        with lab.light_hosts(Path(name) / "lab", 2) as hosts:
            for fault, (script, words, act, code) in FAULTS.items():
                measure(fault, Path(name) / fault, hosts, (script, words, act, code), rounds)
        with lab.net_hosts(Path(name) / "net", 2) as net:
            lost = net.hosts["nb"]
            for fault, act, mend in (
                ("a host's link goes down", partial(link, lost, "down"), partial(link, lost, "up")),
                ("a host's packets vanish", partial(vanish, lost, "add"), partial(vanish, lost, "del")),
            ):
                measure(fault, Path(name) / fault, net, (WAITING, [], act, 200), rounds, mend)


def link(host: lab.Namespace, state: str, _: Run) -> None:
    host.link(state)


def vanish(host: lab.Namespace, what: str, _: Run) -> None:
    subprocess.run(["ip", "route", what, "blackhole", f"{host.address}/32"], check=True)


def measure(
    fault: str,
    folder: Path,
    hosts: lab.Lab,
    kind: tuple[str, list[str], Callable[[Run], Any], int],
    rounds: int,
    mend: Callable[[Run], None] = lambda run: None,
) -> None:
    script, words, act, code = kind
    ended, gone = Series("ended"), Series("gone")
    hostfile = hosts.hostfile(2)
    for number in range(rounds):
        own = folder / str(number)
        own.mkdir(parents=True)
        (own / "job.py").write_text(script)
        run = Run(own, ["-H", str(hostfile), *words, "job.py"], hosts.env)
        try:
            run.wait_ready(4)
            try:
                gone_s, ended_s = happen(run, act)
            finally:
                mend(run)
            if run.process.returncode != code:
                raise SystemExit(f"{fault}: expected exit code {code}, found {run.process.returncode}\n{run.err}")
        finally:
            run.end()
        gone.values.append(gone_s)
        ended.values.append(ended_s)
    spread = "   ".join(
        f"{one.name} {one.median:.2f} s ({min(one.values):.2f} to {max(one.values):.2f})" for one in (gone, ended)
    )
    print(f"{fault:42} exit {code}   {spread}", flush=True)


def happen(run: Run, act: Callable[[Run], Any]) -> tuple[float, float]:
    """Seconds from the fault until no process is left, and until the command has ended; either may come first."""
    at = time.monotonic()
    act(run)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(lambda: (run.wait(60), time.monotonic() - at)[1])
        run.wait_gone(60, at)
        return time.monotonic() - at, waiting.result()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
