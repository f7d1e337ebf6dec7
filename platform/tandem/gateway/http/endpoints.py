"""The endpoints that ask the model: how each reads a body, and how it writes answers and errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from tandem.gateway.api import anthropic_writer, responses_writer
from tandem.gateway.api.anthropic_api import messages_request
from tandem.gateway.api.anthropic_writer import MessagesWriter
from tandem.gateway.api.requests import Wanted, chat_request, completion_request
from tandem.gateway.api.responses_api import responses_request
from tandem.gateway.api.responses_writer import ResponsesWriter
from tandem.gateway.api.wire import ChatWriter, CompletionWriter, Writer, error_event
from tandem.gateway.errors import ApiError
from tandem.gateway.text.model_card import ModelCard


class Endpoint(NamedTuple):
    """One way to ask the model."""

    name: str
    """Of metrics, logs and usage records."""
    parse: Callable[[Mapping[str, Any], ModelCard], Wanted]
    """Raises ApiError."""
    writer: Callable[..., Writer]
    """(wanted, number, prompts, vocabulary) → what turns the reply into bytes."""
    error: Callable[[ApiError, str], bytes]
    """(error, request id) → the body of an answer that is an error."""
    error_event: Callable[[ApiError, str], bytes]
    """The same within a stream that has begun."""
    keep_alive: bytes = b": keep-alive\n\n"
    """What a stream sends while there is nothing to tell."""
    operation: str = "chat"
    """Of traces, as OpenTelemetry names it."""


def _error(error: ApiError, request_id: str) -> bytes:
    return error.body()


def _error_event(error: ApiError, request_id: str) -> bytes:
    return error_event(error)


CHAT = Endpoint("chat", chat_request, ChatWriter, _error, _error_event)
COMPLETIONS = Endpoint(
    "completions", completion_request, CompletionWriter, _error, _error_event, operation="text_completion"
)
MESSAGES = Endpoint(
    "messages",
    messages_request,
    MessagesWriter,
    anthropic_writer.encode_error,
    anthropic_writer.error_event,
    anthropic_writer.KEEP_ALIVE,
)
RESPONSES = Endpoint(
    "responses",
    responses_request,
    ResponsesWriter,
    responses_writer.encode_error,
    responses_writer.error_event,
    responses_writer.KEEP_ALIVE,
)

BY_PATH: dict[str, Endpoint] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETIONS,
    "/v1/messages": MESSAGES,
    "/v1/responses": RESPONSES,
}
