"""When a step is too late, and for which rank the others wait: the decisions, without a process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dstrain.launcher import stacks
from dstrain.launcher.attempt import Attempt
from dstrain.launcher.blame import Standing, blame
from dstrain.launcher.hang import ALONE_S, LONG_S, USUAL_S, HangWatch, Progress, bound_s
from dstrain.launcher.hostfile import Host
from dstrain.launcher.node import Node
from dstrain.launcher.plan import Request, Target, make_plan
from dstrain.launcher.preflight import HostReport
from dstrain.launcher.request import RunOptions, build_request
from dstrain.runtime.spec.errors import UsageError
from dstrain.runtime.spec.frames import Paused

TORCH = "/v/lib/python3.11/site-packages/torch"
RUNTIME = "/root/.cache/dstrain/abc/dstrain/runtime"
SCRIPT = ("/job/train.py", 40, "<module>")
LOADS = ("/job/data.py", 31, "load")
REDUCES = (f"{TORCH}/distributed/distributed_c10d.py", 3000, "all_reduce")
LOCK = ("/usr/lib/python3.11/threading.py", 324, "wait")
BELOW = (f"{RUNTIME}/zygote.py", 220, "run_target")


def text(*frames: tuple[str, int, str], head: str = "Stack") -> str:
    lines = [f'  File "{file}", line {line} in {function}' for file, line, function in frames]
    return "\n".join([f"{head} (most recent call first):", *lines, ""])


WAITING = text(REDUCES, SCRIPT, BELOW)
LOADING = text(LOADS, SCRIPT, BELOW)


def standing(rank: int, said: str = WAITING, state: str = "S", step: int | None = 5) -> Standing:
    return Standing(rank, f"h{rank}", state, said, step)


# --- stacks --------------------------------------------------------------------------------------------------


def test_a_stack_is_read_back() -> None:
    (inner, *_) = stacks.main_thread(LOADING)
    assert (inner.file, inner.line, inner.function) == LOADS
    assert inner.place == "load (data.py:31)"
    assert stacks.main_thread("") == ()
    assert stacks.main_thread("noise\n  File ???, line ??? in ???") == ()


def test_the_main_thread_is_found_among_all() -> None:
    other = text(LOCK, ("/job/other.py", 3, "watch"), head="Thread 0x00007f01")
    both = f"{other}\n{text(LOADS, SCRIPT, BELOW, head='Current thread 0x00007f02')}"
    assert stacks.main_thread(both)[0].place == "load (data.py:31)"
    assert stacks.shown(both).splitlines() == [
        "main thread, most recent call first:",
        '  File "/job/data.py", line 31 in load',
        '  File "/job/train.py", line 40 in <module>',
        "another thread, most recent call first:",
        '  File "/usr/lib/python3.11/threading.py", line 324 in wait',
        '  File "/job/other.py", line 3 in watch',
    ]


def test_a_rank_is_where_its_users_code_is() -> None:
    waits_for_thread = text(LOCK, (f"{RUNTIME}/data/loader.py", 80, "_take"), head="Current thread 0x1")
    assert stacks.place(waits_for_thread) == "_take (loader.py:80)"
    assert stacks.place(f"{text(LOADS, LOCK, head='Thread 0x2')}\n{waits_for_thread}") == "load (data.py:31)"
    assert stacks.place(WAITING) == "<module> (train.py:40)"
    assert stacks.place(text(LOCK)) == "wait (threading.py:324)"


@pytest.mark.parametrize(
    ("frames", "waits"),
    [
        ((REDUCES, SCRIPT), True),
        ((LOCK, (f"{RUNTIME}/comm_group.py", 95, "wait")), True),
        (((f"{RUNTIME}/gradients.py", 269, "wait"), SCRIPT), True),
        (((f"{TORCH}/nn/parallel/distributed.py", 1, "forward"), SCRIPT), True),
        ((LOADS, REDUCES), False),  # what a collective's own code calls of the user's is the user's
        ((LOCK, (f"{RUNTIME}/data/loader.py", 80, "_take"), SCRIPT), False),
        (((f"{TORCH}/utils/data/dataloader.py", 80, "_get_data"), SCRIPT), False),
        (((f"{TORCH}/distributed/checkpoint/filesystem.py", 80, "write"), SCRIPT), False),
        ((LOCK,), False),
        ((), False),
    ],
)
def test_who_waits_for_others(frames: tuple[Any, ...], waits: bool) -> None:
    assert stacks.waits(stacks.main_thread(text(*frames))) is waits


def test_a_backward_that_computes_waits_for_nobody() -> None:
    backward = text((f"{TORCH}/autograd/graph.py", 829, "_engine_run_backward"), SCRIPT)
    assert not standing(0, backward, state="R").waits
    assert standing(0, backward, state="S futex_wait_queue").waits


# --- which rank ----------------------------------------------------------------------------------------------


def blamed(*ranks: Standing) -> list[int]:
    return [one.rank for one in blame(ranks).behind]


def test_who_is_outside_of_the_collective() -> None:
    found = blame([standing(0), standing(1, LOADING), standing(2), standing(3)])
    assert [one.rank for one in found.behind] == [1]
    assert found.waiting == (0, 2, 3)
    assert found.words("hangs") == "rank 1 on h1 hangs in load (data.py:31), ranks 0,2-3 wait for it"
    assert found.words("is") == "rank 1 on h1 is in load (data.py:31), ranks 0,2-3 wait for it"


def test_who_is_stopped_or_does_not_answer() -> None:
    assert blamed(standing(0), standing(1, LOADING), standing(2, "", "T")) == [2]
    assert blamed(standing(0), standing(1, LOADING), standing(2, "")) == [2]
    found = blame([standing(0), standing(1, "", "D nfs_wait_bit_killable")])
    assert found.words("hangs") == (
        "rank 1 on h1 hangs: it waits for a disk or a network file system (nfs_wait_bit_killable), rank 0 waits for it"
    )
    assert (
        blame([standing(0), standing(1, "")]).words("is")
        == "rank 1 on h1 does not say where it is, rank 0 waits for it"
    )


def test_of_several_those_with_the_fewest_steps() -> None:
    assert blamed(standing(0), standing(1, LOADING, step=4), standing(2, LOADING, step=5)) == [1]
    assert blamed(standing(0), standing(1, step=4)) == [1]
    assert blamed(standing(0, step=5), standing(1, step=None)) == [0, 1]  # it reports none: nothing is known


def test_of_several_the_one_elsewhere() -> None:
    """As on a GPU: nobody is seen to wait, but most are in one place."""
    syncs = text(("/job/train.py", 55, "step"))
    found = blame([standing(0, syncs), standing(1, syncs), standing(2, LOADING), standing(3, syncs)])
    assert [one.rank for one in found.behind] == [2]
    assert found.others_wait
    assert len(blamed(standing(0, syncs), standing(1, LOADING))) == 2


def test_all_wait_for_each_other() -> None:
    found = blame([standing(0), standing(1), standing(2)])
    assert found.all_wait
    assert found.words("hangs") == "ranks 0-2 hang in a collective, rank 0 in <module> (train.py:40)"
    elsewhere = text((f"{TORCH}/distributed/distributed_c10d.py", 99, "barrier"), ("/job/train.py", 7, "save"))
    assert blamed(standing(0), standing(1), standing(2, elsewhere)) == [2]


def test_nobody_can_be_asked() -> None:
    found = blame([standing(0, ""), standing(1, "")])
    assert (found.can_be_asked, found.takes_long, found.others_wait) == (False, True, True)
    assert blamed(standing(0, "", step=5), standing(1, "", step=4)) == [1]


def test_one_rank_alone_waits_for_nobody() -> None:
    found = blame([standing(0)])
    assert not found.others_wait


# --- when ----------------------------------------------------------------------------------------------------


def test_bounds() -> None:
    assert bound_s(None, 0.5, has_pace=True, others_wait=True) == USUAL_S
    assert bound_s(None, 20.0, has_pace=True, others_wait=True) == 200.0
    assert bound_s(None, None, has_pace=True, others_wait=True) == LONG_S  # the pace is not known yet
    assert bound_s(None, 0.5, has_pace=False, others_wait=True) == LONG_S
    assert bound_s(None, 100.0, has_pace=False, others_wait=True) == 1000.0
    assert bound_s(None, 0.5, has_pace=True, others_wait=False) == ALONE_S
    assert bound_s(None, 0.5, has_pace=True, others_wait=False, are_apart=True) == LONG_S
    assert bound_s(3.0, 20.0, has_pace=True, others_wait=False) == 3.0
    assert bound_s(3.0, None, has_pace=False, others_wait=True) == LONG_S
    assert bound_s(2000.0, None, has_pace=False, others_wait=False) == 2000.0
    assert bound_s(0.0, 1.0, has_pace=True, others_wait=True) == float("inf")


def step(number: int, at_s: float | None = None) -> dict[str, Any]:
    return {"kind": "step", "step": number, "ts": int((number if at_s is None else at_s) * 1e9)}


def stepping(hang_s: float | None, ranks: int = 2, steps: int = 10) -> HangWatch:
    """A step a second, the last at `steps`."""
    watch = HangWatch(hang_s)
    for number in range(1, steps + 1):
        for rank in range(ranks):
            watch.progress.take(rank, step(number), float(number))
    return watch


def test_the_pace_is_the_median_of_the_ranks_own_clock() -> None:
    progress = Progress()
    for number, at in enumerate((1.0, 1.5, 2.0, 9.0, 9.5), 1):
        progress.take(0, step(number, at), now=100.0)  # they may arrive together
    assert progress.median_s is None
    progress.take(0, step(8, 11.0), now=100.0)  # three in one
    assert progress.median_s == 0.5
    progress.take(0, step(2, 50.0), now=100.0)  # it has gone back to a checkpoint: no interval
    progress.take(0, step(10**400, 60.0), now=100.0)  # a script may write anything
    progress.take(0, {"kind": "step", "step": 3, "ts": 10**400}, now=100.0)
    assert len(progress._intervals) == 5
    assert progress.median_s == 0.5


def test_who_reports_no_steps_is_not_watched() -> None:
    watch = HangWatch(1.0)
    watch.progress.take(0, {"kind": "note"}, 0.0)
    assert watch.progress.most_silent({0, 1}, 1000.0) == (0.0, False)
    assert not watch.should_ask({0, 1}, 1000.0)
    watch = stepping(1.0)
    watch.progress.take(0, {"kind": "end"}, 11.0)
    watch.progress.take(0, {"kind": "warning"}, 12.0)
    assert watch.progress.most_silent({0}, 1000.0) == (0.0, False)
    assert watch.progress.most_silent({1}, 20.0) == (10.0, True)


def test_any_event_shows_that_a_rank_lives() -> None:
    watch = stepping(6.0)
    assert watch.should_ask({0, 1}, 14.0)
    for rank in (0, 1):
        watch.progress.take(rank, {"kind": "alive", "step": 10}, 13.5)
    assert not watch.should_ask({0, 1}, 14.0)


def test_time_in_which_nobody_looked_is_no_silence() -> None:
    watch = stepping(6.0)
    assert not watch.should_ask({0, 1}, 11.0)
    assert not watch.should_ask({0, 1}, 1011.0)
    assert watch.should_ask({0, 1}, 1014.0)


HUNG = [standing(0), standing(1, LOADING)]


def test_a_note_once_then_the_verdict() -> None:
    watch, both = stepping(6.0), {0, 1}
    assert not watch.should_ask(both, 12.9)
    assert watch.should_ask(both, 13.0)
    finding = watch.judge(HUNG, both, 13.2)
    assert finding
    assert not finding.is_hang
    assert finding.note() == (
        "no step for 3 s: rank 1 on h1 is in load (data.py:31), rank 0 waits for it; "
        "at 6 s it counts as a hang (--hang-timeout)"
    )
    assert not watch.should_ask(both, 15.0)
    assert watch.judge(HUNG, both, 15.0) is None  # said already
    assert watch.should_ask(both, 16.0)
    finding = watch.judge(HUNG, both, 16.3)
    assert finding
    assert finding.is_hang
    cause = finding.cause("", "here")
    assert (cause.code, cause.origin, cause.rank, cause.host) == (203, "launcher", 1, "h1")
    assert cause.headline == "rank 1 on h1 hangs in load (data.py:31), rank 0 waits for it: no step for 6 s"
    assert '  File "/job/data.py", line 31 in load' in cause.detail
    assert "here" in cause.remedy


def test_steps_that_go_on_begin_anew() -> None:
    watch, both = stepping(6.0), {0, 1}
    assert watch.judge(HUNG, both, 13.2)
    for rank in both:
        watch.progress.take(rank, step(11), 14.0)
    assert not watch.should_ask(both, 14.5)
    assert watch.judge(HUNG, both, 14.6) is None  # the answers come too late
    assert watch.should_ask(both, 17.0)
    assert watch.judge(HUNG, both, 17.0)


def test_automatic_times() -> None:
    """A minute where others wait; nine where it may take long, or two are apart; half an hour where nobody is kept
    waiting."""
    both = {0, 1}
    saving = [standing(0), standing(1, text((f"{RUNTIME}/checkpoint/save.py", 9, "write"), SCRIPT))]
    busy = [standing(0, LOADING, "R"), standing(1, LOADING, "R")]
    apart = [standing(0, LOADING, "R"), standing(1, text(("/job/data.py", 99, "other")), "R")]
    for ranks, bound in ((HUNG, 60.0), (saving, 540.0), (apart, 540.0), (busy, 1800.0)):
        watch = stepping(None)
        assert not watch.should_ask(both, 10.0 + 29.0)
        for silent in range(30, 2000):
            now = 10.0 + silent
            finding = watch.judge(ranks, both, now) if watch.should_ask(both, now) else None
            if finding and finding.is_hang:
                assert silent == bound
                break
        else:
            raise AssertionError("never")


def test_before_the_first_step() -> None:
    watch, both = HangWatch(3.0), {0, 1}
    for rank in both:
        watch.progress.take(rank, {"kind": "start"}, 0.0)
    ranks = [standing(0, step=0), standing(1, LOADING, step=0)]
    assert not watch.should_ask(both, 269.0)
    assert watch.should_ask(both, 270.0)
    finding = watch.judge(ranks, both, 540.0)
    assert finding
    assert finding.is_hang


def test_a_rank_in_a_debugger_is_left_alone() -> None:
    both = {0, 1}
    traced = [standing(0), standing(1, LOADING, "t")]
    in_pdb = [standing(0), standing(1, text(("/usr/lib/python3.11/pdb.py", 3, "cmdloop"), LOADS))]
    for ranks in (traced, in_pdb):
        assert stepping(6.0).judge(ranks, both, 1000.0) is None


@pytest.mark.parametrize(("hang_s", "ends"), [(0.0, False), (None, True)])
def test_a_stopped_rank_is_a_note_alone_where_nothing_is_a_hang(hang_s: float | None, ends: bool) -> None:
    """Whoever stopped it may have asked for just that."""
    target = Target("script", "x.py")
    plan = make_plan(Request(target, (Host("h0", slots=1),), "/job", hang_s=hang_s), "id", [1])
    node = Node(SimpleNamespace(index=0, send=lambda message: None), HostReport(Host("h0")))  # type: ignore[arg-type]
    notes: list[str] = []
    attempt = Attempt(0, plan, [node], None, notes.append)  # type: ignore[arg-type]
    attempt.take(node, Paused({"0": 60.0}))
    attempt.look()
    assert notes == ["rank 0 on h0 is stopped (SIGSTOP): the others wait for it"]
    assert (attempt.finished() is not None) is ends


def test_a_bound_that_is_no_number(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.py").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"^--hang-timeout: expected a number of seconds, or 0 for never, found nan$"):
        build_request(RunOptions(hang_s=float("nan")), Target("script", "x.py"))
    request, _ = build_request(RunOptions(hang_s=0.0), Target("script", "x.py"))
    assert request.hang_s == 0.0
