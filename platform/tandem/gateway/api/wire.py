"""Answers as bytes: OpenAI's chat and completion objects, whole or as server-sent events.

What does not change within a stream is serialised once; a chunk is that around the new text.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from tandem.gateway.api.requests import Wanted
from tandem.gateway.errors import ApiError
from tandem.gateway.text.detokenize import Vocabulary
from tandem.gateway.text.pieces import Piece, TokenLogprob, ToolDelta, Usage

encode = msgspec.json.Encoder().encode

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
    return b"data: " + error.body(in_stream=True) + b"\n\n"


class Writer(Protocol):
    """Turns one reply, of one or several choices, into bytes. `index` is the choice, from 0."""

    def first(self) -> bytes:
        """Events that open the stream, for all choices."""

    def piece(self, index: int, piece: Piece) -> bytes:
        """Events for what is new of a choice; none if there is nothing to tell."""

    def last(self, index: int, reason: str) -> bytes:
        """Events that end a choice."""

    def closing(self, usage: Usage) -> bytes:
        """Events that close the stream well, after the last choice; `usage` is that of the whole reply."""

    def whole(self, choices: Sequence[tuple[Piece, str]], usage: Usage) -> bytes:
        """The reply in one body: (all of its text, finish reason) of each choice."""


class _Base:
    chat: bool
    kind: str
    name: str

    def __init__(
        self,
        wanted: Wanted,
        number: str,
        prompts: Sequence[Sequence[int]],
        vocabulary: Vocabulary | None = None,
        *,
        created: int | None = None,
    ) -> None:
        """`number` is the reply's id; `prompts`, the token ids of each prompt; `vocabulary` is needed for `echo`;
        `created` in Unix seconds, None = now."""
        self._wanted = wanted
        self._prompts = prompts
        kind = self.kind + ".chunk" if self.chat and wanted.stream else self.kind
        begun = int(time.time()) if created is None else created
        self._identity = {"id": self.name + number, "object": kind, "created": begun, "model": wanted.model}
        if wanted.service_tier is not None:
            self._identity["service_tier"] = "default" if wanted.service_tier == "auto" else wanted.service_tier
        head = b"data: " + encode(self._identity)[:-1] + b',"choices":['
        self._head = head
        self._openings = [head + b'{"index":%d,' % index for index in range(wanted.choices)]
        # With include_usage every chunk has the field, and it is null in all but the last.
        self._tail = b'],"usage":null}\n\n' if wanted.include_usage else b"]}\n\n"
        self._plain = b',"logprobs":null,"finish_reason":null}' + self._tail
        self._simple = not wanted.return_token_ids and wanted.logprobs is None

    def closing(self, usage: Usage) -> bytes:
        if not self._wanted.include_usage:
            return DONE
        weights = b'"system_fingerprint":' + encode(usage.version) + b"," if usage.version else b""
        return (
            self._head + b"]," + weights + b'"usage":' + encode(usage_object(usage, chat=self.chat)) + b"}\n\n" + DONE
        )

    def _detailed(self, index: int, content: bytes, piece: Piece, logprobs: Any) -> bytes:
        """One event that says everything, so that ids and logprobs stand beside the text that they are of."""
        ids = b',"token_ids":' + encode(piece.ids) if self._wanted.return_token_ids else b""
        end = b',"logprobs":' + encode(logprobs) + b',"finish_reason":null}'
        return self._openings[index] + content + ids + end + self._tail

    def _finish(self, index: int, empty: bytes, reason: str) -> bytes:
        return self._openings[index] + empty + b',"logprobs":null,"finish_reason":' + encode(reason) + b"}" + self._tail

    def _body(self, choices: list[dict[str, Any]], pieces: Sequence[tuple[Piece, str]], usage: Usage) -> bytes:
        body: dict[str, Any] = {**self._identity, "choices": choices, "usage": usage_object(usage, chat=self.chat)}
        if usage.version:
            body["system_fingerprint"] = usage.version
        if self._wanted.return_token_ids:
            for index, (choice, (piece, _)) in enumerate(zip(choices, pieces, strict=True)):
                choice["token_ids"] = piece.ids
                if len(self._prompts) > 1:
                    choice["prompt_token_ids"] = self._prompts[index // self._wanted.n]
            if len(self._prompts) == 1:
                body["prompt_token_ids"] = self._prompts[0]
        return encode(body)


class ChatWriter(_Base):
    """`chat.completion` and `chat.completion.chunk`, with DeepSeek's `reasoning_content`."""

    chat = True
    kind = "chat.completion"
    name = "chatcmpl-"

    def first(self) -> bytes:
        role = b'"delta":{"role":"assistant","content":""}' + self._plain
        return b"".join([opening + role for opening in self._openings])

    def piece(self, index: int, piece: Piece) -> bytes:
        if not self._simple:
            return self._details(index, piece)
        opening = self._openings[index]
        events = b""
        if piece.reasoning:
            events = opening + b'"delta":{"reasoning_content":' + encode(piece.reasoning) + b"}" + self._plain
        if piece.content:
            events += opening + b'"delta":{"content":' + encode(piece.content) + b"}" + self._plain
        if piece.tools:
            events += opening + b'"delta":{"tool_calls":' + encode(_tool_deltas(piece.tools)) + b"}" + self._plain
        return events

    def last(self, index: int, reason: str) -> bytes:
        return self._finish(index, b'"delta":{}', reason)

    def whole(self, choices: Sequence[tuple[Piece, str]], usage: Usage) -> bytes:
        found: list[dict[str, Any]] = []
        for index, (piece, reason) in enumerate(choices):
            message: dict[str, Any] = {"role": "assistant", "content": piece.content}
            if piece.reasoning:
                message["reasoning_content"] = piece.reasoning
            if piece.tools:
                message["content"] = piece.content or None
                message["tool_calls"] = joined_calls(piece.tools)
            logprobs = None if self._wanted.logprobs is None else chat_logprobs(piece.logprobs)
            found.append({"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason})
        return self._body(found, choices, usage)

    def _details(self, index: int, piece: Piece) -> bytes:
        delta: dict[str, Any] = {}
        if piece.reasoning:
            delta["reasoning_content"] = piece.reasoning
        if piece.content:
            delta["content"] = piece.content
        if piece.tools:
            delta["tool_calls"] = _tool_deltas(piece.tools)
        if not delta and not piece.logprobs and not (piece.ids and self._wanted.return_token_ids):
            return b""
        logprobs = chat_logprobs(piece.logprobs) if piece.logprobs else None
        return self._detailed(index, b'"delta":' + encode(delta), piece, logprobs)


class CompletionWriter(_Base):
    """`text_completion`, whole or in chunks."""

    chat = False
    kind = "text_completion"
    name = "cmpl-"

    def __init__(
        self,
        wanted: Wanted,
        number: str,
        prompts: Sequence[Sequence[int]],
        vocabulary: Vocabulary | None = None,
        *,
        created: int | None = None,
    ) -> None:
        super().__init__(wanted, number, prompts, vocabulary, created=created)
        self._echoes = [""] * wanted.choices
        if wanted.echo:
            assert vocabulary is not None, "an echo of token ids needs their text"
            texts = [given if isinstance(given, str) else vocabulary.text(given) for given in wanted.prompts]
            self._echoes = [texts[index // wanted.n] for index in range(wanted.choices)]
        self._offsets = [0] * wanted.choices
        """Where the next characters of each choice stand in its text."""

    def first(self) -> bytes:
        events = [
            opening + b'"text":' + encode(echo) + self._plain
            for opening, echo in zip(self._openings, self._echoes, strict=True)
            if echo
        ]
        return b"".join(events)

    def piece(self, index: int, piece: Piece) -> bytes:
        if self._simple:
            if not piece.content:
                return b""
            return self._openings[index] + b'"text":' + encode(piece.content) + self._plain
        if not piece.content and not piece.logprobs and not (piece.ids and self._wanted.return_token_ids):
            return b""
        logprobs = None if self._wanted.logprobs is None else self._logprobs(index, piece)
        return self._detailed(index, b'"text":' + encode(piece.content), piece, logprobs)

    def last(self, index: int, reason: str) -> bytes:
        return self._finish(index, b'"text":""', reason)

    def whole(self, choices: Sequence[tuple[Piece, str]], usage: Usage) -> bytes:
        found: list[dict[str, Any]] = []
        for index, (piece, reason) in enumerate(choices):
            logprobs = None if self._wanted.logprobs is None else self._logprobs(index, piece)
            text = self._echoes[index] + piece.content
            found.append({"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason})
        return self._body(found, choices, usage)

    def _logprobs(self, index: int, piece: Piece) -> dict[str, Any]:
        """OpenAI's older form: a list for each property of a token."""
        offsets, at = [], self._offsets[index]
        for one in piece.logprobs:
            offsets.append(at)
            at += len(one.text)
        self._offsets[index] = at
        return {
            "tokens": [one.text for one in piece.logprobs],
            "token_logprobs": [one.logprob for one in piece.logprobs],
            "top_logprobs": [{other.text: other.logprob for other in one.top} for one in piece.logprobs]
            if self._wanted.logprobs
            else None,
            "text_offset": offsets,
        }


def chat_logprobs(logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    """OpenAI's `logprobs` of a chat, with DeepSeek's list for the reasoning."""
    found: dict[str, Any] = {"content": [_scored(one) for one in logprobs if not one.reasoning], "refusal": None}
    reasoning = [_scored(one) for one in logprobs if one.reasoning]
    if reasoning:
        found["reasoning_content"] = reasoning
    return found


def joined_calls(deltas: Sequence[ToolDelta]) -> list[dict[str, Any]]:
    """Whole tool calls, as a message has them."""
    calls: dict[int, dict[str, Any]] = {}
    for delta in deltas:
        if delta.index not in calls:
            function = {"name": delta.name, "arguments": ""}
            calls[delta.index] = {"id": delta.id, "type": "function", "function": function}
        calls[delta.index]["function"]["arguments"] += delta.arguments
    return list(calls.values())


def _scored(one: TokenLogprob) -> dict[str, Any]:
    return {**_named(one), "top_logprobs": [_named(other) for other in one.top]}


def _named(one: TokenLogprob) -> dict[str, Any]:
    return {"token": one.text, "logprob": one.logprob, "bytes": list(one.bytes)}


def _tool_deltas(deltas: Sequence[ToolDelta]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for delta in deltas:
        if delta.name is None:
            found.append({"index": delta.index, "function": {"arguments": delta.arguments}})
        else:
            function = {"name": delta.name, "arguments": delta.arguments}
            found.append({"index": delta.index, "id": delta.id, "type": "function", "function": function})
    return found
