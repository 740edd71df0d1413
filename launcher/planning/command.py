"""From the options of `dstrain plan` to its lines. Reads files, contacts no host."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dstrain.launcher.plan import JOB_FILE_ENDINGS, Target
from dstrain.launcher.planning.cluster import SUSTAINED, TFLOPS, Assumed, Cluster, make_cluster
from dstrain.launcher.planning.costs import read_costs
from dstrain.launcher.planning.find_shapes import find_shapes
from dstrain.launcher.planning.layout import layout_of
from dstrain.launcher.planning.planner import Plan, Planner
from dstrain.launcher.planning.search import search
from dstrain.launcher.planning.show import plan_json, plan_lines, search_json, search_lines
from dstrain.launcher.planning.units import read_rate
from dstrain.launcher.request import RunOptions, build_request
from dstrain.runtime.spec.config import JobConfig
from dstrain.runtime.spec.errors import UsageError
from dstrain.runtime.spec.schedule import draw_svg


@dataclass(frozen=True)
class PlanOptions:
    """As on the command line."""

    hostfile: Path | None = None
    hosts: str | None = None
    nproc_per_node: str | None = None
    overrides: tuple[str, ...] = ()
    search: bool = False
    json: bool = False
    svg: Path | None = None
    costs: str | None = None
    assumed: Assumed = Assumed()  # noqa: RUF009 # frozen


def planned(path: Path, options: PlanOptions) -> Iterator[str]:
    """The lines to print; with `svg`, writes that file. Raises UsageError."""
    if options.search and options.costs is not None:
        raise UsageError.mismatch("--costs", "no such option with --search", options.costs, "stages differ by layout")
    if options.svg is not None:
        _check_output(options.svg)
    job, cluster = _job_and_cluster(path, options)
    given = read_costs(options.costs) if options.costs is not None else None
    planner = Planner(job, find_shapes(job), cluster)
    if options.search:
        found = search(planner)
        best = found.plans[0]
        lines = [json.dumps(search_json(planner, found))] if options.json else list(search_lines(planner, found))
    else:
        best = planner.plan(layout_of(job, cluster.world_size), given)
        lines = [json.dumps(plan_json(planner, best))] if options.json else list(plan_lines(planner, best))
    if options.svg is not None:
        _draw(options.svg, best)
    yield from lines


def _check_output(path: Path) -> None:
    """Told before anything is planned."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        found = "a folder" if path.is_dir() else f"no folder {path.parent}"
        raise UsageError.mismatch("--svg", "a file to write", f"{path} ({found})")


def _draw(path: Path, plan: Plan) -> None:
    try:
        path.write_text(draw_svg(plan.timeline), encoding="utf-8")
    except OSError as error:
        raise UsageError.mismatch("--svg", "a file to write", f"{path}: {error.strerror}") from None


def _job_and_cluster(path: Path, options: PlanOptions) -> tuple[JobConfig, Cluster]:
    """The job as `dstrain run` would take it, and its hosts."""
    if not path.name.endswith(JOB_FILE_ENDINGS):
        raise UsageError.mismatch("dstrain plan", "a job.yaml", str(path), "a script says nothing of its model")
    run = RunOptions(
        hostfile=options.hostfile,
        hosts=options.hosts,
        nproc_per_node=options.nproc_per_node,
        overrides=options.overrides,
    )
    request, _ = build_request(run, Target("script", str(path)))
    assert request.job is not None, "a job.yaml is a job"
    job = JobConfig.model_validate_json(request.job)
    slots = []
    for host in request.hosts:
        count = request.slots(host)
        if count is None:
            fix = f"write {host.written_name} slots=N, or -n N: a plan asks no host for its GPUs"
            raise UsageError.mismatch(f"host {host.written_name}", "a number of slots", "none", fix)
        slots.append(count)
    if options.assumed.tflops is not None:
        read_rate(str(options.assumed.tflops), "--tflops")
    peak = job.log.peak_tflops
    tflops = peak * SUSTAINED if peak is not None else TFLOPS[job.precision.dtype]
    return job, make_cluster(request.hosts, slots, options.assumed, tflops)
