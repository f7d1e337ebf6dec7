"""The messages of a chat, checked and brought into the form that chat templates read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tandem.gateway.api.params import boolean, object_of, text, wrong_type
from tandem.gateway.errors import ApiError, bad_value, unsupported

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})

_EVERY = frozenset({"role", "content", "name", "cache_control", "provider_specific_fields"})
_FIELDS = {
    "tool": _EVERY | {"tool_call_id"},
    "assistant": _EVERY
    | {
        *("tool_calls", "function_call", "prefix", "refusal", "annotations", "audio", "images"),
        *("reasoning_content", "reasoning", "reasoning_details", "thinking_blocks"),
    },
}
"""What SDKs send with a message. Old reasoning is among it: it is left out of the prompt, as DeepSeek asks for."""


def checked_messages(messages: Any) -> tuple[list[dict[str, Any]], bool]:
    """(messages for the template, whether the last is the beginning of the answer). Raises ApiError."""
    if messages is None:
        raise bad_value("messages", "Missing required parameter: 'messages'.", "missing_required_parameter")
    if not isinstance(messages, list):
        raise wrong_type("messages", "an array", messages)
    if not messages:
        raise bad_value("messages", "'messages' must have at least one message.", "empty_array")
    found = [_message(f"messages[{place}]", message) for place, message in enumerate(messages)]
    _check_tool_outputs(found)
    return found, _prefix(messages, found)


def _message(where: str, message: Any) -> dict[str, Any]:
    object_of(where, message)
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        allowed = ", ".join(f"'{name}'" for name in sorted(ROLES))
        raise bad_value(f"{where}.role", f"'{where}.role' must be one of {allowed}.")
    calls = message.get("tool_calls")
    if calls is not None and role != "assistant":
        raise bad_value(f"{where}.tool_calls", "Only messages of the assistant have 'tool_calls'.")
    for field in message:
        if field not in _FIELDS.get(role, _EVERY):
            param = f"{where}.{field:.80}"
            raise ApiError(400, f"Unknown parameter: '{param}'.", param=param, code="unknown_parameter")
    if message.get("function_call") is not None:
        raise unsupported(f"{where}.function_call", "use 'tool_calls'")
    if message.get("audio") is not None:
        raise unsupported(f"{where}.audio", "this model reads text only")
    known: dict[str, Any] = {"role": {"developer": "system", "function": "tool"}.get(role, role)}
    known["content"] = content_text(f"{where}.content", message.get("content"), optional=bool(calls))
    if calls:
        known["tool_calls"] = _tool_calls(f"{where}.tool_calls", calls)
    if role == "tool" and message.get("tool_call_id") is None:
        param = f"{where}.tool_call_id"
        raise bad_value(param, f"Missing required parameter: '{param}'.", "missing_required_parameter")
    for field in ("name", "tool_call_id"):
        if message.get(field) is not None:
            known[field] = text(f"{where}.{field}", message[field])
    return known


def content_text(where: str, content: Any, *, optional: bool = False) -> str | None:
    """The text of a message's content: a string, or parts that are all text. Raises ApiError."""
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
        object_of(f"{where}[{place}]", part)
        kind = part.get("type")
        if kind not in ("text", "refusal"):
            raise unsupported(f"{where}[{place}].type", f"this model reads text only, not {kind!r:.40}")
        parts.append(text(f"{where}[{place}].{kind}", part.get(kind)))
    return "".join(parts)


def _tool_calls(where: str, calls: Any) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise wrong_type(where, "an array", calls)
    for place, call in enumerate(calls):
        function = object_of(f"{where}[{place}].function", call.get("function") if isinstance(call, dict) else None)
        for field in ("name", "arguments"):
            text(f"{where}[{place}].function.{field}", function.get(field))
        for field in ("type", "id"):
            if call.get(field) is not None:
                text(f"{where}[{place}].{field}", call[field])
    return [{**call, "type": call.get("type") or "function"} for call in calls]


def _check_tool_outputs(messages: list[dict[str, Any]]) -> None:
    """A tool's output follows the call that it is of."""
    asked: set[str | None] | None = None
    for place, message in enumerate(messages):
        if message["role"] != "tool":
            calls = message.get("tool_calls")
            asked = {call.get("id") for call in calls} if calls else None
            continue
        where = f"messages[{place}]"
        if asked is None:
            why = "a message with role 'tool' must follow one of the assistant with 'tool_calls'"
            raise bad_value(f"{where}.role", f"'{where}' has no call before it: {why}.")
        number = message.get("tool_call_id")
        if number is not None and number not in asked and None not in asked:
            param = f"{where}.tool_call_id"
            raise bad_value(param, f"'{param}' is {number!r:.60}, which no call of the message before it has.")


def _prefix(given: list[Mapping[str, Any]], found: list[dict[str, Any]]) -> bool:
    """Whether the last message is to be continued. Its reasoning, too, is then part of the prompt."""
    for place, message in enumerate(given):
        if message.get("prefix") is None or not boolean(f"messages[{place}].prefix", message["prefix"]):
            continue
        if place != len(given) - 1:
            raise bad_value(f"messages[{place}].prefix", "Only the last message can have 'prefix': true.")
        if found[-1].get("tool_calls"):
            raise unsupported(f"messages[{place}].prefix", "a message with 'tool_calls' cannot be continued")
        reasoning = message.get("reasoning_content")
        if reasoning is not None:
            found[-1]["reasoning_content"] = text(f"messages[{place}].reasoning_content", reasoning)
        return True
    return False
