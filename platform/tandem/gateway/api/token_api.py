"""`/tokenize` and `/detokenize`, in vLLM's shapes: what the model sees of a text, and the text of token ids.

Both are exact: tokens of a conversation are those that `/v1/chat/completions` sends, tokens of a text those that
`/v1/completions` does (or without the special tokens around them), and special tokens are part of the text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from tandem.gateway.api.choices import prompts_of
from tandem.gateway.api.params import boolean, text, wrong_type
from tandem.gateway.api.requests import chat_request, model_not_found
from tandem.gateway.errors import ApiError, bad_value, unsupported
from tandem.gateway.text.model_card import ModelCard
from tandem.gateway.text.tokenize import Tokenizer

_TOKENIZE = frozenset({"model", "prompt", "add_special_tokens", "return_token_strs"})
_CHAT = frozenset(
    {"model", "messages", "tools", "add_special_tokens", "return_token_strs", "add_generation_prompt",
     "continue_final_message"}
)  # fmt: skip
_DETOKENIZE = frozenset({"model", "tokens"})
MAX_TOKENS = 1 << 20
"""Token ids that one `/detokenize` may have: beyond any context, and well under a second's work."""


def tokenize(body: Mapping[str, Any], card: ModelCard, tokenizer: Tokenizer) -> bytes:
    """`POST /tokenize`: the answer's body. Raises ApiError."""
    # A known field that is null is the same as one that is left out.
    body = {field: value for field, value in body.items() if value is not None or field not in _TOKENIZE | _CHAT}
    if ("messages" in body) == ("prompt" in body):
        raise bad_value("prompt", "Give either 'prompt' or 'messages'.", "missing_required_parameter")
    ids = _chat(body, card, tokenizer) if "messages" in body else _text(body, card, tokenizer)
    strings = _flag(body, "return_token_strs", False)
    found: dict[str, Any] = {
        "count": len(ids),
        "max_model_len": card.context,
        "tokens": ids,
        "token_strs": [tokenizer.inner.id_to_token(token) or "" for token in ids] if strings else None,
    }
    return msgspec.json.encode(found)


def detokenize(body: Mapping[str, Any], card: ModelCard, tokenizer: Tokenizer) -> bytes:
    """`POST /detokenize`: the answer's body. Raises ApiError."""
    _check(body, _DETOKENIZE, card)
    tokens = body.get("tokens")
    if tokens is None:
        raise bad_value("tokens", "Missing required parameter: 'tokens'.", "missing_required_parameter")
    if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
        raise wrong_type("tokens", "an array of token ids", tokens)
    if len(tokens) > MAX_TOKENS:
        raise bad_value(
            "tokens", f"'tokens' has {len(tokens)} ids; the most is {MAX_TOKENS}.", "array_above_max_length"
        )
    if tokens and not 0 <= min(tokens) <= max(tokens) < card.vocab_size:
        raise bad_value("tokens", f"'tokens' has token ids outside 0 … {card.vocab_size - 1}.")
    return msgspec.json.encode({"prompt": tokenizer.inner.decode(tokens, skip_special_tokens=False)})


def _text(body: Mapping[str, Any], card: ModelCard, tokenizer: Tokenizer) -> list[int]:
    _check(body, _TOKENIZE, card)
    prompt = text("prompt", body["prompt"])
    if _flag(body, "add_special_tokens", True):
        return tokenizer.encode(prompt)
    ids: list[int] = tokenizer.inner.encode_batch_fast([prompt], add_special_tokens=False)[0].ids
    return ids


def _chat(body: Mapping[str, Any], card: ModelCard, tokenizer: Tokenizer) -> list[int]:
    _check(body, _CHAT, card)
    # The template writes what the model needs, and opens the answer: anything else is another prompt.
    for field, only in (
        ("add_special_tokens", False),
        ("add_generation_prompt", True),
        ("continue_final_message", False),
    ):
        if _flag(body, field, only) is not only:
            raise unsupported(field, f"a conversation is tokenized as it is answered, with {str(only).lower()} here")
    chat = {"model": card.name, "messages": body["messages"]}
    if body.get("tools") is not None:
        chat["tools"] = body["tools"]
    return prompts_of(chat_request(chat, card), tokenizer)[0].ids


def _check(body: Mapping[str, Any], known: frozenset[str], card: ModelCard) -> None:
    for field in body:
        if field not in known:
            raise ApiError(400, f"Unknown parameter: '{field}'.", param=field, code="unknown_parameter")
    name = body.get("model")
    if name is not None and text("model", name) != card.name:
        raise model_not_found(name)


def _flag(body: Mapping[str, Any], field: str, default: bool) -> bool:
    value = body.get(field)
    return default if value is None else boolean(field, value)
