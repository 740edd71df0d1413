"""Our GPT."""

from __future__ import annotations

import math

import torch

from dstrain.runtime.models.gpt import GPT, next_token_loss
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


def test_an_untrained_model_knows_nothing() -> None:
    samples = torch.randint(256, (8, 17))
    loss = next_token_loss(gpt()(samples[:, :-1]), samples).item()
    assert abs(loss - math.log(256)) < 0.1


def test_head_and_embedding_are_one() -> None:
    model = gpt()
    block = 2 * 2 * 32 + 32 * 96 + 96 + 32 * 32 + 32 + 2 * 32 * 128 + 128 + 32
    assert sum(p.numel() for p in model.parameters()) == 256 * 32 + 16 * 32 + 2 * block + 2 * 32
    assert model.head.weight is model.token.weight


def test_generation_continues_the_prompt_beyond_the_context_and_repeats_with_its_seed() -> None:
    model = gpt()
    prompt = torch.tensor([7, 8])
    texts = [model.generate(prompt, 30, 0.8, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert texts[0].shape == (32,)
    assert texts[0][:2].tolist() == [7, 8]
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])
