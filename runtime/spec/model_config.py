"""The section `model`: what is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from dstrain.runtime.spec.section import Count, ImportPath, Section

BYTE_VALUES = 256
"""Tokens of the format `bytes`: each byte of the corpus is one token."""

GPT_SIZES: dict[str, dict[str, int]] = {
    "tiny": {"layers": 3, "width": 160, "heads": 5, "context": 128, "vocabulary": BYTE_VALUES},
    "mini": {"layers": 6, "width": 384, "heads": 6, "context": 256, "vocabulary": BYTE_VALUES},
    "124m": {"layers": 12, "width": 768, "heads": 12, "context": 1024, "vocabulary": 50304},
    "350m": {"layers": 24, "width": 1024, "heads": 16, "context": 2048, "vocabulary": 50304},
    "760m": {"layers": 24, "width": 1536, "heads": 16, "context": 2048, "vocabulary": 50304},
    "1.3b": {"layers": 24, "width": 2048, "heads": 16, "context": 2048, "vocabulary": 50304},
    "2.7b": {"layers": 32, "width": 2560, "heads": 32, "context": 2048, "vocabulary": 50304},
    "6.7b": {"layers": 32, "width": 4096, "heads": 32, "context": 2048, "vocabulary": 50304},
}
"""The shapes of Radford et al. 2019 and Brown et al. 2020; 50304 is GPT-2's 50257 rounded up to a multiple of 64."""


class GPTConfig(Section):
    """A decoder-only transformer: pre-norm, causal attention, rotary positions."""

    model_config = ConfigDict(json_schema_extra=lambda schema: _shape_or_size(schema))

    size: Literal["tiny", "mini", "124m", "350m", "760m", "1.3b", "2.7b", "6.7b"] | None = Field(
        default=None, description="A usual shape by its number of parameters; the other keys override it."
    )
    layers: Count = Field(description="Transformer blocks.")
    width: Count = Field(description="Features of the residual stream; a multiple of 2 × `heads`.")
    heads: Count = Field(description="Attention heads.")
    context: Count = Field(description="Longest sequence in tokens.")
    vocabulary: Count = Field(default=BYTE_VALUES, description="Tokens known; 256 are the values of a byte.")

    @model_validator(mode="before")
    @classmethod
    def _fill_in_the_size(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("size") is not None:
            unknown = GPT_SIZES["tiny"]  # its mistake is told of `size`, not again of every key that is missing
            return GPT_SIZES.get(str(values["size"]), unknown) | values
        return values


def _shape_or_size(schema: dict[str, Any]) -> None:
    """The JSON schema's own form of `_fill_in_the_size`."""
    schema["anyOf"] = [{"required": ["size"]}, {"required": schema.pop("required")}]


class HFConfig(Section):
    """A model of the library transformers; nothing is downloaded."""

    path: Path | None = Field(
        default=None, description="Local folder with config.json and *.safetensors: pretrained weights, streamed in."
    )
    config: Path | dict[str, Any] | None = Field(
        default=None, description="Random weights: a config.json, or its keys (`model_type` and what differs)."
    )
    auto_class: str = Field(
        default="AutoModelForCausalLM", description="transformers' class that makes the model from its configuration."
    )


class ModelConfig(Section):
    """The model to train: one of `gpt`, `hf`, `factory`."""

    gpt: GPTConfig | None = Field(default=None, description="Our own GPT.")
    hf: HFConfig | None = Field(default=None, description="A model of transformers.")
    factory: ImportPath | None = Field(
        default=None, description="`package.module:name` of anything that returns an nn.Module."
    )
    args: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments of `factory`.")
