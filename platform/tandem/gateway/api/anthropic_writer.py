"""Answers as Anthropic's Messages API has them: a message of blocks, whole or as named server-sent events.

Blocks come in the order in which the model wrote them: `thinking`, `text`, one `tool_use` a call. A stream never has
two blocks open at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from tandem.gateway.api.anthropic_api import MessagesWanted
from tandem.gateway.api.requests import Wanted
from tandem.gateway.errors import ApiError
from tandem.gateway.text.answer import Piece, ToolDelta, Usage
from tandem.gateway.text.detokenize import Vocabulary

encode = msgspec.json.Encoder().encode

KEEP_ALIVE = b'event: ping\ndata: {"type":"ping"}\n\n'

_REASONS = {"length": "max_tokens", "tool_calls": "tool_use"}
_ERRORS = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}


def encode_error(error: ApiError, request_id: str) -> bytes:
    """The body of an answer that is an error, as Anthropic's SDKs read it."""
    message = error.message if error.param is None else f"{error.param}: {error.message}"
    return encode({"type": "error", "error": {"type": error_type(error), "message": message}, "request_id": request_id})


def error_event(error: ApiError, request_id: str) -> bytes:
    """An error within a stream that has begun."""
    return b"event: error\ndata: " + encode_error(error, request_id) + b"\n\n"


def error_type(error: ApiError) -> str:
    """Anthropic's name for the kind of error."""
    if error.code == "no_capacity":
        return "overloaded_error"
    return _ERRORS.get(error.status) or ("api_error" if error.status >= 500 else "invalid_request_error")


def usage_object(usage: Usage) -> dict[str, Any]:
    """Anthropic's `usage`: tokens that came from the prefix cache are told apart from `input_tokens`."""
    return {
        "input_tokens": usage.prompt - usage.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached,
        "output_tokens": usage.completion,
        "output_tokens_details": {"thinking_tokens": usage.reasoning},
    }


class MessagesWriter:
    """A `message`, or the events of one. Has one choice only."""

    def __init__(
        self,
        wanted: Wanted,
        number: str,
        prompts: Sequence[Sequence[int]],
        vocabulary: Vocabulary | None = None,
        *,
        created: int | None = None,
    ) -> None:
        """`prompts`: the token ids of the prompt, as a list of one. Messages do not say when they were `created`."""
        self._prompt_tokens = sum(map(len, prompts))
        self._stops = sorted(wanted.stops, key=len, reverse=True) if wanted.include_stop else []
        self._shown = not isinstance(wanted, MessagesWanted) or wanted.thinking_shown
        self._message = {"id": "msg_" + number, "type": "message", "role": "assistant", "model": wanted.model}
        # Clients keep it and send it back with the thinking, which is then left out: it only has to be there.
        self._signature = "tandem-" + number
        self._block = -1
        self._open = ""
        self._call = -1
        self._reason = ""
        self._stop: str | None = None

    def first(self) -> bytes:
        usage = Usage(prompt=self._prompt_tokens, completion=0, reasoning=0, cached=0)
        message: dict[str, Any] = {
            **self._message,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage_object(usage),
        }
        return _event("message_start", {"message": message})

    def piece(self, index: int, piece: Piece) -> bytes:
        events = b""
        if piece.reasoning:
            events += self._enter("thinking", {"type": "thinking", "thinking": "", "signature": ""})
            if self._shown:
                events += self._delta(b'"thinking_delta","thinking":', piece.reasoning)
        content = self._cut(piece.content)
        if content:
            events += self._enter("text", {"type": "text", "text": ""})
            events += self._delta(b'"text_delta","text":', content)
        for delta in piece.tools:
            if delta.index != self._call:
                self._call = delta.index
                events += self._close()
                block = {"type": "tool_use", "id": delta.id or "", "name": delta.name or "", "input": {}}
                events += self._enter("tool_use", block)
            if delta.arguments:
                events += self._delta(b'"input_json_delta","partial_json":', delta.arguments)
        return events

    def last(self, index: int, reason: str) -> bytes:
        self._reason = reason
        return self._close()

    def closing(self, usage: Usage) -> bytes:
        delta = _stop_fields(self._reason, self._stop)
        events = _event("message_delta", {"delta": delta, "usage": usage_object(usage)})
        return events + _event("message_stop", {})

    def whole(self, choices: Sequence[tuple[Piece, str]], usage: Usage) -> bytes:
        piece, reason = choices[0]
        content: list[dict[str, Any]] = []
        if piece.reasoning:
            thinking = piece.reasoning if self._shown else ""
            content.append({"type": "thinking", "thinking": thinking, "signature": self._signature})
        if text := self._cut(piece.content):
            content.append({"type": "text", "text": text})
        content += _tool_blocks(piece.tools)
        fields = _stop_fields(reason, self._stop)
        return encode({**self._message, "content": content, **fields, "usage": usage_object(usage)})

    def failed(self, error: ApiError, request_id: str) -> bytes:
        """Events that end a stream that has begun badly."""
        return error_event(error, request_id)

    def _cut(self, content: str) -> str:
        """The text without the stop string that ended it, which is noted.

        A stop string comes out whole or not at all, and ends the answer: so text that ends with one was ended by it,
        and where it ends with several, by the longest.
        """
        for stop in self._stops:
            if content.endswith(stop):
                self._stop = stop
                return content[: -len(stop)]
        return content

    def _enter(self, kind: str, block: dict[str, Any]) -> bytes:
        """Have a block of this kind open."""
        if self._open == kind:
            return b""
        events = self._close()
        self._block += 1
        self._open = kind
        return events + _event("content_block_start", {"index": self._block, "content_block": block})

    def _close(self) -> bytes:
        if not self._open:
            return b""
        events = b""
        if self._open == "thinking":
            events = self._delta(b'"signature_delta","signature":', self._signature)
        self._open = ""
        return events + _event("content_block_stop", {"index": self._block})

    def _delta(self, kind: bytes, text: str) -> bytes:
        return (
            b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,"delta":{"type":' % self._block
            + kind
            + encode(text)
            + b"}}\n\n"
        )


def _stop_fields(reason: str, stop: str | None) -> dict[str, Any]:
    """`stop_reason` and `stop_sequence`, from our finish reason and the stop string that was found, if any was."""
    if reason == "stop" and stop is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": stop}
    return {"stop_reason": _REASONS.get(reason, "end_turn"), "stop_sequence": None}


def _tool_blocks(deltas: Sequence[ToolDelta]) -> list[dict[str, Any]]:
    blocks: dict[int, dict[str, Any]] = {}
    arguments: dict[int, str] = {}
    for delta in deltas:
        block = {"type": "tool_use", "id": delta.id or "", "name": delta.name or ""}
        blocks.setdefault(delta.index, block)
        arguments[delta.index] = arguments.get(delta.index, "") + delta.arguments
    return [{**block, "input": _input(arguments[index])} for index, block in blocks.items()]


def _input(arguments: str) -> dict[str, Any]:
    """A call's arguments as the object that they should be; what the model wrote otherwise is in `raw_arguments`."""
    try:
        found = msgspec.json.decode(arguments or "{}")
    except (msgspec.MsgspecError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {"raw_arguments": arguments}


def _event(kind: str, fields: dict[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), encode({"type": kind, **fields}))
