"""One choice of a reply: what its engine request says, and how its tokens are read."""

from __future__ import annotations

import secrets
from typing import Any

from tandem.gateway.api.grammar import Format, structural_tag
from tandem.gateway.api.requests import Wanted
from tandem.gateway.api.tools import Choice, ToolFormat, calls_grammar
from tandem.gateway.errors import ApiError, bad_value
from tandem.gateway.text.answer import Answer
from tandem.gateway.text.chat_template import TemplateRefusal
from tandem.gateway.text.detokenize import Vocabulary
from tandem.gateway.text.model_card import ModelError
from tandem.gateway.text.tokenize import ChatPrompt, Tokenizer

_STEP = 0x9E3779B97F4A7C15
"""Odd and without pattern: neighbouring seeds have no choice in common."""


def prompts_of(wanted: Wanted, tokenizer: Tokenizer) -> list[ChatPrompt]:
    """The request's prompts as token ids; choice i answers prompt i // n. Raises ApiError."""
    if wanted.messages is None:
        return [
            ChatPrompt(tokenizer.encode(prompt) if isinstance(prompt, str) else prompt, False)
            for prompt in wanted.prompts
        ]
    tools = wanted.tools if wanted.tool_choice.mode != "none" else None
    try:
        return [
            tokenizer.chat(wanted.messages, tools, thinking=wanted.thinking.enabled, prefix=wanted.prefix),
        ]
    except TemplateRefusal as error:
        raise bad_value("messages", f"The model's chat template refuses these messages: {error}") from error
    except ModelError as error:
        raise ApiError(400, f"This model cannot chat: {error}.", param="model", code="model_not_chat") from error


def sampling_for(wanted: Wanted, index: int, *, thinking: bool, limit: int, form: ToolFormat) -> dict[str, Any]:
    """SGLang's `sampling_params` of choice `index`, whose prompt ends in open reasoning if `thinking`.

    `limit`: tokens that the answer may have; `form`: how the model calls tools.
    """
    params = {**wanted.sampling, "max_new_tokens": limit}
    if "sampling_seed" in params:
        params["sampling_seed"] = _choice_seed(params["sampling_seed"], index % wanted.n)
    elif wanted.n > 1:
        # An engine that samples by seeds alone has a fixed one for requests without, and all choices would be alike.
        params["sampling_seed"] = secrets.randbits(63)
    tag = structural_tag(_content(wanted, form), thinking=thinking, budget=wanted.thinking.budget)
    if tag is not None:
        params["structural_tag"] = tag
    return params


def _choice_seed(seed: int, choice: int) -> int:
    """Choices of one prompt differ, and each is the same when the request is made again."""
    return seed if choice == 0 else (seed + choice * _STEP) % 2**63


def _content(wanted: Wanted, form: ToolFormat) -> Format | None:
    if not wanted.tools:
        return wanted.grammar
    choice, parallel = wanted.tool_choice, wanted.parallel_tool_calls
    if wanted.grammar is None or choice.mode == "none":
        return wanted.grammar or calls_grammar(wanted.tools, choice, form, parallel=parallel)
    # With "auto" the answer may be either.
    calls = calls_grammar(wanted.tools, Choice("required"), form, parallel=parallel)
    return {"type": "or", "elements": [wanted.grammar, calls]}


def answer_for(wanted: Wanted, vocabulary: Vocabulary, *, thinking: bool, form: ToolFormat) -> Answer:
    """The reader of one choice's tokens."""
    return Answer(
        vocabulary,
        stops=wanted.stops,
        chat=wanted.messages is not None,
        thinking=thinking,
        tools=form if wanted.tools and wanted.tool_choice.mode != "none" else None,
        parallel=wanted.parallel_tool_calls and wanted.tool_choice.mode != "function",
        special_tokens=wanted.special_tokens,
        include_stop=wanted.include_stop,
    )
