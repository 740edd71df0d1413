"""`dstrain report`: parse, delegate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN]...", help="Directories or ids of runs; default: the newest in ./runs."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Default: report.html in the run's directory, of several in this one."),
    ] = None,
) -> None:
    """Draw runs into one HTML file that opens offline: curves, how they ended, how they were configured."""
    from dstrain.launcher.report.page import write_report
    from dstrain.launcher.run_dir import find_run, newest_run

    folders = list(dict.fromkeys(find_run(run) for run in runs)) if runs else [newest_run()]
    path = output or (folders[0] if len(folders) == 1 else Path()) / "report.html"
    write_report(folders, path)
    typer.echo(f"wrote {path}")
