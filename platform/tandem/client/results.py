"""Protobuf as what the client gives back: whole answers, pieces, and pieces put together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from tandem.client.types import (
    Answer,
    Choice,
    FinishReason,
    Logprob,
    Piece,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from tandem.v1 import inference_pb2 as pb

_REASONS: dict[int, FinishReason | None] = {
    pb.FINISH_REASON_UNSPECIFIED: None,
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_TOOL_CALLS: "tool_calls",
}


def generated(found: pb.GenerateOnceResponse) -> Answer:
    """A whole continuation."""
    return _answer(found, [_choice(choice, choice.text, "", ()) for choice in found.choices])


def chatted(found: pb.ChatOnceResponse) -> Answer:
    """A whole answer to a conversation."""
    choices = []
    for choice in found.choices:
        said = choice.message
        calls = tuple(ToolCall(id=call.id, name=call.name, arguments=call.arguments) for call in said.tool_calls)
        choices.append(_choice(choice, said.content, said.reasoning_content, calls))
    return _answer(found, choices)


class Collector:
    """Turns the messages of a stream into pieces, and puts the pieces together."""

    def __init__(self) -> None:
        self.info = pb.AnswerInfo()
        self.weight_version = ""
        self.usage: Usage | None = None
        self._choices: dict[int, _Growing] = {}

    def take(self, message: Any) -> list[Piece]:
        """The news in a `GenerateResponse` or `ChatResponse`."""
        if message.HasField("info"):
            self.info = message.info
        self.weight_version = message.weight_version or self.weight_version
        if message.HasField("usage"):
            self.usage = _usage(message.usage)
        pieces = [_piece(delta) for delta in message.deltas]
        for piece in pieces:
            self._choices.setdefault(piece.index, _Growing()).add(piece)
        return pieces

    def answer(self) -> Answer | None:
        """All of it; None as long as it is not complete."""
        if self.usage is None:
            return None
        return Answer(
            id=self.info.id,
            model=self.info.model,
            created=self.info.created,
            weight_version=self.weight_version,
            choices=tuple(self._choices[index].choice(index) for index in sorted(self._choices)),
            usage=self.usage,
            prompt_token_ids=tuple(self.info.prompt_token_ids),
        )


class _Growing:
    """One choice while it comes."""

    def __init__(self) -> None:
        self._pieces: list[Piece] = []

    def add(self, piece: Piece) -> None:
        self._pieces.append(piece)

    def choice(self, index: int) -> Choice:
        pieces = self._pieces
        return Choice(
            index=index,
            text="".join(piece.text for piece in pieces),
            reasoning="".join(piece.reasoning for piece in pieces),
            tool_calls=_calls(delta for piece in pieces for delta in piece.tool_calls),
            token_ids=tuple(token for piece in pieces for token in piece.token_ids),
            logprobs=tuple(logprob for piece in pieces for logprob in piece.logprobs),
            finish_reason=next((piece.finish_reason for piece in pieces if piece.finish_reason), None),
        )


def _calls(deltas: Iterable[ToolCallDelta]) -> tuple[ToolCall, ...]:
    found: dict[int, ToolCall] = {}
    for delta in deltas:
        before = found.get(delta.index, ToolCall(id="", name="", arguments=""))
        found[delta.index] = msgspec.structs.replace(
            before,
            id=delta.id or before.id,
            name=delta.name or before.name,
            arguments=before.arguments + delta.arguments,
        )
    return tuple(found[index] for index in sorted(found))


def _piece(delta: pb.TextDelta | pb.ChatDelta) -> Piece:
    index, reason = delta.index, _reason(delta.finish_reason)
    ids, logprobs = tuple(delta.token_ids), _logprobs(delta.logprobs)
    if isinstance(delta, pb.TextDelta):
        return Piece(index=index, text=delta.text, token_ids=ids, logprobs=logprobs, finish_reason=reason)
    calls = tuple(
        ToolCallDelta(index=call.index, id=call.id, name=call.name, arguments=call.arguments)
        for call in delta.tool_calls
    )
    return Piece(
        index=index,
        text=delta.content,
        reasoning=delta.reasoning_content,
        tool_calls=calls,
        token_ids=ids,
        logprobs=logprobs,
        finish_reason=reason,
    )


def _choice(found: pb.TextChoice | pb.ChatChoice, text: str, reasoning: str, calls: tuple[ToolCall, ...]) -> Choice:
    return Choice(
        index=found.index,
        text=text,
        reasoning=reasoning,
        tool_calls=calls,
        token_ids=tuple(found.token_ids),
        logprobs=_logprobs(found.logprobs),
        finish_reason=_reason(found.finish_reason),
    )


def _answer(found: pb.GenerateOnceResponse | pb.ChatOnceResponse, choices: Iterable[Choice]) -> Answer:
    return Answer(
        id=found.info.id,
        model=found.info.model,
        created=found.info.created,
        weight_version=found.weight_version,
        choices=tuple(choices),
        usage=_usage(found.usage),
        prompt_token_ids=tuple(found.info.prompt_token_ids),
    )


def _usage(found: pb.Usage) -> Usage:
    return Usage(
        prompt_tokens=found.prompt_tokens,
        cached_tokens=found.cached_tokens,
        completion_tokens=found.completion_tokens,
        reasoning_tokens=found.reasoning_tokens,
    )


def _reason(reason: int) -> FinishReason | None:
    return _REASONS.get(reason, "other")


def _logprobs(found: Iterable[pb.TokenLogprob]) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(
            **_logprob(one.chosen),
            top=tuple(Logprob(**_logprob(other)) for other in one.top),
            reasoning=one.reasoning,
        )
        for one in found
    )


def _logprob(one: pb.Logprob) -> dict[str, Any]:
    return {"token": one.token, "token_id": one.token_id, "token_bytes": one.token_bytes, "logprob": one.logprob}
