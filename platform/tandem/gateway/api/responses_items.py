"""The `input` of OpenAI's Responses API: a text or items, turned into chat messages.

Calls of functions that follow each other, or the assistant's text, are one assistant message. Reasoning of earlier
turns is left out: R1 must not see it again.
"""

from __future__ import annotations

from typing import Any

from tandem.gateway.api.params import text, wrong_type
from tandem.gateway.errors import bad_value, unsupported

_ROLES = ("user", "assistant", "system", "developer")
_TEXTS = ("input_text", "output_text", "text")
_STATELESS = "this server keeps no responses: send the item itself"


Placed = list[tuple[str, dict[str, Any]]]
"""(where it comes from, chat message)"""


def chat_messages(found: Any) -> Placed:
    """The chat messages of an `input`. Raises ApiError."""
    if isinstance(found, str):
        return [("input", {"role": "user", "content": found})]
    if not isinstance(found, list):
        raise wrong_type("input", "a string or an array of items", found)
    if not found:
        raise bad_value("input", "'input' must have at least one item.", "empty_array")
    messages: Placed = []
    for place, item in enumerate(found):
        _add(messages, f"input[{place}]", item)
    if not messages:
        raise bad_value("input", "'input' has nothing to answer: earlier reasoning is left out.")
    return messages


def _add(messages: Placed, where: str, item: Any) -> None:
    if not isinstance(item, dict):
        raise wrong_type(where, "an object", item)
    # A message may be written without its type; so may a reference, which has nothing but an id.
    kind = item.get("type")
    if kind is None:
        kind = "message" if "role" in item else "item_reference"
    if kind == "message":
        messages.append((where, _message(where, item)))
    elif kind == "function_call":
        _add_call(messages, where, item)
    elif kind == "function_call_output":
        content = _content(f"{where}.output", item.get("output"))
        call = _required(where, "call_id", item)
        messages.append((where, {"role": "tool", "tool_call_id": call, "content": content}))
    elif kind == "item_reference":
        raise unsupported(f"{where}.type", _STATELESS)
    elif kind != "reasoning":
        raise unsupported(f"{where}.type", f"items of type {kind!r:.60} are not known to this server")


def _message(where: str, item: dict[str, Any]) -> dict[str, Any]:
    role = item.get("role")
    if role not in _ROLES:
        allowed = ", ".join(f"'{name}'" for name in _ROLES)
        raise bad_value(f"{where}.role", f"'{where}.role' must be one of {allowed}.")
    return {"role": role, "content": _content(f"{where}.content", item.get("content"))}


def _add_call(messages: Placed, where: str, item: dict[str, Any]) -> None:
    function = {"name": _required(where, "name", item), "arguments": _required(where, "arguments", item)}
    call = {"id": _required(where, "call_id", item), "type": "function", "function": function}
    if not messages or messages[-1][1]["role"] != "assistant":
        messages.append((where, {"role": "assistant", "content": ""}))
    messages[-1][1].setdefault("tool_calls", []).append(call)


def _content(where: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    if content is None:
        raise bad_value(where, f"Missing required parameter: '{where}'.", "missing_required_parameter")
    if not isinstance(content, list):
        raise wrong_type(where, "a string or an array of parts", content)
    parts: list[str] = []
    for place, part in enumerate(content):
        at = f"{where}[{place}]"
        if not isinstance(part, dict):
            raise wrong_type(at, "an object", part)
        kind = part.get("type")
        if kind == "refusal":
            parts.append(text(f"{at}.refusal", part.get("refusal")))
        elif kind in _TEXTS:
            parts.append(text(f"{at}.text", part.get("text")))
        else:
            raise unsupported(f"{at}.type", f"this model reads text only, not {kind!r:.60}")
    return "".join(parts)


def _required(where: str, field: str, item: dict[str, Any]) -> str:
    value = item.get(field)
    if value is None:
        at = f"{where}.{field}"
        raise bad_value(at, f"Missing required parameter: '{at}'.", "missing_required_parameter")
    return text(f"{where}.{field}", value)
