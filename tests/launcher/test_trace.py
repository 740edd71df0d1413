"""`dstrain run --trace`: one file of all ranks, wherever they are."""

from __future__ import annotations

import json

import pytest
from trace_lab import check_file, names
from typer.testing import CliRunner

import lab
from dstrain.launcher.cli import app
from dstrain.launcher.plan import Target
from dstrain.launcher.request import RunOptions, build_request
from dstrain.runtime.spec.errors import UsageError
from dstrain.runtime.spec.schedule import make_schedule, simulate
from dstrain.runtime.spec.trace import Category, read_trace

JOB = """
model: {gpt: {layers: 4, width: 16, heads: 2, context: 16}}
data: {path: text}
batch: {global: 4, micro: 1}
parallel: {pipeline: 2, schedule: zb_h1}
train: {steps: 8, sample_bytes: 0, eval_samples: 4}
"""


@pytest.mark.lab
def test_the_timeline_of_ranks_on_two_hosts_is_one_file(start, light: lab.Lab, tmp_path):
    (tmp_path / "job.yaml").write_text(JOB)
    (tmp_path / "text").write_bytes(b"the quick brown fox jumps over the lazy dog\n" * 100)
    hosts = light.hostfile(slots=1, names=light.names[:2])
    run = start("-H", hosts, "--trace", "job.yaml", env=light.env)
    assert run.wait(90) == 0, run.err
    path = run.directory / "trace.json"
    rows = check_file(path, 2, [4, 5, 6])
    plan = make_schedule("zb_h1", 2, 4)
    actions = [category for category in Category if category.is_action]
    for rank in range(2):
        assert names(rows[rank, 1], 5, *actions) == [str(action) for action in plan.ranks[rank]]
    measured = read_trace(path)
    trace = run.report["trace"]
    assert trace == {
        "file": "trace.json",
        "steps": 3,
        "bubble": pytest.approx(measured.bubble, abs=1e-5),
        "uncertainty_us": pytest.approx(1e6 * measured.uncertainty_s, abs=1e-3),
    }
    assert f"the timeline of 3 steps is in {run.directory}/trace.json, for ui.perfetto.dev; bubble" in run.err
    assert measured.costs is not None
    assert 0 < simulate(plan, measured.costs).bubble < 1
    words = ["plan", str(tmp_path / "job.yaml"), "-H", str(hosts), "--costs", str(path), "--json"]
    planned = json.loads(CliRunner().invoke(app, words, catch_exceptions=False).output)
    assert planned["replayed_steps"] == 3
    assert planned["bubble"] == pytest.approx(measured.bubble, rel=0.05)
    assert json.loads((run.directory / "job.json").read_text())["job"]["log"]["trace"] == "4-6"


@pytest.mark.lab
def test_a_script_that_never_trains_by_the_engine_leaves_a_note(start, script, tmp_path):
    (tmp_path / "job.yaml").write_text("name: own\n")
    run = start("-n", "1", "--trace", "-c", "job.yaml", script("print('hello')"))
    assert run.wait() == 0, run.err
    assert "no timeline: dstrain's engine did none of the steps 4-6 (log.trace)" in run.err
    assert run.report["trace"] is None
    assert not (run.directory / "trace.json").exists()


def test_a_target_without_a_job_is_refused_in_a_line():
    with pytest.raises(UsageError, match=r"--trace: expected a job\.yaml, found target train\.py; give -c job\.yaml"):
        build_request(RunOptions(trace=True), Target("script", "train.py"))


@pytest.mark.parametrize(
    ("log", "steps", "options", "expected"),
    [
        ("{}", 8, {"trace": True}, "4-6"),
        ("{}", 5, {"trace": True}, "3-5"),
        ("{}", 1, {"trace": True}, "1-1"),
        ("{trace: 2}", 8, {"trace": True}, 2),
        ("{trace: 2}", 8, {}, 2),
        ("{}", 8, {"trace": True, "overrides": ("log.trace=7-9",)}, "7-9"),
        ("{}", 8, {}, None),
    ],
)
def test_the_option_leaves_the_steps_to_the_job(tmp_path, log, steps, options, expected):
    job = tmp_path / "job.yaml"
    job.write_text(JOB.replace("steps: 8", f"steps: {steps}") + f"log: {log}\n")
    request, _ = build_request(RunOptions(hosts="localhost", **options), Target("script", str(job)))
    assert json.loads(request.job)["log"]["trace"] == expected


OWN_LOOP = """
import torch
from dstrain.runtime import initialize

engine = initialize(torch.nn.Linear(4, 1), optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
for step in range(8):
    engine.backward(engine(torch.ones(2, 4)).mean())
    engine.step()
    if step == 4:
        raise RuntimeError("enough")
"""


@pytest.mark.lab
def test_a_loop_of_ones_own_that_fails_leaves_what_there_is(start, script, tmp_path):
    (tmp_path / "job.yaml").write_text("name: own\n")
    run = start("-n", "1", "--trace", "-c", "job.yaml", script(OWN_LOOP))
    assert run.wait() == 1
    rows = check_file(run.directory / "trace.json", 1, [4, 5])
    assert names(rows[0, 1], 5, Category.FORWARD, Category.BACKWARD) == ["0F0", "0B0"]
    assert run.report["trace"]["bubble"] is None  # of a pipeline alone
    assert "the timeline of 2 steps is in" in run.err
