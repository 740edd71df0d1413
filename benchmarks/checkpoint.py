"""What a checkpoint costs, and how soon a job is back.

    python benchmarks/checkpoint.py save [ROUNDS]     512 MB over 2 ranks: ours, with checksums and fsync, against
                                                      torch.save, DCP and DCP async (bars: stall 0.5 of DCP async's,
                                                      the whole save 0.8 of DCP's)
    python benchmarks/checkpoint.py resume [ROUNDS]   kill -9 of a worker to the first step behind the resume,
                                                      4 ranks of the example's GPT (bar: 3 s)

`save` runs in one job: each contender in each round, the order turned round each time, what was written before synced
beforehand. CKPT_DIR=…: where to write, by default a temporary folder. --tiny: next to nothing, to see that all runs.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from jobs import free_port
from measure import Series, describe, report, report_one

RANKS = 2
BIN = Path(sys.executable).parent
JOB = """
name: resume
model: {gpt: {layers: 3, width: 160, heads: 5, context: 128}}
data: {format: bytes}
batch: {global: 16, micro: 4}
train: {steps: 100000, eval_every: null, sample_bytes: 0}
checkpoint: {dir: saved, every_steps: 5}
log: {every: 1000}
run: {nproc_per_node: 4, max_restarts: 1}
"""


def main(what: str, rounds: int, *flags: str) -> None:
    describe()
    with tempfile.TemporaryDirectory(dir=os.environ.get("CKPT_DIR")) as name:
        if what == "resume":
            measure_resume(Path(name), rounds)
        else:
            measure_save(Path(name), rounds, *flags)


def measure_save(folder: Path, rounds: int, *flags: str) -> None:
    script, port = Path(__file__).with_name("checkpoint_rank.py"), str(free_port())
    ranks = []
    for rank in range(RANKS):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, **{name: str(value) for name, value in own.items()}}
        command = [sys.executable, script, folder, str(rounds), *flags]
        ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    answers = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise SystemExit(f"exit {[rank.returncode for rank in ranks]}")
    found = json.loads(answers[0].splitlines()[-1])
    series = {name: Series(name, values) for name, values in found.items()}
    series["dd with fsync, one process"] = _dd(folder, rounds)
    for one in series.values():
        report_one(one)
    report(series["ours async, stall"], series["DCP async, stall"])
    report(series["ours"], series["DCP"])
    report(_sum("ours async, all", series, "ours async"), _sum("DCP async, all", series, "DCP async"))


def _sum(name: str, series: dict[str, Series], prefix: str) -> Series:
    parts = [one.values for key, one in series.items() if key.startswith(prefix)]
    return Series(name, [sum(values) for values in zip(*parts, strict=True)])


def _dd(folder: Path, rounds: int) -> Series:
    series = Series("dd with fsync, one process")
    for _ in range(rounds):
        os.sync()
        begun = time.perf_counter()
        command = ["dd", "if=/dev/zero", f"of={folder / 'dd'}", "bs=1M", "count=512", "conv=fsync"]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        series.values.append(time.perf_counter() - begun)
    return series


def measure_resume(folder: Path, rounds: int) -> None:
    series = Series("kill -9 to the first step behind it")
    (folder / "text").write_bytes(bytes(range(256)) * 4000)
    (folder / "job.yaml").write_text(JOB.replace("format: bytes", f"format: bytes, path: {folder / 'text'}"))
    for number in range(rounds):
        series.values.append(_resume(folder, folder / f"run-{number}", number))
        print(f"round {number + 1}: {series.values[-1]:.2f} s", file=sys.stderr)
    report_one(series)


def _resume(folder: Path, run: Path, number: int) -> float:
    command = [BIN / "dstrain", "run", "--run-dir", run, "--set", f"checkpoint.dir=saved-{number}", "job.yaml"]
    with (folder / "out").open("w") as out:
        job = subprocess.Popen([str(word) for word in command], cwd=folder, stdout=out, stderr=out)
    try:
        first = _wait_for(run, job, lambda event: event["kind"] == "checkpoint")
        os.kill(_pid_of_rank(first["run_id"], 2), signal.SIGKILL)
        killed = time.time_ns()
        step = _wait_for(run, job, lambda event: event["kind"] == "step" and event["attempt"] == 1)
        return float(step["ts"] - killed) / 1e9
    finally:
        job.send_signal(signal.SIGINT)
        job.wait()


def _wait_for(run: Path, job: subprocess.Popen[bytes], wanted) -> dict:  # type: ignore[no-untyped-def, type-arg]
    """The first event that is wanted, of rank 0."""
    while job.poll() is None:
        for path in run.rglob("events.jsonl"):
            for line in path.read_text().splitlines():
                with_newline = json.loads(line) if line.endswith("}") else None
                if with_newline and with_newline.get("rank") in (0, None) and wanted(with_newline):
                    return with_newline
        time.sleep(0.05)
    said = (run.parent / "out").read_text()[-2000:]
    raise SystemExit(f"the job has ended with {job.returncode}\n{said}")


def _pid_of_rank(run_id: str, rank: int) -> int:
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            environment = path.read_bytes().split(b"\0")
            title = path.with_name("cmdline").read_bytes()
        except OSError:
            continue
        if f"DSTRAIN_RUN_ID={run_id}".encode() in environment and title.startswith(f"dstrain rank {rank}".encode()):
            return int(path.parent.name)
    raise SystemExit(f"no process of rank {rank}")


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if not word.startswith("--")]
    main(words[0], int(words[1]) if len(words) > 1 else 5, *(word for word in sys.argv if word.startswith("--")))
