"""What a plan must know of a model: the shapes of its parameters, and what its layers compute and keep. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

ITEM_BYTES = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "uint8": 1}
"""Of an element, by torch's name of the dtype."""

CONFIGURED = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""torch's names of `precision.dtype`."""


@dataclass(frozen=True)
class ParameterShape:
    """One parameter, as the model makes it. dtype: torch's name; float32 becomes the job's `precision.dtype`."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    requires_grad: bool = True

    def numel(self) -> int:
        """Elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class LayerShape:
    """One layer of the chain; bytes and operations are those of the forward of one sample.

    parameters: names; a tied one is in each layer that uses it. saved_bytes: kept for the backward, without parameters.
    input_bytes: what a layer keeps that computes again. output_bytes: sent to the next layer.
    weight_flops: products with parameters, whose gradients take as much again for each of weights and inputs.
    other_flops: products of activations (attention), whose gradients take twice as much.
    left_bytes: what a split backward leaves for the weights' turn: inputs of linear layers, and gradients of their
    outputs. ready_bytes: gradients of all other parameters, which it makes at once and keeps; however many samples.
    rebuilt_bytes: of what is kept, what a pipeline computes again in the backward.
    """

    name: str
    parameters: tuple[str, ...]
    saved_bytes: float
    input_bytes: float
    output_bytes: float
    weight_flops: float
    other_flops: float = 0.0
    left_bytes: float = 0.0
    ready_bytes: float = 0.0
    rebuilt_bytes: float = 0.0


@dataclass(frozen=True)
class ModelShapes:
    """A model as a plan sees it. parameters: in the model's order, tied ones once. blocks: names of the repeated
    modules, which stage 3 gathers and activation checkpointing recomputes. uncut: why it is no chain that a pipeline
    could cut; "" if it is one. unknown: what could not be found out, for people."""

    name: str
    parameters: tuple[ParameterShape, ...]
    layers: tuple[LayerShape, ...]
    blocks: tuple[str, ...]
    uncut: str = ""
    unknown: tuple[str, ...] = ()

    @property
    def elements(self) -> int:
        """Of all parameters."""
        return sum(parameter.numel() for parameter in self.parameters)

    def to_json(self) -> dict[str, Any]:
        """As the process that has looked at a model prints it."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ModelShapes:
        """The inverse of `to_json`. Raises KeyError or TypeError for anything else."""
        parameters = [ParameterShape(**{**each, "shape": tuple(each["shape"])}) for each in values["parameters"]]
        layers = [LayerShape(**{**each, "parameters": tuple(each["parameters"])}) for each in values["layers"]]
        blocks, unknown = tuple(values["blocks"]), tuple(values["unknown"])
        return cls(values["name"], tuple(parameters), tuple(layers), blocks, values["uncut"], unknown)
