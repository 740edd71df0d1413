"""The shapes of our own GPT, by its formulas: what `runtime/models/gpt.py` makes, without torch.

[Note: what a block keeps]
In units of time × width elements: the inputs of both norms (2), of the two matrices behind them (2), queries, keys and
values as they were (3), queries and keys turned (2), what attention has mixed (1), and the same with heads side by side
(1), both sides of the GELU (8): 19.
Besides, in fp32, each norm's mean and deviation, and attention's sum for each head. Scores are never kept: attention
computes them again, block by block (Dao et al. 2022).

[Note: what is rebuilt]
In a pipeline the inputs of the matrices behind both norms (2) and the GELU (4) are computed again: 6
(runtime/pipeline/rebuilt.py). The head's, whose weight is the embedding's too, is not, but where backwards are split.

[Note: what is left]
Of a block whose backward is split: the inputs of its four matrices (1 + 1 + 1 + 4), and the gradients of what came out
of them (3 + 1 + 4 + 1): 16 in the same units.
"""

from __future__ import annotations

from dstrain.runtime.spec.model_config import GPTConfig
from dstrain.runtime.spec.model_shapes import LayerShape, ModelShapes, ParameterShape

KEPT_OF_A_BLOCK = 19
"""[Note: what a block keeps]"""
LEFT_OF_A_BLOCK = 16
"""[Note: what is left]"""
REBUILT_OF_A_BLOCK = 6
"""[Note: what is rebuilt]"""


def gpt_shapes(config: GPTConfig, sequence_length: int, item_bytes: int) -> ModelShapes:
    """item_bytes: of an activation. The head's loss is in fp32, and keeps a logarithm for each word."""
    width, length = config.width, sequence_length
    stream = float(length * width * item_bytes)
    parameters = [ParameterShape("token.weight", (config.vocabulary, width))]
    layers = [LayerShape("token", ("token.weight",), 8.0 * length, 8.0 * length, stream, 0.0, left_bytes=stream)]
    for number in range(config.layers):
        own = _parameters_of_block(f"blocks.{number}", width)
        parameters += own
        layers.append(_block(config, f"blocks.{number}", tuple(one.name for one in own), length, item_bytes))
    parameters += [ParameterShape("norm.weight", (width,)), ParameterShape("norm.bias", (width,))]
    head = LayerShape(
        name="head",
        parameters=("norm.weight", "norm.bias", "token.weight"),
        saved_bytes=2 * stream + (4 * config.vocabulary + 8 + 8) * length,
        input_bytes=stream,
        output_bytes=4.0,
        weight_flops=2.0 * length * width * config.vocabulary,
        left_bytes=stream + config.vocabulary * length * item_bytes,
        ready_bytes=2.0 * width * item_bytes,
    )
    blocks = tuple(f"blocks.{number}" for number in range(config.layers))
    return ModelShapes("gpt", tuple(parameters), (*layers, head), blocks)


def _parameters_of_block(name: str, width: int) -> list[ParameterShape]:
    shapes: list[tuple[str, tuple[int, ...]]] = [
        ("attention_norm.weight", (width,)),
        ("attention_norm.bias", (width,)),
        ("attention.query_key_value.weight", (3 * width, width)),
        ("attention.query_key_value.bias", (3 * width,)),
        ("attention.out.weight", (width, width)),
        ("attention.out.bias", (width,)),
        ("mlp_norm.weight", (width,)),
        ("mlp_norm.bias", (width,)),
        ("mlp.0.weight", (4 * width, width)),
        ("mlp.0.bias", (4 * width,)),
        ("mlp.2.weight", (width, 4 * width)),
        ("mlp.2.bias", (width,)),
    ]
    return [ParameterShape(f"{name}.{own}", shape) for own, shape in shapes]


def _block(config: GPTConfig, name: str, parameters: tuple[str, ...], length: int, item_bytes: int) -> LayerShape:
    """[Note: what a block keeps]"""
    width, stream = config.width, float(length * config.width * item_bytes)
    cast_positions = 0 if item_bytes == 4 else 2 * length * (width // config.heads) * item_bytes
    return LayerShape(
        name=name,
        parameters=parameters,
        saved_bytes=KEPT_OF_A_BLOCK * stream + (4 * 4 + 4 * config.heads) * length + cast_positions,
        input_bytes=stream,
        output_bytes=stream,
        weight_flops=2.0 * length * 12 * width * width,
        other_flops=4.0 * length * length * width,
        left_bytes=LEFT_OF_A_BLOCK * stream,
        rebuilt_bytes=REBUILT_OF_A_BLOCK * stream,
        ready_bytes=4.0 * width * item_bytes,
    )
