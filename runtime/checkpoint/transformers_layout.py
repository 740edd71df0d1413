"""How the library transformers names the files of a model. Without torch."""

from __future__ import annotations

import re
from collections.abc import Mapping

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
GENERATION = "generation_config.json"

MAX_SHARD_BYTES = 5_000_000_000

_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def is_of_weights(name: str) -> bool:
    """Whether transformers may take a file of that name for weights, or for what says where they are."""
    return name in (SINGLE, INDEX) or _SHARD.fullmatch(name) is not None


def in_shards(sizes: Mapping[str, int], max_bytes: int) -> dict[str, list[str]]:
    """Names of tensors by file, in their order: one file if they fit, else files of up to `max_bytes`, or of a single
    tensor that is larger."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": names for i, names in enumerate(shards, 1)}
