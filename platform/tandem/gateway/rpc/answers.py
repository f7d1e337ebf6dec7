"""Answers of `tandem.v1.Inference`: steps of a reply as messages, streamed or whole. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from tandem.gateway.text.answer import Piece, TokenLogprob, Usage
from tandem.v1 import inference_pb2 as pb

_REASONS: Mapping[str | None, pb.FinishReason] = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "tool_calls": pb.FINISH_REASON_TOOL_CALLS,
}


class Step(Protocol):
    """What is new of one choice, as `tandem.gateway.service` has it."""

    @property
    def index(self) -> int:
        """The choice, from 0."""

    @property
    def piece(self) -> Piece: ...

    @property
    def reason(self) -> str | None:
        """Why the choice ended; None while it goes on."""

    @property
    def usage(self) -> Usage | None:
        """What the whole reply cost; only in its last step."""


def text_delta(step: Step, ids: bool) -> pb.TextDelta | None:
    """News of a continuation; None if there is nothing to tell. `ids`: token ids were asked for."""
    piece = step.piece
    tokens = piece.ids if ids else None
    if not (piece.content or tokens or step.reason or piece.logprobs):
        return None
    return pb.TextDelta(
        index=step.index,
        text=piece.content,
        token_ids=tokens,
        logprobs=_logprobs(piece.logprobs),
        finish_reason=_reason(step.reason),
    )


def chat_delta(step: Step, ids: bool) -> pb.ChatDelta | None:
    """News of an answer to a conversation; None if there is nothing to tell. `ids`: token ids were asked for."""
    piece = step.piece
    tokens = piece.ids if ids else None
    if not (piece.content or piece.reasoning or tokens or step.reason or piece.tools or piece.logprobs):
        return None
    delta = pb.ChatDelta(
        index=step.index,
        reasoning_content=piece.reasoning,
        content=piece.content,
        token_ids=tokens,
        logprobs=_logprobs(piece.logprobs),
        finish_reason=_reason(step.reason),
    )
    for tool in piece.tools:
        delta.tool_calls.add(index=tool.index, id=tool.id or "", name=tool.name or "", arguments=tool.arguments)
    return delta


def text_choices(steps: Iterable[Step], *, ids: bool) -> list[pb.TextChoice]:
    """Whole continuations, by their numbers."""
    return [
        pb.TextChoice(
            index=index,
            text=piece.content,
            token_ids=piece.ids if ids else None,
            logprobs=_logprobs(piece.logprobs),
            finish_reason=_reason(reason),
        )
        for index, piece, reason in _whole(steps)
    ]


def chat_choices(steps: Iterable[Step], *, ids: bool) -> list[pb.ChatChoice]:
    """Whole answers to a conversation, by their numbers."""
    return [
        pb.ChatChoice(
            index=index,
            message=_message(piece),
            token_ids=piece.ids if ids else None,
            logprobs=_logprobs(piece.logprobs),
            finish_reason=_reason(reason),
        )
        for index, piece, reason in _whole(steps)
    ]


def usage_message(usage: Usage) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=usage.prompt,
        cached_tokens=usage.cached,
        completion_tokens=usage.completion,
        reasoning_tokens=usage.reasoning,
    )


def _whole(steps: Iterable[Step]) -> list[tuple[int, Piece, str | None]]:
    """(number, everything, finish reason) of each choice."""
    pieces: dict[int, list[Piece]] = {}
    reasons: dict[int, str | None] = {}
    for step in steps:
        pieces.setdefault(step.index, []).append(step.piece)
        reasons[step.index] = step.reason or reasons.get(step.index)
    return [(index, _joined(pieces[index]), reasons[index]) for index in sorted(pieces)]


def _joined(pieces: Sequence[Piece]) -> Piece:
    return Piece(
        "".join(piece.reasoning for piece in pieces),
        "".join(piece.content for piece in pieces),
        [token for piece in pieces for token in piece.ids],
        [tool for piece in pieces for tool in piece.tools],
        [logprob for piece in pieces for logprob in piece.logprobs],
    )


def _message(piece: Piece) -> pb.Message:
    calls: dict[int, pb.ToolCall] = {}
    arguments: dict[int, list[str]] = {}
    for tool in piece.tools:
        call = calls.setdefault(tool.index, pb.ToolCall())
        call.id = tool.id or call.id
        call.name = tool.name or call.name
        arguments.setdefault(tool.index, []).append(tool.arguments)
    for index, call in calls.items():
        call.arguments = "".join(arguments[index])
    return pb.Message(
        role=pb.MESSAGE_ROLE_ASSISTANT,
        # As OpenAI has it: a message that only calls tools has no content.
        content=piece.content if piece.content or not calls else None,
        reasoning_content=piece.reasoning,
        tool_calls=[calls[index] for index in sorted(calls)],
    )


def _reason(reason: str | None) -> pb.FinishReason:
    return _REASONS.get(reason, pb.FINISH_REASON_OTHER)


def _logprobs(found: Sequence[TokenLogprob]) -> list[pb.TokenLogprob] | None:
    if not found:
        return None
    return [
        pb.TokenLogprob(chosen=_logprob(one), top=[_logprob(other) for other in one.top], reasoning=one.reasoning)
        for one in found
    ]


def _logprob(one: TokenLogprob) -> pb.Logprob:
    return pb.Logprob(token=one.text, token_bytes=one.bytes, logprob=one.logprob, token_id=one.token)
