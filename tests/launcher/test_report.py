"""`dstrain report`: from real event files to a page that a real browser draws without a network."""

from __future__ import annotations

import html
import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from trace_lab import recorded
from typer.testing import CliRunner

import lab
from dstrain.launcher.cli import app
from dstrain.launcher.event_log import EventLog
from dstrain.launcher.report import tables
from dstrain.launcher.report.charts import Chart, charts_of
from dstrain.launcher.report.page import page
from dstrain.launcher.report.read import read_run
from dstrain.launcher.run_dir import RunDir
from dstrain.runtime.spec.errors import UsageError
from dstrain.runtime.spec.event import EventWriter
from dstrain.runtime.spec.schedule import Costs, make_schedule, simulate
from dstrain.runtime.spec.trace import write_trace

HOSTILE = "</script><script>document.title='hacked'</script><img src=x onerror=document.title='hacked'>"

JOB = {"name": "gpt", "optimizer": {"lr": 0.003, "betas": [0.9, 0.95]}, "train": {"steps": 40, "clip": None}}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path


class Recorder:
    """A run's directory, written by the launcher's and the runtime's own writers."""

    def __init__(self, run_id: str, job: dict[str, Any] | None = None, base: Path = Path("runs")) -> None:
        self.run = RunDir.create(base, run_id)
        self.path, self.id = self.run.path, run_id
        self.log = EventLog(self.run, run_id)
        self.run.write_json("job.json", {"cwd": "/job", "environment": {"API_KEY": "***"}, "job": job})

    def ranks(self, count: int, attempt: int = 0) -> list[EventWriter]:
        fd = os.open(self.run.events, os.O_WRONLY | os.O_APPEND)
        return [EventWriter(fd, self.id, attempt, rank) for rank in range(count)]

    def train(self, ranks: int, steps: Sequence[int], attempt: int = 0, **more: float) -> None:
        writers = self.ranks(ranks, attempt)
        for rank, writer in enumerate(writers):
            writer.emit("start", world_size=ranks, device="cuda:0", parameters=968_000, accumulation=1)
            for step in steps:
                own = {"step_s": 0.1 + rank / 100, "memory_bytes": (1 + rank) << 30, "data_wait_s": 0.01 * rank}
                same = {"loss": 100 * attempt + 5 - step / 10, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_s": 10_000.0}
                writer.emit("step", step=step, **same, **own, **more)
            writer.emit("validation", step=steps[-1], val_loss=2.0 + attempt)

    def report(self, code: int = 0, **more: Any) -> None:
        times = {"started": 1_790_000_000.0, "ended": 1_790_003_723.0}
        origin = {"origin": "worker", "cause": None, "attempts": [{"number": 0}], "world_size": 2, "hosts": ["a", "b"]}
        self.run.write_json("report.json", {"exit_code": code, "target": "python x.py", **origin, **times, **more})


def fact(recorder: Recorder, name: str) -> str:
    return {row.name: row.cells[0] for row in tables.summary([read_run(recorder.path)])}.get(name, "")


def titles(*recorders: Recorder) -> list[str]:
    return [chart.title for chart in charts_of([read_run(recorder.path) for recorder in recorders])]


# --- reading -------------------------------------------------------------------------------------------------


def test_what_a_run_says(folder: Path) -> None:
    run = Recorder("a", JOB)
    run.train(2, range(1, 41))
    run.report()
    assert fact(run, "Outcome") == "succeeded"
    assert fact(run, "Wall time") == "1:02:03"
    assert fact(run, "Hosts") == "a, b"
    assert fact(run, "Ranks") == "2 on cuda"
    assert fact(run, "Parameters") == "968 k"
    assert fact(run, "Steps") == "40 of 40"
    assert fact(run, "Tokens") == "40 k"
    assert float(fact(run, "Training loss (mean of the last 10)")) == pytest.approx(5 - 3.55)
    assert fact(run, "Validation loss") == "2.0000"
    assert fact(run, "Throughput (median)") == "10 k tokens/s"
    assert fact(run, "Peak memory of a rank") == "2.00 GiB"
    assert fact(run, "Could not be read") == ""
    common = [
        "Loss",
        "Learning rate",
        "Gradient norm",
        "Throughput",
        "Step time per rank",
        "Waiting for data",
        "Memory",
    ]
    assert titles(run) == common
    run.train(2, range(41, 43), mfu=0.5, loss_scale=65536.0)
    assert sorted({*titles(run)} - {*common}) == ["Loss scale", "Model FLOPs utilization"]
    assert fact(run, "Model FLOPs utilization (median)") == "50.0%"


def test_a_file_that_is_being_written_and_damaged(folder: Path) -> None:
    run = Recorder("a")
    run.train(1, range(1, 5))
    lines = [
        b'{"kind":"step","attempt":0,"rank":0,"step":5,"loss":null,"step_s":true,"lr":"x","tokens_per_s":' + b"9" * 400,
        b'{"kind":"step","attempt":0,"rank":0,"step":-1,"loss":1}',
        b'{"kind":"step","attempt":null,"rank":0,"step":6,"loss":1}',
        b'{"kind":"step","attempt":0,"rank":0,"step":7,"loss":NaN}',
        b'{"kind":"validation","attempt":0,"rank":0,"step":7,"val_loss":Infinity}',
        b"[" * 100_000,
        b"\xff\xfe",
        b"5",
        b"",
        b'{"kind":"step","attempt":0,"rank":0,"st',
    ]
    with run.run.events.open("ab") as file:
        file.write(b"}\n".join(lines[:1]) + b"}\n" + b"\n".join(lines[1:]))
    read = read_run(run.path)
    assert read.problems == ("events.jsonl: 4 lines are no events, and are left out",)
    (loss,) = read.attempts(0, "loss")
    assert loss.step.tolist() == [1, 2, 3, 4, 5, 7]
    assert len(read.validations) == 1
    assert "Loss" in page([read])


def test_missing_and_broken_files(folder: Path) -> None:
    run = Recorder("a")
    run.train(1, range(1, 5))
    (run.path / "job.json").write_text("{")
    (run.path / "report.json").write_text("[1]")
    assert fact(run, "Outcome") == "no report.json: it still runs, or the launcher was killed"
    assert "job.json: not JSON" in fact(run, "Could not be read")
    assert "report.json: no JSON object" in fact(run, "Could not be read")
    run.run.events.unlink()
    assert "events.jsonl: No such file" in fact(run, "Could not be read")
    assert "reported no steps" in page([read_run(run.path)])


def test_attempts_are_one_history_with_marks(folder: Path) -> None:
    run = Recorder("a", JOB)
    run.train(2, range(1, 31))
    run.train(2, range(21, 41), attempt=1)
    run.report(attempts=[{"number": 0}, {"number": 1}])
    assert fact(run, "Attempts") == "2"
    charts = {chart.title: chart for chart in charts_of([read_run(run.path)])}
    for chart in charts.values():
        assert [(mark["x0"], mark["label"]["text"]) for mark in chart.layout["shapes"]] == [(21, "restart 1")]
    again, training, _validation = charts["Loss"].data
    assert (again["line"]["dash"], training["line"].get("dash")) == ("dot", None)
    assert fact(run, "Tokens") == "40 k"
    assert float(fact(run, "Training loss (mean of the last 10)")) > 100  # of the second attempt
    assert fact(run, "Best validation loss") == "2.0000 at step 30"


def test_where_the_time_went(folder: Path) -> None:
    run = Recorder("a", JOB)
    run.log.write(0, "run_start")
    run.log.write(0, "launch", clock_offset_s=0.0)
    run.train(2, range(1, 31))
    run.log.write(0, "failure", headline=HOSTILE)
    run.log.write(0, "ended")
    run.log.write(1, "launch", clock_offset_s=0.0)
    run.train(2, range(21, 41), attempt=1)
    run.log.write(1, "run_end")
    read = read_run(run.path)
    assert (read.ledger.to_json()["steps"], read.ledger.to_json()["repeated_steps"]) == (40, 10)
    assert re.fullmatch(r"[\d.]+% of the time trained", fact(run, "Goodput"))
    text = page([read])
    section = text.partition("<h2>Where the time went</h2>")[2].partition("</section>")[0]
    assert '<div class="bar"><span style="width:' in section
    assert "<td>1 to 30</td>" in section
    assert "<td>21 to 40</td>" in section
    assert html.escape(HOSTILE) in section
    assert "<script>document.title" not in text
    assert "Where the time went" not in page([read_run(Recorder("b").path)])


def test_what_a_script_writes_is_kept_and_only_events_are_told(folder: Path) -> None:
    told: list[Any] = []
    run = RunDir.create(Path("runs"), "a")
    log = EventLog(run, "a", told.append)
    lines = [b'{"kind":"step","rank":7,"step":1}\n', b"no event\n", b"[1]\n", b"[" * 100_000 + b"\n", b'{"kind":"x']
    log.append(1, lines[0] + lines[1][:3])
    log.append(1, lines[1][3:] + lines[2] + lines[3] + lines[4])
    assert told == [{"kind": "step", "rank": 1, "step": 1}]  # whose it is says the pipe
    log.append(1, b'"}\n')
    assert told[1:] == [{"kind": "x", "rank": 1}]
    assert run.events.read_bytes() == b"".join(lines) + b'"}\n'


def test_many_ranks_are_a_picture_that_names_the_slowest(folder: Path) -> None:
    run = Recorder("a")
    run.train(16, range(1, 11))
    (chart,) = [chart for chart in charts_of([read_run(run.path)]) if chart.title.startswith("Step time")]
    assert [trace["type"] for trace in chart.data] == ["heatmap"]
    assert chart.note == "Medians from 0.1 s (rank 0) to 0.25 s (rank 15)."


def test_a_long_run_stays_small(folder: Path) -> None:
    run = Recorder("a")
    run.train(4, range(1, 5001))
    html_text = page([read_run(run.path)])
    data = html_text.partition('id="charts">')[2].partition("</script>")[0]
    assert run.run.events.stat().st_size > 4_000_000
    assert len(data) < 600_000


def test_configuration_and_what_differs(folder: Path) -> None:
    one, two = Recorder("one", JOB), Recorder("two", JOB | {"optimizer": {"lr": 0.001, "betas": [0.9, 0.95]}})
    rows = {row.name: row for row in tables.configuration([read_run(one.path), read_run(two.path)])}
    assert rows["optimizer.lr"].cells == ("0.003", "0.001")
    assert [name for name, row in rows.items() if row.differs] == ["optimizer.lr"]
    assert rows["run.environment.API_KEY"].cells == ("***", "***")
    assert rows["optimizer.betas"].cells[0] == "[0.9, 0.95]"
    assert "train.clip" not in rows


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (999.7, "1 k"), (12_345, "12.3 k"), (2.5e6, "2.5 M"), (9e11, "900 G"), (float("nan"), "")],
)
def test_amounts(number: float, text: str) -> None:
    assert tables.amount(number) == text


# --- the figures, by plotly's own schema ---------------------------------------------------------------------


def every_chart(folder: Path) -> Iterator[Chart]:
    small, large, plain = Recorder("small", JOB), Recorder("large", JOB), Recorder("plain")
    small.train(2, range(1, 400), mfu=0.4, loss_scale=2.0)
    small.train(2, range(300, 500), attempt=1, mfu=0.4, loss_scale=2.0)
    large.train(9, range(1, 20))
    runs = [read_run(recorder.path) for recorder in (small, large, plain)]
    yield from charts_of(runs[:1])
    yield from charts_of(runs)


def test_figures_are_what_plotly_knows(folder: Path) -> None:
    from plotly.graph_objects import Figure

    charts = list(every_chart(folder))
    assert len(charts) == 9 + 10
    for chart in charts:
        Figure(chart.data, chart.layout)  # raises ValueError for a key or value that plotly does not know


# --- the page, in a browser ----------------------------------------------------------------------------------


class Browser:
    """What chromium made of a page: the document after its scripts, and what they complained of."""

    def __init__(self, path: Path, folder: Path) -> None:
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--enable-logging=stderr",
            "--virtual-time-budget=9000",
        ]
        command = [
            "chromium",
            *options,
            f"--user-data-dir={folder / 'profile'}",
            "--dump-dom",
            path.absolute().as_uri(),
        ]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=100, env=os.environ | {"HOME": str(folder)}
        )
        self.document = done.stdout
        self.complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    @property
    def title(self) -> str:
        found = re.search("<head>.*?<title>(.*?)</title>", self.document, re.DOTALL)
        return html.unescape(found[1]) if found else ""

    @property
    def drawn(self) -> int:
        """Charts, as the page's script says when plotly has drawn them all, and as plotly has left them."""
        (said,) = re.findall(r'<html[^>]* data-drawn="(\d+)"', self.document)
        assert self.document.count('class="chart js-plotly-plot"') == int(said)
        return int(said)


@pytest.mark.slow
def test_a_browser_draws_one_run_without_a_complaint(folder: Path) -> None:
    run = Recorder("20261121-043000-a1b2c3-gpt", JOB)
    run.train(2, range(1, 400))
    run.report()
    result = CliRunner().invoke(app, ["report", str(run.path)])
    assert result.output == f"wrote {run.path}/report.html\n"
    browser = Browser(run.path / "report.html", folder)
    assert browser.complaints == []
    assert browser.drawn == 7
    assert browser.title == "20261121-043000-a1b2c3-gpt · dstrain"
    assert browser.document.count('class="scatterlayer') >= 7
    assert "rank 1" in browser.document


@pytest.mark.slow
def test_a_browser_draws_several_runs_and_runs_nothing_of_their_text(folder: Path) -> None:
    hostile = Recorder(HOSTILE.replace("/", "\\"), JOB | {"name": HOSTILE})
    hostile.train(9, range(1, 30))
    cause = {"headline": HOSTILE, "detail": HOSTILE, "remedy": HOSTILE}
    hostile.report(1, cause=cause, origin=HOSTILE, target=HOSTILE, hosts=[HOSTILE], notes=[HOSTILE])
    good, plain = Recorder("good", JOB), Recorder("plain")
    good.train(1, range(1, 400))
    good.train(1, range(300, 500), attempt=1)
    plain.report()
    result = CliRunner().invoke(app, ["report", str(hostile.path), "good", str(plain.path), "-o", "all.html"])
    assert result.output == "wrote all.html\n"
    browser = Browser(Path("all.html"), folder)
    assert browser.complaints == []
    assert browser.drawn == 8
    assert browser.title == "3 runs · dstrain"
    assert "<img" not in browser.document
    assert browser.document.count("Root cause") == 1
    assert "plain reported no steps" in browser.document


def test_the_page_may_not_ask_for_anything(folder: Path) -> None:
    """The policy of the page holds in the browser: a request that slipped in would be refused, and told."""
    run = Recorder("a")
    text = page([read_run(run.path)]).replace("<main>", '<main><img src="http://127.0.0.1:9/x.png">')
    Path("page.html").write_text(text)
    (complaint,) = Browser(Path("page.html"), folder).complaints
    assert "Content Security Policy" in complaint


# --- the command ---------------------------------------------------------------------------------------------


def report(*words: str) -> str:
    result = CliRunner().invoke(app, ["report", *words])
    if isinstance(result.exception, Exception):
        raise result.exception
    return result.output.strip()


def test_runs_are_found_by_path_by_id_and_by_age(folder: Path) -> None:
    Recorder("20250101-000000-aaaaaa")
    newer = Recorder("20260101-000000-bbbbbb")
    Recorder("20270101-000000-cccccc", base=Path("elsewhere"))
    assert report() == f"wrote runs/{newer.id}/report.html"
    assert report("20250101-000000-aaaaaa").endswith("runs/20250101-000000-aaaaaa/report.html")
    assert report("20270101-000000-cccccc").endswith("elsewhere/20270101-000000-cccccc/report.html")
    assert report(str(newer.path), newer.id).endswith(f"{newer.id}/report.html")  # one run, named twice
    assert report("20250101-000000-aaaaaa", newer.id) == "wrote report.html"


def test_runs_that_are_none(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"^RUN: expected a run in \./runs, found none; name its directory or its id$"):
        report()
    with pytest.raises(UsageError, match=r"^RUN: expected a run's directory or id, found 'nowhere'; the ids are in"):
        report("nowhere")
    run = Recorder("a")
    with pytest.raises(UsageError, match=r"^--output: expected a file that can be written, found \.: Is a directory"):
        report(str(run.path), "-o", ".")


@pytest.mark.slow
@pytest.mark.lab
def test_a_real_run(start: Callable[..., Any], folder: Path) -> None:
    (folder / "text").write_bytes(b"the quick brown fox jumps over the lazy dog\n" * 100)
    (folder / "job.yaml").write_text(
        "model: {gpt: {layers: 1, width: 16, heads: 2, context: 16}}\n"
        "data: {path: text}\nbatch: {global: 4, micro: 2}\ntrain: {steps: 12, sample_bytes: 0}\n"
    )
    run = start("-n", 2, "job.yaml")
    assert run.wait(90) == 0, run.err
    done = subprocess.run([lab.DSTRAIN, "report"], cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    read = read_run(run.directory)
    facts = {row.name: row.cells[0] for row in tables.summary([read])}
    assert (facts["Outcome"], facts["Steps"], facts["Ranks"]) == ("succeeded", "12 of 12", "2 on cpu")
    assert float(facts["Training loss (mean of the last 10)"]) < 6
    assert read.problems == ()
    assert json.loads((run.directory / "report.json").read_text())["exit_code"] == 0
    assert (run.directory / "report.html").stat().st_size > 4_000_000


def test_a_trace_gives_a_table_of_costs_and_the_bubble() -> None:
    recorder = Recorder("piped")
    timeline = simulate(make_schedule("1f1b", 2, 4), Costs([3e-3, 5e-3], 4e-3, 2e-3, 1e-3))
    write_trace(recorder.path / "trace.json", recorded(timeline, 4, zero=0))
    text = page([read_run(recorder.path)])
    cells = re.findall(r"<td>([^<]*) ms</td>", text)
    assert cells == ["3", "6", "1", "5", "6"]  # the last stage sends to no next one
    assert f"{timeline.bubble:.1%}, {timeline.bubble:.1%} to {timeline.bubble:.1%} in 1 traced step" in text
    (recorder.path / "trace.json").write_text("half a fi")
    assert "trace.json: no trace of ours" in page([read_run(recorder.path)])
