"""Anthropic's Messages API in: a body of `POST /v1/messages`, checked and turned into a chat request.

Fields are named in errors as Anthropic names them (`messages.0.content.1.type`), and an unknown one is refused in its
words. What the chat endpoint checks (ranges, tool schemas, the model's name) is checked there, once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import msgspec

from tandem.gateway.api.anthropic_blocks import chat_messages, check_cache, extra, fault, system_messages, text_of
from tandem.gateway.api.choices import prompts_of
from tandem.gateway.api.requests import Wanted, chat_request
from tandem.gateway.api.translate import Translated, renamed, wanted_fields
from tandem.gateway.errors import ApiError
from tandem.gateway.text.model_card import ModelCard
from tandem.gateway.text.tokenize import Tokenizer

_SAMPLING = ("temperature", "top_p", "top_k")
_COUNTED = frozenset(
    {
        "model", "messages", "system", "tools", "tool_choice", "thinking", "output_config", "cache_control",
        "user_profile_id", "workspace_id", "speed",
    }
)  # fmt: skip
"""Fields of `POST /v1/messages/count_tokens`."""
_FIELDS = _COUNTED | {
    "max_tokens", "stop_sequences", "stream", "metadata", "service_tier", "inference_geo", "container",
    "diagnostics", *_SAMPLING,
}  # fmt: skip
_REFUSED: dict[str, tuple[Any, ...]] = {
    "container": (),
    "diagnostics": (),
    "inference_geo": ("not_available",),
    "speed": ("standard",),
}
"""Known, but not here: field → the values (beside null) that ask for nothing."""
_TIERS = {"auto": "auto", "standard_only": "default"}
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_THINKING_FIELDS = frozenset({("budget_tokens", "enabled"), ("display", "enabled"), ("display", "adaptive")})
_DISPLAYS = (None, "summarized", "omitted")
_TOOL_FIELDS = frozenset(
    {
        "type", "name", "description", "input_schema", "cache_control", "strict", "eager_input_streaming",
        "input_examples", "defer_loading", "allowed_callers",
    }
)  # fmt: skip


class MessagesWanted(Wanted, frozen=True, kw_only=True):
    """A checked request of the Messages API."""

    thinking_shown: bool = True
    """The reasoning is told; else its block is empty (`thinking.display` is "omitted")."""


def messages_request(body: Mapping[str, Any], card: ModelCard) -> MessagesWanted:
    """`POST /v1/messages`. Raises ApiError, with Anthropic's names of fields."""
    _check_fields(body, _FIELDS)
    if body.get("max_tokens") is None:
        raise fault("max_tokens", "Field required")
    return _wanted(body, card)


def count_tokens(body: Mapping[str, Any], card: ModelCard, tokenizer: Tokenizer) -> bytes:
    """`POST /v1/messages/count_tokens`: the tokens that the same request would send to the model. Raises ApiError."""
    _check_fields(body, _COUNTED)
    prompts = prompts_of(_wanted(body, card), tokenizer)
    return msgspec.json.encode({"input_tokens": len(prompts[0].ids)})


def translate(body: Mapping[str, Any]) -> Translated:
    """The chat request that a Messages request is. Raises ApiError."""
    if body.get("messages") is None:
        raise fault("messages", "Field required")
    placed = [("system", message) for message in system_messages(body.get("system"))]
    placed += chat_messages(body["messages"])
    found: dict[str, Any] = {"messages": [message for _, message in placed]}
    names = {f"messages[{place}]": where for place, (where, _) in enumerate(placed)}
    for field in ("model", "max_tokens", "stream", *_SAMPLING):
        if body.get(field) is not None:
            found[field] = body[field]
    if found.get("top_k") == -1:
        raise fault("top_k", "Input should be greater than or equal to 0")
    if body.get("stop_sequences") is not None:
        if not isinstance(body["stop_sequences"], list):
            raise fault("stop_sequences", "Input should be a valid list")
        if body["stop_sequences"]:
            found["stop"], names["stop"] = body["stop_sequences"], "stop_sequences"
    _tools(body, found, names)
    _thinking(body, found, names)
    _output(body.get("output_config"), found, names)
    _labels(body, found, names)
    return Translated(found, names)


def _wanted(body: Mapping[str, Any], card: ModelCard) -> MessagesWanted:
    translated = translate(body)
    try:
        wanted = chat_request(translated.body, card)
    except ApiError as error:
        raise renamed(error, translated.names) from error
    thinking = body.get("thinking")
    shown = thinking is None or thinking.get("display") != "omitted"
    # The stop string that was found is told, so the writer must see it; it takes it out of the text.
    fields = {**wanted_fields(wanted), "include_stop": True}
    return MessagesWanted(**fields, thinking_shown=shown)


def _check_fields(body: Mapping[str, Any], known: Collection[str]) -> None:
    for field, value in body.items():
        if field not in known:
            raise extra(field)
        if field in _REFUSED and value is not None and value not in _REFUSED[field]:
            raise fault(field, "this server does not support it; leave it out", "unsupported_parameter")
    check_cache("", body)
    for field in ("user_profile_id", "workspace_id"):
        if body.get(field) is not None:
            text_of(field, body[field])


def _tools(body: Mapping[str, Any], found: dict[str, Any], names: dict[str, str]) -> None:
    tools = body.get("tools")
    if tools is not None:
        if not isinstance(tools, list):
            raise fault("tools", "Input should be a valid list")
        found["tools"] = [_tool(f"tools.{place}", tool) for place, tool in enumerate(tools)]
        for place in range(len(tools)):
            names[f"tools[{place}]"] = names[f"tools[{place}].function"] = f"tools.{place}"
            names[f"tools[{place}].function.parameters"] = f"tools.{place}.input_schema"
    choice = body.get("tool_choice")
    if choice is None:
        return
    if not isinstance(choice, dict):
        raise fault("tool_choice", "Input should be a valid dictionary")
    kind = choice.get("type")
    for field in choice:
        if field not in ("type", "disable_parallel_tool_use") and not (field == "name" and kind == "tool"):
            raise extra(f"tool_choice.{field}")
    if kind == "tool":
        name = text_of("tool_choice.name", choice.get("name"))
        found["tool_choice"] = {"type": "function", "function": {"name": name}}
    elif isinstance(kind, str) and kind in _CHOICES:
        found["tool_choice"] = _CHOICES[kind]
    else:
        raise fault("tool_choice.type", "Input should be 'auto', 'any', 'tool' or 'none'")
    names["tool_choice.function.name"] = "tool_choice.name"
    alone = choice.get("disable_parallel_tool_use")
    if alone is not None:
        if not isinstance(alone, bool):
            raise fault("tool_choice.disable_parallel_tool_use", "Input should be a valid boolean")
        found["parallel_tool_calls"] = not alone
        names["parallel_tool_calls"] = "tool_choice.disable_parallel_tool_use"


def _tool(where: str, tool: Any) -> dict[str, Any]:
    if not isinstance(tool, dict):
        raise fault(where, "Input should be a valid dictionary")
    kind = tool.get("type")
    if kind not in (None, "custom"):
        why = f"tools that run on the server are not supported, only your own (type 'custom'), not {kind!r:.60}"
        raise fault(f"{where}.type", why, "unsupported_parameter")
    for field, value in tool.items():
        if field not in _TOOL_FIELDS:
            raise extra(f"{where}.{field}")
        if (field == "defer_loading" and value) or (field == "allowed_callers" and value not in (None, ["direct"])):
            raise fault(f"{where}.{field}", "this server does not support it; leave it out", "unsupported_parameter")
    check_cache(f"{where}.", tool)
    function: dict[str, Any] = {"name": text_of(f"{where}.name", tool.get("name"))}
    schema = tool.get("input_schema")
    if schema is None:
        raise fault(f"{where}.input_schema", "Field required")
    if not isinstance(schema, dict):
        raise fault(f"{where}.input_schema", "Input should be a valid dictionary")
    if tool.get("description") is not None:
        function["description"] = text_of(f"{where}.description", tool["description"])
    function["parameters"] = schema
    if tool.get("strict") is not None:
        function["strict"] = tool["strict"]
    return {"type": "function", "function": function}


def _thinking(body: Mapping[str, Any], found: dict[str, Any], names: dict[str, str]) -> None:
    thinking = body.get("thinking")
    if thinking is None:
        return
    if not isinstance(thinking, dict):
        raise fault("thinking", "Input should be a valid dictionary")
    kind = thinking.get("type")
    if kind not in ("enabled", "disabled", "adaptive"):
        raise fault("thinking.type", "Input should be 'enabled', 'disabled' or 'adaptive'")
    for field in thinking:
        if field != "type" and (field, kind) not in _THINKING_FIELDS:
            raise extra(f"thinking.{kind}.{field}")
    if thinking.get("display") not in _DISPLAYS:
        raise fault(f"thinking.{kind}.display", "Input should be 'summarized' or 'omitted'")
    found["thinking"] = {"type": kind}
    if kind != "enabled":
        return
    where = "thinking.enabled.budget_tokens"
    budget, limit = thinking.get("budget_tokens"), body.get("max_tokens")
    if budget is None:
        raise fault(where, "Field required")
    found["thinking"]["budget_tokens"], names["thinking.budget_tokens"] = budget, where
    if type(limit) is int and type(budget) is int and budget >= limit:
        raise fault("max_tokens", "`max_tokens` must be greater than `thinking.budget_tokens`")


def _output(config: Any, found: dict[str, Any], names: dict[str, str]) -> None:
    if config is None:
        return
    if not isinstance(config, dict):
        raise fault("output_config", "Input should be a valid dictionary")
    for field in config:
        if field not in ("effort", "format"):
            raise extra(f"output_config.{field}")
    if config.get("effort") is not None:
        found["reasoning_effort"], names["reasoning_effort"] = config["effort"], "output_config.effort"
    form = config.get("format")
    if form is None:
        return
    if not isinstance(form, dict) or form.get("type") != "json_schema":
        raise fault("output_config.format.type", "Input should be 'json_schema'")
    for field in form:
        if field not in ("type", "schema"):
            raise extra(f"output_config.format.{field}")
    if not isinstance(form.get("schema"), dict):
        raise fault("output_config.format.schema", "Input should be a valid dictionary")
    schema = {"name": "output", "schema": form["schema"], "strict": True}
    found["response_format"] = {"type": "json_schema", "json_schema": schema}
    names["response_format"] = "output_config.format"
    names["response_format.json_schema"] = "output_config.format"


def _labels(body: Mapping[str, Any], found: dict[str, Any], names: dict[str, str]) -> None:
    metadata = body.get("metadata")
    if metadata is not None:
        if not isinstance(metadata, dict):
            raise fault("metadata", "Input should be a valid dictionary")
        for field in metadata:
            if field != "user_id":
                raise extra(f"metadata.{field}")
        if metadata.get("user_id") is not None:
            found["user"], names["user"] = metadata["user_id"], "metadata.user_id"
    tier = body.get("service_tier")
    if tier is not None:
        if not isinstance(tier, str) or tier not in _TIERS:
            raise fault("service_tier", "Input should be 'auto' or 'standard_only'")
        found["service_tier"] = _TIERS[tier]
