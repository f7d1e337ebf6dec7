"""OpenAI's Responses API in, as far as it needs no memory: a body of `POST /v1/responses` turned into a chat request.

Nothing is stored: whatever refers to an earlier response, or asks to keep this one, is refused. What the chat endpoint
checks (ranges, tool schemas, the model's name) is checked there, once, and told with the client's names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tandem.gateway.api.params import SAMPLING, Check, boolean, integer, object_of, text, wrong_type
from tandem.gateway.api.requests import MAX_LOGPROBS, Wanted, chat_request
from tandem.gateway.api.responses_items import chat_messages
from tandem.gateway.api.translate import Translated, renamed, wanted_fields
from tandem.gateway.errors import ApiError, bad_value, unsupported
from tandem.gateway.text.model_card import ModelCard

_PASSED = ("model", "stream", "tool_choice", "parallel_tool_calls", "user", "metadata", "safety_identifier",
           "prompt_cache_key", "service_tier", "priority")  # fmt: skip
"""Fields that the chat endpoint has under the same name (beside those that steer sampling)."""
_OWN = frozenset(
    {
        "input", "instructions", "max_output_tokens", "tools", "text", "reasoning", "include", "top_logprobs",
        "stream_options", "store", "truncation",
    }
)  # fmt: skip
"""Fields that are read here."""
_HARMLESS: dict[str, Check] = {
    "max_tool_calls": integer(1, 2**31 - 1),
    "prompt_cache_retention": text,
    "prompt_cache_options": object_of,
}
"""Accepted, and without effect: tools of OpenAI's own never run here, and the prefix cache is always on."""
_STATELESS = "this server keeps no responses: send the whole conversation in 'input'"
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "previous_response_id": ((), _STATELESS),
    "conversation": ((), _STATELESS),
    "background": ((False,), "this server keeps no responses: wait for the answer, or stream it"),
    "background_options": ((), "this server keeps no responses: wait for the answer, or stream it"),
    "prompt": ((), "this server keeps no prompts: send their text in 'input'"),
    "context_management": (([],), _STATELESS),
    "moderation": ((), ""),
    "access_programs": ((), ""),
    "image": ((), "this model reads text only"),
}
"""Field → the values (beside null) that ask for nothing, and why any other is refused."""
INCLUDABLE = (
    "message.output_text.logprobs", "reasoning.encrypted_content", "file_search_call.results",
    "web_search_call.results", "web_search_call.action.sources", "message.input_image.image_url",
    "computer_call_output.output.image_url", "code_interpreter_call.outputs",
)  # fmt: skip
"""What `include` may name. Only the logprobs exist here; of the others an answer has nothing to include."""
_TOOL_FIELDS = frozenset({"type", "name", "description", "parameters", "strict"})
_SUMMARIES = ("auto",)
"""Of the reasoning: it is told in full, so "as you see fit" is a summary of nothing."""


class ResponsesWanted(Wanted, frozen=True, kw_only=True):
    """A checked request of the Responses API."""

    asked: dict[str, Any]
    """What the response object repeats of the request."""


def responses_request(body: Mapping[str, Any], card: ModelCard) -> ResponsesWanted:
    """`POST /v1/responses`. Raises ApiError."""
    translated = translate(body)
    try:
        wanted = chat_request(translated.body, card)
    except ApiError as error:
        raise renamed(error, translated.names) from error
    return ResponsesWanted(**wanted_fields(wanted), asked=_asked(body))


def translate(body: Mapping[str, Any]) -> Translated:
    """The chat request that a Responses request is. Raises ApiError."""
    _check_fields(body)
    if body.get("input") is None:
        raise bad_value("input", "Missing required parameter: 'input'.", "missing_required_parameter")
    placed = chat_messages(body["input"])
    if body.get("instructions") is not None:
        system = {"role": "system", "content": text("instructions", body["instructions"])}
        placed = [("instructions", system), *placed]
    found: dict[str, Any] = {"messages": [message for _, message in placed]}
    names = {f"messages[{place}]": where for place, (where, _) in enumerate(placed)}
    names |= {"messages": "input", "max_completion_tokens": "max_output_tokens"}
    if body.get("max_output_tokens") is not None:
        found["max_completion_tokens"] = body["max_output_tokens"]
    for field in (*_PASSED, *SAMPLING):
        if body.get(field) is not None:
            found[field] = body[field]
    _tools(body, found, names)
    _text(body.get("text"), found, names)
    _reasoning(body.get("reasoning"), found, names)
    _logprobs(body, found)
    return Translated(found, names)


def _check_fields(body: Mapping[str, Any]) -> None:
    for field, value in body.items():
        if field in _REFUSED:
            harmless, why = _REFUSED[field]
            if value is not None and not any(type(value) is type(ok) and value == ok for ok in harmless):
                raise unsupported(field, why)
        elif field in _HARMLESS:
            if value is not None:
                _HARMLESS[field](field, value)
        elif field not in _OWN and field not in _PASSED and field not in SAMPLING:
            raise ApiError(400, f"Unknown parameter: '{field}'.", param=field, code="unknown_parameter")
    if body.get("store") is not None and boolean("store", body["store"]):
        raise unsupported("store", "this server keeps no responses; leave 'store' out or set it to false")
    if body.get("truncation") not in (None, "disabled"):
        raise unsupported("truncation", "only 'disabled' is: this server never drops a part of the input")
    options = body.get("stream_options")
    if options is not None:
        if not isinstance(options, dict):
            raise wrong_type("stream_options", "an object", options)
        for field, value in options.items():
            if field != "include_obfuscation":
                raise unsupported(f"stream_options.{field}")
            if value is not None:
                boolean("stream_options.include_obfuscation", value)


def _tools(body: Mapping[str, Any], found: dict[str, Any], names: dict[str, str]) -> None:
    tools = body.get("tools")
    if tools is not None:
        if not isinstance(tools, list):
            raise wrong_type("tools", "an array", tools)
        found["tools"] = [_tool(f"tools[{place}]", tool) for place, tool in enumerate(tools)]
        for place in range(len(tools)):
            names[f"tools[{place}].function"] = f"tools[{place}]"
    choice = body.get("tool_choice")
    if isinstance(choice, dict):
        if choice.get("type") != "function":
            raise unsupported("tool_choice.type", "only 'none', 'auto', 'required' and one function can be chosen")
        for field in choice:
            if field not in ("type", "name"):
                raise ApiError(
                    400,
                    f"Unknown parameter: 'tool_choice.{field}'.",
                    param=f"tool_choice.{field}",
                    code="unknown_parameter",
                )
        name = text("tool_choice.name", choice.get("name"))
        found["tool_choice"] = {"type": "function", "function": {"name": name}}
        names["tool_choice.function"] = "tool_choice"


def _tool(where: str, tool: Any) -> dict[str, Any]:
    if not isinstance(tool, dict):
        raise wrong_type(where, "an object", tool)
    kind = tool.get("type")
    if kind != "function":
        why = f"no tools run on this server, so only your own functions can be named, not {kind!r:.60}"
        raise unsupported(f"{where}.type", why)
    for field, value in tool.items():
        if field not in _TOOL_FIELDS and value not in (None, False):
            raise unsupported(f"{where}.{field}")
    function = {field: tool[field] for field in _TOOL_FIELDS - {"type"} if tool.get(field) is not None}
    return {"type": "function", "function": function}


def _text(config: Any, found: dict[str, Any], names: dict[str, str]) -> None:
    if config is None:
        return
    if not isinstance(config, dict):
        raise wrong_type("text", "an object", config)
    for field in config:
        if field not in ("format", "verbosity"):
            raise ApiError(400, f"Unknown parameter: 'text.{field}'.", param=f"text.{field}", code="unknown_parameter")
    # "medium" is what OpenAI does when nothing is said.
    if config.get("verbosity") not in (None, "medium"):
        raise unsupported("text.verbosity", "this model has no such setting")
    form = config.get("format")
    if form is None:
        return
    if not isinstance(form, dict):
        raise wrong_type("text.format", "an object", form)
    names["response_format"] = names["response_format.json_schema"] = "text.format"
    if form.get("type") == "json_schema":
        schema = {field: value for field, value in form.items() if field != "type" and value is not None}
        found["response_format"] = {"type": "json_schema", "json_schema": schema}
    else:
        found["response_format"] = form


def _reasoning(config: Any, found: dict[str, Any], names: dict[str, str]) -> None:
    if config is None:
        return
    if not isinstance(config, dict):
        raise wrong_type("reasoning", "an object", config)
    for field, value in config.items():
        if field == "effort":
            if value is not None:
                found["reasoning_effort"], names["reasoning_effort"] = value, "reasoning.effort"
        elif field in ("summary", "generate_summary"):
            if value is not None and value not in _SUMMARIES:
                why = "the reasoning is told in full, as 'reasoning_text'; leave the field out or set it to 'auto'"
                raise unsupported(f"reasoning.{field}", why)
        elif field in ("context", "mode"):
            if value not in (None, "auto", "current_turn", "standard"):
                raise unsupported(f"reasoning.{field}")
        else:
            raise ApiError(
                400, f"Unknown parameter: 'reasoning.{field}'.", param=f"reasoning.{field}", code="unknown_parameter"
            )


def _logprobs(body: Mapping[str, Any], found: dict[str, Any]) -> None:
    include = body.get("include")
    if include is not None:
        if not isinstance(include, list):
            raise wrong_type("include", "an array of strings", include)
        for place, name in enumerate(include):
            if name not in INCLUDABLE:
                allowed = ", ".join(f"'{one}'" for one in INCLUDABLE)
                raise bad_value(f"include[{place}]", f"'include[{place}]' must be one of {allowed}.")
        if INCLUDABLE[0] in include:
            found["logprobs"] = True
    if body.get("top_logprobs") is not None:
        most = integer(0, MAX_LOGPROBS)("top_logprobs", body["top_logprobs"])
        if found.get("logprobs"):
            found["top_logprobs"] = most
        elif most:
            raise bad_value("top_logprobs", f"'top_logprobs' needs '{INCLUDABLE[0]}' in 'include'.")


def _asked(body: Mapping[str, Any]) -> dict[str, Any]:
    """The request's side of the response object, with OpenAI's defaults."""
    form = (body.get("text") or {}).get("format") or {"type": "text"}
    reasoning = body.get("reasoning") or {}
    return {
        "background": False,
        "instructions": body.get("instructions"),
        "max_output_tokens": body.get("max_output_tokens"),
        "max_tool_calls": body.get("max_tool_calls"),
        "metadata": body.get("metadata") or {},
        "parallel_tool_calls": body.get("parallel_tool_calls") is not False,
        "previous_response_id": None,
        "prompt_cache_key": body.get("prompt_cache_key"),
        "reasoning": {"effort": reasoning.get("effort"), "summary": None},
        "safety_identifier": body.get("safety_identifier"),
        "service_tier": "default",
        "store": False,
        "temperature": body.get("temperature"),
        "text": {"format": form, "verbosity": "medium"},
        "tool_choice": body.get("tool_choice") or "auto",
        "tools": [{"strict": None, **tool} for tool in body.get("tools") or []],
        "top_logprobs": body.get("top_logprobs") or 0,
        "top_p": body.get("top_p"),
        "truncation": "disabled",
        "user": body.get("user"),
    }
