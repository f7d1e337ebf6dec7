"""JSON schemas of the gateway's answers. They may have more fields than these: clients must not mind."""

from __future__ import annotations

from tandem.gateway.api.openapi_fields import Schema, ref

_TEXT: Schema = {"type": "string"}
_TEXT_OR_NULL: Schema = {"type": ["string", "null"]}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_IDS: Schema = {"type": "array", "items": {"type": "integer"}}


def found(**fields: Schema) -> Schema:
    """An object that always has these fields."""
    return {"type": "object", "properties": fields, "required": list(fields)}


def _with(schema: Schema, **optional: Schema) -> Schema:
    return {**schema, "properties": {**schema["properties"], **optional}}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


_REASONS: Schema = {"enum": ["stop", "length", "tool_calls"]}
_CALL = found(id=_TEXT, type={"const": "function"}, function=found(name=_TEXT, arguments=_TEXT))
_CHAT_CHOICE = _with(
    found(
        index=_COUNT,
        message=_with(
            found(role={"const": "assistant"}, content=_TEXT_OR_NULL), reasoning_content=_TEXT, tool_calls=_list(_CALL)
        ),
        logprobs={"type": ["object", "null"]},
        finish_reason=_REASONS,
    ),
    token_ids=_IDS,
)
_TEXT_CHOICE = _with(
    found(index=_COUNT, text=_TEXT, logprobs={"type": ["object", "null"]}, finish_reason=_REASONS), token_ids=_IDS
)

ANSWERS: dict[str, Schema] = {
    "Usage": _with(
        found(
            prompt_tokens=_COUNT,
            completion_tokens=_COUNT,
            total_tokens=_COUNT,
            prompt_tokens_details=found(cached_tokens=_COUNT),
            prompt_cache_hit_tokens=_COUNT,
            prompt_cache_miss_tokens=_COUNT,
        ),
        completion_tokens_details=found(reasoning_tokens=_COUNT),
    ),
    "ChatCompletion": found(
        id=_TEXT,
        object={"const": "chat.completion"},
        created=_COUNT,
        model=_TEXT,
        choices=_list(_CHAT_CHOICE),
        usage=ref("Usage"),
    ),
    "Completion": found(
        id=_TEXT,
        object={"const": "text_completion"},
        created=_COUNT,
        model=_TEXT,
        choices=_list(_TEXT_CHOICE),
        usage=ref("Usage"),
    ),
    "Response": found(
        id=_TEXT,
        object={"const": "response"},
        created_at=_COUNT,
        model=_TEXT,
        status={"enum": ["completed", "incomplete"]},
        error={"type": "null"},
        incomplete_details={"type": ["object", "null"]},
        output=_list(found(id=_TEXT, type={"enum": ["reasoning", "message", "function_call"]}, status=_TEXT)),
        usage=found(
            input_tokens=_COUNT,
            input_tokens_details=found(cached_tokens=_COUNT),
            output_tokens=_COUNT,
            output_tokens_details=found(reasoning_tokens=_COUNT),
            total_tokens=_COUNT,
        ),
    ),
    "Message": found(
        id=_TEXT,
        type={"const": "message"},
        role={"const": "assistant"},
        model=_TEXT,
        content=_list(found(type={"enum": ["thinking", "text", "tool_use"]})),
        stop_reason={"enum": ["end_turn", "max_tokens", "stop_sequence", "tool_use"]},
        stop_sequence=_TEXT_OR_NULL,
        usage=found(
            input_tokens=_COUNT,
            output_tokens=_COUNT,
            cache_read_input_tokens=_COUNT,
            cache_creation_input_tokens=_COUNT,
        ),
    ),
    "TokenCount": found(input_tokens=_COUNT),
    "Tokens": found(
        count=_COUNT, max_model_len=_COUNT, tokens=_IDS, token_strs={"type": ["array", "null"], "items": _TEXT}
    ),
    "Text": found(prompt=_TEXT),
    "Model": found(
        id=_TEXT, object={"const": "model"}, created=_COUNT, owned_by=_TEXT, max_model_len={"type": "integer"}
    ),
    "Models": found(object={"const": "list"}, data=_list(ref("Model"))),
    "Health": found(status={"enum": ["ok", "leaving"]}, replica=_TEXT, fleet=_TEXT),
    "Ready": _with(found(status={"enum": ["ready", "not ready"]}), reason=_TEXT),
    "Fleet": found(name=_TEXT, groups=_list({"type": "object"}), gateway={"type": "object"}),
    "Error": found(error=found(message=_TEXT, type=_TEXT, param=_TEXT_OR_NULL, code=_TEXT_OR_NULL)),
    "AnthropicError": found(type={"const": "error"}, error=found(type=_TEXT, message=_TEXT), request_id=_TEXT),
}
