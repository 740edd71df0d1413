"""`dstrain plan`: what it says of a job, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest
import yaml
from trace_lab import recorded
from typer.testing import CliRunner

from dstrain.launcher.cli import app
from dstrain.launcher.hostfile import parse_hosts_expression
from dstrain.launcher.planning.cluster import Assumed, Cluster, make_cluster
from dstrain.launcher.planning.layout import Layout, enough, layout_of
from dstrain.launcher.planning.planner import Plan, Planner
from dstrain.launcher.planning.search import best, search
from dstrain.launcher.planning.show import WIDTH, assumptions, layout_yaml, plan_lines, search_lines
from dstrain.runtime.spec.config import JobConfig
from dstrain.runtime.spec.errors import DstrainError, UsageError
from dstrain.runtime.spec.gpt_shapes import gpt_shapes
from dstrain.runtime.spec.load import job_of
from dstrain.runtime.spec.parallel_dims import ParallelDims
from dstrain.runtime.spec.schedule import SCHEDULE_NAMES, Took, find_schedule, simulate
from dstrain.runtime.spec.trace import write_trace

GPT = {"layers": 6, "width": 64, "heads": 2, "context": 32, "vocabulary": 256}
LARGE = {"layers": 24, "width": 4096, "heads": 32, "context": 2048, "vocabulary": 50304}
"""5 B parameters: 80 GB of state in bf16."""
GIANT = {"layers": 120, "width": 16384, "heads": 128, "context": 4096, "vocabulary": 131072}
"""389 B parameters."""


def job(gpt: dict[str, int] = GPT, **sections: Any) -> JobConfig:
    return job_of({"model": {"gpt": gpt}, "batch": {"global": 16, "micro": 1}, "train": {"steps": 1}} | sections)


def cluster(hosts: str, **assumed: Any) -> Cluster:
    parsed = parse_hosts_expression(hosts)
    return make_cluster(parsed, [host.slots or 1 for host in parsed], Assumed(**assumed), 125.0)


def planner_of(config: JobConfig, hosts: str, **assumed: Any) -> Planner:
    assert config.gpt is not None
    shapes = gpt_shapes(config.gpt, config.gpt.context, 4 if config.precision.dtype == "fp32" else 2)
    return Planner(config, shapes, cluster(hosts, **assumed))


def planned(config: JobConfig, hosts: str, **assumed: Any) -> Plan:
    planner = planner_of(config, hosts, **assumed)
    return planner.plan(layout_of(config, planner.cluster.world_size))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DSTRAIN_HOSTFILE", raising=False)
    write("job.yaml")
    return tmp_path


def write(name: str, **sections: Any) -> None:
    values = {"model": {"gpt": GPT}, "batch": {"global": 16, "micro": 1}, "train": {"steps": 1}} | sections
    Path(name).write_text(yaml.safe_dump(values))


def plan(*words: str) -> str:
    result = CliRunner().invoke(app, ["plan", *words])
    if isinstance(result.exception, Exception):
        raise result.exception
    assert result.exit_code == 0
    return result.stdout


def refused(*words: str) -> str:
    with pytest.raises(DstrainError) as error:
        plan(*words)
    assert int(error.value.exit_code) == 2
    return str(error.value)


# --- the command -----------------------------------------------------------------------------------------------


def test_a_plan_says_what_a_job_will_cost(folder: Path) -> None:
    said = plan("job.yaml", "--hosts", "a:2,b:2", "--set", "parallel.pipeline=2", "--set", "zero.stage=1")
    assert "pipeline 2 × data_replicate 1 × data_shard 2 = 4 ranks, on 2 hosts" in said
    assert "batch.global 16 = micro 1 × 2 data ranks × 8 micro-batches" in said
    assert "fits:" in said
    for words in ("between pipeline stages", "reduction of gradients", "gradients of tied parameters", "bubble"):
        assert words in said
    assert "rank 1 " in said, "the schedule is drawn"
    for option in ("--gpu-memory", "--link-gbit", "--node-link-gbit", "--tflops"):
        assert option in said, "what was assumed is told"


def test_many_micro_batches_are_drawn_as_fewer(folder: Path) -> None:
    words = ["job.yaml", "--hosts", "a:2", "--set", "parallel.pipeline=2", "--set"]
    assert "as 24 micro-batches would be" in plan(*words, "batch.global=64")
    assert "would be" not in plan(*words, "batch.global=24")


def test_a_plan_needs_no_hosts(folder: Path) -> None:
    assert "on 1 host" in plan("job.yaml", "-n", "4")


def test_a_plan_reads_a_hostfile(folder: Path) -> None:
    Path("cluster").write_text("n1 slots=2\nn2 slots=2\nn3 slots=2 spare\n")
    assert "= 4 ranks, on 2 hosts" in plan("job.yaml", "-H", "cluster")


WIDE = [
    ("a:1", {}),
    ("a:2,b:2", {"parallel": {"pipeline": 4, "schedule": "zb_v"}, "zero": {"stage": 3}}),
    ("n[1-64]:8", {"parallel": {"pipeline": 8}, "zero": {"stage": 2}, "batch": {"global": 65536, "micro": 4}}),
    ("a-host-with-a-very-long-name.of.a.very.long.domain[1-4]:2", {"parallel": {"pipeline": 2}, "zero": {"stage": 1}}),
]


@pytest.mark.parametrize(("hosts", "sections"), WIDE)
def test_a_plan_fits_80_columns(hosts: str, sections: dict[str, Any]) -> None:
    config = job(GPT, **sections)
    for assumed in ({}, {"memory": ("1MiB",), "link": ("0.001",)}):
        planner = planner_of(config, hosts, **assumed)
        lines = list(plan_lines(planner, planner.plan(layout_of(config, planner.cluster.world_size))))
        assert max(map(len, lines)) <= WIDTH, max(lines, key=len)


@pytest.mark.slow
def test_a_search_fits_80_columns() -> None:
    planner = planner_of(
        job(GIANT, batch={"global": 65536, "micro": 1}, precision={"dtype": "bf16"}), "n[1-512]:8", memory=("1024GiB",)
    )
    lines = list(search_lines(planner, search(planner)))
    assert max(map(len, lines)) <= WIDTH, max(lines, key=len)


NUMBERS = {"type": "array", "items": {"type": "number"}}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": [
        *("model", "world_size", "hosts", "layout", "pipeline_ranks", "fits", "flows", "costs_s", "bubble"),
        *("makespan_s", "replayed_steps", "exposed_s", "step_s", "assumed", "warnings"),
    ],
    "properties": {
        "model": {"type": "object"},
        "world_size": {"type": "integer"},
        "hosts": {"type": "integer"},
        "layout": {
            "type": "object",
            "required": ["pipeline", "data_replicate", "data_shard", "stage", "schedule", "micro", "micro_batches"],
        },
        "pipeline_ranks": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["rank", "layers", "ranks", "hosts", "memory"],
                "properties": {
                    "memory": {
                        "type": "object",
                        "required": ["parameters", "gradients", "optimizer", "activations", "total"],
                        "additionalProperties": {"type": "integer", "minimum": 0},
                    }
                },
            },
        },
        "fits": {"type": "boolean"},
        "flows": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name", "rank_bytes", "host_bytes", "inside_bytes", "between_bytes", "link_s"],
            },
        },
        "costs_s": {"type": "object", "additionalProperties": NUMBERS},
        "bubble": {"type": "number", "minimum": 0, "maximum": 1},
        "makespan_s": {"type": "number"},
        "replayed_steps": {"type": "integer", "minimum": 0},
        "exposed_s": {"type": "number"},
        "step_s": {"type": "number"},
        "assumed": {"type": "array", "items": {"type": "string"}},
        "warnings": {"type": "array", "items": {"type": "string"}},
    },
}


def test_a_plan_as_json_keeps_to_its_schema(folder: Path) -> None:
    said = json.loads(plan("job.yaml", "--hosts", "a:2,b:2", "--set", "parallel.pipeline=2", "--json"))
    jsonschema.validate(said, SCHEMA)
    for rank in said["pipeline_ranks"]:
        memory = rank["memory"]
        assert memory["total"] == sum(size for kind, size in memory.items() if kind not in ("total", "host"))


def test_a_search_as_json_keeps_to_it_too(folder: Path) -> None:
    said = json.loads(plan("job.yaml", "--hosts", "a:2,b:2", "--search", "--json"))
    assert 0 < len(said["plans"]) <= 10 <= said["tried"]
    for one in said["plans"]:
        jsonschema.validate(one, SCHEMA)
    steps = [one["step_s"] for one in said["plans"]]
    assert steps == pytest.approx(sorted(steps), rel=0.01)


def test_an_svg_is_xml(folder: Path) -> None:
    plan("job.yaml", "--hosts", "a:4", "--set", "parallel.pipeline=4", "--svg", "schedule.svg")
    root = ElementTree.parse("schedule.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "1f1b" in "".join(root.itertext())


# --- refusals --------------------------------------------------------------------------------------------------

REFUSALS = [
    (["--set", "parallel.pipeline=3"], "parallel.pipeline: expected a divisor of 4 ranks, found 3 (pipeline 3 × "),
    (
        ["--set", "parallel.pipeline=2", "--set", "parallel.data_shard=4", "--set", "zero.stage=1"],
        "expected data_shard × data_replicate = 4 ranks / pipeline 2 = 2, found 4",
    ),
    (
        ["--set", "parallel.pipeline=2", "--set", "batch.global=15", "--set", "batch.micro=3"],
        "batch.global: expected a multiple of batch.micro × data ranks = 3 × 2 = 6 (4 ranks / pipeline 2 = 2)",
    ),
    (
        ["--set", "parallel.pipeline=4", "--set", "parallel.partition=[2, 2, 2, 1]"],
        "parallel.partition: expected all 8 layers of the model, found 2 + 2 + 2 + 1 = 7",
    ),
    (
        ["--set", "parallel.pipeline=4", "--set", "parallel.partition=[4, 4]"],
        "parallel.partition: expected 4 numbers, one for each stage, found 2",
    ),
    (["--costs", "1,2", "--set", "parallel.pipeline=2"], "--costs: expected F,I,W or F,I,W,MESSAGE in seconds"),
    (["--costs", "1,2,x"], "--costs: expected seconds, at least 0, found 'x'"),
    (["--costs", "1,1,1", "--search"], "--costs: expected no such option with --search"),
    (["--gpu-memory", "much"], "--gpu-memory: expected a size such as 80GiB or 24GB, found 'much'"),
    (["--gpu-memory", "c=1GiB"], "--gpu-memory: expected a known host, found 'c'"),
    (["--link-gbit", "0"], "--link-gbit: expected a number above 0, found '0'"),
    (["--tflops", "-1"], "--tflops: expected a number above 0"),
    (["--svg", "no/such/folder.svg"], "--svg: expected a file to write"),
    (["--gpu-memory", "1KiB", "--search"], "memory: expected at most"),
]


@pytest.mark.parametrize(("words", "message"), REFUSALS, ids=lambda value: str(value)[:40])
def test_what_cannot_be_is_refused_with_all_factors(folder: Path, words: list[str], message: str) -> None:
    assert message in refused("job.yaml", "--hosts", "a:2,b:2", *words)


def test_a_partition_by_time_is_one_by_operations(folder: Path) -> None:
    """And the plan says so; where operations are not known, by parameters."""
    config = job(parallel={"pipeline": 4, "partition": "time"})
    planner = planner_of(config, "a:4")
    by_operations = [[layer.name for layer in part.layers[0]] for part in planner.parts(layout_of(config, 4))]
    assert by_operations[0][:2] == ["token", "blocks.0"], "an embedding computes nothing"
    assert "layers as slow as their operations" in said_of(config, "a:4")
    assert config.gpt is not None
    shapes = gpt_shapes(config.gpt, 32, 4)
    unknown = replace(shapes, layers=tuple(replace(one, weight_flops=0.0, other_flops=0.0) for one in shapes.layers))
    blind = Planner(config, unknown, planner.cluster)
    by_parameters = job(parallel={"pipeline": 4})
    assert [len(part.layers[0]) for part in blind.parts(layout_of(config, 4))] == [
        len(part.layers[0]) for part in planner_of(by_parameters, "a:4").parts(layout_of(by_parameters, 4))
    ]
    assert "layers as slow as their parameters" in " ".join(assumptions(blind))


def test_more_stages_than_layers_are_refused(folder: Path) -> None:
    said = refused("job.yaml", "--hosts", "a:16", "--set", "parallel.pipeline=16")
    assert "parallel.pipeline: expected at most the 8 layers of the model, found 16 stages" in said


def test_a_host_whose_slots_nobody_has_said_is_refused(folder: Path) -> None:
    assert "host b: expected a number of slots, found none" in refused("job.yaml", "--hosts", "a:2,b")


def test_a_script_is_refused(folder: Path) -> None:
    assert "dstrain plan: expected a job.yaml, found train.py" in refused("train.py")


PIPED = ["--set", "parallel.pipeline=2", "--set", "batch.global=2", "--set", "parallel.schedule=own.csv"]


def test_a_users_own_schedule_is_planned(folder: Path) -> None:
    """That of 1f1b, written by hand."""
    Path("own.csv").write_text("0F0,0F1,0B0,,0B1\n1F0,1B0,1F1,1I1,1W1\n")
    own = json.loads(plan("job.yaml", "--hosts", "a:2", *PIPED, "--json"))
    assert own["layout"]["schedule"] == "own.csv"
    named = json.loads(plan("job.yaml", "--hosts", "a:2", *PIPED, "--set", "parallel.schedule=1f1b", "--json"))
    for key in ("bubble", "step_s", "flows", "pipeline_ranks"):
        assert own[key] == named[key], key
    assert "own.csv: 2 ranks, 2 stages, 2 micro-batches" in plan("job.yaml", "--hosts", "a:2", *PIPED)


WRONG = [
    ("0F0,0B0,0F1,0B1\n1F1,1B1,1F0,1B0\n", "found a deadlock: rank 0 at cell 1 (0B0) waits", "rank 1  >1F1<"),
    ("0F0,0F1,0B0\n1F0,1B0,1F1,1B1\n", "rank 0, cell 3: expected 0B1", ">0B1?<"),
    ("0F0,0F1,0B0,0B1\n", "expected 2 lines, found 1; one line for each pipeline rank", ""),
    ("0F0,what\n1F0,1B0\n", "own.csv:1, column 2", ""),
]


@pytest.mark.parametrize(("rows", "message", "cell"), WRONG, ids=["deadlock", "incomplete", "lines", "words"])
def test_a_schedule_that_cannot_run_is_refused_with_its_cell(folder: Path, rows: str, message: str, cell: str) -> None:
    Path("own.csv").write_text(rows)
    said = refused("job.yaml", "--hosts", "a:2", *PIPED)
    assert message in said
    assert cell in said


def test_an_unknown_schedule_is_refused(folder: Path) -> None:
    said = refused("job.yaml", "--hosts", "a:2", *PIPED, "--set", "parallel.schedule=zigzag")
    assert "parallel.schedule: expected one of gpipe, 1f1b, " in said
    assert "found zigzag (no such file)" in said


# --- time and bytes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 4), (4, 8), (4, 3), (8, 64)])
def test_the_bubble_of_1f1b_is_the_formulas(folder: Path, ranks: int, micro_batches: int) -> None:
    batch = f"batch.global={micro_batches}"
    gpt = "model.gpt.layers=16"
    words = ["--set", f"parallel.pipeline={ranks}", "--set", batch, "--set", gpt, "--costs", "1,1,1,0", "--json"]
    said = json.loads(plan("job.yaml", "--hosts", f"a:{ranks}", *words))
    makespan = 3 * micro_batches + 2 * (ranks - 1)
    assert said["makespan_s"] == pytest.approx(makespan)
    assert said["bubble"] == pytest.approx(2 * (ranks - 1) / makespan)


def test_costs_of_each_stage_come_from_a_file(folder: Path) -> None:
    costs = {"forward": [1, 2], "input_gradient": [1, 2], "weight_gradient": [1, 2], "message": [0.5]}
    Path("costs.json").write_text(json.dumps(costs))
    said = json.loads(
        plan("job.yaml", "--hosts", "a:2", "--set", "parallel.pipeline=2", "--costs", "costs.json", "--json")
    )
    assert said["costs_s"] == costs
    Path("costs.json").write_text(json.dumps(costs | {"forward": [1, 2, 3]}))
    with_three = refused("job.yaml", "--hosts", "a:2", "--set", "parallel.pipeline=2", "--costs", "costs.json")
    assert "--costs: forward: expected 2 numbers, one for each of the stages, found 3" in with_three


def tied_s(said: dict[str, Any]) -> float:
    """Behind all actions."""
    return sum(flow["link_s"] for flow in said["flows"] if flow["name"] == "gradients of tied parameters")


def test_a_trace_of_the_schedule_is_replayed_and_of_another_gives_its_medians(folder: Path) -> None:
    """Of four micro-batches one is slow, which medians do not show."""
    schedule = find_schedule("1f1b", 2, 4)
    actions = [action for row in schedule.ranks for action in row]
    took = {action: Took(1.0 if action.micro_batch == 1 else 0.25) for action in actions}
    timeline = simulate(schedule, took)
    write_trace(Path("trace.json"), [*recorded(timeline, 1, 0)])
    words = ["job.yaml", "--hosts", "a:2", "--set", "parallel.pipeline=2", "--costs", "trace.json"]
    said = json.loads(plan(*words, "--set", "batch.global=4", "--json"))
    assert said["replayed_steps"] == 1
    assert said["makespan_s"] == pytest.approx(timeline.makespan_s)
    assert said["bubble"] == pytest.approx(timeline.bubble)
    text = plan(*words, "--set", "batch.global=4")
    assert f"bubble {100 * timeline.bubble:.1f} % of 4 micro-batches, median of 1 traced step, replayed" in text
    slow = "--hosts", "a:1,b:1", "--link-gbit", "1e-5"  # in the traced steps messages have been waited for already
    waiting = json.loads(plan(words[0], *slow, *words[3:], "--set", "batch.global=4", "--json"))
    by_medians = json.loads(plan(words[0], *slow, *words[3:], "--set", "batch.global=8", "--json"))
    assert (waiting["replayed_steps"], by_medians["replayed_steps"]) == (1, 0)
    assert waiting["exposed_s"] == tied_s(waiting) == tied_s(by_medians) < by_medians["exposed_s"]
    with_others = plan(words[0], "--hosts", "a:4", *words[3:], "--set", "batch.global=8", "--json")
    assert json.loads(with_others)["replayed_steps"] == 0, "as many micro-batches, but of two pipelines"
    for other in ("batch.global=8", "parallel.schedule=gpipe"):
        said = json.loads(plan(*words, "--set", "batch.global=4", "--set", other, "--json"))
        assert said["replayed_steps"] == 0
        assert said["costs_s"]["forward"] == pytest.approx([0.25, 0.25])
        assert said["makespan_s"] < timeline.makespan_s


@pytest.mark.parametrize("name", SCHEDULE_NAMES)
@pytest.mark.parametrize("micro_batches", [1, 3, 16, 31])
def test_a_small_schedule_is_simulated_whole(name: str, micro_batches: int) -> None:
    sections = {"parallel": {"pipeline": 4, "schedule": name}, "batch": {"global": micro_batches, "micro": 1}}
    found = planned(job(GPT, **sections), "a:4")
    whole = simulate(find_schedule(name, 4, micro_batches), found.costs.for_simulator())
    assert found.makespan_s == whole.makespan_s
    assert found.bubble == pytest.approx(whole.bubble)


@pytest.mark.parametrize("name", SCHEDULE_NAMES)
@pytest.mark.parametrize("ranks", [4, 8])
@pytest.mark.parametrize("micro_batches", [600, 607])
def test_a_schedule_that_was_cut_short_takes_as_long_as_a_whole_one(name: str, ranks: int, micro_batches: int) -> None:
    """Within 1 %; what is in flight is the same, or all of it."""
    sections = {"parallel": {"pipeline": ranks, "schedule": name}, "batch": {"global": micro_batches, "micro": 1}}
    config = job(GPT | {"layers": 14}, **sections)
    planner = planner_of(config, f"a:{ranks}")
    layout = layout_of(config, ranks)
    short = planner.plan(layout)
    assert short.schedule.micro_batches == enough(layout) < micro_batches
    whole = simulate(find_schedule(name, ranks, micro_batches), short.costs.for_simulator())
    assert short.makespan_s == pytest.approx(whole.makespan_s, rel=0.01)
    assert short.bubble == pytest.approx(whole.bubble, abs=0.01)
    if name != "gpipe":
        assert short.timeline.peak_in_flight == whole.peak_in_flight


def test_gpipe_holds_all_micro_batches() -> None:
    sizes = []
    for micro_batches in (16, 32):
        sections = {"parallel": {"pipeline": 2, "schedule": "gpipe"}, "batch": {"global": micro_batches, "micro": 1}}
        sizes.append(planned(job(GPT, **sections), "a:2").memory[0].activations)
    assert sizes[1] == pytest.approx(2 * sizes[0])


def elements(config: JobConfig) -> int:
    assert config.gpt is not None
    return gpt_shapes(config.gpt, 32, 4).elements


TRAFFIC = [
    # as tests/runtime/test_zero_traffic.py measures them, in units of Ψ·(N−1)/N elements of fp32
    ({"stage": 0}, 1, 2.0),
    ({"stage": 1}, 1, 2.0),
    ({"stage": 2}, 1, 2.0),
    ({"stage": 3, "resident_elements": 0}, 1, 3.0),
    ({"stage": 3, "resident_elements": 0, "reshard": "step"}, 1, 2.0),
    ({"stage": 1}, 4, 2.0),
    ({"stage": 1, "accumulate": "sharded"}, 4, 5.0),
    ({"stage": 2}, 4, 5.0),
    ({"stage": 2, "accumulate": "local"}, 4, 2.0),
    ({"stage": 3, "resident_elements": 0, "accumulate": "local"}, 4, 9.0),
    ({"stage": 3, "resident_elements": 0}, 4, 12.0),
]


@pytest.mark.parametrize(("zero", "micro_batches", "units"), TRAFFIC)
@pytest.mark.parametrize("ranks", [2, 4])
def test_bytes_are_the_formulas(zero: dict[str, Any], micro_batches: int, units: float, ranks: int) -> None:
    config = job(GPT | {"width": 128}, zero=zero, batch={"global": micro_batches * ranks, "micro": 1})
    found = sum(flow.rank_bytes for flow in planned(config, f"a:{ranks}").flows)
    assert found == pytest.approx(units * 4 * elements(config) * (ranks - 1) / ranks, rel=0.02)


def test_copies_exchange_shards() -> None:
    """2 hosts × 4, shards inside of a host: each rank all-reduces a quarter with the other host."""
    config = job(zero={"stage": 2}, parallel={"data_shard": 4})
    flows = {flow.name: flow for flow in planned(config, "a:4,b:4").flows}
    copies, shards = flows["gradients between copies"], flows["reduction of gradients"]
    assert shards.between_bytes == 0
    assert copies.inside_bytes == 0
    assert copies.rank_bytes == pytest.approx(2 * 4 * elements(config) / 4 * 1 / 2, rel=0.02)
    assert copies.host_bytes == pytest.approx(4 * copies.rank_bytes)


def test_a_pipeline_sends_activations_and_gradients() -> None:
    config = job(parallel={"pipeline": 2}, batch={"global": 8, "micro": 2})
    stages, tied = planned(config, "a:1,b:1").flows
    message = 2 * 32 * 64 * 4
    assert stages.name == "between pipeline stages"
    assert stages.rank_bytes == 4 * message
    assert stages.between_bytes == 2 * 4 * message
    assert tied.rank_bytes == 4 * 256 * 64, "half of the all-reduce's two rounds, of the embedding"


def test_ranks_of_one_host_share_its_link() -> None:
    hosts = cluster("a:4,b:4", link=("10",), node_link=("100",))
    neighbours, strided = hosts.rings(1, 8), hosts.rings(4, 2)
    assert (neighbours.inside, neighbours.between, neighbours.most) == (6, 2, 1)
    assert (strided.inside, strided.between, strided.most) == (0, 8, 4)
    assert strided.byte_s == pytest.approx(4 * neighbours.byte_s) == pytest.approx(4 * 8 / 10e9)


# --- warnings --------------------------------------------------------------------------------------------------


def said_of(config: JobConfig, hosts: str, **assumed: Any) -> str:
    planner = planner_of(config, hosts, **assumed)
    lines = plan_lines(planner, planner.plan(layout_of(config, planner.cluster.world_size)))
    return " ".join(" ".join(lines).split())


def test_a_smaller_gpu_is_told() -> None:
    config = job(LARGE, precision={"dtype": "bf16"}, zero={"stage": 2}, batch={"global": 4, "micro": 1})
    said = said_of(config, "new[1-3]:1,old:1", memory=("80GiB", "old=24GiB"))
    assert "warning: does not fit" in said
    assert "old has room for 21.6 GiB; other hosts, such as new1, have room for 72.0 GiB" in said


def test_a_slow_link_is_told() -> None:
    config = job(LARGE, precision={"dtype": "bf16"}, zero={"stage": 2}, batch={"global": 4, "micro": 1})
    said = said_of(config, "a:1,b:1,c:1,d:1", link=("10", "c=1"))
    assert "of a step" in said
    assert "c's link to other hosts (1 Gbit/s)" in said


@pytest.mark.parametrize(("schedule", "is_told"), [("zb_h1", True), ("zb_v", True), ("own.csv", True), ("1f1b", False)])
def test_what_autocast_cannot_split_is_told(folder: Path, schedule: str, is_told: bool) -> None:
    Path("own.csv").write_text("0F0,0F1,0B0,,0B1\n1F0,1B0,1F1,1I1,1W1\n")
    piped = {"parallel": {"pipeline": 2, "schedule": schedule}, "batch": {"global": 2, "micro": 1}}
    for autocast in (True, False):
        said = said_of(job(precision={"dtype": "bf16", "autocast": autocast}, **piped), "a:2")
        assert (f"warning: {schedule} splits nothing under precision.autocast" in said) is (is_told and autocast)


def test_a_large_bubble_is_told() -> None:
    said = said_of(job(parallel={"pipeline": 8}, batch={"global": 4, "micro": 1}), "a:8")
    assert "warning: bubble " in said


# --- search ----------------------------------------------------------------------------------------------------


def winner(config: JobConfig, hosts: str, **assumed: Any) -> Plan:
    return search(planner_of(config, hosts, **assumed)).plans[0]


def test_fast_links_are_for_sharding() -> None:
    config = job(LARGE, precision={"dtype": "bf16"}, batch={"global": 64, "micro": 1})
    found = winner(config, "a:8", node_link=("7200",))
    assert found.layout.dims.pipeline == 1
    assert found.layout.zero.stage > 0, "a whole copy does not fit"
    assert found.fits


def test_slow_ethernet_is_for_a_pipeline() -> None:
    config = job(LARGE, precision={"dtype": "bf16"}, batch={"global": 64, "micro": 1})
    found = winner(config, "a:1,b:1,c:1,d:1", link=("1",))
    assert found.layout.dims.pipeline == 4


def test_a_pipeline_across_hosts_shards_inside_of_them() -> None:
    config = job(LARGE, precision={"dtype": "bf16"}, batch={"global": 256, "micro": 1})
    found = winner(config, "a:4,b:4", link=("1",), node_link=("7200",))
    dims = found.layout.dims
    assert dims.pipeline % 2 == 0
    assert all(not flow.between_bytes for flow in found.flows if flow.name.startswith(("reduction", "gathering")))


def test_a_small_model_stays_simple() -> None:
    """Nothing is gained by cutting or sharding it."""
    found = winner(job(), "a:2", node_link=("7200",)).layout
    assert (found.dims, found.zero.stage) == (ParallelDims(1, 2, 1), 0)


@pytest.mark.parametrize("micro_batches", [1, 7, 13, 30])
@pytest.mark.parametrize("hosts", ["a:3", "a:2,b:4", "a:1"])
def test_a_search_of_odd_numbers(hosts: str, micro_batches: int) -> None:
    """What divides is tried, what does not is left out; no layout crashes, none has a bubble below 0."""
    planner = planner_of(job(GPT | {"layers": 5}, batch={"global": micro_batches, "micro": 1}), hosts)
    found = search(planner)
    assert max(map(len, search_lines(planner, found))) <= WIDTH
    for one in found.plans:
        assert 0 <= one.bubble < 1
        dims = one.layout.dims
        assert one.layout.micro * one.layout.micro_batches * dims.data == micro_batches
        assert dims.world_size == planner.cluster.world_size


def test_the_search_misses_nothing() -> None:
    """The same ten as by planning every layout."""
    from dstrain.launcher.planning import search as module

    config = job(GPT | {"layers": 4}, batch={"global": 8, "micro": 1})
    planner = planner_of(config, "a:2,b:2", link=("0.1",), node_link=("1",), tflops=0.01)
    layouts = list(module._layouts(planner))
    all_plans = [planner.plan(layout) for layout in layouts]
    fastest = sorted(plan.step_s for plan in all_plans if plan.fits)[:10]
    assert [plan.step_s for plan in best(planner, layouts, 10)] == pytest.approx(fastest, rel=0.01)
    for one in all_plans:
        assert planner.estimate(one.layout).least_s <= one.step_s * (1 + 1e-9), "a bound"


def test_the_winners_keys_are_a_job(folder: Path) -> None:
    said = json.loads(plan("job.yaml", "--hosts", "a:2,b:2", "--search", "--json"))
    write("won.yaml", **yaml.safe_load(said["yaml"]))
    again = json.loads(plan("won.yaml", "--hosts", "a:2,b:2", "--json"))
    assert again["step_s"] == said["plans"][0]["step_s"]
    assert again["layout"] == said["plans"][0]["layout"]


def test_why_the_winner_wins(folder: Path) -> None:
    said = " ".join(plan("job.yaml", "--hosts", "a:2,b:2", "--search").split())
    assert "why: " in said
    assert "; the best with" in said


def test_yaml_of_each_kind_of_layout() -> None:
    plans = [planned(job(), "a:2"), planned(job(parallel={"pipeline": 2, "schedule": "interleaved_1f1b"}), "a:2")]
    for one in plans:
        values = yaml.safe_load("\n".join(layout_yaml(one)))
        config = job(**values)
        assert layout_of(config, 2).dims == one.layout.dims
    assert "stages_per_rank: 2" in "\n".join(layout_yaml(plans[1]))


# --- worlds that nobody here can start -------------------------------------------------------------------------


@pytest.mark.parametrize("more", [[], ["--search"]])
def test_a_giant_is_planned(folder: Path, more: list[str]) -> None:
    write(
        "giant.yaml",
        model={"gpt": GIANT},
        batch={"global": 2048, "micro": 1},
        parallel={"pipeline": 32},
        zero={"stage": 2},
        precision={"dtype": "bf16"},
        train={"steps": 1, "activation_checkpointing": "all"},
    )
    said = plan("giant.yaml", "--hosts", "n[1-1024]:8", *more)
    assert "8,192 ranks" in said or "8192 ranks" in said


def test_a_layout_in_words() -> None:
    config = job(parallel={"pipeline": 2})
    assert str(layout_of(config, 2)) == "pipeline 2 (1f1b), stage 0"
    assert isinstance(layout_of(config, 2), Layout)
    with pytest.raises(UsageError):
        layout_of(config, 3)
