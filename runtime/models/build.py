"""The model that the section `model` asks for, and what is known of it."""

from __future__ import annotations

from torch import nn

from dstrain.runtime.imports import call_object
from dstrain.runtime.models import hf
from dstrain.runtime.models.gpt import GPT
from dstrain.runtime.models.hf_weights import RefillBy
from dstrain.runtime.spec.errors import UsageError
from dstrain.runtime.spec.model_config import ModelConfig


def build_model(config: ModelConfig, refill_by: RefillBy | None = None, *, parameters: bool = True) -> nn.Module:
    """The model, on the CPU, in training mode; fp32, unless a factory has it otherwise.

    Random weights come from torch's seed. refill_by: told how to read parameters from files, later. parameters: without
    it those of files are not read, for a rank that gets them from another. Raises UsageError where the section asks
    for what cannot be had.
    """
    if config.gpt is not None:
        return GPT(config.gpt)
    if config.hf is not None:
        return hf.build(config.hf, refill_by, parameters=parameters)
    assert config.factory is not None, "the loader has seen to it: one of gpt, hf, factory"
    model = call_object(config.factory, config.args, "model.factory")
    if isinstance(model, list | tuple) and model and all(isinstance(layer, nn.Module) for layer in model):
        model = nn.Sequential(*model)
    if not isinstance(model, nn.Module):
        expected = "a function that returns an nn.Module, or a list of layers"
        raise UsageError.mismatch("model.factory", expected, type(model).__name__)
    return model


def vocabulary_of(model: nn.Module, config: ModelConfig) -> int | None:
    """Tokens that the model made of `config` knows; None where that is not known."""
    if config.gpt is not None:
        return config.gpt.vocabulary
    return hf.text_size(model, "vocab_size") if config.hf is not None else None


def context_of(model: nn.Module, config: ModelConfig) -> int | None:
    """The longest sequence, in tokens, of the model made of `config`; None where that is not known."""
    if config.gpt is not None:
        return config.gpt.context
    return hf.text_size(model, "max_position_embeddings") if config.hf is not None else None
