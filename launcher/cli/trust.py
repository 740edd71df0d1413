"""`dstrain hosts trust`: look at a host's key and pin it on purpose."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dstrain.runtime.spec.errors import HostError, HostKeyError, UsageError

if TYPE_CHECKING:
    from dstrain.launcher.hostfile import Host


def trust(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[HOST]...", help="Hosts; default: all of the hostfile.")
    ] = None,
    hostfile: Annotated[
        Path | None, typer.Option("-H", "--hostfile", help="Where user, port and address of the hosts stand.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask: for scripts, where the network is trusted.")] = False,
) -> None:
    """Show the fingerprint of each host's key and, after a yes, add it to known_hosts.

    A key that has changed is never replaced here: ssh-keygen -R removes the old one first.
    """
    failed = [error for host in chosen_hosts(names, hostfile) if (error := _trust_one(host, yes)) is not None]
    for error in failed:
        print(f"dstrain: {error}", file=sys.stderr)
    if failed:
        raise typer.Exit(int(failed[0].exit_code))


def chosen_hosts(names: list[str] | None, hostfile: Path | None) -> list[Host]:
    """The named hosts as the hostfile describes them, or by themselves where it does not; else all of it."""
    from dstrain.launcher.hostfile import load_hostfile, parse_hosts_expression
    from dstrain.launcher.hostfile_store import find_hostfile

    path = find_hostfile(hostfile, os.environ)
    known = load_hostfile(path).hosts if path else ()
    if not names:
        if not known:
            raise UsageError.mismatch("hosts trust", "a host or a hostfile", "neither", "dstrain hosts trust HOST")
        return [host for host in known if host.transport == "ssh"]
    by_name = {host.name: host for host in known}
    wanted = [host for name in names for host in parse_hosts_expression(name)]
    return [by_name.get(host.name, host) for host in wanted]


def _trust_one(host: Host, yes: bool) -> HostError | None:
    from dstrain.launcher.transport import ConnectOptions
    from dstrain.launcher.transport.known_hosts import fetch_key, fingerprint, known_key, pin
    from dstrain.launcher.transport.ssh_config import resolve

    try:
        target = resolve(host)
        key = fetch_key(host, target, ConnectOptions())
        known = known_key(target, key.get_name())
        if known == key:
            print(f"{host.name}: {fingerprint(key)}: known already")
            return None
        if known is not None:
            fix = f"if the host was set up anew: ssh-keygen -R '{target.key_name}', then trust it again"
            return HostKeyError(host.name, f"its host key has CHANGED (now {fingerprint(key)})", fix)
        print(f"{host.name}: {fingerprint(key)}")
        if not yes and not _agreed(host):
            return HostKeyError(host.name, "not trusted", "nothing was changed")
        print(f"{host.name}: added to {pin(target, key)}")
    except HostError as error:
        return error
    return None


def _agreed(host: Host) -> bool:
    if not sys.stdin.isatty():
        raise UsageError.mismatch("hosts trust", "a terminal to ask at", "none", "compare the fingerprint, then --yes")
    return typer.confirm(f"Is this the fingerprint that {host.name} itself shows (ssh-keygen -lf)?")
