"""The dtypes that a checkpoint can hold, between safetensors' names and torch's."""

from __future__ import annotations

import torch

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""safetensors' names of what can be stored; their sizes are in manifest.py."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}
