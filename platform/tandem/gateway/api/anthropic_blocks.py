"""The messages of Anthropic's Messages API: turns made of blocks, turned into chat messages.

A user's turn that holds results of tools becomes `tool` messages and then, for its text, a `user` message.
Earlier thinking is left out: R1 must not see it again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from tandem.gateway.errors import ApiError, bad_value

_BLOCK_FIELDS = {
    "text": frozenset({"type", "text", "cache_control", "citations"}),
    "tool_use": frozenset({"type", "id", "name", "input", "cache_control", "caller", "toolset_name"}),
    "tool_result": frozenset({"type", "tool_use_id", "content", "is_error", "cache_control", "toolset_name"}),
    "thinking": frozenset({"type", "thinking", "signature"}),
    "redacted_thinking": frozenset({"type", "data"}),
}
_ALLOWED = {
    "user": ("text", "tool_result"),
    "assistant": ("text", "tool_use", "thinking", "redacted_thinking"),
    "system": ("text",),
}
_SEEN = frozenset({"image", "document", "search_result", "container_upload"})
TOOL_FAILED = "The tool failed: "
"""Before the content of a tool's result with `is_error`, so that the model knows."""


def fault(where: str, what: str, code: str = "invalid_value") -> ApiError:
    """400 for the field at `where`; `what` is wrong, in Anthropic's words where it has some."""
    return bad_value(where, what, code)


def extra(where: str) -> ApiError:
    """A field that does not exist, as Anthropic says it."""
    return fault(where, "Extra inputs are not permitted", "unknown_parameter")


def text_of(where: str, value: Any) -> str:
    if value is None:
        raise fault(where, "Field required")
    if not isinstance(value, str):
        raise fault(where, "Input should be a valid string")
    return value


def check_cache(where: str, found: Mapping[str, Any]) -> None:
    """`cache_control` is accepted: the prefix cache is always on. `where` ends in a dot, or is empty."""
    value = found.get("cache_control")
    if value is not None and not isinstance(value, dict):
        raise fault(f"{where}cache_control", "Input should be a valid dictionary")


def system_messages(system: Any) -> list[dict[str, Any]]:
    """The chat message for `system`: a text or text blocks. Raises ApiError."""
    if system is None:
        return []
    if isinstance(system, str):
        return [{"role": "system", "content": system}]
    if not isinstance(system, list):
        raise fault("system", "Input should be a valid string or list of text blocks")
    parts = [_text_block(f"system.{place}", block) for place, block in enumerate(system)]
    return [{"role": "system", "content": "\n\n".join(parts)}] if parts else []


def chat_messages(messages: Any) -> list[tuple[str, dict[str, Any]]]:
    """(where it comes from, chat message) for a conversation. Raises ApiError."""
    if not isinstance(messages, list):
        raise fault("messages", "Input should be a valid list")
    if not messages:
        raise fault("messages", "at least one message is required")
    found: list[tuple[str, dict[str, Any]]] = []
    role: Any = ""
    for place, message in enumerate(messages):
        where = f"messages.{place}"
        if not isinstance(message, dict):
            raise fault(where, "Input should be a valid dictionary")
        for field in message:
            if field not in ("role", "content"):
                raise extra(f"{where}.{field}")
        role = message.get("role")
        if not isinstance(role, str) or role not in _ALLOWED:
            raise fault(f"{where}.role", "Input should be 'user', 'assistant' or 'system'")
        found += [(where, made) for made in _turn(role, f"{where}.content", message.get("content"))]
    if role == "assistant":
        why = "This model does not support assistant message prefill. The conversation must end with a user message."
        raise fault("messages", why)
    return found


def _turn(role: str, where: str, content: Any) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if content is None:
        raise fault(where, "Field required")
    if not isinstance(content, list):
        raise fault(where, "Input should be a valid string or list of blocks")
    texts: list[str] = []
    calls: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for place, block in enumerate(content):
        at = f"{where}.{place}"
        kind = _kind(at, block, _ALLOWED[role])
        if kind == "text":
            texts.append(text_of(f"{at}.text", block.get("text")))
        elif kind == "tool_use":
            calls.append(_call(at, block))
        elif kind == "tool_result":
            results.append(_result(at, block))
    if results and not texts:
        return results
    message: dict[str, Any] = {"role": role, "content": "".join(texts)}
    if calls:
        message["tool_calls"] = calls
    return [*results, message]


def _kind(where: str, block: Any, allowed: tuple[str, ...]) -> str:
    """The type of a block, when it may stand here and has no field that it cannot have."""
    if not isinstance(block, dict):
        raise fault(where, "Input should be a valid dictionary")
    kind = block.get("type")
    if isinstance(kind, str) and kind in _SEEN:
        raise fault(
            f"{where}.type", f"this model reads text only, not blocks of type '{kind}'", "unsupported_parameter"
        )
    if not isinstance(kind, str) or kind not in allowed:
        names = ", ".join(f"'{name}'" for name in allowed)
        raise fault(f"{where}.type", f"Input tag {kind!r:.60} found here; expected one of {names}")
    for field in block:
        if field not in _BLOCK_FIELDS[kind]:
            raise extra(f"{where}.{kind}.{field}")
    check_cache(f"{where}.{kind}.", block)
    if not isinstance(block.get("citations"), list | None):
        raise fault(f"{where}.{kind}.citations", "Input should be a valid list")
    return kind


def _text_block(where: str, block: Any) -> str:
    _kind(where, block, ("text",))
    return text_of(f"{where}.text", block.get("text"))


def _call(where: str, block: dict[str, Any]) -> dict[str, Any]:
    arguments = block.get("input")
    if not isinstance(arguments, dict):
        raise fault(f"{where}.tool_use.input", "Input should be a valid dictionary")
    name = text_of(f"{where}.tool_use.name", block.get("name"))
    function = {"name": name, "arguments": msgspec.json.encode(arguments).decode()}
    return {"id": text_of(f"{where}.tool_use.id", block.get("id")), "type": "function", "function": function}


def _result(where: str, block: dict[str, Any]) -> dict[str, Any]:
    call = text_of(f"{where}.tool_result.tool_use_id", block.get("tool_use_id"))
    content = block.get("content")
    if content is None:
        content = ""
    elif isinstance(content, list):
        parts = [_text_block(f"{where}.tool_result.content.{n}", part) for n, part in enumerate(content)]
        content = "".join(parts)
    elif not isinstance(content, str):
        raise fault(f"{where}.tool_result.content", "Input should be a valid string or list of text blocks")
    failed = block.get("is_error")
    if failed is not None and not isinstance(failed, bool):
        raise fault(f"{where}.tool_result.is_error", "Input should be a valid boolean")
    return {"role": "tool", "tool_call_id": call, "content": TOOL_FAILED + content if failed else content}
