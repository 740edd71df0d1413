"""Activation checkpointing: the same gradients from less memory."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from dstrain.runtime.activation_checkpointing import blocks_of, checkpoint_activations
from dstrain.runtime.models.gpt import GPT, next_token_loss
from dstrain.runtime.models.language import logits_of
from dstrain.runtime.models.recommender import Recommender
from dstrain.runtime.models.resnet import ResNet
from dstrain.runtime.spec.errors import UsageError
from dstrain.runtime.spec.model_config import GPTConfig

TOKENS = torch.randint(256, (2, 17), generator=torch.Generator().manual_seed(0))


def gpt() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(layers=5, width=32, heads=4, context=16))


def with_dropout(model: GPT) -> GPT:
    for block in model.blocks:
        assert isinstance(block.mlp, nn.Sequential)
        block.mlp.append(nn.Dropout(0.5))
    return model


def llama() -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 256}
    config = transformers.LlamaConfig(num_hidden_layers=3, attention_dropout=0.3, use_cache=False, **sizes)
    return transformers.LlamaForCausalLM(config).train()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=256, use_cache=False)
    ).train()


def gradients(model: nn.Module, forward: Callable[..., Any] | None = None) -> dict[str, Tensor]:
    torch.manual_seed(7)
    next_token_loss(logits_of((model if forward is None else forward)(TOKENS[:, :-1])), TOKENS).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ("all", ["blocks.0", "blocks.1", "blocks.2", "blocks.3", "blocks.4"]),
        (1, ["blocks.0", "blocks.1", "blocks.2", "blocks.3", "blocks.4"]),
        (2, ["blocks.1", "blocks.3"]),
        (("blocks.*",), ["blocks.0", "blocks.1", "blocks.2", "blocks.3", "blocks.4"]),
        (("*.mlp", "blocks.4"), ["blocks.0.mlp", "blocks.1.mlp", "blocks.2.mlp", "blocks.3.mlp", "blocks.4"]),
    ],
)
def test_gradients_keep_their_bits_and_parameters_their_names(
    spec: Literal["all"] | int | tuple[str, ...], names: list[str]
) -> None:
    expected = gradients(with_dropout(gpt()))
    model = with_dropout(gpt())
    assert checkpoint_activations(model, spec) == names
    found = gradients(model)
    assert list(found) == list(expected)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("make", [llama, gpt2])
def test_models_of_transformers(make: Any) -> None:
    expected = gradients(make())
    model = make()
    assert len(checkpoint_activations(model, "all")) == 3
    found = gradients(model)
    assert expected.keys() == found.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[nn.Module], Callable[..., Any]]]:
    """`torch.compile` with the backend that traces forward and backward, but leaves out the slow generation of code."""
    torch._dynamo.reset()
    yield lambda model: torch.compile(model, backend="aot_eager")
    torch._dynamo.reset()


@pytest.mark.parametrize("make", [lambda: with_dropout(gpt()), llama])
@pytest.mark.slow
def test_compiled_it_has_the_same_gradients_from_less_memory(
    make: Callable[[], nn.Module], compiled: Callable[[nn.Module], Callable[..., Any]]
) -> None:
    plain, model = make(), make()
    checkpoint_activations(model, "all")
    expected, found = gradients(plain, compiled(plain)), gradients(model, compiled(model))
    assert expected.keys() == found.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name
    assert not torch._dynamo.utils.counters["graph_break"]
    assert saved_bytes(model, compiled(model)) < saved_bytes(plain, compiled(plain)) / 3


def saved_bytes(model: nn.Module, forward: Callable[..., Any] | None = None) -> int:
    """Of the storages that the forward keeps for the backward, parameters excepted."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = logits_of((model if forward is None else forward)(TOKENS[:, :-1]))
    for parameter in model.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    assert output.requires_grad
    return sum(kept.values())


def test_less_is_kept_the_more_blocks_recompute() -> None:
    plain, some, every = gpt(), gpt(), gpt()
    checkpoint_activations(some, 2)
    checkpoint_activations(every, "all")
    of_plain, of_some, of_every = saved_bytes(plain), saved_bytes(some), saved_bytes(every)
    of_block = (of_plain - of_every) // 5
    assert of_block > 8 * 2 * 16 * 32 * 4, "attention and MLP keep more than 8 times the block's input"
    assert of_plain - of_some == 2 * of_block


def test_a_block_runs_twice_only_when_a_gradient_is_wanted() -> None:
    model, runs = gpt(), []
    checkpoint_activations(model, ("blocks.2",))
    model.blocks[2].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    model(TOKENS[:, :-1]).sum().backward()
    assert len(runs) == 2
    runs.clear()
    model.eval()
    with torch.no_grad():
        evaluated = model(TOKENS[:, :-1])
    assert len(runs) == 1
    assert torch.equal(evaluated, gpt()(TOKENS[:, :-1]))


def test_a_copy_of_the_model_computes_with_its_own_parameters() -> None:
    model = gpt()
    checkpoint_activations(model, "all")
    other = copy.deepcopy(model)
    for parameter in other.blocks.parameters():
        parameter.data.zero_()
    assert torch.equal(model(TOKENS[:, :-1]), gpt()(TOKENS[:, :-1]))
    assert not torch.equal(other(TOKENS[:, :-1]), model(TOKENS[:, :-1]))


def test_blocks_are_the_longest_list_and_others_of_its_class() -> None:
    assert blocks_of(ResNet(blocks_per_stage=2)) == [f"blocks.{i}" for i in range(6)]
    layer = nn.TransformerEncoderLayer(8, 2, batch_first=True)
    two = nn.ModuleDict(
        {name: nn.TransformerEncoder(layer, n, enable_nested_tensor=False) for name, n in [("a", 2), ("b", 3)]}
    )
    assert blocks_of(two) == ["a.layers.0", "a.layers.1", "b.layers.0", "b.layers.1", "b.layers.2"]
    assert blocks_of(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) == [], "single layers are no blocks"


@pytest.mark.parametrize(
    ("model", "spec", "line"),
    [
        (gpt(), ("layers.*",), "expected patterns of modules' names (token, blocks, blocks.0, blocks.1, blocks.2, "
         "blocks.3, blocks.4, norm, head), found 'layers.*'"),
        (gpt(), 6, "expected at most the 5 blocks of the model, found 6"),
        (Recommender(2, 2), "all", "expected a list of repeated blocks in the model, found none; give patterns of its "
         "modules' names: user, item, mlp, mlp.0, mlp.1, mlp.2"),
    ],
)  # fmt: skip
def test_nothing_that_matches(model: nn.Module, spec: Any, line: str) -> None:
    with pytest.raises(UsageError, match=re.escape(f"train.activation_checkpointing: {line}")):
        checkpoint_activations(model, spec)
