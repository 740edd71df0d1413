"""Our GPT."""

from __future__ import annotations

import math

import pytest
import torch

from dstrain.runtime.models.gpt import GPT, next_token_loss, rotary, rotated
from dstrain.runtime.spec.config import GPTConfig

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
    texts = [model.generate(prompt, 30, 0.8, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert texts[0].shape == (32,)
    assert texts[0][:2].tolist() == [7, 8]
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])
