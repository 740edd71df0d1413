"""How well a device is used: FLOPs of a model, peaks of known GPUs, memory of a process."""

from __future__ import annotations

import re
import resource
import sys
from typing import Literal

import torch

DtypeName = Literal["fp32", "bf16", "fp16"]

_PEAKS: tuple[tuple[str, float, float | None, float | None], ...] = (
    # name in torch.cuda.get_device_name, then fp32, bf16, fp16
    (r"GB200", 80.0, 2500.0, 2500.0),
    (r"B200", 75.0, 2250.0, 2250.0),
    (r"GH200", 67.0, 989.4, 989.4),
    (r"H200 NVL", 60.0, 835.5, 835.5),
    (r"H200", 67.0, 989.4, 989.4),
    (r"H20", 44.0, 148.0, 148.0),
    (r"H[18]00 NVL", 60.0, 835.5, 835.5),
    (r"H[18]00 PCIe", 51.2, 756.4, 756.4),
    (r"H[18]00", 66.9, 989.4, 989.4),
    (r"A[18]00", 19.5, 312.0, 312.0),
    (r"A40", 37.4, 149.7, 149.7),
    (r"A30", 10.3, 165.0, 165.0),
    (r"A10G", 35.0, 70.0, 70.0),
    (r"A10", 31.2, 125.0, 125.0),
    (r"L40S", 91.6, 362.1, 362.1),
    (r"L40", 90.5, 181.1, 181.1),
    (r"L4", 30.3, 121.0, 121.0),
    (r"RTX 6000 Ada", 91.1, 364.2, 364.2),
    (r"RTX A6000", 38.7, 154.8, 154.8),
    (r"RTX 5090$", 104.8, 209.5, 209.5),
    (r"RTX 4090$", 82.6, 165.2, 165.2),
    (r"RTX 4080$", 48.7, 97.5, 97.5),
    (r"RTX 3090 Ti$", 40.0, 80.0, 80.0),
    (r"RTX 3090$", 35.6, 71.0, 71.0),
    (r"V100S", 16.4, None, 130.0),
    (r"V100.*PCIE", 14.0, None, 112.0),
    (r"V100", 15.7, None, 125.0),
    (r"T4", 8.1, None, 65.0),
)
"""TFLOP/s of dense matrices by NVIDIA's data sheets and architecture papers, without sparsity and without TF32.

Those of GeForce cards are for sums in fp32, as in training; their namesakes for laptops and the like are other cards.
The first name that fits counts. None: no such units.
"""


def peak_tflops(device_name: str, dtype: DtypeName) -> float | None:
    """TFLOP/s that a GPU, by its `torch.cuda.get_device_name`, can reach in `dtype`; None where nobody has told us.

    A slice of a GPU (MIG) has no peak of its own here.
    """
    if "MIG" in device_name:
        return None
    for name, fp32, bf16, fp16 in _PEAKS:
        if re.search(rf"(?<![A-Za-z0-9]){name}(?![A-Za-z0-9])", device_name):
            return {"fp32": fp32, "bf16": bf16, "fp16": fp16}[dtype]
    return None


def transformer_flops_per_token(parameters: int, layers: int, width: int, sequence_length: int) -> int:
    """FLOPs of forward and backward for one token: 6·N + 12·layers·width·sequence_length.

    As in PaLM (Chowdhery et al. 2022, appendix B): causal attention counts in full, activations that are computed
    again do not count. parameters: those that multiply, so a tied embedding once and an untied one not at all.
    """
    return 6 * parameters + 12 * layers * width * sequence_length


def model_flops_utilization(tokens_per_s: float, ranks: int, flops_per_token: float, device_tflops: float) -> float:
    """Share of the devices' peak that the model's own FLOPs make up. tokens_per_s: of all `ranks` together."""
    return tokens_per_s / ranks * flops_per_token / (device_tflops * 1e12)


def peak_memory_bytes(device: torch.device) -> int:
    """The most that this process has held: on CUDA allocated by torch, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # the one place where Linux counts in KiB
