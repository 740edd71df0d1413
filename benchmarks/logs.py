"""Two hosts print 1,000,000 lines of 80 bytes each, over SSH, prefixed, into one file: dstrain against pdsh.

    python benchmarks/logs.py [ROUNDS]

dstrain also keeps every rank's bytes in a file of its own. Bars: 0.8 of pdsh's time, head memory at most 200 MB.
Needs root, sshd and pdsh: the hosts are 127.0.0.2 and 127.0.0.3 of this machine. Rounds are interleaved.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import lab
from measure import Series, describe, report

BIN = Path(sys.executable).parent
LINES = 1_000_000
PROGRAM = f"yes {'x' * 79} | head -n {LINES}"


def main(rounds: int) -> None:
    describe()
    ours, theirs, memory = Series("dstrain run"), Series("pdsh"), []
    with tempfile.TemporaryDirectory() as name, lab.light_hosts(Path(name) / "lab", 2) as hosts:
        folder = Path(name)
        addresses = ["127.0.0.2", "127.0.0.3"]
        port = next(line.split()[1] for line in hosts.config.read_text().splitlines() if "Port" in line)
        with hosts.config.open("a") as config:
            config.write("".join(f"Host {address}\n  Port {port}\n" for address in addresses))
        environment = {**os.environ, **hosts.env, "PDSH_SSH_ARGS_APPEND": f"-F {hosts.config} -o BatchMode=yes"}
        for _ in range(rounds):
            _timed(theirs, ["pdsh", "-R", "ssh", "-w", ",".join(addresses), PROGRAM], folder, environment)
            command = [f"{BIN}/dstrain", "run", "-H", f"{hosts.hostfile(slots=1)}", "--no-python", "sh", "-c", PROGRAM]
            memory.append(_timed(ours, command, folder, environment))
            subprocess.run(["rm", "-rf", str(folder / "runs")], check=True)
    report(ours, theirs)
    print(f"head memory: peak of console plus peak of supervisor, median {statistics.median(memory) / 1024:.0f} MiB")


def _timed(series: Series, command: list[str], folder: Path, environment: dict[str, str]) -> int:
    """Run to the end with stdout in a file; check its size; return the peak KiB of our two processes."""
    peaks: dict[int, int] = {}
    start = time.perf_counter()
    with (folder / "out").open("wb") as out:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=subprocess.PIPE)
        while process.poll() is None:
            if series.name.startswith("dstrain"):
                peaks |= _peaks(process.pid)
            time.sleep(0.05)
    series.values.append(time.perf_counter() - start)
    counted = subprocess.run(["wc", "-l", str(folder / "out")], capture_output=True, text=True, check=True)
    lines = int(counted.stdout.split()[0])
    if process.returncode != 0 or lines != 2 * LINES:
        raise SystemExit(f"{series.name}: exit {process.returncode}, {lines} lines\n{process.stderr.read()[-2000:]!r}")
    return sum(peaks.values())


def _peaks(console: int) -> dict[int, int]:
    found = {}
    try:
        children = Path(f"/proc/{console}/task/{console}/children").read_text().split()
        for pid in [console, *map(int, children)]:
            status = Path(f"/proc/{pid}/status").read_text()
            if match := re.search(r"VmHWM:\s+(\d+)", status):
                found[pid] = int(match[1])
    except OSError:
        pass
    return found


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 15)
