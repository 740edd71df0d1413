"""Sizes and rates as people write them, in options and in tables."""

from __future__ import annotations

import math
import re

from dstrain.runtime.spec.errors import UsageError

GIB = 1 << 30
_SIZES = {"": 1, "KB": 1000, "MB": 1000**2, "GB": 1000**3, "TB": 1000**4, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": GIB}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]*)")


def read_bytes(text: str, option: str) -> int:
    """`80GiB`, `24 GB`. Raises UsageError."""
    match = _SIZE.fullmatch(text.strip())
    unit = _SIZES.get(match[2].upper()) if match else None
    if match is None or unit is None or not float(match[1]):
        raise UsageError.mismatch(option, "a size such as 80GiB or 24GB", ascii(text))
    return int(float(match[1]) * unit)


def read_rate(text: str, option: str) -> float:
    """A number above 0. Raises UsageError."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise UsageError.mismatch(option, "a number above 0", ascii(text))
    return value


def gib(count: float) -> str:
    """Memory: `12.3 GiB`."""
    return _scaled(count, 1024.0, ("B", "KiB", "MiB", "GiB", "TiB"))


def gigabytes(count: float) -> str:
    """What is sent, in powers of 1,000: `1.23 GB`."""
    return _scaled(count, 1000.0, ("B", "kB", "MB", "GB", "TB", "PB"))


def number(count: float) -> str:
    """Of parameters: `386 B` are billions."""
    return _scaled(count, 1000.0, ("", "K", "M", "B", "T")).strip()


def seconds(duration: float) -> str:
    """Three digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if duration >= size:
            return f"{_digits(duration / size)} {unit}"
    return f"{_digits(duration * 1e6)} µs" if duration else "0 s"


def _scaled(count: float, step: float, units: tuple[str, ...]) -> str:
    place = 0
    while count >= 999.5 and place < len(units) - 1:
        count, place = count / step, place + 1
    return f"{_digits(count) if place else round(count)} {units[place]}"


def _digits(value: float) -> str:
    """Three that count."""
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:,.0f}"
