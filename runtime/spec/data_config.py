"""The sections `data` and `batch`: what the model reads, and how much at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from dstrain.runtime.spec.errors import ConfigError
from dstrain.runtime.spec.section import Count, ImportPath, NonNegativeCount, OpenFraction, Positive, Section, Seed


class SourceConfig(Section):
    """One of several corpora."""

    path: Path = Field(description="File, or folder read in sorted order.")
    weight: Positive = Field(default=1.0, description="Share of the samples, relative to the other sources'.")


class DataConfig(Section):
    """What the model reads: one of `path`, `sources`, `factory`; without any, the Python standard library's source."""

    path: Path | None = Field(
        default=None,
        description="File, or folder read in sorted order. By default the Python standard library's source: "
        "real text that is on every host.",
    )
    sources: tuple[SourceConfig, ...] = Field(default=(), description="Several corpora with weights.")
    factory: ImportPath | None = Field(
        default=None,
        description="`package.module:name` of anything that returns a torch Dataset, an iterable, or a pair of them "
        "(training, validation).",
    )
    args: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments of `factory`.")
    format: Literal["bytes", "tokens", "text"] = Field(
        default="bytes",
        description="How a file becomes tokens. bytes: one byte, one token. tokens: a flat array of numbers, memory-"
        "mapped. text: UTF-8 through `tokenizer`, once.",
    )
    tokenizer: Path | None = Field(
        default=None, description="tokenizer.json of the library tokenizers, or a folder that holds one; for `text`."
    )
    token_type: Literal["uint16", "uint32"] = Field(
        default="uint16", description="Numbers in a file of `tokens`, little-endian; uint16 holds 65,536 tokens."
    )
    sequence_length: Count | None = Field(
        default=None, description="Tokens of one sample; by default the model's whole context."
    )
    validation_fraction: OpenFraction = Field(
        default=0.05,
        description="Share of the corpus held out; 0.05 of a few megabytes measures the loss to about 0.01.",
    )
    validation_path: Path | None = Field(
        default=None, description="File or folder to validate on, in place of a share of the corpus."
    )
    seed: Seed = Field(default=0, description="Order of the samples.")
    shuffle: bool = Field(default=True, description="Draw the samples in an order of the seed; else as they stand.")
    prefetch: NonNegativeCount = Field(
        default=2, description="Micro-batches that are made ready while the model computes; 0 makes them when asked."
    )
    cache: Path | None = Field(
        default=None,
        description="Folder for tokens made of text, once per host; by default ~/.cache/dstrain/tokens.",
    )


class BatchConfig(Section):
    """Samples of one optimizer step, whatever the number of ranks."""

    global_: Count = Field(alias="global", description="Samples of one optimizer step, over all ranks.")
    micro: Count = Field(description="Samples of one forward and backward on one rank; bounds the memory.")

    def accumulation(self, data_ranks: int) -> int:
        """Micro-batches that each of `data_ranks` ranks adds up in one step; never rounded.

        Raises ConfigError, with every factor, when the global batch does not divide.
        """
        together = self.micro * data_ranks
        if self.global_ % together:
            nearest = max(1, round(self.global_ / together)) * together
            raise ConfigError(
                f"batch.global: expected a multiple of batch.micro × data ranks = {self.micro} × "
                f"{data_ranks} = {together}, found {self.global_}; the nearest is {nearest}"
            )
        return self.global_ // together
