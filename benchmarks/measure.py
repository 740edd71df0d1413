"""What all benchmarks share: timing whole commands, and reporting medians with their spread."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path


@dataclass
class Series:
    """What one contender took, round by round: seconds, or another unit."""

    name: str
    values: list[float] = field(default_factory=list)
    unit: str = "s"

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """The lower one, the median, the upper one; of a single round, that one."""
        if len(self.values) == 1:
            return self.values[0], self.values[0], self.values[0]
        low, _, high = statistics.quantiles(self.values, n=4)
        return low, self.median, high


def timed(
    series: Series,
    command: Sequence[object],
    folder: Path,
    environment: dict[str, str] | None = None,
    stdout: int = subprocess.DEVNULL,
) -> None:
    """Run one command to its end and note its seconds; an error ends the benchmark."""
    start = time.perf_counter()
    done = subprocess.run(
        [str(word) for word in command], cwd=folder, env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True
    )
    series.values.append(time.perf_counter() - start)
    if done.returncode != 0:
        raise SystemExit(f"{series.name}: exit {done.returncode}\n{done.stderr[-2000:]}")


def describe() -> None:
    """Commit, machine and versions: what a figure is worth nothing without."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    cpus = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in cpus if "model name" in line), "unknown")
    print(f"commit {commit.stdout.strip()}, {os.cpu_count()} x {model}, Linux {platform.release()}")
    print(f"python {platform.python_version()}, torch {version('torch')}, paramiko {version('paramiko')}")


def report(ours: Series, theirs: Series) -> None:
    """Both medians with quartiles, and the ratio round by round."""
    for series in (ours, theirs):
        report_one(series)
    low, middle, high = ratio(ours, theirs).quartiles
    print(f"{'ratio':36} median {middle:.3f}     quartiles {low:.3f} to {high:.3f}")


def report_one(series: Series) -> None:
    """The median with quartiles."""
    low, middle, high = series.quartiles
    spread = f"quartiles {low:.3f} to {high:.3f}   rounds {len(series.values)}"
    print(f"{series.name:36} median {middle:.3f} {series.unit}   {spread}")


def ratio(ours: Series, theirs: Series) -> Series:
    """Round by round."""
    values = [a / b for a, b in zip(ours.values, theirs.values, strict=True)]
    return Series(f"{ours.name} / {theirs.name}", values, unit="")
