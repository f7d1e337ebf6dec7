"""Answers as bytes: OpenAI's chat and completion objects, whole or as server-sent events.

What does not change within a stream is serialised once; a chunk is that around the new text.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

import msgspec

from tandem.gateway.answer import Piece, Usage
from tandem.gateway.errors import ApiError
from tandem.gateway.requests import Wanted

encode = msgspec.json.encode

DONE = b"data: [DONE]\n\n"


def usage_object(usage: Usage, *, chat: bool) -> dict[str, Any]:
    """OpenAI's `usage`, with DeepSeek's names for the prefix cache beside it."""
    found: dict[str, Any] = {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
        "prompt_cache_hit_tokens": usage.cached,
        "prompt_cache_miss_tokens": usage.prompt - usage.cached,
    }
    if chat:
        found["completion_tokens_details"] = {"reasoning_tokens": usage.reasoning}
    return found


def error_event(error: ApiError) -> bytes:
    """An error in the middle of a stream, as the OpenAI SDKs look for it."""
    return b"data: " + error.body() + b"\n\n"


class Writer(Protocol):
    """Turns one answer into bytes."""

    def first(self) -> bytes:
        """Events that open the stream."""

    def piece(self, piece: Piece) -> bytes:
        """Events for new text; none if there is nothing to tell."""

    def last(self, reason: str, usage: Usage) -> bytes:
        """Events that close the stream well."""

    def whole(self, piece: Piece, reason: str, usage: Usage) -> bytes:
        """The answer in one body."""


class _Base:
    def __init__(self, wanted: Wanted, number: str, kind: str, prompt_ids: list[int]) -> None:
        self._wanted = wanted
        self._prompt_ids = prompt_ids
        self._identity = {"id": number, "object": kind, "created": int(time.time()), "model": wanted.model}
        self._head = b"data: " + encode(self._identity)[:-1] + b',"choices":['
        # With include_usage every chunk has the field, and it is null in all but the last.
        self._tail = b'],"usage":null}\n\n' if wanted.include_usage else b"]}\n\n"

    def _event(self, choice: bytes) -> bytes:
        return self._head + choice + self._tail

    def _ids(self, piece: Piece) -> bytes:
        return b',"token_ids":' + encode(piece.ids) if self._wanted.return_token_ids else b""

    def _closing(self, choice: bytes, usage: Usage, *, chat: bool) -> bytes:
        events = self._event(choice)
        if self._wanted.include_usage:
            events += self._head + b'],"usage":' + encode(usage_object(usage, chat=chat)) + b"}\n\n"
        return events + DONE

    def _body(self, choice: dict[str, Any], piece: Piece, usage: Usage, *, chat: bool) -> bytes:
        if self._wanted.return_token_ids:
            choice["token_ids"] = piece.ids
        body: dict[str, Any] = {**self._identity, "choices": [choice], "usage": usage_object(usage, chat=chat)}
        if self._wanted.return_token_ids:
            body["prompt_token_ids"] = self._prompt_ids
        return encode(body)


class ChatWriter(_Base):
    """`chat.completion` and `chat.completion.chunk`, with DeepSeek's `reasoning_content`."""

    def __init__(self, wanted: Wanted, number: str, prompt_ids: list[int]) -> None:
        kind = "chat.completion.chunk" if wanted.stream else "chat.completion"
        super().__init__(wanted, "chatcmpl-" + number, kind, prompt_ids)

    def first(self) -> bytes:
        return self._event(
            b'{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}'
        )

    def piece(self, piece: Piece) -> bytes:
        ids = self._ids(piece)
        events = b""
        if piece.reasoning or (ids and not piece.content):
            delta = b'{"reasoning_content":' + encode(piece.reasoning) + b"}" if piece.reasoning else b"{}"
            events += self._event(b'{"index":0,"delta":' + delta + self._end(b"" if piece.content else ids))
        if piece.content:
            events += self._event(b'{"index":0,"delta":{"content":' + encode(piece.content) + b"}" + self._end(ids))
        return events

    def last(self, reason: str, usage: Usage) -> bytes:
        choice = b'{"index":0,"delta":{},"logprobs":null,"finish_reason":' + encode(reason) + b"}"
        return self._closing(choice, usage, chat=True)

    def whole(self, piece: Piece, reason: str, usage: Usage) -> bytes:
        message: dict[str, Any] = {"role": "assistant", "content": piece.content}
        if piece.reasoning:
            message["reasoning_content"] = piece.reasoning
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
        return self._body(choice, piece, usage, chat=True)

    @staticmethod
    def _end(ids: bytes) -> bytes:
        return ids + b',"logprobs":null,"finish_reason":null}'


class CompletionWriter(_Base):
    """`text_completion`, whole or in chunks."""

    def __init__(self, wanted: Wanted, number: str, prompt_ids: list[int]) -> None:
        super().__init__(wanted, "cmpl-" + number, "text_completion", prompt_ids)

    def first(self) -> bytes:
        return b""

    def piece(self, piece: Piece) -> bytes:
        ids = self._ids(piece)
        if not piece.content and not ids:
            return b""
        text = encode(piece.content)
        return self._event(b'{"index":0,"text":' + text + ids + b',"logprobs":null,"finish_reason":null}')

    def last(self, reason: str, usage: Usage) -> bytes:
        choice = b'{"index":0,"text":"","logprobs":null,"finish_reason":' + encode(reason) + b"}"
        return self._closing(choice, usage, chat=False)

    def whole(self, piece: Piece, reason: str, usage: Usage) -> bytes:
        choice = {"index": 0, "text": piece.content, "logprobs": None, "finish_reason": reason}
        return self._body(choice, piece, usage, chat=False)
