"""Pipelines of two stages against torch.distributed.pipelining and DeepSpeed's PipelineModule.

    python benchmarks/pipeline.py table [ROUNDS] [CONTENDERS…]     seconds of a step, peak memory of the first stage
    python benchmarks/pipeline.py stage2 [ROUNDS]                  2 stages × 2 ranks at ZeRO stage 2, which DeepSpeed
                                                                   refuses: it runs, and its losses are the pipeline's

The GPT of `gpt.py`, fp32, as embedding, blocks, norm and head; 2 stages of a thread each, 8 micro-batches of 2 x 128
tokens, fused AdamW, clipping by the norm over both stages, Gloo. A round is a job of each contender, in turn: 3 steps,
then the median of 8. Memory is rank 0's peak above the floor. Contenders whose losses differ end the benchmark. --tiny:
a model that trains in no time.

PEERS=…/bin/python: the interpreter for DeepSpeed, by default this one.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from gpt import TINY, Work
from jobs import Job, interleave, with_peers
from measure import describe, ratio

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
    """The same global batch: half as many micro-batches on each of two ranks."""
    figures = interleave([Job("pipe-1f1b-stage2", "pipe-1f1b-stage2", work, ranks=4)], rounds)
    found = figures["pipe-1f1b-stage2"]
    print(f"4 ranks: {found.step.median:.3f} s   losses {found.losses}")


MODES = {"table": table, "stage2": stage2}


def main(words: list[str]) -> None:
    names = [word for word in words if not word.startswith("--")]
    work = replace(TINY if "--tiny" in words else Work(), accumulation=MICRO_BATCHES)
    mode, rounds = names[0] if names else "table", int(names[1]) if len(names) > 1 else 15
    describe()
    MODES[mode](work, rounds, names[2:] or [*PEERS, *OURS])


if __name__ == "__main__":
    main(sys.argv[1:])
