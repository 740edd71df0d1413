"""What all language models share, ours and those of transformers: logits and text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def logits_of(output: Any) -> Tensor:
    """The logits in what a model returned: the tensor itself, or `.logits` of a transformers output."""
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits


@torch.no_grad()
def generate(
    model: Callable[[Tensor], Any],
    prompt: Tensor,
    tokens: int,
    *,
    temperature: float,
    generator: torch.Generator,
    context: int | None = None,
) -> Tensor:
    """Continue `prompt`, (time,) int64 on the model's device, by `tokens` tokens. Both together, on the CPU.

    model: called with tokens (1, time). generator: draws the tokens, on the CPU. context: the most tokens that
    the model can see; None for any number. Whether dropout is on is the caller's `model.eval()`.
    """
    text = prompt.cpu()
    for _ in range(tokens):
        seen = text if context is None else text[-context:]
        logits = logits_of(model(seen.to(prompt.device).unsqueeze(0)))[0, -1]
        chances = torch.softmax(logits.float().cpu() / temperature, dim=-1)
        text = torch.cat([text, torch.multinomial(chances, 1, generator=generator)])
    return text
