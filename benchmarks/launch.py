"""How long a launch takes, from the command to the end of one all-reduce: dstrain against torchrun and pdsh.

    python benchmarks/launch.py help            `dstrain --help` (bar: 250 ms)
    python benchmarks/launch.py local           16 local ranks, against torchrun (bar: 0.2 of its time)
    python benchmarks/launch.py hosts           4 SSH hosts x 2 ranks, against pdsh + torchrun (bar: 0.4)
    python benchmarks/launch.py idle            CPU of head and agent while a job prints 10 lines a second (bar: 1 %)

Rounds are interleaved; printed are medians, their spread, and the ratio round by round. `hosts` needs root, sshd and
pdsh: its hosts are addresses 127.0.0.2 to 127.0.0.5 of this machine.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import lab
from measure import Series, describe, report, timed

BIN = Path(sys.executable).parent
ALL_REDUCE = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
value = torch.ones(1)
dist.all_reduce(value)
assert value.item() == dist.get_world_size()
dist.destroy_process_group()
"""
TICKER = """
import os, time
for number in range(300):
    print("line", number, flush=True)
    time.sleep(0.1)
"""


def main(what: str, rounds: int) -> None:
    describe()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "job.py").write_text(ALL_REDUCE)
        measures = {"help": measure_help, "local": measure_local, "hosts": measure_hosts, "idle": measure_idle}
        measures[what](folder, rounds)


def measure_help(folder: Path, rounds: int) -> None:
    ours, python = Series("dstrain --help"), Series("python -c pass")
    for _ in range(rounds):
        timed(python, [sys.executable, "-c", "pass"], folder)
        timed(ours, [BIN / "dstrain", "--help"], folder)
    report(ours, python)


def measure_local(folder: Path, rounds: int) -> None:
    ours, theirs = Series("dstrain run -n 16"), Series("torchrun --nproc-per-node 16")
    for _ in range(rounds):
        timed(theirs, [BIN / "torchrun", "--standalone", "--nproc-per-node", "16", "job.py"], folder)
        timed(ours, [BIN / "dstrain", "run", "-n", "16", "job.py"], folder)
    report(ours, theirs)


def measure_hosts(folder: Path, rounds: int) -> None:
    ours, theirs = Series("dstrain run, 4 hosts x 2"), Series("pdsh + torchrun, 4 hosts x 2")
    with lab.light_hosts(folder / "lab", 4) as hosts:
        environment = {**os.environ, **hosts.env, "PDSH_SSH_ARGS_APPEND": f"-F {hosts.config} -o BatchMode=yes"}
        addresses = [f"127.0.0.{index + 2}" for index in range(4)]
        with hosts.config.open("a") as config:
            port = next(line.split()[1] for line in hosts.config.read_text().splitlines() if "Port" in line)
            config.write("".join(f"Host {address}\n  Port {port}\n" for address in addresses))
        for round_number in range(rounds):
            torchrun = (
                f"cd {folder} && {BIN}/torchrun --nnodes 4 --node-rank %n --nproc-per-node 2 "
                f"--master-addr 127.0.0.2 --master-port {29700 + round_number} job.py"
            )
            timed(theirs, ["pdsh", "-R", "ssh", "-w", ",".join(addresses), torchrun], folder, environment)
            timed(ours, [BIN / "dstrain", "run", "-H", hosts.hostfile(), "job.py"], folder, environment)
    report(ours, theirs)


def measure_idle(folder: Path, rounds: int) -> None:
    """CPU seconds of console, supervisor, warden and agent between two moments of a running job, per second."""
    (folder / "job.py").write_text(TICKER)
    shares = []
    with lab.light_hosts(folder / "lab", 1) as hosts:
        for _ in range(rounds):
            command = [str(BIN / "dstrain"), "run", "--hosts", "h1:1", "job.py"]
            run = subprocess.Popen(command, cwd=folder, env={**os.environ, **hosts.env}, stdout=subprocess.DEVNULL)
            lab.wait_for(lambda pid=run.pid: len(_ours(pid)) == 4 and _ranks(), "the job")
            time.sleep(3)  # a measurement's beginning, not a synchronisation
            before, at = _ticks(_ours(run.pid)), time.monotonic()
            time.sleep(15)
            ticks = _ticks(_ours(run.pid)) - before
            shares.append(ticks / os.sysconf("SC_CLK_TCK") / (time.monotonic() - at))
            run.wait()
    print(f"head + agent: median {100 * statistics.median(shares):.2f} % of a core ({len(shares)} rounds: "
          f"{', '.join(f'{100 * share:.2f}' for share in shares)})")  # fmt: skip


def _table() -> dict[int, tuple[str, int, int]]:
    """pid -> (name, parent, ticks)."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            head, _, tail = path.read_text().rpartition(")")
        except OSError:
            continue
        fields = tail.split()
        found[int(path.parent.name)] = (head.partition("(")[2], int(fields[1]), int(fields[11]) + int(fields[12]))
    return found


def _ours(console: int) -> list[int]:
    table = _table()
    named = [pid for pid, (name, _, _) in table.items() if name in ("dstrain-agent", "dstrain-warden")]
    return [console, *(pid for pid, (_, parent, _) in table.items() if parent == console), *named]


def _ranks() -> bool:
    return any(name.startswith("dstrain rank") for name, _, _ in _table().values())


def _ticks(pids: list[int]) -> int:
    table = _table()
    return sum(table[pid][2] for pid in pids)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 15)
