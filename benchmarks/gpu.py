"""One GPU's step of a GPT of 1.3 B parameters in bf16: the engine against plain loops, FSDP2 and DeepSpeed.

    python benchmarks/gpu.py step [ROUNDS] [CONTENDERS…]    seconds, tokens/s, MFU, peak memory of GPU and host
    python benchmarks/gpu.py two                            two ranks on one GPU over Gloo: the losses of DDP and of
                                                            stages 0 to 3 agree

A rank, one GPU, 4 x 1024 tokens, fused AdamW, clipping. A round is a job of each contender, in turn: 3 steps, then the
median of 8; before the first one each is tried, and left out by name where it cannot run (memory, a missing package).
The plain loop computes in autocast on fp32 weights; FSDP2, DeepSpeed and the engine keep fp32 masters of bf16 weights.
MFU is of PaLM's FLOPs and the data sheet's peak. Host memory is above the floor of `zero.py`. PEERS as there.

Without a GPU it ends with exit code 2; --tiny: a model that trains in no time, on the CPU, to see that all runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch

from dstrain.runtime.metrics import model_flops_utilization, peak_tflops, transformer_flops_per_token
from gpt import TINY, Work
from jobs import Figures, Job, JobFailed, interleave, run_job, with_peers
from measure import describe, ratio

LARGE = Work(
    vocabulary=32768, width=2048, layers=24, heads=16, length=1024, micro=4, dtype="bf16", device="cuda"
)  # 1.3 B, of which 1.2 B in blocks
CONTENDERS = [
    "plain",
    "plain-compiled",
    "fsdp2",
    "deepspeed1",
    "deepspeed3",
    "deepspeed3-offload",
    "stage0",
    "stage0-compiled",
    "stage3",
    "stage3-offload",
]
PEER_OF = {
    "stage0": "plain",
    "stage0-compiled": "plain-compiled",
    "stage3": "deepspeed3",
    "stage3-offload": "deepspeed3-offload",
}


def step(work: Work, rounds: int, contenders: Sequence[str]) -> None:
    names = with_peers(contenders or CONTENDERS)
    jobs = those_that_run([Job(name, name, work, ranks=1) for name in names])
    figures = interleave(jobs, rounds)
    for name, own in figures.items():
        print(line(name, own, work))
    for name, peer in PEER_OF.items():
        if name in figures and peer in figures:
            low, middle, high = ratio(figures[name].step, figures[peer].step).quartiles
            print(f"{f'{name} step / {peer}':40} {middle:.3f} ({low:.3f} to {high:.3f})")


def two(work: Work, rounds: int, contenders: Sequence[str]) -> None:
    """One job each: what counts is that their losses agree, as `interleave` demands."""
    work = replace(work, **({} if work.device == "cpu" else {"width": 512, "layers": 8, "heads": 8}), dtype="fp32")
    names = contenders or ["ddp", "stage0", "stage1", "stage2", "stage3"]
    figures = interleave([Job(name, name, work, ranks=2) for name in names], rounds=1)
    print(f"losses agree: {', '.join(figures)}")


def those_that_run(jobs: Sequence[Job]) -> list[Job]:
    """Tries each once, which also fills the compilers' caches."""
    able = []
    for job in jobs:
        try:
            run_job(job)
        except JobFailed as failure:
            why = [text for text in str(failure).splitlines() if text.strip()]
            print(f"left out: {job.name}: {why[-1].strip()}")
        else:
            able.append(job)
    return able


def line(name: str, own: Figures, work: Work) -> str:
    low, middle, high = own.step.quartiles
    tokens_per_s = work.micro * work.accumulation * work.length / middle
    speed = f"{middle:.3f} s ({low:.3f} to {high:.3f})   {tokens_per_s:.0f} tokens/s   MFU {mfu(work, tokens_per_s)}"
    memory = f"GPU {own.device_peak.median / 1024:.2f} GiB   host {own.peak.median / 1024:.2f} GiB"
    return f"{name:20} {speed}   {memory}   rounds {len(own.step.values)}"


def mfu(work: Work, tokens_per_s: float) -> str:
    """In percent; "-" where the device's peak is not known."""
    tflops = peak_tflops(torch.cuda.get_device_name(0), work.dtype) if work.device == "cuda" else None
    if tflops is None:
        return "-"
    multiplying = work.parameters - (work.vocabulary + work.length) * work.width  # tables that are only looked up
    flops = transformer_flops_per_token(multiplying, work.layers, work.width, work.length)
    return f"{100 * model_flops_utilization(tokens_per_s, 1, flops, tflops):.1f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("step", "two"))
    parser.add_argument("rounds", nargs="?", type=int, default=15)
    parser.add_argument("contenders", nargs="*", metavar="CONTENDERS", help=f"of {', '.join(CONTENDERS)}")
    parser.add_argument("--tiny", action="store_true")
    words = parser.parse_intermixed_args()
    if not words.tiny and not torch.cuda.is_available():
        print("gpu.py: expected a CUDA GPU, found none; --tiny tries all of it on the CPU", file=sys.stderr)
        raise SystemExit(2)
    describe()
    if not words.tiny:
        print(f"GPU {torch.cuda.get_device_name(0)}, CUDA {torch.version.cuda}")
    work = replace(TINY, dtype="bf16") if words.tiny else LARGE
    {"step": step, "two": two}[words.what](work, words.rounds, words.contenders)


if __name__ == "__main__":
    main()
