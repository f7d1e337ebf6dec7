"""What a stream with penalties says, reckoned apart from the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from support.oracle import Oracle

FAVOURED: dict[str, float] = {str(number): 6.0 for number in range(400, 408)}
"""A logit bias with which the tiny model says few tokens again and again: else it hardly ever repeats itself, and
penalties would change nothing."""
PENALTIES: list[dict[str, Any]] = [
    {"logit_bias": FAVOURED, **penalties}
    for penalties in (
        {"frequency_penalty": 1.5},
        {"presence_penalty": 1.0},
        {"repetition_penalty": 1.3},
        {"frequency_penalty": 0.7, "presence_penalty": 0.3, "repetition_penalty": 1.1},
    )
]


def penalized(
    oracle: Oracle,
    prompt: Sequence[int],
    tokens: int,
    *,
    frequency_penalty: float = 0,
    presence_penalty: float = 0,
    repetition_penalty: float = 1,
    logit_bias: Mapping[str, float] | None = None,
    stop_token_ids: Sequence[int] = (),
    min_new_tokens: int = 0,
) -> list[int]:
    """Greedy continuation by transformers, with SGLang's penalties over all output, and its order of things."""
    counts = torch.zeros(oracle.model.config.vocab_size)
    found: list[int] = []
    with torch.no_grad():
        for _ in range(tokens):
            logits = oracle.model(torch.tensor([[*prompt, *found]])).logits[0, -1].clone()
            said = counts > 0
            logits -= frequency_penalty * counts + presence_penalty * said
            scaled = torch.where(logits < 0, logits * repetition_penalty, logits / repetition_penalty)
            logits[said] = scaled[said]
            for token, bias in (logit_bias or {}).items():
                logits[int(token)] += bias
            if len(found) < min_new_tokens:
                logits[list(stop_token_ids)] = -torch.inf
            found.append(int(logits.argmax()))
            counts[found[-1]] += 1
            if found[-1] in stop_token_ids:
                break
    return found
