"""The dstrain package as the head sends it: content-addressed, so a host that has this very version gets nothing.

The digest is over sorted relative paths and the SHA-256 of each file; `agent/bootstrap.py` computes the same on the
host and refuses what differs.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from dataclasses import dataclass
from pathlib import Path

import dstrain.launcher
import dstrain.runtime


@dataclass(frozen=True)
class Bundle:
    """`archive`: a tar of dstrain/launcher and dstrain/runtime. `digest`: hexadecimal, of its tree."""

    digest: str
    archive: bytes


def build_bundle() -> Bundle:
    """Read the installed package's own files. About 10 ms."""
    files = dict(_files("dstrain/launcher", dstrain.launcher) + _files("dstrain/runtime", dstrain.runtime))
    whole = hashlib.sha256()
    for path in sorted(files):
        whole.update(f"{path}\0{hashlib.sha256(files[path]).hexdigest()}\n".encode())
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path, data in files.items():
            member = tarfile.TarInfo(path)
            member.size, member.mode = len(data), 0o600
            archive.addfile(member, io.BytesIO(data))
    return Bundle(whole.hexdigest(), buffer.getvalue())


def _files(prefix: str, package: object) -> list[tuple[str, bytes]]:
    root = Path(str(getattr(package, "__file__", ""))).parent
    return [(f"{prefix}/{path.relative_to(root).as_posix()}", path.read_bytes()) for path in root.rglob("*.py")]


def bootstrap_source(marker: str) -> bytes:
    """The program that the host runs first; `marker` ends whatever a login shell prints before us."""
    source = (Path(dstrain.launcher.__file__).parent / "agent" / "bootstrap.py").read_text(encoding="utf-8")
    return f"MARKER = {marker!r}\n{source}".encode()
