"""Timelines of real steps: every rank's, in the schedule's order, by one clock."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trace_lab import check_file, names

from dstrain.runtime import trainer
from dstrain.runtime.comm import Communicator
from dstrain.runtime.spec.event import EventWriter
from dstrain.runtime.spec.load import load_job
from dstrain.runtime.spec.schedule import find_schedule, simulate
from dstrain.runtime.spec.trace import Category, Collected, Measured, RankTrace, read_trace, write_trace
from dstrain.runtime.task import SampleTask
from dstrain.runtime.tracing.tracer import Tracer

from .test_pipeline import Training, engine_of
from .test_pipeline_trainer import YAML
from .test_trainer import events_of

RunRanks = Callable[..., list[Any]]
Events = list[dict[str, Any]]


@pytest.fixture
def job(tmp_path: Path) -> Path:
    (tmp_path / "text").write_bytes(b"the quick brown fox jumps over the lazy dog\n" * 100)
    (tmp_path / "job.yaml").write_text(YAML % (tmp_path / "text", tmp_path / "checkpoints"))
    return tmp_path / "job.yaml"


def train(run_ranks: RunRanks, monkeypatch: pytest.MonkeyPatch, job: Path, ranks: int, **values: Any) -> Events:
    """The events of all ranks."""
    words = [word for key, value in values.items() for word in ("--set", f"{key.replace('__', '.')}={value}")]

    def work(rank: int) -> Events:
        path = job.parent / f"events-{rank}"
        with path.open("wb") as file:
            monkeypatch.setenv("DSTRAIN_EVENT_FD", str(file.fileno()))
            assert trainer.main([str(job), *words]) == 0
        return events_of(path)

    return [event for events in run_ranks(ranks, work) for event in events]


def traces_of(events: Events) -> list[RankTrace]:
    collected = Collected()
    for event in events:
        collected.take(event)
    return collected.traces


ACTIONS = [category for category in Category if category.is_action]


def within(waits: list[Any], actions: list[Any], step: int) -> dict[str, list[str]]:
    """What each action of a step waits for."""
    return {
        action["name"]: [
            wait["name"]
            for wait in waits
            if action["ts"] <= wait["ts"] and wait["ts"] + wait["dur"] <= action["ts"] + action["dur"] + 2e-3
        ]
        for action in actions
        if action["args"]["step"] == step
    }


@pytest.mark.parametrize(("ranks", "pipeline", "stage", "schedule"), [(2, 2, 0, "1f1b"), (4, 2, 3, "zb_v")])
def test_a_pipelines_actions_are_those_of_its_schedule(
    run_ranks: RunRanks,
    monkeypatch: pytest.MonkeyPatch,
    job: Path,
    ranks: int,
    pipeline: int,
    stage: int,
    schedule: str,
) -> None:
    """Also around a validation and a checkpoint, which steps 3 and 4 end with."""
    values = {"parallel__pipeline": pipeline, "parallel__schedule": schedule, "zero__stage": stage}
    events = train(run_ranks, monkeypatch, job, ranks, log__trace="2-4", **values)
    path = job.parent / "trace.json"
    write_trace(path, traces_of(events))
    rows = check_file(path, ranks, [2, 3, 4])
    data = ranks // pipeline
    plan = find_schedule(schedule, pipeline, 8 // data)
    for rank in range(ranks):
        for step in (2, 3, 4):
            assert names(rows[rank, 1], step, *ACTIONS) == [str(action) for action in plan.ranks[rank // data]]
            assert names(rows[rank, 1], step, Category.DATA) == ["batches"]
            assert "optimizer" in names(rows[rank, 1], step, Category.UPDATE)
            assert "sums of gradients" in names(rows[rank, 2], step, Category.WAIT)
        assert names(rows[rank, 1], 3, Category.CHECKPOINT) == ["checkpoint"]
        assert names(rows[rank, 1], 4, Category.VALIDATION) == ["validation"]
    arrows = [event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] in "sf"]
    between = [s for s in range(plan.stages - 1) if plan.rank_of[s] != plan.rank_of[s + 1]]
    assert len(arrows) == 2 * 3 * 2 * len(between) * 8  # ends, steps, directions; all micro-batches of all columns
    measured = read_trace(path)
    assert [step.step for step in measured.steps] == [2, 3, 4]
    assert all(0 < step.bubble < 1 for step in measured.steps)
    costs = measured.costs
    assert costs is not None
    assert len(list(costs.forward)) == plan.stages  # type: ignore[arg-type]
    assert sorted(measured.messages) == between  # of seconds that may be 0: it came before the sender went on


def test_ranks_without_a_pipeline_have_forwards_backwards_and_waits(
    run_ranks: RunRanks, monkeypatch: pytest.MonkeyPatch, job: Path
) -> None:
    """A training that ends before the last traced step leaves what there is."""
    events = train(run_ranks, monkeypatch, job, 2, log__trace="5-9", zero__stage=3, zero__resident_elements=0)
    traces = traces_of(events)
    assert [len(trace.clock) for trace in traces] == [0, 2]
    write_trace(job.parent / "trace.json", traces)
    rows = check_file(job.parent / "trace.json", 2, [5, 6])
    for rank in range(2):
        passes = names(rows[rank, 1], 5, Category.FORWARD, Category.BACKWARD)
        assert passes == [f"0{kind}{micro}" for micro in range(4) for kind in "FB"]
        assert names(rows[rank, 1], 5, Category.DATA) == ["batch"] * 4
        inside = within(rows[rank, 2], rows[rank, 1], 5)
        assert any(name.startswith("parameters of ") for name in inside["0F0"])
        assert "sums of gradients" in inside["0B1"]  # of the micro-batch before


def test_a_trace_that_no_launcher_asks_for_is_a_file_here(
    run_ranks: RunRanks, monkeypatch: pytest.MonkeyPatch, job: Path
) -> None:
    monkeypatch.chdir(job.parent)
    monkeypatch.delenv("DSTRAIN_EVENT_FD", raising=False)
    run_ranks(2, lambda _: trainer.main([str(job), "--set", "log.trace=2"]))
    check_file(Path("trace.json"), 2, [2])


def test_without_the_key_nothing_is_recorded(run_ranks: RunRanks, monkeypatch: pytest.MonkeyPatch, job: Path) -> None:
    assert traces_of(train(run_ranks, monkeypatch, job, 1)) == []


AHEAD_NS = 7_000_000_000
DRIFT = 1 + 2e-5
"""Of a bad quartz."""


def test_a_message_never_arrives_before_it_is_sent(run_ranks: RunRanks, tmp_path: Path) -> None:
    """Rank 1's clock is ahead, and runs faster: by more than the shortest message, by far."""

    def work(rank: int) -> Events:
        def now() -> int:
            true = time.perf_counter_ns()
            return round(true * DRIFT) + AHEAD_NS if rank == 1 else true

        path = tmp_path / f"events-{rank}"
        with Communicator.connect() as comm, path.open("wb") as file:
            engine = engine_of(comm, Training(), "1f1b", 2, 0, None)
            engine.tracer = Tracer(engine.trace, comm, (2, 4), EventWriter(file.fileno(), "", 0, rank), now=now)
            training = Training()
            for step in range(5):
                engine.train_batch(training.task(), training.batches(step, 0))
        return events_of(path)

    traces = traces_of([event for events in run_ranks(2, work) for event in events])
    assert [len(trace.clock) for trace in traces] == [0, 2]
    offset = traces[1].clock[0].offset_ns
    assert offset < -AHEAD_NS
    early = [arrived - sent for sent, arrived in messages(traces)]
    assert len(early) == 3 * 2 * 4
    uncertainty = sum(trace.uncertainty_ns for trace in traces)
    assert 0 < uncertainty < 20_000_000
    assert min(early) >= -uncertainty
    traces[1].clock.clear()
    assert min(arrived - sent for sent, arrived in messages(traces)) < -1_000_000_000  # by its own clock


def messages(traces: list[RankTrace]) -> list[tuple[int, int]]:
    """When each was sent, and when the wait for it ended."""
    aligned = {trace.rank: trace.aligned() for trace in traces}
    sent = {
        (rank, span.peer, span.step, span.name): span.begin_ns
        for rank, spans in aligned.items()
        for span in spans
        if span.category is Category.SEND
    }
    return [
        (sent[span.peer, rank, span.step, span.name], span.end_ns)
        for rank, spans in aligned.items()
        for span in spans
        if span.category is Category.WAIT and span.peer is not None
    ]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("x", "a step or FIRST-LAST, from 1, of at most 100 steps, found 'x'"),
        ("6-4", "a step or FIRST-LAST, from 1, of at most 100 steps, found '6-4'"),
        ("1-101", "a step or FIRST-LAST, from 1, of at most 100 steps, found '1-101'"),
        ("9", "steps within train.steps = 6, found 9"),
    ],
)
def test_nonsense_is_refused_in_a_line(job: Path, value: str, expected: str) -> None:
    with pytest.raises(Exception, match=r"log\.trace: expected ") as error:
        load_job(job, [f"log.trace={value}"])
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_a_process_alone_that_fails_within_the_traced_steps_writes_them(
    job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step makes numbers that are not finite in the second."""
    monkeypatch.chdir(job.parent)
    monkeypatch.delenv("DSTRAIN_EVENT_FD", raising=False)
    words = [word for key in ("log.trace=2-5", "optimizer.lr=1e30", "train.clip=null") for word in ("--set", key)]
    assert trainer.main([str(job), *words]) == 206
    rows = check_file(Path("trace.json"), 1, [2])
    assert names(rows[0, 1], 2, Category.UPDATE) == []


class Resting(torch.autograd.Function):
    """Takes its time, in the forward and twice that in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        time.sleep(2 * ctx.seconds)
        return gradient, None


class Slow(nn.Module):
    """One time after the other, in turn."""

    def __init__(self, *seconds: float) -> None:
        super().__init__()
        self.linear, self.seconds = nn.Linear(4, 4), cycle(seconds)

    def forward(self, x: Tensor) -> Tensor:
        rested: Tensor = Resting.apply(self.linear(x), next(self.seconds))  # type: ignore[no-untyped-call]
        return rested


def measured_of(run_ranks: RunRanks, folder: Path, schedule: str, layers: Callable[[], Iterable[Slow]]) -> Measured:
    """Three steps of four micro-batches, on two ranks."""
    training = Training(
        model=lambda: nn.Sequential(*layers(), nn.Linear(4, 3)),
        task=lambda: SampleTask("pipeline_lab:difference"),
        batch=lambda micro, generator: (torch.ones(2, 4), torch.zeros(2, 3)),
    )

    def work(rank: int) -> Events:
        path = folder / f"events-{rank}"
        with Communicator.connect() as comm, path.open("wb") as file:
            engine = engine_of(comm, training, schedule, 2, 0, None)
            engine.tracer = Tracer(engine.trace, comm, (2, 4), EventWriter(file.fileno(), "", 0, rank))
            for step in range(5):
                engine.train_batch(training.task(), training.batches(step, 0))
        return events_of(path)

    traces = traces_of([event for events in run_ranks(2, work) for event in events])
    write_trace(folder / "trace.json", traces)
    return read_trace(folder / "trace.json")


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved_1f1b"])
def test_the_planned_bubble_is_the_executed_one(run_ranks: RunRanks, tmp_path: Path, schedule: str) -> None:
    """By the medians that the trace has, and nothing else of it: within 5 %, where no other load makes actions uneven.
    The last stage is slower than the others."""
    measured = measured_of(run_ranks, tmp_path, schedule, lambda: map(Slow, (0.04, 0.04, 0.04, 0.06)))
    assert measured.costs is not None
    planned = simulate(find_schedule(schedule, 2, 4), measured.costs).bubble
    assert measured.bubble == pytest.approx(planned, rel=0.05)
    assert planned > 0.1


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved_1f1b", "zb_h1", "zb_v"])
def test_where_layers_are_uneven_the_replay_has_the_executed_bubble(
    run_ranks: RunRanks, tmp_path: Path, schedule: str
) -> None:
    """Within 5 %, where medians are far off: every layer is slow for every third micro-batch, which no median sees."""
    measured = measured_of(run_ranks, tmp_path, schedule, lambda: (Slow(0.04, 0.005, 0.005) for _ in range(4)))
    replay = measured.replay(find_schedule(schedule, 2, 4))
    assert replay is not None
    assert replay.steps == 3
    assert measured.bubble == pytest.approx(replay.bubble, rel=0.05)
    assert measured.costs is not None
    by_medians = simulate(find_schedule(schedule, 2, 4), measured.costs).bubble
    assert measured.bubble != pytest.approx(by_medians, rel=0.05)
