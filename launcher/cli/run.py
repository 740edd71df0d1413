"""`dstrain run`: parse, delegate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from dstrain.launcher.plan import JOB_FILE_ENDINGS

_TARGET_ENDING = {"-m": "module", "--module": "module", "--no-python": "program"}


class RunCommand(TyperCommand):
    """Ends our options where python's end: at the target, at `-m MODULE`, at `--no-python PROGRAM`.

    What follows reaches the script byte for byte, even if it looks like an option of ours. A job.yaml has no arguments,
    so options behind it are ours too.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ours, kind, rest = split_target(args, self._takes_value())
        ctx.meta["dstrain.target"] = (kind, rest)
        return super().parse_args(ctx, ours)

    def _takes_value(self) -> dict[str, bool]:
        options: list[Any] = [p for p in self.params if p.param_type_name == "option"]
        return {name: not option.is_flag for option in options for name in (*option.opts, *option.secondary_opts)}

    def format_usage(self, ctx: Any, formatter: Any) -> None:
        targets = "job.yaml | script.py | -m MODULE | --no-python PROGRAM"
        formatter.write_usage(ctx.command_path, f"[OPTIONS] ({targets}) [ARGS]...")


def split_target(args: list[str], takes_value: dict[str, bool]) -> tuple[list[str], str, list[str]]:
    """(our options, kind of target, target and its arguments)."""
    position = 0
    while position < len(args):
        word = args[position]
        if word in _TARGET_ENDING:
            return args[:position], _TARGET_ENDING[word], args[position + 1 :]
        if word.startswith("-m") and not word.startswith("--") and len(word) > 2:
            return args[:position], "module", [word[2:], *args[position + 1 :]]
        if word == "--":
            return args[:position], "script", args[position + 1 :]
        if word.endswith(JOB_FILE_ENDINGS) and not word.startswith("-"):
            more, _, words = split_target(args[position + 1 :], takes_value)
            return [*args[:position], *more], "script", [word, *words]
        if not word.startswith("-") or word == "-":
            return args[:position], "script", args[position:]
        name = word.partition("=")[0] if word.startswith("--") else word[:2]
        alone = word == name
        position += 2 if takes_value.get(name, False) and alone else 1
    return args, "script", []


def run(
    ctx: typer.Context,
    hostfile: Annotated[Path | None, typer.Option("-H", "--hostfile", help="Hosts, one a line.")] = None,
    hosts: Annotated[str | None, typer.Option(help="Hosts in place: 'a:4,gpu[1-3]:8'.")] = None,
    include: Annotated[str | None, typer.Option(help="Only these: 'a:0,2@b'.")] = None,
    exclude: Annotated[str | None, typer.Option(help="All but these.")] = None,
    nproc: Annotated[
        str | None, typer.Option("-n", "--nproc-per-node", metavar="N|auto", help="Ranks on each host.")
    ] = None,
    config: Annotated[Path | None, typer.Option("-c", "--config", help="A job.yaml for a script of your own.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Change a key: train.steps=100.")] = None,
    env: Annotated[
        list[str] | None, typer.Option("--env", help="NAME=VALUE, or NAME of this shell (for secrets).")
    ] = None,
    env_file: Annotated[list[Path] | None, typer.Option("--env-file", help="NAME=VALUE lines, kept secret.")] = None,
    pass_env: Annotated[list[str] | None, typer.Option("--pass-env", help="Variables by pattern: 'NCCL_*'.")] = None,
    cwd: Annotated[str | None, typer.Option(help="Directory on every host; default: this one.")] = None,
    python: Annotated[str | None, typer.Option(help="Interpreter on every host.")] = None,
    prologue: Annotated[str | None, typer.Option(help="Shell line before the workers: 'module load cuda'.")] = None,
    master_addr: Annotated[
        str | None, typer.Option(help="Rank 0's address; default: one that all hosts reach.")
    ] = None,
    master_port: Annotated[
        int, typer.Option(min=0, max=65535, help="The store's port; default: a free one.", show_default=False)
    ] = 0,
    interface: Annotated[str | None, typer.Option(help="Network interface for Gloo and NCCL.")] = None,
    ssh: Annotated[str, typer.Option(help="paramiko, or openssh: the ssh program itself.")] = "paramiko",
    run_dir: Annotated[Path | None, typer.Option(help="Where runs are kept; default: ./runs.")] = None,
    name: Annotated[str | None, typer.Option(help="A word in the run's id.")] = None,
    ranks: Annotated[str | None, typer.Option(help="Show only these ranks' output: '0,4-7'.")] = None,
    max_restarts: Annotated[int | None, typer.Option(min=0, help="Attempts after a failed one.")] = None,
    min_nodes: Annotated[
        int | None, typer.Option(min=1, help="Hosts that suffice for a restart; default: all of them.")
    ] = None,
    resume: Annotated[
        str | None, typer.Option(metavar="auto|STEP|PATH", help="Go on from a checkpoint of the job.")
    ] = None,
    grace: Annotated[float | None, typer.Option(min=0, help="Seconds from SIGTERM to SIGKILL; default 10.")] = None,
    hang_timeout: Annotated[
        float | None,
        typer.Option(min=0, help="Seconds without a step that are a hang, 0: none is; default: by the run's steps."),
    ] = None,
    trace: Annotated[
        bool, typer.Option("--trace", help="Write the timeline of a few steps, for Perfetto; log.trace says which.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, start nothing.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a line on stdout.")] = False,
    no_preload: Annotated[bool, typer.Option("--no-preload", help="A fresh interpreter for each rank.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Only errors.")] = False,
    timestamps: Annotated[bool, typer.Option("--timestamps", help="The time before each line.")] = False,
) -> None:
    """Start TARGET on every host, stream its output, end it cleanly.

    TARGET is a job.yaml, a script.py, -m MODULE, or --no-python PROGRAM; everything behind it is the target's own, but
    for a job.yaml, behind which our options may stand too.
    """
    from dstrain.launcher import foreground
    from dstrain.launcher.console import ConsoleOptions
    from dstrain.launcher.request import RunOptions, build_request

    kind, rest = ctx.meta["dstrain.target"]
    options = RunOptions(
        hostfile=hostfile,
        hosts=hosts,
        include=include,
        exclude=exclude,
        nproc_per_node=nproc,
        overrides=tuple(overrides or ()),
        env=tuple(env or ()),
        env_files=tuple(env_file or ()),
        pass_env=tuple(pass_env or ()),
        cwd=cwd,
        python=python,
        prologue=prologue,
        master_address=master_addr,
        master_port=master_port,
        interface=interface,
        max_restarts=max_restarts,
        min_nodes=min_nodes,
        grace_s=grace,
        hang_s=hang_timeout,
        preload=not no_preload,
        config=config,
        resume=resume,
        trace=trace,
    )
    request, job_name = build_request(options, foreground.target(kind, rest))
    program = foreground.ssh_program(ssh)
    if dry_run:
        raise typer.Exit(foreground.dry_run(request, program, json))
    shown = ConsoleOptions(foreground.rank_set(ranks), quiet, timestamps, json)
    base = run_dir or Path("runs")
    raise typer.Exit(foreground.run(request, program, shown, base, foreground.run_name(name or job_name)))
