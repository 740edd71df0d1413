"""`dstrain plan`: parse, delegate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def plan(
    job: Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job to plan.")],
    hostfile: Annotated[Path | None, typer.Option("-H", "--hostfile", help="Hosts, one a line.")] = None,
    hosts: Annotated[str | None, typer.Option(help="Hosts in place: 'a:4,gpu[1-3]:8'.")] = None,
    nproc: Annotated[
        str | None, typer.Option("-n", "--nproc-per-node", metavar="N|auto", help="Ranks on each host.")
    ] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Change a key: train.steps=100.")] = None,
    search: Annotated[bool, typer.Option("--search", help="Try all layouts on these hosts, and rank them.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    svg: Annotated[Path | None, typer.Option("--svg", metavar="FILE", help="Draw the schedule into a file.")] = None,
    costs: Annotated[
        str | None,
        typer.Option("--costs", metavar="F,I,W[,MESSAGE]|FILE", help="Seconds of a stage's micro-batch, as measured."),
    ] = None,
    memory: Annotated[
        list[str] | None,
        typer.Option("--gpu-memory", metavar="[HOSTS=]SIZE", help="Of each rank's GPU; default: 80GiB."),
    ] = None,
    link: Annotated[
        list[str] | None,
        typer.Option("--link-gbit", metavar="[HOSTS=]N", help="Of a host to the others; default: 10."),
    ] = None,
    node_link: Annotated[
        list[str] | None,
        typer.Option("--node-link-gbit", metavar="[HOSTS=]N", help="Of a rank inside its host; default: 200."),
    ] = None,
    tflops: Annotated[
        float | None,
        typer.Option(
            "--tflops", help="Sustained by one rank; default: 125 in 16 bits, 10 in fp32, or log.peak_tflops."
        ),
    ] = None,
) -> None:
    """Say what a job will cost before anything starts: memory, bytes, time, and whether it fits."""
    from dstrain.launcher.planning.cluster import Assumed
    from dstrain.launcher.planning.command import PlanOptions, planned

    assumed = Assumed(tuple(memory or ()), tuple(link or ()), tuple(node_link or ()), tflops)
    options = PlanOptions(hostfile, hosts, nproc, tuple(overrides or ()), search, json, svg, costs, assumed)
    for line in planned(job, options):
        typer.echo(line)
