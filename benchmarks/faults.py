"""How soon each fault is noticed, and gone: the table of faults, measured.

    python benchmarks/faults.py [ROUNDS]

Two hosts of two ranks each behind one sshd on this machine; root and openssh-server are needed. Of each fault, from the
moment that it happens: seconds until no process of the job is left on any host, and until the command has ended with
its code and the cause.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
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
    "Ctrl-C": (WAITING, [], lambda run: run.process.send_signal(signal.SIGINT), 130),
    "Ctrl-C twice, ranks that ignore SIGTERM": (STUBBORN, ["--grace", "60"], ctrl_c_twice, 130),
}


def main(rounds: int) -> None:
    describe()
    with tempfile.TemporaryDirectory() as name, lab.light_hosts(Path(name) / "lab", 2) as hosts:
        hostfile = hosts.hostfile(2)
        for place, (fault, (script, words, act, code)) in enumerate(FAULTS.items()):
            ended, gone = Series("ended"), Series("gone")
            for number in range(rounds):
                folder = Path(name) / f"{place}-{number}"
                folder.mkdir()
                (folder / "job.py").write_text(script)
                run = Run(folder, ["-H", str(hostfile), *words, "job.py"], hosts.env)
                try:
                    run.wait_ready(4)
                    at = time.monotonic()
                    act(run)
                    run.wait_gone(60, at)
                    gone.values.append(time.monotonic() - at)
                    found = run.wait(60)
                    ended.values.append(max(time.monotonic() - at, gone.values[-1]))
                    if found != code:
                        raise SystemExit(f"{fault}: expected exit code {code}, found {found}\n{run.err}")
                finally:
                    run.end()
            spread = "   ".join(
                f"{one.name} {one.median:.2f} s ({min(one.values):.2f} to {max(one.values):.2f})"
                for one in (gone, ended)
            )
            print(f"{fault:42} exit {code}   {spread}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
