"""Where a run's time went, from its events."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.launcher.ledger import KINDS, Ledger, summary_line

BEGAN = 1_790_000_000.0


class Story:
    """Events at seconds of the head's clock; rank 0's is `ahead_s` before it."""

    def __init__(self, ahead_s: float = 0.0) -> None:
        self.ledger, self.ahead_s, self.attempt = Ledger(), ahead_s, 0

    def launcher(self, at: float, kind: str, **fields: Any) -> None:
        ts = int((BEGAN + at) * 1e9)
        self.ledger.take({"ts": ts, "attempt": self.attempt, "rank": None, "kind": kind, **fields})

    def rank(self, at: float, kind: str, rank: int = 0, **fields: Any) -> None:
        ts = int((BEGAN + at + self.ahead_s) * 1e9)
        self.ledger.take({"ts": ts, "attempt": self.attempt, "rank": rank, "kind": kind, **fields})

    def launch(self, at: float, attempt: int = 0) -> None:
        self.attempt = attempt
        self.launcher(at, "launch", clock_offset_s=self.ahead_s)

    def steps(self, first: int, last: int, at: float, step_s: float = 1.0) -> float:
        """The first begins at `at`; when the last ended."""
        for step in range(first, last + 1):
            at += step_s
            self.rank(at, "step", step=step, step_s=step_s)
        return at


def parts(ledger: Ledger) -> dict[str, float]:
    return {name: value for name, value in ledger.to_json().items() if name.endswith("_s") and value}


def two_attempts(ahead_s: float = 0.0) -> Story:
    """20 steps, one saved behind the 15th; killed at 30, known at 31, gone at 33; from step 16 again at 40."""
    story = Story(ahead_s)
    story.launcher(0, "run_start")
    story.launch(3)
    story.rank(5, "start")
    assert story.steps(1, 15, 6) == 21
    story.rank(22, "checkpoint", step=15, seconds=1.0)
    assert story.steps(16, 20, 22) == 27
    story.launcher(31, "failure", detected_ts=int((BEGAN + 30) * 1e9), headline="rank 1 on h1 died of SIGKILL")
    story.launcher(33, "ended")
    story.launch(36, attempt=1)
    story.rank(38, "resume", step=15)
    assert story.steps(16, 45, 40) == 70
    story.rank(71, "validation", step=45)
    story.rank(72, "end", step=45)
    story.launcher(74, "run_end")
    return story


@pytest.mark.parametrize("ahead_s", [0.0, 5.0, -5.0])
def test_two_attempts(ahead_s: float) -> None:
    ledger = two_attempts(ahead_s).ledger
    found = ledger.to_json()
    assert parts(ledger) == pytest.approx(
        {
            "total_s": 74,
            "startup_s": 6,
            "trained_s": 15 + 31,
            "checkpoint_stall_s": 1,
            "repeated_s": 5,
            "detection_s": 3,
            "teardown_s": 3,
            "restart_s": 7,
            "end_s": 3,
        },
        abs=1e-3,
    )
    assert (found["restarts"], found["steps"], found["repeated_steps"]) == (1, 45, 5)
    assert ledger.goodput == pytest.approx(46 / 74)
    first, second = found["attempts"]
    assert (first["first_step"], first["last_step"], first["steps"], first["repeated_steps"]) == (1, 20, 15, 5)
    assert (second["first_step"], second["last_step"], second["steps"]) == (16, 45, 30)
    assert (first["wait_s"], first["startup_s"], second["wait_s"], second["startup_s"]) == pytest.approx((3, 3, 3, 4))
    assert first["cause"] == "rank 1 on h1 died of SIGKILL"
    assert second["cause"] is None


def test_the_line_at_the_end() -> None:
    ledger = two_attempts().ledger
    report = {"goodput": ledger.goodput, "ledger": ledger.to_json()}
    assert summary_line(report) == (
        "goodput 62.2 %: 46.0 s of 74.0 s trained, 18.0 s lost by 1 restart (5 steps again), "
        "1.0 s stalled by checkpoints"
    )
    assert summary_line({"goodput": None, "ledger": None}) is None
    assert summary_line({}) is None


def test_a_run_that_has_lost_nothing_is_not_spoken_of() -> None:
    story = Story()
    story.launcher(0, "run_start")
    story.launch(1)
    story.steps(1, 100, 2)
    story.launcher(103, "run_end")
    assert story.ledger.goodput == pytest.approx(100 / 103)
    assert summary_line({"goodput": story.ledger.goodput, "ledger": story.ledger.to_json()}) is None


def test_a_run_without_steps_has_no_goodput() -> None:
    story = Story()
    story.launcher(0, "run_start")
    story.launch(1)
    story.launcher(9, "run_end")
    assert story.ledger.goodput is None
    assert Ledger().to_json()["total_s"] == 0


def test_an_attempt_that_fails_before_its_first_step() -> None:
    story = Story()
    story.launcher(0, "run_start")
    story.launch(2)
    story.rank(3, "start")
    story.launcher(10, "failure")
    story.launcher(11, "ended")
    story.launch(12, attempt=1)
    story.steps(1, 5, 14)
    story.launcher(20, "run_end")
    assert parts(story.ledger) == pytest.approx(
        {"total_s": 20, "startup_s": 10, "teardown_s": 1, "restart_s": 3, "trained_s": 5, "end_s": 1}
    )


def test_a_failure_that_nothing_follows() -> None:
    story = Story()
    story.launch(0)
    story.steps(1, 5, 1)
    story.launcher(8, "failure")
    story.launcher(9, "ended")
    story.launcher(10, "run_end")
    assert parts(story.ledger) == pytest.approx(
        {"total_s": 10, "startup_s": 1, "trained_s": 5, "detection_s": 2, "teardown_s": 2}
    )


def test_a_wait_for_an_attempt_that_never_began() -> None:
    story = Story()
    story.launch(0)
    story.steps(1, 5, 1)
    story.launcher(8, "failure")
    story.launcher(9, "ended")
    story.launcher(39, "run_end", exit_code=130, origin="launcher")
    assert parts(story.ledger) == pytest.approx(
        {"total_s": 39, "startup_s": 1, "trained_s": 5, "detection_s": 2, "teardown_s": 1, "restart_s": 30}
    )


def test_going_back_within_an_attempt() -> None:
    story = Story()
    story.launch(0)
    story.steps(1, 10, 0)
    story.rank(11, "resume", step=6)
    story.steps(7, 12, 11)
    found = story.ledger.to_json()
    assert (found["steps"], found["repeated_steps"], found["repeated_s"]) == (12, 4, pytest.approx(4))
    assert found["trained_s"] == pytest.approx(6 + 6 + 1)  # the way back counts to the first step behind it


def test_a_checkpoint_that_was_written_beside_the_training() -> None:
    """Its event comes when it is whole; only the stall is lost, and that lies in the steps before."""
    story = Story()
    story.launch(0)
    story.steps(1, 4, 0)
    story.rank(4.5, "checkpoint", step=2, seconds=2.5, stall_s=1.5)
    story.steps(5, 5, 4.5)
    assert parts(story.ledger) == pytest.approx({"total_s": 5.5, "trained_s": 4.0, "checkpoint_stall_s": 1.5})


def test_an_older_log_without_launches() -> None:
    story = Story()
    story.rank(0, "start")
    story.steps(1, 5, 1)
    story.attempt = 1
    story.rank(8, "start")
    story.steps(4, 6, 9)
    found = story.ledger.to_json()
    assert (found["total_s"], found["trained_s"], found["repeated_steps"], found["restarts"]) == (12, 6, 2, 1)


def test_other_ranks_and_late_words_count_for_nothing() -> None:
    story = Story()
    story.launch(0)
    story.steps(1, 5, 0)
    story.rank(6, "step", rank=1, step=9)
    story.launch(7, attempt=1)
    story.attempt = 0
    story.rank(8, "step", step=6)
    assert story.ledger.to_json()["steps"] == 5


ODD = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.lists(st.integers(), max_size=2)
)
KIND = st.sampled_from(["run_start", "launch", "step", "validation", "checkpoint", "failure", "ended", "run_end", "x"])
MARK = st.fixed_dictionaries(
    {
        "kind": KIND,
        "ts": st.integers(0, 10**12),
        "rank": st.sampled_from([None, 0]),
        "attempt": st.integers(0, 2),
        "step": st.integers(0, 9),
        "seconds": st.floats(0, 100),
        "step_s": st.floats(0, 100),
    }
)
EVENT = st.fixed_dictionaries(
    {"kind": st.one_of(KIND, ODD)},
    optional={
        "ts": st.one_of(st.integers(0, 10**12), ODD),
        "rank": st.one_of(st.none(), st.just(0), ODD),
        "attempt": st.one_of(st.integers(0, 3), ODD),
        "step": st.one_of(st.integers(0, 20), ODD),
        **dict.fromkeys(["step_s", "seconds", "stall_s", "clock_offset_s", "detected_ts", "headline"], ODD),
        "origin": st.one_of(st.just("launcher"), ODD),
        "exit_code": st.one_of(st.just(130), ODD),
    },
)


@given(st.lists(st.one_of(MARK, EVENT), max_size=30))
def test_the_parts_are_the_whole_whatever_is_said(events: list[dict[str, Any]]) -> None:
    ledger = Ledger()
    for event in events:
        ledger.take(event)
    seconds = [attempt.seconds[kind] for attempt in ledger.attempts for kind in KINDS]
    assert all(value >= -1e-3 for value in seconds)
    if ledger.attempts:
        assert sum(seconds) == pytest.approx(ledger.total_s, abs=1e-3)
    assert ledger.goodput is None or 0 <= ledger.goodput <= 1
    ledger.to_json()
