"""The command line: one small file per command group; `main` turns our errors into one clear line each."""

from __future__ import annotations

import sys

import typer

from dstrain.launcher.cli import ckpt, config, hosts
from dstrain.launcher.cli.plan import plan
from dstrain.launcher.cli.report import report
from dstrain.launcher.cli.run import RunCommand, run
from dstrain.launcher.cli.trust import trust
from dstrain.runtime.spec.errors import DstrainError

app = typer.Typer(
    name="dstrain",
    help="Distributed training on machines that you reach by SSH.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("run", cls=RunCommand)(run)
app.command("plan")(plan)
hosts.app.command("trust")(trust)
app.add_typer(hosts.app, name="hosts")
app.add_typer(config.app, name="config")
app.add_typer(ckpt.app, name="ckpt")
app.command("report")(report)


def _show_version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        print(f"dstrain {version('dstrain')}")
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(False, "--version", callback=_show_version, is_eager=True, help="Show the version."),
) -> None:
    """Distributed training on machines that you reach by SSH."""


def main() -> None:
    """The `dstrain` program."""
    try:
        app()
    except DstrainError as error:
        for line in str(error).splitlines():
            print(f"dstrain: {line}", file=sys.stderr)
        sys.exit(int(error.exit_code))
    except KeyboardInterrupt:
        sys.exit(130)
