"""Floating-point numbers in another dtype, as torch would give them, BF16 among them. Without torch."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dstrain.runtime.checkpoint.manifest import ITEM_BYTES

FLOATS = ("F64", "F32", "F16", "BF16")
"""safetensors' names."""
_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
_BLOCK = 1 << 20
"""Elements that are cast at a time: what is in memory besides the two tensors is little."""
_NAN = 0x7FC0
"""As BF16."""


def cast(items: NDArray[Any], found: str, wanted: str) -> NDArray[Any]:
    """`items`, flat and of any type of the right size, are numbers of dtype `found`; returns them in dtype `wanted`, as
    items without a meaning. Rounds to nearest, ties to even; what is too large becomes infinite."""
    if found == wanted:
        return items
    result = np.empty(items.shape, dtype=f"V{ITEM_BYTES[wanted]}")
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        for begin in range(0, len(items), _BLOCK):
            values = _numbers(items[begin : begin + _BLOCK], found)
            result[begin : begin + _BLOCK] = _rounded(values, wanted).view(result.dtype)
    return result


def _numbers(items: NDArray[Any], dtype: str) -> NDArray[Any]:
    if dtype == "BF16":  # the upper half of a F32
        return (items.view("<u2").astype("<u4") << 16).view("<f4")
    return items.view(_NUMPY[dtype])


def _rounded(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    if dtype == "F64":
        return values.astype("<f8")
    single = values.astype("<f4")  # also on the way from F64 to 16 bits, as torch does
    if dtype != "BF16":
        return single.astype(_NUMPY[dtype])
    bits = single.view("<u4")
    rounded = (bits + ((bits >> 16) & 1) + 0x7FFF) >> 16
    return np.where(np.isnan(single), _NAN, rounded).astype("<u2")
