"""Host keys: what is known, what is revoked, and pinning a new one on purpose."""

from __future__ import annotations

import base64
import contextlib
import fnmatch
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import paramiko
from paramiko.hostkeys import HostKeyEntry, HostKeys

from dstrain.launcher.hostfile import Host
from dstrain.launcher.transport import ConnectOptions
from dstrain.launcher.transport.ssh_config import SshTarget


class UnknownKeyError(paramiko.SSHException):
    """No known_hosts file has a key of this host."""

    def __init__(self, key: paramiko.PKey) -> None:
        super().__init__("unknown host key")
        self.key = key


class RefuseUnknown(paramiko.MissingHostKeyPolicy):
    """A host that nobody has pinned is refused, with its key in the error."""

    def missing_host_key(self, client: paramiko.SSHClient, hostname: str, key: paramiko.PKey) -> None:
        raise UnknownKeyError(key)


def fingerprint(key: paramiko.PKey) -> str:
    """`ssh-ed25519 SHA256:…`, as ssh-keygen -l shows it."""
    digest = base64.b64encode(hashlib.sha256(key.asbytes()).digest()).decode().rstrip("=")
    return f"{key.get_name()} SHA256:{digest}"


def _entries(target: SshTarget, marker: str) -> Iterator[HostKeyEntry]:
    """The lines of the known_hosts files that have this marker ("" or "@revoked") and a key that paramiko knows."""
    for path in target.known_hosts:
        if not Path(path).is_file():
            continue
        for line in Path(path).read_text(errors="replace").splitlines():
            first, _, rest = line.strip().partition(" ")
            if (first if first.startswith("@") else "") != marker or first.startswith("#"):
                continue
            with contextlib.suppress(paramiko.SSHException):
                if entry := HostKeyEntry.from_line(rest.strip() if marker else line.strip()):
                    yield entry


def load_known_keys(keys: HostKeys, target: SshTarget) -> None:
    """Add every known key to `keys`. (paramiko's own reader stops at a line with a marker.)"""
    for entry in _entries(target, ""):
        names = entry.hostnames or []
        if any(name.startswith("!") and fnmatch.fnmatchcase(target.key_name, name[1:]) for name in names):
            continue
        for name in names:
            if entry.key is not None:
                matches = ("*" in name or "?" in name) and fnmatch.fnmatchcase(target.key_name, name)
                keys.add(target.key_name if matches else name, entry.key.get_name(), entry.key)


def is_revoked(key: paramiko.PKey, target: SshTarget) -> bool:
    """Is the key marked `@revoked` for this host?"""
    for entry in _entries(target, "@revoked"):
        if entry.key != key:
            continue
        keys = HostKeys()
        for name in entry.hostnames or []:
            keys.add(name, key.get_name(), key)
        if "*" in (entry.hostnames or []) or keys.lookup(target.key_name):
            return True
    return False


def fetch_key(host: Host, target: SshTarget, options: ConnectOptions) -> paramiko.PKey:
    """The key that the host shows now, without logging in. Raises HostError."""
    from dstrain.launcher.transport.ssh import open_stream, translated

    with translated(host, target, options):
        stream = open_stream(host, target, options)
    with translated(host, target, options, stream):
        transport = paramiko.Transport(stream)
        try:
            transport.start_client(timeout=options.timeout_s)
            return transport.get_remote_server_key()
        finally:
            transport.close()
            stream.close()


def known_key(target: SshTarget, kind: str) -> paramiko.PKey | None:
    """The key of this kind that known_hosts already has."""
    keys = HostKeys()
    load_known_keys(keys, target)
    found = keys.lookup(target.key_name)
    return found.get(kind) if found is not None else None


def pin(target: SshTarget, key: paramiko.PKey) -> Path:
    """Append the key to the user's own known_hosts file; returns that file."""
    path = Path(target.known_hosts[0])
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    line = f"{target.key_name} {key.get_name()} {key.get_base64()}\n"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    with os.fdopen(fd, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        broken = size > 0 and os.pread(file.fileno(), 1, size - 1) != b"\n"
        file.write((b"\n" if broken else b"") + line.encode())
    return path
