"""Peaks of known GPUs, FLOPs of a model, memory of a process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dstrain.runtime import metrics
from dstrain.runtime.metrics import DtypeName
from dstrain.runtime.models.gpt import GPT
from dstrain.runtime.spec.model_config import GPTConfig


@pytest.mark.parametrize(
    ("name", "dtype", "tflops"),
    [
        ("NVIDIA H200", "bf16", 989.4),
        ("NVIDIA H200 NVL", "bf16", 835.5),
        ("NVIDIA GH200 480GB", "fp16", 989.4),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 80GB HBM3", "fp32", 66.9),
        ("NVIDIA H100 PCIe", "bf16", 756.4),
        ("NVIDIA H100 NVL", "bf16", 835.5),
        ("NVIDIA H800", "bf16", 989.4),
        ("NVIDIA H20", "bf16", 148.0),
        ("NVIDIA B200", "bf16", 2250.0),
        ("NVIDIA GB200", "bf16", 2500.0),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312.0),
        ("NVIDIA A100-PCIE-40GB", "fp32", 19.5),
        ("NVIDIA A100 80GB PCIe MIG 3g.40gb", "bf16", None),
        ("NVIDIA L40S", "bf16", 362.1),
        ("NVIDIA L40", "bf16", 181.1),
        ("NVIDIA L4", "bf16", 121.0),
        ("NVIDIA A10", "bf16", 125.0),
        ("NVIDIA A10G", "bf16", 70.0),
        ("NVIDIA A40", "bf16", 149.7),
        ("Tesla V100-SXM2-16GB", "fp16", 125.0),
        ("Tesla V100-SXM2-16GB", "bf16", None),
        ("Tesla V100-PCIE-32GB", "fp16", 112.0),
        ("Tesla V100S-PCIE-32GB", "fp16", 130.0),
        ("Tesla T4", "fp16", 65.0),
        ("NVIDIA T400", "fp16", None),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA GeForce RTX 4090 D", "bf16", None),
        ("NVIDIA GeForce RTX 4080 SUPER", "bf16", None),
        ("NVIDIA GeForce RTX 3090", "fp16", 71.0),
        ("NVIDIA GeForce RTX 3090 Ti", "fp16", 80.0),
        ("NVIDIA RTX A6000", "bf16", 154.8),
        ("NVIDIA RTX 6000 Ada Generation", "bf16", 364.2),
        ("Quadro RTX 6000", "fp16", None),
        ("a card of tomorrow", "bf16", None),
    ],
)
def test_peaks(name: str, dtype: DtypeName, tflops: float | None) -> None:
    assert metrics.peak_tflops(name, dtype) == tflops


def test_flops_per_token_of_palms_formula() -> None:
    assert metrics.transformer_flops_per_token(1000, layers=2, width=8, sequence_length=16) == 6000 + 12 * 2 * 8 * 16


def test_flops_per_token_are_what_torch_counts() -> None:
    """Against torch's own counter; what is not counted (norms, the causal half) is known, or is small."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    config = GPTConfig(layers=2, width=64, heads=2, context=32)
    model = GPT(config)
    tokens = torch.zeros(3, 32, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens).sum().backward()
    matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 2)
    expected = metrics.transformer_flops_per_token(matrices, config.layers, config.width, 32)
    assert counter.get_total_flops() / tokens.numel() == pytest.approx(expected, rel=0.02)


def test_utilization() -> None:
    # 8 devices of 100 TFLOP/s; 4,000 tokens/s of 100 GFLOP each are 400 TFLOP/s
    assert metrics.model_flops_utilization(4000, 8, 100e9, 100.0) == pytest.approx(0.5)


def test_memory_of_this_process_grows_with_what_it_holds() -> None:
    before = metrics.peak_memory_bytes(torch.device("cpu"))
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    held = b"x" * (before - resident + (64 << 20))  # all together 64 MiB more than this process ever had
    assert metrics.peak_memory_bytes(torch.device("cpu")) >= before + (32 << 20), len(held)
