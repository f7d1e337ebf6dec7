"""Answers as OpenAI's Responses API has them: a response of output items, whole or as typed server-sent events.

Items come in the order in which the model wrote them: `reasoning` (in full, as `reasoning_text`), `message`, one
`function_call` a call. A stream never has two items open at once, and every event has its `sequence_number`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec

from tandem.gateway.api.requests import Wanted
from tandem.gateway.api.responses_api import ResponsesWanted
from tandem.gateway.errors import ApiError
from tandem.gateway.text.answer import Piece, TokenLogprob, Usage
from tandem.gateway.text.detokenize import Vocabulary

encode = msgspec.json.Encoder().encode

KEEP_ALIVE = b": keep-alive\n\n"


def encode_error(error: ApiError, request_id: str) -> bytes:
    """The body of an answer that is an error: as everywhere in OpenAI's API."""
    return error.body()


def error_event(error: ApiError, request_id: str) -> bytes:
    """An error within a stream that has begun, where there is no writer to number it; see `ResponsesWriter.failed`."""
    return _error_event(error, 0)


def usage_object(usage: Usage) -> dict[str, Any]:
    """The Responses API's `usage`."""
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning},
        "total_tokens": usage.prompt + usage.completion,
    }


class _Item:
    """An output item while it is written."""

    def __init__(self, kind: str, number: str, place: int, *, call: str = "", name: str = "") -> None:
        prefix = {"reasoning": "rs_", "message": "msg_", "function_call": "fc_"}[kind]
        self.kind = kind
        self.place = place
        self.id = f"{prefix}{number}_{place}"
        self.call = call
        self.name = name
        self.texts: list[str] = []
        self.logprobs: list[dict[str, Any]] = []

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def part(self) -> dict[str, Any]:
        """The content of a message or of reasoning, as it is now."""
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": self.text}
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": self.logprobs}

    def object(self, status: str) -> dict[str, Any]:
        """The whole item; `status` "in_progress" is its beginning, without content."""
        found: dict[str, Any] = {"id": self.id, "type": self.kind, "status": status}
        if self.kind == "function_call":
            return {**found, "call_id": self.call, "name": self.name, "arguments": self.text}
        content = [] if status == "in_progress" else [self.part()]
        if self.kind == "reasoning":
            return {**found, "summary": [], "content": content}
        return {**found, "role": "assistant", "content": content}


class ResponsesWriter:
    """A `response`, or the events of one. Has one choice only."""

    def __init__(
        self,
        wanted: Wanted,
        number: str,
        prompts: Sequence[Sequence[int]],
        vocabulary: Vocabulary | None = None,
        *,
        created: int | None = None,
    ) -> None:
        """`prompts`: the token ids of the prompt, as a list of one; `created` in Unix seconds, None = now."""
        self._number = number
        self._with_logprobs = wanted.logprobs is not None
        self._response: dict[str, Any] = {
            "id": "resp_" + number,
            "object": "response",
            "created_at": int(time.time()) if created is None else created,
            "model": wanted.model,
            **(wanted.asked if isinstance(wanted, ResponsesWanted) else {}),
        }
        self._done: list[dict[str, Any]] = []
        self._open: _Item | None = None
        self._held: list[dict[str, Any]] = []
        """Logprobs of tokens whose text has not come yet."""
        self._call = -1
        self._sequence = 0
        self._reason = ""

    def first(self) -> bytes:
        response = self._object("in_progress")
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def piece(self, index: int, piece: Piece) -> bytes:
        events = b""
        if piece.reasoning:
            events += self._enter("reasoning")
            events += self._delta("response.reasoning_text.delta", piece.reasoning)
        if self._with_logprobs:
            self._held += self._logprobs(piece.logprobs)
        if piece.content:
            logprobs, self._held = self._held, []
            events += self._enter("message")
            events += self._delta("response.output_text.delta", piece.content, logprobs)
        for delta in piece.tools:
            if delta.index != self._call:
                self._call = delta.index
                events += self._close("completed")
                events += self._enter("function_call", call=delta.id or "", name=delta.name or "")
            if delta.arguments:
                events += self._delta("response.function_call_arguments.delta", delta.arguments)
        return events

    def last(self, index: int, reason: str) -> bytes:
        self._reason = reason
        return self._close("incomplete" if reason == "length" else "completed")

    def closing(self, usage: Usage) -> bytes:
        status = "incomplete" if self._reason == "length" else "completed"
        return self._event("response." + status, response=self._object(status, usage))

    def whole(self, choices: Sequence[tuple[Piece, str]], usage: Usage) -> bytes:
        piece, reason = choices[0]
        # The same items as a stream's, so that both say the same.
        self.piece(0, piece)
        self.last(0, reason)
        return encode(self._object("incomplete" if reason == "length" else "completed", usage))

    def failed(self, error: ApiError, request_id: str) -> bytes:
        """Events that end a stream that has begun badly: OpenAI's `error`, and the response as far as it came."""
        found = self._close("incomplete")
        found += _error_event(error, self._sequence)
        self._sequence += 1
        code = "server_error" if error.status >= 500 else "invalid_prompt"
        response = self._object("failed")
        response["error"] = {"code": code, "message": error.message}
        return found + self._event("response.failed", response=response)

    def _enter(self, kind: str, *, call: str = "", name: str = "") -> bytes:
        """Have an item of this kind open."""
        if self._open is not None and self._open.kind == kind:
            return b""
        events = self._close("completed")
        item = self._open = _Item(kind, self._number, len(self._done), call=call, name=name)
        events += self._event("response.output_item.added", output_index=item.place, item=item.object("in_progress"))
        if kind != "function_call":
            events += self._event("response.content_part.added", **self._at(item), part=item.part())
        return events

    def _delta(self, kind: str, text: str, logprobs: list[dict[str, Any]] | None = None) -> bytes:
        item = self._open
        assert item is not None, "a delta comes within an item"
        item.texts.append(text)
        if logprobs is None:
            return self._event(kind, **self._at(item), delta=text)
        item.logprobs += logprobs
        return self._event(kind, **self._at(item), delta=text, logprobs=logprobs)

    def _close(self, status: str) -> bytes:
        item = self._open
        if item is None:
            return b""
        self._open = None
        at = self._at(item)
        if item.kind == "function_call":
            events = self._event("response.function_call_arguments.done", **at, name=item.name, arguments=item.text)
        elif item.kind == "reasoning":
            events = self._event("response.reasoning_text.done", **at, text=item.text)
        else:
            item.logprobs, self._held = item.logprobs + self._held, []
            events = self._event("response.output_text.done", **at, text=item.text, logprobs=item.logprobs)
        if item.kind != "function_call":
            events += self._event("response.content_part.done", **at, part=item.part())
        found = item.object(status)
        self._done.append(found)
        return events + self._event("response.output_item.done", output_index=item.place, item=found)

    @staticmethod
    def _logprobs(logprobs: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
        return [
            {**_logprob(one), "top_logprobs": [_logprob(other) for other in one.top]}
            for one in logprobs
            if not one.reasoning
        ]

    def _object(self, status: str, usage: Usage | None = None) -> dict[str, Any]:
        return {
            **self._response,
            "status": status,
            "completed_at": int(time.time()) if status == "completed" else None,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": list(self._done),
            "usage": None if usage is None else usage_object(usage),
        }

    @staticmethod
    def _at(item: _Item) -> dict[str, Any]:
        place = {"item_id": item.id, "output_index": item.place}
        return place if item.kind == "function_call" else {**place, "content_index": 0}

    def _event(self, kind: str, **fields: Any) -> bytes:
        data = encode({"type": kind, "sequence_number": self._sequence, **fields})
        self._sequence += 1
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), data)


def _logprob(one: TokenLogprob) -> dict[str, Any]:
    return {"token": one.text, "bytes": list(one.bytes), "logprob": one.logprob}


def _error_event(error: ApiError, sequence: int) -> bytes:
    found = {"code": error.code, "message": error.message, "param": error.param}
    # The SDK raises for the inner `error`; the fields beside it are those that the API's reference has.
    data = {"type": "error", "sequence_number": sequence, **found, "error": {"type": error.type, **found}}
    return b"event: error\ndata: " + encode(data) + b"\n\n"
