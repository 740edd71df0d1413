"""Checkpoints as text for people, at most as wide as the terminal where that can be. Pure but for its width."""

from __future__ import annotations

import json
import re
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from math import prod
from pathlib import Path
from typing import Any

from dstrain.launcher.checkpoints import Held
from dstrain.launcher.console_text import escape
from dstrain.runtime.checkpoint.manifest import Manifest, TensorEntry

KINDS = ("model", "optimizer", "master", "average", "rng")
LARGEST = 5
"""Tensors that `show` names."""
LONGEST_VALUE = 40
"""Characters; of a longer value only the length is shown."""


def printable(text: str) -> str:
    """Without anything that a terminal would obey or that cannot be printed."""
    return escape(text).encode(errors="backslashreplace").decode()


def in_bytes(size: float) -> str:
    """1424564 -> "1.4 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


_SIZE = re.compile(r"(\d+(?:\.\d+)?) *([kKMGT]?)(i?)B?")


def bytes_of(text: str) -> int | None:
    """5GB -> 5000000000; also kB, MB, TB, KiB, MiB, GiB, TiB and plain bytes. None: no size."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        return None
    power = " KMGT".index((match[2] or " ").upper())
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def ago(seconds: float) -> str:
    """90061 -> "25 h ago"."""
    for unit, length in (("d", 86400 * 2), ("h", 3600 * 2), ("min", 120)):
        if seconds >= length:
            return f"{seconds // {'d': 86400, 'h': 3600, 'min': 60}[unit]:.0f} {unit} ago"
    return f"{max(seconds, 0):.0f} s ago"


def iso(time: float) -> str:
    """Unix time in UTC."""
    return datetime.fromtimestamp(int(time), UTC).isoformat().replace("+00:00", "Z")


def as_json(held: Held) -> dict[str, Any]:
    """What `list --json` says of one."""
    whole = not held.damages and not held.elsewhere
    said = {"path": str(held.path), "saved_at": iso(held.saved_at), "whole": whole}
    return {**vars(held), **said, "damages": list(held.damages), "elsewhere": dict(held.elsewhere)}


def state_of(held: Held) -> str:
    """In a word or two."""
    return "damaged" if held.damages else "in part" if held.elsewhere else "whole"


def files_elsewhere(away: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """A line for each host that has files on a disk of its own."""
    for host, files in away.items():
        more = f" and {len(files) - 3} more" if len(files) > 3 else ""
        yield f"on {host}, not here: {', '.join(files[:3])}{more}"


def as_line(held: Held) -> str:
    """For a pipe, between tabs: path, step, time, bytes, ranks, run id, `whole` or why not."""
    state = (*held.damages, *files_elsewhere(held.elsewhere), "whole")[0]
    ranks = "-" if held.ranks is None else held.ranks
    cells = (held.path, held.step, iso(held.saved_at), held.size_bytes, ranks, held.run_id or "-", state)
    return "\t".join(printable(str(cell)) for cell in cells)


def as_table(folder: Path, held: Iterable[Held], now: float) -> Iterator[str]:
    """One folder of them, the newest first; what is wrong with one stands below it."""
    yield printable(str(folder))
    yield f"  {'step':>8}  {'saved':>10}  {'size':>8}  {'ranks':>5}  {'':7}  run"
    for each in held:
        ranks = "-" if each.ranks is None else each.ranks
        cells = f"{each.step:>8}  {ago(now - each.saved_at):>10}  {in_bytes(each.size_bytes):>8}  {ranks:>5}"
        yield f"  {cells}  {state_of(each):7}  {printable(each.run_id) or '-'}"
        for line in (*each.damages, *files_elsewhere(each.elsewhere)):
            yield from _wrapped(printable(line.removeprefix(f"{folder}/")), " " * 12)


def kinds_of(manifest: Manifest) -> dict[str, dict[str, int]]:
    """tensors, elements and bytes of each kind."""
    kinds: dict[str, dict[str, int]] = {kind: {"tensors": 0, "elements": 0, "bytes": 0} for kind in KINDS}
    for entry in manifest.tensors:
        kind = kinds.setdefault(entry.name.partition(".")[0], {"tensors": 0, "elements": 0, "bytes": 0})
        kind["tensors"] += 1
        kind["elements"] += prod(entry.shape)
        kind["bytes"] += size_of(entry)
    return {kind: counts for kind, counts in kinds.items() if counts["tensors"]}


def size_of(entry: TensorEntry) -> int:
    """Bytes that its pieces take."""
    return sum(piece.size for piece in entry.pieces)


def largest(manifest: Manifest, count: int = LARGEST) -> list[TensorEntry]:
    """The tensors that take the most bytes."""
    return sorted(manifest.tensors, key=lambda entry: (-size_of(entry), entry.name))[:count]


def show_json(held: Held, manifest: Manifest) -> dict[str, Any]:
    """What `show --json` says: all but the pieces."""
    tensors = [
        {"name": e.name, "shape": list(e.shape), "dtype": e.dtype, "bytes": size_of(e), "pieces": len(e.pieces)}
        for e in manifest.tensors
    ]
    said = {"layout": manifest.layout, "versions": manifest.versions, "files": manifest.files, "hosts": manifest.hosts}
    return {**as_json(held), **said, "kinds": kinds_of(manifest), "tensors": tensors, "state": manifest.state}


def show(held: Held, manifest: Manifest, now: float) -> Iterator[str]:
    """One checkpoint on a page."""
    yield printable(str(held.path))
    layout = {"ranks": held.ranks, **{k: v for k, v in manifest.layout.items() if k != "world_size"}}
    yield from _field("step", f"{held.step}, saved {ago(now - held.saved_at)} ({iso(held.saved_at)})")
    yield from _field("run", held.run_id or "-")
    yield from _field("layout", _short(layout))
    yield from _field("versions", _short(manifest.versions))
    pieces = sum(len(entry.pieces) for entry in manifest.tensors)
    yield from _field("files", f"{_files(manifest.files)}; {pieces} pieces")
    if manifest.hosts:
        yield from _field("hosts", _hosts(manifest, held.elsewhere))
    for name, values in manifest.state.items():
        if name == "optimizer" and isinstance(values, Mapping):
            values = _optimizer(values)
        if name == "model" and isinstance(values, Mapping):
            values = _model(values)
        plain = values if isinstance(values, str) else _value(values)
        text = _short(_flat(values)) if isinstance(values, Mapping) else plain
        yield from _field(name.removeprefix("imported_"), text)
    for damage in held.damages:
        yield from _field("damaged", damage)
    for line in files_elsewhere(held.elsewhere):
        yield from _field("in part", line)
    yield ""
    yield f"  {'':10}{'tensors':>8}  {'elements':>15}  {'size':>9}"
    for kind, counts in kinds_of(manifest).items():
        cells = f"{counts['tensors']:>8}  {counts['elements']:>15,}  {in_bytes(counts['bytes']):>9}"
        yield f"  {printable(kind):10}{cells}"
    yield ""
    yield "  the largest"
    rows = [(in_bytes(size_of(e)), e.dtype, "×".join(map(str, e.shape)) or "-", e.name) for e in largest(manifest)]
    for cells, name in zip(_aligned([row[:3] for row in rows]), (row[3] for row in rows), strict=True):
        yield f"  {cells}  {printable(name)}"


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return ("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _files(files: Mapping[str, int]) -> str:
    if len(files) > 4:
        return f"{len(files)}, {in_bytes(sum(files.values()))} together"
    return ", ".join(f"{name} {in_bytes(size)}" for name, size in files.items())


def _hosts(manifest: Manifest, away: Mapping[str, Sequence[str]]) -> str:
    sizes: dict[str, list[int]] = {}
    for name, host in manifest.hosts.items():
        sizes.setdefault(host, []).append(manifest.files.get(name, 0))
    said = (
        f"{host} {len(held)} file{'s' * (len(held) > 1)} of {in_bytes(sum(held))}{' (not here)' * (host in away)}"
        for host, held in sizes.items()
    )
    return ", ".join(said)


def _optimizer(values: Mapping[str, Any]) -> dict[str, Any]:
    """Its class, and the learning rate of each group; how else it was configured is in --json."""
    rates = [_value(group["lr"]) for group in values.get("groups", []) if "lr" in group]
    return {"class": values.get("class"), "lr": ", ".join(rates) or "-"}


def _model(values: Mapping[str, Any]) -> dict[str, Any]:
    """Of its configuration only what kind it is."""
    config, tied = values.get("config"), values.get("tied")
    said = {"kind": values.get("kind") or "-"}
    said |= {"model_type": config.get("model_type")} if isinstance(config, Mapping) else {}
    return said | ({"tied": ", ".join(tied)} if isinstance(tied, Mapping) and tied else {})


def _flat(values: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Of small sections, their keys with dots."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value and len(value) <= 8:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _short(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {_value(value)}" for key, value in values.items()) or "-"


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    if len(text) <= LONGEST_VALUE:
        return text
    return f"({len(value)} values)" if isinstance(value, Mapping | list) else f"({len(text)} characters)"


def _field(name: str, text: str) -> Iterator[str]:
    lines = _wrapped(printable(text), " " * 12)
    yield f"  {printable(name)[:9]:9} {next(lines).lstrip()}"
    yield from lines


def _wrapped(text: str, indent: str) -> Iterator[str]:
    width = max(shutil.get_terminal_size().columns, 40)
    lines = textwrap.wrap(text, width - len(indent), break_long_words=False, break_on_hyphens=False)
    return iter([indent + line for line in lines or [""]])
