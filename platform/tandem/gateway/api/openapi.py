"""The gateway's OpenAPI 3.1 document: every path, what it takes, what it answers. `GET /openapi.json`.

Requests are described from the same tables that check them, so that a client, or a fuzzer, can be made from it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from tandem.gateway.api.openapi_answers import ANSWERS
from tandem.gateway.api.openapi_fields import REQUEST_PARTS, Schema, ref, request
from tandem.gateway.api.openapi_translated import (
    TRANSLATED_PARTS,
    count_tokens_request,
    detokenize_request,
    messages_request,
    responses_request,
    tokenize_request,
)
from tandem.gateway.text.model_card import ModelCard

JSON = "application/json"
EVENTS = "text/event-stream"
_ABOUT = "Serves one model from pairs of prefill and decode groups. OpenAI's API, DeepSeek's conventions, Anthropic's."

_ERRORS = {
    400: "The request is wrong; the message says which field, and what to do.",
    401: "No API key or token, or one that is not good.",
    403: "The tenant may not use this model.",
    404: "There is no such model.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is compressed.",
    429: "A limit of the tenant's is reached, or the request would wait too long; see Retry-After.",
    500: "A fault of the gateway's.",
    503: "The gateway or the model cannot take requests now, or the engine failed; see Retry-After.",
    504: "The answer took too long.",
}
_PATH_ERRORS = {401: _ERRORS[401], 500: _ERRORS[500]}
_RETRY: Schema = {"Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer", "minimum": 1}}}


class _Post(NamedTuple):
    summary: str
    request: str
    answer: str
    error: str = "Error"
    streams: bool = True
    headers: tuple[str, ...] = ()


class _Get(NamedTuple):
    summary: str
    answer: str
    """A schema's name, or a content type."""
    open: bool = True
    """Needs no key."""
    also: tuple[tuple[int, str, str], ...] = ()
    """Further (status, summary, schema)."""


_POSTS: dict[str, _Post] = {
    "/v1/chat/completions": _Post("Answer a conversation", "ChatRequest", "ChatCompletion"),
    "/v1/completions": _Post("Continue prompts", "CompletionRequest", "Completion"),
    "/v1/responses": _Post("Answer, as OpenAI's Responses API does; nothing is kept", "ResponsesRequest", "Response"),
    "/v1/messages": _Post(
        "Answer, as Anthropic's Messages API does",
        "MessagesRequest",
        "Message",
        "AnthropicError",
        headers=("anthropic-version", "anthropic-beta"),
    ),
    "/v1/messages/count_tokens": _Post(
        "How many tokens a request of the Messages API has",
        "CountTokensRequest",
        "TokenCount",
        "AnthropicError",
        streams=False,
        headers=("anthropic-version", "anthropic-beta"),
    ),
    "/tokenize": _Post("Tokens of a text or a conversation", "TokenizeRequest", "Tokens", streams=False),
    "/detokenize": _Post("Text of tokens", "DetokenizeRequest", "Text", streams=False),
}
_GETS: dict[str, _Get] = {
    "/v1/models": _Get("The models that are served", "Models", open=False),
    "/v1/models/{model}": _Get("One model", "Model", open=False, also=((404, "There is no such model.", "Error"),)),
    "/health": _Get(
        "Whether the process is there, for new requests", "Health", also=((503, "It leaves; ask another.", "Health"),)
    ),
    "/ready": _Get(
        "Whether requests can be answered", "Ready", also=((503, "They cannot now; `reason` says why.", "Ready"),)
    ),
    "/fleet": _Get("The worker groups, and this replica's view of them", "Fleet"),
    "/metrics": _Get("Prometheus metrics", "text/plain"),
    "/openapi.json": _Get("This document", JSON),
}

PATHS: dict[str, str] = {**dict.fromkeys(_POSTS, "POST"), **dict.fromkeys(_GETS, "GET")}
"""Path of the document → its method."""


def page(card: ModelCard, version: str) -> bytes:
    """The document as JSON; `version` is Tandem's."""
    return msgspec.json.encode(document(card, version))


def document(card: ModelCard, version: str) -> dict[str, Any]:
    """The document, for the model that is served."""
    model: Schema = {"type": "string", "enum": [card.name]}
    schemas = {
        "ChatRequest": request("chat", model),
        "CompletionRequest": request("completion", model),
        "ResponsesRequest": responses_request(model),
        "MessagesRequest": messages_request(model),
        "CountTokensRequest": count_tokens_request(model),
        "TokenizeRequest": tokenize_request(model),
        "DetokenizeRequest": detokenize_request(model, card.vocab_size),
        **REQUEST_PARTS,
        **TRANSLATED_PARTS,
        **ANSWERS,
    }
    paths: dict[str, Any] = {path: {"post": _post(path, post)} for path, post in _POSTS.items()}
    paths |= {path: {"get": _get(path, get, model)} for path, get in _GETS.items()}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Tandem", "version": version, "description": _ABOUT, "license": _LICENSE},
        "servers": [{"url": "/"}],
        "security": [{"bearer": []}, {"apiKey": []}, {}],
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": _SECURITY},
    }


_LICENSE = {"name": "Apache-2.0", "identifier": "Apache-2.0"}
_SECURITY: dict[str, Any] = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "An API key, or a JWT where the fleet accepts them."},
    "apiKey": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "An API key."},
}


def _post(path: str, post: _Post) -> dict[str, Any]:
    content: dict[str, Any] = {JSON: {"schema": ref(post.answer)}}
    if post.streams:
        content[EVENTS] = {"schema": {"type": "string", "description": "With `stream`: server-sent events."}}
    errors = {status: about for status, about in _ERRORS.items() if post.streams or status != 504}
    found: dict[str, Any] = {
        "operationId": _operation("post", path),
        "summary": post.summary,
        "requestBody": {"required": True, "content": {JSON: {"schema": ref(post.request)}}},
        "responses": {
            "200": {"description": "The answer.", "content": content},
            **{str(status): _error(status, about, post.error) for status, about in errors.items()},
        },
    }
    if post.headers:
        found["parameters"] = [
            {
                "name": name,
                "in": "header",
                "required": False,
                "description": "Accepted; without effect.",
                "schema": {"type": "string"},
            }
            for name in post.headers
        ]
    return found


def _get(path: str, get: _Get, model: Schema) -> dict[str, Any]:
    kind = get.answer if "/" in get.answer else JSON
    schema: Schema = ref(get.answer) if kind != get.answer else {"type": "string" if kind != JSON else "object"}
    responses: dict[str, Any] = {"200": {"description": get.summary + ".", "content": {kind: {"schema": schema}}}}
    for status, about, name in get.also:
        responses[str(status)] = {"description": about, "content": {JSON: {"schema": ref(name)}}}
    if not get.open:
        responses |= {str(status): _error(status, about, "Error") for status, about in _PATH_ERRORS.items()}
    found: dict[str, Any] = {
        "operationId": _operation("get", path),
        "summary": get.summary,
        "responses": responses,
    }
    if get.open:
        found["security"] = []
    if "{model}" in path:
        found["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": model}]
    return found


def _error(status: int, about: str, schema: str) -> dict[str, Any]:
    found: dict[str, Any] = {"description": about, "content": {JSON: {"schema": ref(schema)}}}
    return {**found, "headers": _RETRY} if status in (429, 503) else found


def _operation(method: str, path: str) -> str:
    words = path.replace("{", "").replace("}", "").replace(".", "_").strip("/").replace("/", "_")
    return f"{method}_{words}"
