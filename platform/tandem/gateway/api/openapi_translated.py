"""JSON schemas of the requests of `/v1/messages`, `/v1/responses`, `/tokenize` and `/detokenize`."""

from __future__ import annotations

from typing import Any

from tandem.gateway.api.openapi_fields import (
    INT32,
    METADATA,
    PRIORITY,
    SAMPLING_FIELDS,
    Schema,
    closed,
    flag,
    integer,
    json_schema,
    listed,
    nullable,
    number,
    ref,
    string,
)
from tandem.gateway.api.params import MAX_STOPS
from tandem.gateway.api.requests import MAX_LOGPROBS
from tandem.gateway.api.responses_api import INCLUDABLE
from tandem.gateway.api.thinking import EFFORTS
from tandem.gateway.api.token_api import MAX_TOKENS
from tandem.gateway.api.tools import MAX_TOOLS, NAME

_NAME: Schema = {"type": "string", "pattern": f"^{NAME.pattern}$"}
_CACHE: Schema = {"type": ["object", "null"], "description": "Accepted: the prefix cache is always on."}
_TEXT: Schema = {"type": "string"}


def _block(kind: str, fields: dict[str, Schema], *required: str) -> Schema:
    return closed({"type": {"const": kind}, "cache_control": _CACHE, **fields}, "type", *required)


_TEXT_BLOCK = _block("text", {"text": _TEXT, "citations": {"type": ["array", "null"]}}, "text")
_RESULT_BLOCK = _block(
    "tool_result",
    {
        "tool_use_id": _TEXT,
        "content": {"anyOf": [_TEXT, {"type": "array", "items": _TEXT_BLOCK}, {"type": "null"}]},
        "is_error": flag("The tool failed: the model is told so."),
    },
    "tool_use_id",
)
_USE_BLOCK = _block("tool_use", {"id": _TEXT, "name": _TEXT, "input": {"type": "object"}}, "id", "name", "input")
_THINKING_BLOCK = closed({"type": {"const": "thinking"}, "thinking": _TEXT, "signature": _TEXT}, "type")
_REDACTED_BLOCK = closed({"type": {"const": "redacted_thinking"}, "data": _TEXT}, "type")


def _turn(role: str, *blocks: Schema) -> Schema:
    content = {"anyOf": [_TEXT, {"type": "array", "minItems": 1, "items": {"oneOf": list(blocks)}}]}
    return closed({"role": {"const": role}, "content": content}, "role", "content")


_CHOICE_FIELDS: dict[str, Schema] = {"disable_parallel_tool_use": flag("True: at most one call in an answer.")}
_DISPLAY = listed(["summarized", "omitted"], "omitted: the thinking block is empty.")
_TOOL_FIELDS: dict[str, Schema] = {
    "type": listed(["custom"], "Your own tool; no tools run on the server."),
    "name": _NAME,
    "description": string("What it does."),
    "input_schema": json_schema("JSON schema of the input."),
    "strict": flag("Hold the input to the schema."),
    "cache_control": _CACHE,
}
_COUNTED: dict[str, Schema] = {
    "messages": {"type": "array", "minItems": 1, "items": ref("AnthropicTurn")},
    "system": {"anyOf": [_TEXT, {"type": "array", "items": _TEXT_BLOCK}, {"type": "null"}]},
    "tools": {
        "type": ["array", "null"],
        "maxItems": MAX_TOOLS,
        "items": closed(_TOOL_FIELDS, "name", "input_schema"),
    },
    "tool_choice": nullable(
        {
            "oneOf": [
                closed({"type": {"enum": ["auto", "any"]}, **_CHOICE_FIELDS}, "type"),
                closed({"type": {"const": "tool"}, "name": _NAME, **_CHOICE_FIELDS}, "type", "name"),
                closed({"type": {"const": "none"}}, "type"),
            ]
        }
    ),
    "thinking": nullable(
        {
            "oneOf": [
                closed(
                    {
                        "type": {"const": "enabled"},
                        "budget_tokens": {"type": "integer", "minimum": 1, "maximum": INT32},
                        "display": _DISPLAY,
                    },
                    "type",
                    "budget_tokens",
                ),
                closed({"type": {"const": "adaptive"}, "display": _DISPLAY}, "type"),
                closed({"type": {"const": "disabled"}}, "type"),
            ]
        }
    ),
    "output_config": nullable(
        closed(
            {
                "effort": listed(["low", "medium", "high", "xhigh", "max"], "How long to think."),
                "format": nullable(
                    closed(
                        {"type": {"const": "json_schema"}, "schema": json_schema("Of the answer.")}, "type", "schema"
                    )
                ),
            }
        )
    ),
    "cache_control": _CACHE,
    "user_profile_id": string("Accepted; without effect."),
    "workspace_id": string("Accepted; without effect."),
}


def messages_request(model: Schema) -> Schema:
    """The body of `POST /v1/messages`."""
    fields = {
        "model": model,
        **_COUNTED,
        "max_tokens": {"type": "integer", "minimum": 1, "maximum": INT32},
        "stop_sequences": {
            "type": ["array", "null"],
            "items": {"type": "string", "minLength": 1},
            "maxItems": MAX_STOPS,
        },
        "stream": SAMPLING_FIELDS["ignore_eos"] | {"description": "Send the answer as server-sent events."},
        "temperature": number(0, 2, "0 always takes the likeliest token."),
        "top_p": number(0, 1, "Sample from the likeliest tokens that have this probability together."),
        "top_k": integer(0, INT32, "Sample from so many of the likeliest tokens."),
        "metadata": nullable(closed({"user_id": string("Your name for who asks.")})),
        "service_tier": listed(["auto", "standard_only"], "The request's class."),
    }
    return closed(fields, "model", "messages", "max_tokens")


def count_tokens_request(model: Schema) -> Schema:
    """The body of `POST /v1/messages/count_tokens`."""
    return closed({"model": model, **_COUNTED}, "model", "messages")


def _part(*kinds: str) -> Schema:
    fields: dict[str, Schema] = {"type": {"enum": list(kinds)}, "text": _TEXT}
    return {"type": "object", "properties": fields, "required": ["type", "text"]}


def _item(kind: str, fields: dict[str, Schema], *required: str) -> Schema:
    return {"type": "object", "properties": {"type": {"const": kind}, **fields}, "required": ["type", *required]}


_PARTS: Schema = {"anyOf": [_TEXT, {"type": "array", "items": _part("input_text", "output_text")}]}


def responses_request(model: Schema) -> Schema:
    """The body of `POST /v1/responses`."""
    stateless = "Refused: this server keeps no responses."
    fields: dict[str, Schema] = {
        **SAMPLING_FIELDS,
        "model": model,
        "input": {"anyOf": [_TEXT, {"type": "array", "minItems": 1, "items": ref("InputItem")}]},
        "instructions": string("A system message before the input."),
        "max_output_tokens": integer(1, INT32, "Tokens of the answer at most, reasoning included."),
        "max_tool_calls": integer(1, INT32, "Of tools of OpenAI's own: none run here."),
        "stream": flag("Send the answer as server-sent events."),
        "stream_options": nullable(closed({"include_obfuscation": flag("Accepted; nothing is padded.")})),
        "tools": {"type": ["array", "null"], "maxItems": MAX_TOOLS, "items": ref("FunctionTool")},
        "tool_choice": {
            "anyOf": [
                {"enum": ["none", "auto", "required", None]},
                closed({"type": {"const": "function"}, "name": _NAME}, "type", "name"),
            ]
        },
        "parallel_tool_calls": flag("False: at most one call in an answer."),
        "text": nullable(
            closed({"format": nullable(ref("TextFormat")), "verbosity": listed(["medium"], "There is no other.")})
        ),
        "reasoning": nullable(
            closed(
                {
                    "effort": listed([*EFFORTS], "How long to think."),
                    "summary": listed(["auto"], "The reasoning is told in full."),
                    "generate_summary": listed(["auto"], "The same."),
                }
            )
        ),
        "include": {"type": ["array", "null"], "items": {"enum": list(INCLUDABLE)}},
        "top_logprobs": integer(0, MAX_LOGPROBS, f"Needs '{INCLUDABLE[0]}' in `include`."),
        "metadata": METADATA,
        "user": string("Your name for who asks."),
        "safety_identifier": string("Accepted; without effect."),
        "prompt_cache_key": string("Requests with the same key begin alike: they go to the same workers."),
        "prompt_cache_retention": string("Accepted; without effect."),
        "prompt_cache_options": {"type": ["object", "null"], "description": "Accepted; without effect."},
        "service_tier": listed(["auto", "default", "priority", "flex"], "The request's class."),
        "priority": PRIORITY,
        "store": listed([False], "Nothing is stored."),
        "truncation": listed(["disabled"], "Nothing is ever dropped of the input."),
        "background": listed([False], stateless),
        "previous_response_id": {"type": "null", "description": stateless},
        "conversation": {"type": "null", "description": stateless},
    }
    return closed(fields, "model", "input")


def tokenize_request(model: Schema) -> Schema:
    """The body of `POST /tokenize`: a text or a conversation."""
    strings = {"return_token_strs": flag("Tell each token's string, too.")}
    return {
        "oneOf": [
            closed(
                {
                    "model": nullable(model),
                    "prompt": _TEXT,
                    "add_special_tokens": flag("With the special tokens that a completion gets (the default)."),
                    **strings,
                },
                "prompt",
            ),
            closed(
                {
                    "model": nullable(model),
                    "messages": {"type": "array", "minItems": 1, "items": ref("ChatMessage")},
                    "tools": {"type": ["array", "null"], "maxItems": MAX_TOOLS, "items": ref("Tool")},
                    "add_special_tokens": listed([False], "The template writes them."),
                    "add_generation_prompt": listed([True], "As a conversation is answered."),
                    "continue_final_message": listed([False], "As a conversation is answered."),
                    **strings,
                },
                "messages",
            ),
        ]
    }


def detokenize_request(model: Schema, vocab_size: int) -> Schema:
    """The body of `POST /detokenize`."""
    token: dict[str, Any] = {"type": "integer", "minimum": 0, "maximum": vocab_size - 1}
    tokens = {"type": "array", "items": token, "maxItems": MAX_TOKENS}
    return closed({"model": nullable(model), "tokens": tokens}, "tokens")


TRANSLATED_PARTS: dict[str, Schema] = {
    "AnthropicTurn": {
        "oneOf": [
            _turn("user", _TEXT_BLOCK, _RESULT_BLOCK),
            _turn("assistant", _TEXT_BLOCK, _USE_BLOCK, _THINKING_BLOCK, _REDACTED_BLOCK),
            _turn("system", _TEXT_BLOCK),
        ]
    },
    "InputItem": {
        "oneOf": [
            {
                "type": "object",
                "properties": {
                    "type": {"enum": ["message", None]},
                    "role": {"enum": ["user", "assistant", "system", "developer"]},
                    "content": _PARTS,
                },
                "required": ["role", "content"],
            },
            _item(
                "function_call", {"call_id": _TEXT, "name": _TEXT, "arguments": _TEXT}, "call_id", "name", "arguments"
            ),
            _item("function_call_output", {"call_id": _TEXT, "output": _PARTS}, "call_id", "output"),
            _item("reasoning", {}),
        ]
    },
    "FunctionTool": closed(
        {
            "type": {"const": "function"},
            "name": _NAME,
            "description": string("What it does."),
            "parameters": nullable(json_schema("JSON schema of the arguments.")),
            "strict": flag("Hold the arguments to the schema."),
        },
        "type",
        "name",
    ),
    "TextFormat": {
        "oneOf": [
            closed({"type": {"enum": ["text", "json_object"]}}, "type"),
            closed(
                {
                    "type": {"const": "json_schema"},
                    "name": _NAME,
                    "schema": json_schema("JSON schema of the answer."),
                    "description": string("What it is for."),
                    "strict": flag("Accepted; the answer always has the schema."),
                },
                "type",
                "name",
                "schema",
            ),
        ]
    },
}
