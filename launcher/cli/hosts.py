"""`dstrain hosts`: list and edit the hostfile."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dstrain.runtime.spec.errors import UsageError

if TYPE_CHECKING:  # each command imports what it needs, so that `dstrain --help` answers at once
    from rich.table import Table

    from dstrain.launcher.hostfile import Host

app = typer.Typer(help="List and edit the hosts of a hostfile.", no_args_is_help=True)

HostfileOption = Annotated[
    Path | None,
    typer.Option("-H", "--hostfile", metavar="PATH", help="The hostfile. Default: $DSTRAIN_HOSTFILE, else ./hostfile."),
]
_OPTIONS_HELP = "slots=N user=U port=P addr=A python=PATH key=PATH gpus=0,2,3 transport=local|ssh spare"

COLUMNS = ("name", "slots", "user", "port", "addr", "python", "key", "gpus", "transport", "spare")
"""The columns of `hosts list`, in this order in a pipe; the fields of `Host`."""


@app.command("list")
def list_hosts(
    hostfile: HostfileOption = None,
    json: Annotated[bool, typer.Option("--json", help="Print a JSON array with one object a host.")] = False,
) -> None:
    """Show every host, ranges expanded.

    A table on a terminal. In a pipe one line a host, without a heading, with tabs between
    name, slots, user, port, addr, python, key, gpus, transport and spare; "-" is unset.
    """
    from dstrain.launcher.hostfile import load_hostfile

    hosts = load_hostfile(_existing(hostfile)).hosts
    if json:
        from json import dumps

        typer.echo(dumps([asdict(host) for host in hosts], indent=2))
    elif sys.stdout.isatty():
        from rich.console import Console

        console = Console()
        console.print(_table(hosts))
        console.print(_summary(hosts), highlight=False)
    else:
        for host in hosts:
            typer.echo("\t".join(_cells(host)))


@app.command("add")
def add(
    host: Annotated[str, typer.Argument(metavar="HOST", help="A name, an address, or a range: gpu[1-4].")],
    options: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help=_OPTIONS_HELP, show_default=False)
    ] = None,
    hostfile: HostfileOption = None,
) -> None:
    """Append a host (or a range of them); creates the hostfile if there is none."""
    from dstrain.launcher import hostfile_edit

    path = _editable(hostfile)
    words = [host, *(options or [])]
    hostfile_edit.edit_file(path, lambda before: hostfile_edit.add_host(before, words), create=True)
    typer.echo(f"added {host} to {path}")


@app.command("remove")
def remove(
    hosts: Annotated[list[str], typer.Argument(metavar="HOST", help="Names or ranges: gpu2 gpu[5-6].")],
    hostfile: HostfileOption = None,
) -> None:
    """Remove hosts: their lines, or their part of a range."""
    from dstrain.launcher import hostfile_edit

    path = _existing(hostfile)
    hostfile_edit.edit_file(path, lambda before: hostfile_edit.remove_hosts(before, hosts))
    typer.echo(f"removed {' '.join(hosts)} from {path}")


@app.command("set")
def set_(
    host: Annotated[str, typer.Argument(metavar="HOST", help="A name or a range: gpu[1-4].")],
    options: Annotated[list[str], typer.Argument(metavar="KEY=VALUE", help=_OPTIONS_HELP)],
    hostfile: HostfileOption = None,
) -> None:
    """Change a host's options; KEY= with nothing behind it removes that option."""
    from dstrain.launcher import hostfile_edit

    path = _existing(hostfile)
    hostfile_edit.edit_file(path, lambda before: hostfile_edit.set_options(before, host, options))
    typer.echo(f"set {' '.join(options)} for {host} in {path}")


def _editable(option: Path | None) -> Path:
    from dstrain.launcher.hostfile_store import DEFAULT_HOSTFILE, find_hostfile

    return find_hostfile(option, os.environ) or DEFAULT_HOSTFILE


def _existing(option: Path | None) -> Path:
    """The hostfile to read. Raises UsageError when none is named and there is no ./hostfile."""
    from dstrain.launcher.hostfile_store import DEFAULT_HOSTFILE, find_hostfile

    path = find_hostfile(option, os.environ)
    if path is None:
        fix = "name one with -H, or create it with `dstrain hosts add HOST`"
        raise UsageError.mismatch(f"./{DEFAULT_HOSTFILE}", "a hostfile", "no such file", fix)
    return path


def _cells(host: Host) -> list[str]:
    """The host's row, in the order of COLUMNS."""
    gpus = None if host.gpus is None else ",".join(map(str, host.gpus))
    slots = "auto" if host.slots is None else host.slots
    values = (host.written_name, slots, host.user, host.port, host.addr, host.python, host.key, gpus)
    return [*("-" if value is None else str(value) for value in values), host.transport, "spare" if host.spare else "-"]


def _table(hosts: Sequence[Host]) -> Table:
    """For people: only the columns in which some host says something."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    rows = [_cells(host) for host in hosts]
    shown = [i for i, name in enumerate(COLUMNS) if name in ("name", "slots") or any(r[i] != "-" for r in rows)]
    table = Table(box=SIMPLE_HEAD)
    for index in shown:
        table.add_column(COLUMNS[index], justify="right" if COLUMNS[index] in ("slots", "port") else "left")
    for row in rows:
        table.add_row(*(Text(row[index]) for index in shown))  # Text: brackets are no markup here
    return table


def _summary(hosts: Sequence[Host]) -> str:
    used = [host for host in hosts if not host.spare]
    spares = len(hosts) - len(used)
    slots = sum(host.slots or 0 for host in used)
    counted_later = sum(host.slots is None for host in used)
    text = f"{len(used)} host{'' if len(used) == 1 else 's'}, {slots} slot{'' if slots == 1 else 's'}"
    text += f" and the GPUs of {counted_later} (auto)" if counted_later else ""
    return text + (f"; {spares} spare" if spares else "")
