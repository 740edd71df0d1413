"""Large pages for large buffers: fewer to fault in, to look up, and to pin while another rank reads them."""

from __future__ import annotations

import ctypes

from torch import Tensor

_MADV_HUGEPAGE = 14
_LARGE = 2 << 20
"""Bytes of a large page on x86-64 and most others; it only matters for where advice begins."""


def prefer_large_pages(tensor: Tensor) -> Tensor:
    """The tensor, whose memory nobody has touched yet; where the system lets programs choose, in pages of 2 MiB."""
    start = -(-tensor.data_ptr() // _LARGE) * _LARGE
    size = (tensor.data_ptr() + tensor.nbytes - start) // _LARGE * _LARGE
    if tensor.device.type == "cpu" and size > 0:
        libc = ctypes.CDLL(None)
        if hasattr(libc, "madvise"):  # it may refuse: then pages are small
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), _MADV_HUGEPAGE)
    return tensor
