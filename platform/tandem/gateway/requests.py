"""Request bodies, checked once at the edge: JSON in, `Wanted` out, or an ApiError that names the field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from tandem.gateway.errors import ApiError, bad_value, unsupported
from tandem.gateway.model_card import PROMPT_RESERVE, ModelCard
from tandem.gateway.params import boolean, check_fields, integer, sampling_params, stop_strings, text, wrong_type

CHAT_DEFAULT_TOKENS = 32_768
"""Tokens of a chat answer when the request says nothing, as DeepSeek's API has it for R1 (reasoning included)."""
COMPLETION_DEFAULT_TOKENS = 16
"""The same for /v1/completions, as OpenAI's API has it."""

ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
_COMMON = {"model", "stream", "stream_options", "max_tokens", "stop", "return_token_ids"}
_CHAT = _COMMON | {"messages", "max_completion_tokens"}
_COMPLETION = _COMMON | {"prompt"}


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What a request asks for, checked. Exactly one of `messages`, `text` and `ids` is the prompt."""

    model: str
    stream: bool
    include_usage: bool
    return_token_ids: bool
    """Our extension, as vLLM has it: token ids beside the text."""
    max_tokens: int | None
    default_tokens: int
    stops: tuple[str, ...]
    sampling: dict[str, Any]
    messages: list[dict[str, Any]] | None = None
    text: str | None = None
    ids: list[int] | None = None


def parse_json(body: bytes) -> dict[str, Any]:
    """The JSON object of a request; raises ApiError."""
    try:
        found = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, f"We could not parse the JSON body of your request: {error}") from error
    if not isinstance(found, dict):
        raise ApiError(400, "The body of the request must be a JSON object.")
    return found


def chat_request(body: Mapping[str, Any], card: ModelCard) -> Wanted:
    """`POST /v1/chat/completions`. Raises ApiError."""
    _check_model(body, card)
    check_fields(body, _CHAT)
    limit = body.get("max_completion_tokens")
    field = "max_completion_tokens"
    if limit is None:
        limit, field = body.get("max_tokens"), "max_tokens"
    return _wanted(
        body, card, limit=limit, field=field, default=CHAT_DEFAULT_TOKENS, messages=_messages(body.get("messages"))
    )


def completion_request(body: Mapping[str, Any], card: ModelCard) -> Wanted:
    """`POST /v1/completions`. Raises ApiError."""
    _check_model(body, card)
    check_fields(body, _COMPLETION)
    prompt, ids = _prompt(body.get("prompt"), card)
    return _wanted(
        body,
        card,
        limit=body.get("max_tokens"),
        field="max_tokens",
        default=COMPLETION_DEFAULT_TOKENS,
        text=prompt,
        ids=ids,
    )


def check_length(wanted: Wanted, prompt_tokens: int, card: ModelCard) -> int:
    """How many tokens the answer may have; raises ApiError when prompt and answer do not fit."""
    param = "messages" if wanted.messages is not None else "prompt"
    if prompt_tokens == 0:
        raise bad_value(param, f"'{param}' is empty: there is nothing to continue.", "empty_prompt")
    asked = wanted.max_tokens or 0
    if prompt_tokens > card.context - PROMPT_RESERVE or prompt_tokens + asked > card.context:
        answer = f" and {asked} in the answer" if asked else ""
        message = (
            f"This model's maximum context length is {card.context} tokens. However, your request has {prompt_tokens} "
            f"tokens in the {param}{answer}. Please shorten one or the other."
        )
        raise ApiError(400, message, param=param, code="context_length_exceeded")
    return wanted.max_tokens or min(wanted.default_tokens, card.context - prompt_tokens)


def _check_model(body: Mapping[str, Any], card: ModelCard) -> None:
    name = body.get("model")
    if name is None:
        raise bad_value("model", "Missing required parameter: 'model'.", "missing_required_parameter")
    if text("model", name) != card.name:
        raise model_not_found(name)


def model_not_found(name: str) -> ApiError:
    message = f"The model `{name}` does not exist or you do not have access to it."
    return ApiError(404, message, param="model", code="model_not_found")


def _wanted(
    body: Mapping[str, Any],
    card: ModelCard,
    *,
    limit: Any,
    field: str,
    default: int,
    messages: list[dict[str, Any]] | None = None,
    text: str | None = None,
    ids: list[int] | None = None,
) -> Wanted:
    stream = _flag(body, "stream")
    options = body.get("stream_options")
    include_usage = False
    if options is not None:
        if not isinstance(options, dict):
            raise wrong_type("stream_options", "an object", options)
        if not stream:
            raise bad_value("stream_options", "'stream_options' is only allowed when 'stream' is true.")
        for key in options:
            if key not in ("include_usage", "include_obfuscation"):
                raise unsupported(f"stream_options.{key}")
        include_usage = _flag(options, "include_usage", "stream_options.include_usage")
    stop = body.get("stop")
    return Wanted(
        model=card.name,
        stream=stream,
        include_usage=include_usage,
        return_token_ids=_flag(body, "return_token_ids"),
        max_tokens=None if limit is None else integer(1, 2**31 - 1)(field, limit),
        default_tokens=default,
        stops=() if stop is None else stop_strings("stop", stop),
        sampling=sampling_params(body, card.sampling),
        messages=messages,
        text=text,
        ids=ids,
    )


def _flag(body: Mapping[str, Any], field: str, name: str | None = None) -> bool:
    value = body.get(field)
    return False if value is None else boolean(name or field, value)


def _prompt(prompt: Any, card: ModelCard) -> tuple[str | None, list[int] | None]:
    if prompt is None:
        raise bad_value("prompt", "Missing required parameter: 'prompt'.", "missing_required_parameter")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return prompt, None
    if not isinstance(prompt, list):
        raise wrong_type("prompt", "a string or an array of token ids", prompt)
    if prompt and all(isinstance(part, str | list) for part in prompt):
        raise unsupported("prompt", "a list of several prompts; send one request for each")
    if not all(type(token) is int for token in prompt):
        raise wrong_type("prompt", "a string or an array of token ids", prompt)
    if prompt and not 0 <= min(prompt) <= max(prompt) < card.vocab_size:
        raise bad_value("prompt", f"'prompt' has token ids outside 0 … {card.vocab_size - 1}.")
    return None, prompt


def _messages(messages: Any) -> list[dict[str, Any]]:
    if messages is None:
        raise bad_value("messages", "Missing required parameter: 'messages'.", "missing_required_parameter")
    if not isinstance(messages, list):
        raise wrong_type("messages", "an array", messages)
    if not messages:
        raise bad_value("messages", "'messages' must have at least one message.", "empty_array")
    return [_message(f"messages[{place}]", message) for place, message in enumerate(messages)]


def _message(where: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise wrong_type(where, "an object", message)
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        allowed = ", ".join(f"'{name}'" for name in sorted(ROLES))
        raise bad_value(f"{where}.role", f"'{where}.role' must be one of {allowed}.")
    calls = message.get("tool_calls")
    if calls is not None and role != "assistant":
        raise bad_value(f"{where}.tool_calls", "Only messages of the assistant have 'tool_calls'.")
    # Old reasoning (`reasoning_content`) is left out, as DeepSeek asks for.
    known: dict[str, Any] = {"role": "system" if role == "developer" else role}
    known["content"] = _content(f"{where}.content", message.get("content"), optional=bool(calls))
    if calls:
        known["tool_calls"] = _tool_calls(f"{where}.tool_calls", calls)
    for field in ("name", "tool_call_id"):
        if message.get(field) is not None:
            known[field] = text(f"{where}.{field}", message[field])
    return known


def _content(where: str, content: Any, *, optional: bool) -> str | None:
    if isinstance(content, str):
        return content
    if content is None:
        if optional:
            return None
        raise bad_value(where, f"Missing required parameter: '{where}'.", "missing_required_parameter")
    if not isinstance(content, list):
        raise wrong_type(where, "a string or an array of parts", content)
    parts: list[str] = []
    for place, part in enumerate(content):
        if not isinstance(part, dict):
            raise wrong_type(f"{where}[{place}]", "an object", part)
        if part.get("type") != "text":
            raise unsupported(f"{where}[{place}].type", f"this model reads text only, not {part.get('type')!r}")
        parts.append(text(f"{where}[{place}].text", part.get("text")))
    return "".join(parts)


def _tool_calls(where: str, calls: Any) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise wrong_type(where, "an array", calls)
    for place, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise wrong_type(f"{where}[{place}].function", "an object", function)
        for field in ("name", "arguments"):
            text(f"{where}[{place}].function.{field}", function.get(field))
        for field in ("type", "id"):
            if call.get(field) is not None:
                text(f"{where}[{place}].{field}", call[field])
    return [{**call, "type": call.get("type") or "function"} for call in calls]
