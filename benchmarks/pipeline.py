"""Pipelines of two stages against torch.distributed.pipelining and DeepSpeed's PipelineModule.

    python benchmarks/pipeline.py table [ROUNDS] [CONTENDERS…]     seconds of a step, peak memory of the first stage
    python benchmarks/pipeline.py stage2 [ROUNDS]                  2 stages × 2 ranks at ZeRO stage 2, which DeepSpeed
                                                                   refuses: it runs (tests compare its losses)
    python benchmarks/pipeline.py overhead [ROUNDS]                what the executor adds to an action besides computing
    python benchmarks/pipeline.py bubble [ROUNDS] [SCHEDULES…]     planned by `dstrain plan --costs` of a trace, against
                                                                   the executed one in that trace
    python benchmarks/pipeline.py giant [ROUNDS]                   plan and search for 1,024 hosts of 8 GPUs

The GPT of `gpt.py`, fp32, as embedding, blocks, norm and head; 2 stages of a thread each, 8 micro-batches of 2 x 128
tokens, fused AdamW, clipping by the norm over both stages, Gloo. A round is a job of each contender, in turn: 3 steps,
then the median of 8. Memory is rank 0's peak above the floor. Contenders whose losses differ end the benchmark. --tiny:
a model that trains in no time.

PEERS=…/bin/python: the interpreter for DeepSpeed, by default this one.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from pipes import TINY_STAGES, tiny_stages
from tempfile import TemporaryDirectory

from dstrain.runtime.spec.schedule import SCHEDULE_NAMES
from dstrain.runtime.spec.trace import read_trace
from gpt import TINY, Work
from jobs import Job, interleave, with_peers
from measure import Series, describe, ratio

PEERS = ("torch-1f1b", "torch-gpipe", "deepspeed-pipe")
OURS = ("pipe-gpipe", "pipe-1f1b", "pipe-interleaved", "pipe-zb_h1", "pipe-zb_v")
MICRO_BATCHES = 8


def table(work: Work, rounds: int, names: list[str]) -> None:
    names = with_peers(names)
    figures = interleave([Job(name, name, work) for name in names], rounds)
    peers = [name for name in PEERS if name in figures]
    for name, found in figures.items():
        print(f"{name:18} {found.step.median:.3f} s   first stage {found.first_peak.median:.0f} MiB")
    for name in (name for name in OURS if name in figures):
        for peer in peers:
            seconds = ratio(figures[name].step, figures[peer].step)
            memory = ratio(figures[name].first_peak, figures[peer].first_peak)
            print(f"{name:18} ÷ {peer:16} step {seconds.median:.3f}   first stage's peak {memory.median:.3f}")


def stage2(work: Work, rounds: int, _: list[str]) -> None:
    """As many micro-batches in each of two pipelines, of other samples."""
    figures = interleave([Job("pipe-1f1b-stage2", "pipe-1f1b-stage2", work, ranks=4)], rounds)
    found = figures["pipe-1f1b-stage2"]
    print(f"4 ranks: {found.step.median:.3f} s   losses {found.losses}")


def overhead(work: Work, rounds: int, _: list[str]) -> None:
    """Four stages of one tiny layer each on one rank, against the same forwards and backwards in a plain loop."""
    ours, plain = Series("train_batch"), Series("plain loop")
    pipelined, by_hand = tiny_stages(MICRO_BATCHES * work.accumulation)
    actions = 2 * TINY_STAGES * MICRO_BATCHES * work.accumulation
    for _number in range(rounds):
        for run, series in ((pipelined, ours), (by_hand, plain)):
            begun = time.perf_counter()
            run()
            series.values.append((time.perf_counter() - begun) / actions * 1e6)
    added = [one - other for one, other in zip(ours.values[1:], plain.values[1:], strict=True)]
    low, _middle, high = statistics.quantiles(added, n=4)
    print(
        f"µs an action: {ours.median:.0f}, in a plain loop {plain.median:.0f}; added {statistics.median(added):.0f} "
        f"({low:.0f} to {high:.0f})"
    )


BUBBLE_JOB = """
model: {gpt: {layers: 8, width: 512, heads: 8, context: 128}}
batch: {global: 16, micro: 2}
parallel: {pipeline: 2, schedule: %s, partition: time}
train: {steps: 14, sample_bytes: 0, eval_samples: 2}
"""


def bubble(_: Work, rounds: int, names: list[str]) -> None:
    """Real jobs with `--trace`, 8 steps each; the plan gets nothing but the trace, whose steps it replays."""
    dstrain = [sys.executable, "-c", "from dstrain.launcher.cli import main; main()"]
    for name in [name for name in names if name in SCHEDULE_NAMES] or SCHEDULE_NAMES:
        executed, planned = [], []
        for _number in range(rounds):
            with TemporaryDirectory() as folder:
                Path(folder, "job.yaml").write_text(BUBBLE_JOB % name)
                command = [*dstrain, "run", "job.yaml", "-n", "2", "--set", "log.trace=6-13", "--trace", "-q"]
                subprocess.run(command, cwd=folder, check=True, capture_output=True)
                trace = next(Path(folder, "runs").glob("*/trace.json"))
                measured = read_trace(trace)
                command = [*dstrain, "plan", "job.yaml", "-n", "2", "--costs", str(trace), "--json"]
                found = subprocess.run(command, cwd=folder, check=True, capture_output=True)
                executed.append(100 * float(measured.bubble or 0))
                planned.append(100 * float(json.loads(found.stdout)["bubble"]))
        pairs = "   ".join(f"{one:.1f}/{other:.1f}" for one, other in zip(executed, planned, strict=True))
        print(f"{name:18} executed/planned bubble, % of the ranks' time: {pairs}", flush=True)


GIANT_JOB = """
model: {gpt: {layers: 96, width: 18432, heads: 144, context: 4096, vocabulary: 50304}}
batch: {global: 2048, micro: 1}
parallel: {pipeline: 32}
zero: {stage: 2}
precision: {dtype: bf16}
train: {steps: 1, activation_checkpointing: all}
"""


def giant(_: Work, rounds: int, _names: list[str]) -> None:
    """From the command to its end; no host is there."""
    command = [sys.executable, "-c", "from dstrain.launcher.cli import main; main()", "plan", "job.yaml"]
    with TemporaryDirectory() as folder:
        Path(folder, "job.yaml").write_text(GIANT_JOB)
        for more in ([], ["--search"]):
            seconds = Series(" ".join(["plan", *more]))
            for _number in range(rounds):
                begun = time.perf_counter()
                words = [*command, "--hosts", "n[1-1024]:8", *more]
                subprocess.run(words, cwd=folder, check=True, capture_output=True)
                seconds.values.append(time.perf_counter() - begun)
            print(f"{seconds.name:14} {seconds.median:.2f} s")


MODES = {"table": table, "stage2": stage2, "overhead": overhead, "bubble": bubble, "giant": giant}


def main(words: list[str]) -> None:
    names = [word for word in words if not word.startswith("--")]
    work = replace(TINY if "--tiny" in words else Work(), accumulation=MICRO_BATCHES)
    mode, rounds = names[0] if names else "table", int(names[1]) if len(names) > 1 else 15
    describe()
    MODES[mode](work, rounds, names[2:] or [*PEERS, *OURS])


if __name__ == "__main__":
    main(sys.argv[1:])
