"""Our GPT."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dstrain.runtime.models.build import build_model, context_of, vocabulary_of
from dstrain.runtime.models.gpt import GPT, next_token_loss, parameter_count, rotary, rotated
from dstrain.runtime.models.language import generate, logits_of
from dstrain.runtime.spec.errors import UsageError
from dstrain.runtime.spec.model_config import GPTConfig, ModelConfig

CONFIG = GPTConfig(layers=2, width=32, heads=4, context=16)


def gpt() -> GPT:
    torch.manual_seed(0)
    return GPT(CONFIG)


def test_a_token_sees_only_those_before_it() -> None:
    model = gpt()
    tokens = torch.randint(256, (2, 16))
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 256
    logits, others = model(tokens), model(changed)
    assert logits.shape == (2, 16, 256)
    torch.testing.assert_close(logits[:, :9], others[:, :9])
    assert not torch.allclose(logits[:, 9:], others[:, 9:])


def test_the_order_of_earlier_tokens_matters() -> None:
    """Attention alone sees a set: in one block, only positions tell the two apart."""
    model = GPT(CONFIG.model_copy(update={"layers": 1}))
    for name, parameter in model.named_parameters():
        if "query_key_value" in name:
            torch.nn.init.normal_(parameter)
    one, other = model(torch.tensor([[1, 2, 3]])), model(torch.tensor([[2, 1, 3]]))
    assert not torch.allclose(one[0, -1], other[0, -1], atol=1e-3)


def test_an_untrained_model_knows_nothing() -> None:
    samples = torch.randint(256, (8, 17))
    loss = next_token_loss(gpt()(samples[:, :-1]), samples).item()
    assert abs(loss - math.log(256)) < 0.1


def test_head_and_embedding_are_one() -> None:
    model = gpt()
    block = 2 * 2 * 32 + 32 * 96 + 96 + 32 * 32 + 32 + 2 * 32 * 128 + 128 + 32
    assert sum(p.numel() for p in model.parameters()) == 256 * 32 + 2 * block + 2 * 32
    assert model.head.weight is model.token.weight


def test_attention_depends_on_distances_not_on_positions() -> None:
    rotation = rotary(context=16, head_width=8)
    query, key = torch.randn(2, 8)

    def score(query_at: int, key_at: int) -> float:
        turned = rotated(query, rotation[:, query_at]), rotated(key, rotation[:, key_at])
        return float(turned[0] @ turned[1])

    assert score(7, 4) == pytest.approx(score(15, 12), abs=1e-5)
    assert score(7, 4) != pytest.approx(score(7, 5), abs=1e-3)
    assert score(3, 3) == pytest.approx(float(query @ key), abs=1e-5)


def test_generation_continues_the_prompt_beyond_the_context_and_repeats_with_its_seed() -> None:
    model = gpt()
    prompt = torch.tensor([7, 8])

    def text(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return generate(model, prompt, 30, temperature=0.8, generator=generator, context=model.context)

    texts = [text(seed) for seed in (1, 1, 2)]
    assert texts[0].shape == (32,)
    assert texts[0][:2].tolist() == [7, 8]
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


@pytest.mark.parametrize(
    ("size", "parameters"),
    [
        ("tiny", 1e6),
        ("mini", 10.7e6),
        ("124m", 124e6),
        ("350m", 350e6),
        ("760m", 760e6),
        ("1.3b", 1.3e9),
        ("2.7b", 2.7e9),
        ("6.7b", 6.7e9),
    ],
)
def test_a_size_has_the_parameters_of_its_name(size: str, parameters: float) -> None:
    config = GPTConfig.model_validate({"size": size})
    assert parameter_count(config) == pytest.approx(parameters, rel=0.035)


def test_counting_agrees_with_a_real_model_and_takes_no_memory() -> None:
    assert parameter_count(CONFIG) == sum(p.numel() for p in gpt().parameters())
    with torch.device("meta"):
        large = GPT(GPTConfig.model_validate({"size": "6.7b"}))
    assert {tensor.device.type for tensor in large.state_dict().values()} == {"meta"}
    assert large.rotation.is_meta
    assert large.to(torch.bfloat16)(torch.zeros(2, 2048, dtype=torch.int64, device="meta")).shape == (2, 2048, 50304)


def test_a_model_from_the_meta_device_is_the_same_as_one_made_here() -> None:
    with torch.device("meta"):
        model = GPT(CONFIG)
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), model.rotation):
        tensor.data.fill_(torch.nan)
    torch.manual_seed(0)
    model.initialise()
    assert model.head.weight is model.token.weight
    torch.testing.assert_close(model.state_dict(), gpt().state_dict(), rtol=0, atol=0)
    tokens = torch.randint(256, (2, 16))
    assert torch.equal(model(tokens), gpt()(tokens))


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_is_near_fp32(autocast: bool) -> None:
    tokens = torch.randint(256, (2, 16))
    exact = gpt()(tokens).detach()
    model = gpt() if autocast else gpt().to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(tokens)
    assert logits.dtype == torch.bfloat16
    # bf16 rounds to 2 ** -9 of a number; each of a dozen operations does so in turn: 2 ** -5 is 16 such errors
    torch.testing.assert_close(logits.float(), exact, rtol=0, atol=2**-5 * float(exact.abs().max()))


def test_logits_are_the_output_or_in_it() -> None:
    logits = torch.randn(1, 2, 3)
    assert logits_of(logits) is logits
    assert logits_of(SimpleNamespace(logits=logits)) is logits


def test_text_without_a_context_sees_everything() -> None:
    class Counting(nn.Module):
        """The next token is the number of tokens seen."""

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return 1e9 * nn.functional.one_hot(torch.full_like(tokens, tokens.shape[1]), 9).float()

    prompt, generator = torch.tensor([0, 0]), torch.Generator()
    assert generate(Counting(), prompt, 4, temperature=1, generator=generator).tolist() == [0, 0, 2, 3, 4, 5]
    assert generate(Counting(), prompt, 4, temperature=1, generator=generator, context=3).tolist() == [0, 0, 2, 3, 3, 3]


def test_the_section_model_makes_a_gpt_or_calls_a_factory() -> None:
    config = ModelConfig(gpt=CONFIG)
    torch.manual_seed(0)
    model = build_model(config)
    torch.testing.assert_close(model.state_dict(), gpt().state_dict(), rtol=0, atol=0)
    assert (vocabulary_of(model, config), context_of(model, config)) == (256, 16)
    config = ModelConfig(factory="torch.nn:Linear", args={"in_features": 3, "out_features": 2})
    model = build_model(config)
    assert isinstance(model, nn.Linear)
    assert model.weight.shape == (2, 3)
    assert (vocabulary_of(model, config), context_of(model, config)) == (None, None)
    with pytest.raises(
        UsageError,
        match=r"model\.factory: expected a function that returns an nn\.Module, or a list of layers, found dict",
    ):
        build_model(ModelConfig(factory="builtins:dict"))
