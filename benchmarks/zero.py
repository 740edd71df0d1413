"""ZeRO stages 0 to 3 against torch's DDP, ZeroRedundancyOptimizer and FSDP2, and DeepSpeed.

    python benchmarks/zero.py table [ROUNDS] [CONTENDERS…]          the bars: seconds, peak memory, bytes sent
    python benchmarks/zero.py ranks4 [ROUNDS] [CONTENDERS…]         4 ranks
    python benchmarks/zero.py bf16 [ROUNDS] [CONTENDERS…]           bf16 with fp32 masters
    python benchmarks/zero.py accumulation [ROUNDS] [CONTENDERS…]   4 micro-batches in a step
    python benchmarks/zero.py large [ROUNDS]                        210 M parameters at stage 3: peak memory against
                                                                    16Ψ/N + live units + activations (bar: 1.10)
    python benchmarks/zero.py growth [ROUNDS] [CONTENDERS…]         1, 2, 4 and 8 times the layers

The work of `gpt.py`: a GPT of 29.5 M parameters, 2 ranks, 2 x 128 tokens a rank, fp32, fused AdamW, clipping, Gloo,
one thread a rank. A round is a job of each contender, in turn: 3 steps, then the median of 8. Memory is the peak above
the floor, that of a process which has imported torch and joined the other ranks. Contenders whose first or last losses
differ end the benchmark. --tiny: a model that trains in no time, to see that all runs.

PEERS=…/bin/python: the interpreter for FSDP2 and DeepSpeed, by default this one. All others run in this one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from gpt import TINY, Work
from jobs import Figures, Job, interleave, run_job, with_peers
from measure import Series, describe, ratio

STAGES = ["stage0", "stage1", "stage2", "stage3"]
DEEPSPEED = ["deepspeed1", "deepspeed2", "deepspeed3"]
ALL = ["ddp", "ddp-zero1", "fsdp2-keep", "fsdp2", *DEEPSPEED, *STAGES]
ACCUMULATION = 4
LAYERS_TIMES = (1, 2, 4, 8)
LARGE = {"width": 1024, "layers": 16, "heads": 16}
LIVE_UNITS = 4
"""At stage 3: one gathered and one on its way, gradients of one filled and of one under reduction."""


@dataclass(frozen=True)
class Bar:
    """Ours, at most `bound` times the least of the peers. bound: None to look at only."""

    ours: str
    peers: tuple[str, ...]
    what: Literal["step", "peak"]
    bound: float | None = None


BARS = (
    Bar("stage0", ("ddp",), "step", 1.02),
    Bar("stage0", ("ddp",), "peak", 0.97),
    Bar("stage1", ("ddp",), "step", 1.05),
    Bar("stage1", ("deepspeed1",), "step", 0.80),
    Bar("stage1", ("ddp-zero1", "deepspeed1"), "peak", 0.96),
    Bar("stage2", ("ddp",), "step", 1.05),
    Bar("stage2", ("deepspeed2",), "step", 0.80),
    Bar("stage2", ("deepspeed2", "fsdp2-keep"), "peak", 0.62),
    Bar("stage3", ("ddp",), "step", 1.10),
    Bar("stage3", ("fsdp2",), "step", 0.65),
    Bar("stage3", ("deepspeed3",), "step", 0.60),
    Bar("stage3", ("fsdp2",), "peak", 0.60),
)

SENT = {"stage0": 2.0, "stage1": 2.0, "stage2": 2.0, "stage3": 3.0}
"""Units of Ψ·(N-1)/N elements that a rank sends in a step of fp32 without accumulation; held to 1 %."""


# --- what is measured ------------------------------------------------------------------------------------------------


def table(work: Work, rounds: int, contenders: Sequence[str]) -> None:
    figures = compare(work, 2, rounds, contenders or ALL)
    for name, sent in SENT.items():
        if name in figures:
            report_bar(f"{name} bytes sent / bound", Series("", [(figures[name].sent_units or 0.0) / sent]), 1.01)
    report_bars(figures, BARS)


def ranks4(work: Work, rounds: int, contenders: Sequence[str]) -> None:
    against_ddp(compare(work, 4, rounds, contenders or ["ddp", "stage1", "stage2", "stage3"]))


def bf16(work: Work, rounds: int, contenders: Sequence[str]) -> None:
    against_ddp(compare(replace(work, dtype="bf16"), 2, rounds, contenders or ALL))


def accumulation(work: Work, rounds: int, contenders: Sequence[str]) -> None:
    against_ddp(compare(replace(work, accumulation=ACCUMULATION), 2, rounds, contenders or ALL))


def large(work: Work, rounds: int, contenders: Sequence[str]) -> None:
    work, ranks = replace(work, **LARGE) if work != TINY else work, 2
    figures = compare(work, ranks, rounds, ["stage3"])
    own = {
        "16Ψ/N": 16 * work.parameters / ranks / 2**20,
        "live units": LIVE_UNITS * 4 * work.block_parameters / 2**20,
        "activations": run_job(Job("activations", "activations", work, 1)).activations_mib,
    }
    terms = " + ".join(f"{name} {mib:.1f}" for name, mib in own.items())
    print(f"Ψ = {work.parameters / 1e6:.1f} M: {terms} = {sum(own.values()):.1f} MiB")
    peak = figures["stage3"].peak
    report_bar("stage3 peak / their sum", Series("", [value / sum(own.values()) for value in peak.values]), 1.10)


def growth(work: Work, rounds: int, contenders: Sequence[str]) -> None:
    names = list(contenders or ["ddp", "stage3"])
    jobs = [
        Job(f"{name} x{times}", name, replace(work, layers=times * work.layers), 2)
        for times in LAYERS_TIMES
        for name in names
    ]
    figures = interleave(jobs, rounds)
    report_figures(figures)
    for name in names:
        for times in LAYERS_TIMES[1:]:
            grown = ratio(figures[f"{name} x{times}"].step, figures[f"{name} x1"].step)
            report_bar(f"{name} step, x{times} / x1", grown)
    report_bars(figures, [Bar(f"stage3 x{times}", (f"ddp x{times}",), "step") for times in LAYERS_TIMES])


def compare(work: Work, ranks: int, rounds: int, contenders: Sequence[str]) -> dict[str, Figures]:
    figures = interleave([Job(name, name, work, ranks) for name in with_peers(contenders)], rounds)
    report_figures(figures)
    return figures


# --- reports ---------------------------------------------------------------------------------------------------------


def report_figures(figures: dict[str, Figures]) -> None:
    for name, own in figures.items():
        sent = f"   sent {own.sent_units:.3f} units" if own.sent_units is not None else ""
        step, peak = spread(own.step, "{:.3f}"), spread(own.peak, "{:.1f}")
        print(f"{name:18} step {step} s   peak {peak} MiB{sent}   rounds {len(own.step.values)}")


def against_ddp(figures: dict[str, Figures]) -> None:
    report_bars(figures, [Bar(name, ("ddp",), what) for name in STAGES for what in ("step", "peak")])


def report_bars(figures: dict[str, Figures], bars: Sequence[Bar]) -> None:
    """Those of whom all were measured."""
    for bar in bars:
        if bar.ours not in figures or not all(peer in figures for peer in bar.peers):
            continue
        series = {name: getattr(figures[name], bar.what) for name in (bar.ours, *bar.peers)}
        best = min(bar.peers, key=lambda peer: series[peer].median)
        report_bar(f"{bar.ours} {bar.what} / {best}", ratio(series[bar.ours], series[best]), bar.bound)


def report_bar(name: str, ratios: Series, bound: float | None = None) -> None:
    verdict = "" if bound is None else f"   bar {bound:.2f}: {'met' if ratios.median <= bound else 'missed'}"
    print(f"{name:32} {spread(ratios, '{:.3f}')}{verdict}")


def spread(series: Series, form: str) -> str:
    low, middle, high = (form.format(value) for value in series.quartiles)
    return f"{middle} ({low} to {high})"


MEASURES: dict[str, Callable[[Work, int, Sequence[str]], None]] = {
    measure.__name__: measure for measure in (table, ranks4, bf16, accumulation, large, growth)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=MEASURES)
    parser.add_argument("rounds", nargs="?", type=int, default=15)
    parser.add_argument("contenders", nargs="*", metavar="CONTENDERS", help=f"of {', '.join(ALL)}")
    parser.add_argument("--tiny", action="store_true")
    words = parser.parse_intermixed_args()
    if unknown := [name for name in words.contenders if name not in ALL]:
        parser.error(f"contenders: expected some of {', '.join(ALL)}, found {', '.join(unknown)}")
    describe()
    MEASURES[words.what](TINY if words.tiny else Work(), words.rounds, words.contenders)


if __name__ == "__main__":
    main()
