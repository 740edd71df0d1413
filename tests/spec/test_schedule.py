"""The schedules themselves: each action once, in order, with the bubble and the activations of the formulas."""

from __future__ import annotations

import subprocess
import sys
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dstrain.runtime.spec.errors import UsageError
from dstrain.runtime.spec.schedule import (
    SCHEDULE_NAMES,
    UNIT,
    Action,
    Costs,
    Kind,
    Schedule,
    Timeline,
    check,
    hastened,
    make_schedule,
    simulate,
)

RANKS, MICRO_BATCHES = range(1, 9), range(1, 33)
KINDS = [("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 2), ("interleaved_1f1b", 3), ("interleaved_1f1b", 4)]
KINDS += [("zb_h1", 1), ("zb_v", 2)]
COSTS = Costs(2.0, 3.0, 1.0)

NUMBERS = st.integers(0, 10**9 - 1)
SECONDS = st.integers(0, 9).map(float)


def assert_each_once_in_order(schedule: Schedule, chunks: int) -> None:
    """An oracle of its own, not `check`."""
    split = "FIW" if schedule.name.startswith("zb") else "FB"
    done: defaultdict[tuple[int, int], str] = defaultdict(str)
    for rank, row in enumerate(schedule.ranks):
        for kind, stage, micro_batch in row:
            assert schedule.rank_of[stage] == rank
            done[stage, micro_batch] += kind
    p, m = len(schedule.ranks), schedule.micro_batches
    assert schedule.stages == p * chunks
    assert done == dict.fromkeys(((s, j) for s in range(p * chunks) for j in range(m)), split)


def bubble_s(name: str, p: int, m: int, v: int, costs: tuple[float, float, float]) -> float:
    """Idle time of each rank, by formula; F, I, W are of one chunk. Without messages, stages alike.

    gpipe, 1f1b: every p, m, F, I, W. interleaved: every p, m, v, F, I, W; the second term is only for m < p.
    zb_h1: every p, m, F, I, W; it is the paper's (p − 1)(F + I − W) for m ≥ p and W ≤ F, I.
    """
    forward, inputs, weights = costs
    whole = forward + inputs + weights
    if name == "zb_h1":
        return (p - 1) * (forward + inputs) - (min(m, p) - 1) * min(costs)
    return (p - 1) * whole + (v - 1) * max(0, p - m) * whole


def v_bubble_slots(p: int, m: int) -> tuple[int, int]:
    """ZB-V with F = I = W = 1 slot of a chunk: (least, most). p − 1 is what the last rank waits for its first input."""
    if m >= 2 * p - 1:
        return p - 1, p - 1
    if m < p:
        exact = p - 1 + max(2 * (p - m), 3 * p - 4 * m)
        return exact, exact
    return p - 1, p - 1 + (p - 2)


def peaks(name: str, p: int, m: int, v: int, rank: int) -> tuple[int, int]:
    """Activations in flight on a rank, in chunks: until the last gradient, until the input's."""
    if name == "gpipe":
        return m, m
    if name == "interleaved_1f1b":
        group = -(-m // max(1, m // p))
        both = min(v * m, 2 * (p - rank - 1) + (v - 1) * group + 1)
        return both, both
    ours = min(m, p - rank)
    return (ours, ours) if name == "1f1b" else (min(m, p), ours)


def assert_bubble(timeline: Timeline, chunks: int) -> None:
    name, p, m = timeline.schedule.name, len(timeline.schedule.ranks), timeline.schedule.micro_batches
    least, most = v_bubble_slots(p, m) if name == "zb_v" else [bubble_s(name, p, m, chunks, (2.0, 3.0, 1.0))] * 2
    assert all(least <= idle <= most for idle in timeline.idle_s), (name, p, m, chunks, timeline.idle_s)
    assert timeline.bubble == pytest.approx(sum(timeline.idle_s) / (p * timeline.makespan_s))


@pytest.mark.parametrize("p", RANKS)
@pytest.mark.parametrize(("name", "v"), KINDS)
def test_each_action_once_in_order_with_bubble_and_memory_of_the_formulas(name: str, v: int, p: int) -> None:
    for m in MICRO_BATCHES:
        schedule = make_schedule(name, p, m, v)
        assert_each_once_in_order(schedule, v)
        timeline = simulate(schedule, UNIT if name == "zb_v" else COSTS)
        assert_bubble(timeline, v)
        found = list(zip(timeline.peak_in_flight, timeline.peak_until_input_gradient, strict=True))
        if name == "zb_v":
            assert [whole for whole, _ in found] == [min(2 * m, 2 * p)] * p
        else:
            assert found == [peaks(name, p, m, v, rank) for rank in range(p)]


@settings(max_examples=200)
@given(
    st.sampled_from([kind for kind in KINDS if kind[0] != "zb_v"]),
    st.integers(1, 6),
    st.integers(1, 12),
    SECONDS,
    SECONDS,
    SECONDS,
)
def test_bubbles_hold_for_any_costs(kind: tuple[str, int], p: int, m: int, f: float, i: float, w: float) -> None:
    name, v = kind
    timeline = simulate(make_schedule(name, p, m, v), Costs(f, i, w))
    assert list(timeline.idle_s) == [bubble_s(name, p, m, v, (f, i, w))] * p


@pytest.mark.parametrize("p", RANKS)
def test_one_f_one_b_takes_two_times_m_plus_p_minus_1(p: int) -> None:
    """With unit F and B; and its warm-up is min(m, p − rank − 1)."""
    for m in MICRO_BATCHES:
        timeline = simulate(make_schedule("1f1b", p, m), Costs(1.0, 0.5, 0.5))
        assert timeline.makespan_s == 2 * (m + p - 1)
        for rank, row in enumerate(timeline.schedule.ranks):
            first_backward = next(cell for cell, action in enumerate(row) if action.kind is Kind.BACKWARD)
            warm_up = min(m, p - rank - 1)
            assert first_backward == (warm_up + 1 if m > warm_up else m)


def test_schedules_are_those_of_the_papers() -> None:
    """Rows as the figures draw them: 1F1B and interleaved (2104.04473, fig. 4), ZB-H1 (2401.10241, fig. 2)."""

    def row(name: str, rank: int, stages_per_rank: int | None = None) -> str:
        return " ".join(map(str, make_schedule(name, 4, 8, stages_per_rank).ranks[rank]))

    assert row("gpipe", 1).startswith("1F0 1F1 1F2 1F3 1F4 1F5 1F6 1F7 1B0 1B1")
    assert row("1f1b", 1) == "1F0 1F1 1F2 1B0 1F3 1B1 1F4 1B2 1F5 1B3 1F6 1B4 1F7 1B5 1B6 1B7"
    assert row("interleaved_1f1b", 3).startswith("3F0 3F1 3F2 3F3 7F0 7B0 7F1 7B1 7F2 7B2 7F3 7B3 3F4 3B0 3F5 3B1")
    assert row("zb_h1", 0).startswith("0F0 0F1 0F2 0F3 0I0 0W0 0F4 0I1 0W1")
    assert row("zb_h1", 3).startswith("3F0 3I0 3F1 3I1 3F2 3I2 3F3 3I3 3W0 3F4 3I4 3W1")
    assert row("zb_v", 3).startswith("3F0 4F0 3F1 4F1 3F2 4F2 3F3 4F3 4I0 4W0 3F4 3I0 3W0 4F4 4I1 4W1")
    assert make_schedule("zb_v", 3, 5).rank_of == (0, 1, 2, 2, 1, 0)
    assert make_schedule("interleaved_1f1b", 3, 5).rank_of == (0, 1, 2, 0, 1, 2)


@pytest.mark.parametrize("p", [2, 4, 7])
def test_below_2p_minus_1_micro_batches_zb_v_keeps_a_place_for_the_second_chunk(p: int) -> None:
    """Without it a rank could fill up with first chunks, and no micro-batch could go on."""
    for m in range(p, 2 * p - 1):
        for rank, row in enumerate(make_schedule("zb_v", p, m).ranks):
            held = 0
            for kind, stage, _ in row:
                held += {Kind.FORWARD: 1, Kind.WEIGHT_GRADIENT: -1}.get(kind, 0)
                assert held < 2 * p or stage != rank or kind is not Kind.FORWARD


@given(st.sampled_from(Kind), NUMBERS, NUMBERS)
def test_print_and_parse_are_inverses(kind: Kind, stage: int, micro_batch: int) -> None:
    action = Action(kind, stage, micro_batch)
    assert Action.parse(str(action)) == action


def test_an_action_is_printed_as_torch_does() -> None:
    assert str(Action(Kind.FORWARD, 0, 3)) == "0F3"
    assert Action.parse("12W0") == Action(Kind.WEIGHT_GRADIENT, 12, 0)


@pytest.mark.parametrize(
    "text", ["", "F3", "0F", "0X3", "0f3", "-1F3", "00F3", "0F03", " 0F3", "0F3 ", "0SEND_F3", "²F3"]
)
def test_what_is_no_action(text: str) -> None:
    with pytest.raises(UsageError) as raised:
        Action.parse(text, "mine.csv:2, column 5")
    assert str(raised.value).startswith("mine.csv:2, column 5: expected stage, one of F B I W, micro-batch, like 0F3")
    assert f"found {text!r}" in str(raised.value)


@pytest.mark.parametrize(
    ("call", "found"),
    [
        (("gpip", 4, 8), "expected one of gpipe, 1f1b, interleaved_1f1b, zb_h1, zb_v, found 'gpip'"),
        (
            ("gpipe", 0, 8),
            "0 ranks × 1 stages per rank = 0 stages, 8 micro-batches): expected at least 1, found 0 ranks",
        ),
        (
            ("1f1b", 4, 0),
            "4 ranks × 1 stages per rank = 4 stages, 0 micro-batches): expected at least 1, found 0 micro",
        ),
        (("1f1b", 4, 8, 2), "4 ranks × 2 stages per rank = 8 stages, 8 micro-batches): expected 1 stages per rank"),
        (("zb_v", 4, 8, 3), "expected 2 stages per rank, found 3"),
        (("interleaved_1f1b", 4, 8, 1), "expected at least 2 stages per rank, found 1"),
    ],
)
def test_impossible_combinations_are_refused_with_all_factors(call: tuple[str, int, int], found: str) -> None:
    with pytest.raises(UsageError) as raised:
        make_schedule(*call)
    assert found in str(raised.value)


def test_import_needs_the_standard_library_only() -> None:
    code = "import sys, dstrain.runtime.spec.schedule; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "pydantic", "yaml"} & set(done.stdout.split())


@pytest.mark.parametrize("name", SCHEDULE_NAMES)
def test_the_last_gradients_leave_before_those_of_the_weights(name: str) -> None:
    """gpipe and 1f1b wait (p - 1) · (F + I), not (p - 1) · (F + I + W)."""
    costs = Costs(3.0, 2.0, 1.5)
    for p in range(1, 9):
        for m in (1, 2, 5, 16):
            plain = make_schedule(name, p, m)
            found = hastened(plain)
            check(found)
            timeline = simulate(found, costs)
            assert timeline.makespan_s <= simulate(plain, costs).makespan_s
            assert timeline.peak_in_flight == simulate(plain, costs).peak_in_flight
            if name in ("gpipe", "1f1b"):
                assert timeline.makespan_s == pytest.approx(m * 6.5 + (p - 1) * 5.0)
