"""Models of the library transformers: from a configuration, or with weights from a local folder."""

from __future__ import annotations

import difflib
from importlib import import_module
from pathlib import Path
from textwrap import shorten
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from dstrain.runtime.imports import optional_module
from dstrain.runtime.models.hf_weights import RefillBy, load_weights, read_json
from dstrain.runtime.spec.errors import UsageError
from dstrain.runtime.spec.model_config import HFConfig

_REASON_CHARACTERS = 200


def build(config: HFConfig, refill_by: RefillBy | None = None, *, parameters: bool = True) -> nn.Module:
    """The model in fp32, in training mode, without the cache that only generation needs. [Note: streamed weights]

    refill_by, parameters: see `load_weights`. Raises UsageError where configuration, class and files do not fit
    together.
    """
    transformers = optional_module("transformers", "model.hf", "hf")
    if config.path is None:
        assert config.config is not None, "the loader has seen to it: path or config"
        values = _given_values(transformers, config.config)
        model = _model(transformers, config.auto_class, values, "model.hf.config")
    else:
        values = read_json(config.path / "config.json", "model.hf.path")
        with _UnfilledParameters():
            model = _model(transformers, config.auto_class, values, "model.hf.path")
        load_weights(model, config.path, refill_by, parameters=parameters)
    return model.train()


def text_size(model: nn.Module, name: str) -> int | None:
    """`name` of a transformers model's configuration of text; None if it has no such thing (as for images)."""
    text: Any = model.config.get_text_config()  # type: ignore[operator, union-attr] # nn.Module knows no config
    size: int | None = getattr(text, name, None)  # every architecture has fields of its own, and aliases for some
    return size


class _UnfilledParameters(TorchFunctionMode):
    """Leaves out the random numbers of new parameters, which are drawn only to be overwritten."""

    _DRAWS = frozenset({"normal_", "uniform_", "kaiming_uniform_", "erfinv_", "exponential_"})

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.__name__ in self._DRAWS:
            drawn = args[0] if args else kwargs["tensor"]
            if isinstance(drawn, nn.Parameter):
                return drawn
        return func(*args, **kwargs)


def _model(transformers: ModuleType, auto_class: str, values: dict[str, Any], key: str) -> nn.Module:
    """Made of config.json's `values`; transformers' own complaints come out as one line."""
    model_type = _model_type(transformers, values, key)
    if not (auto_class.startswith("AutoModel") and auto_class in dir(transformers)):
        autos = [name for name in dir(transformers) if name.startswith("AutoModel")]
        near = difflib.get_close_matches(auto_class, autos, n=1) or ["AutoModelForCausalLM"]
        raise UsageError.mismatch(
            "model.hf.auto_class", "an AutoModel class of transformers", auto_class, f"such as {near[0]}"
        )
    try:
        configuration = transformers.AutoConfig.for_model(**values)
        configuration.use_cache = False
        model: nn.Module = getattr(transformers, auto_class).from_config(
            configuration, dtype=torch.float32, trust_remote_code=False
        )
    except (TypeError, ValueError, KeyError, import_module("huggingface_hub.errors").StrictDataclassError) as error:
        reason = shorten(str(error), _REASON_CHARACTERS, placeholder=" …")
        expected = f"a configuration of {model_type} for {auto_class}"
        raise UsageError.mismatch(key, expected, f"one that transformers refuses ({reason})") from error
    return model


def _model_type(transformers: ModuleType, values: dict[str, Any], key: str) -> str:
    known = list(transformers.CONFIG_MAPPING)
    model_type = str(values.get("model_type"))
    if model_type not in known:
        near = difflib.get_close_matches(model_type, known, n=1)
        hint = f"did you mean {near[0]}?" if near else "such as llama, qwen2, gpt2, bert"
        raise UsageError.mismatch(key, "a model_type that transformers knows", model_type, hint)
    return model_type


def _given_values(transformers: ModuleType, config: Path | dict[str, Any]) -> dict[str, Any]:
    """Of a file; or keys that a person wrote: transformers would take a misspelt one and do nothing with it."""
    if isinstance(config, Path):
        return read_json(config / "config.json" if config.is_dir() else config, "model.hf.config")
    model_type = _model_type(transformers, config, "model.hf.config")
    usual = transformers.AutoConfig.for_model(model_type)
    known = [*usual.to_dict(), *usual.attribute_map, "num_labels"]
    if unknown := [name for name in config if name not in known]:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"did you mean {near[0]}?" if near else "a config.json may hold any key"
        raise UsageError.mismatch("model.hf.config", f"keys of {model_type}", ", ".join(unknown), hint)
    return config
