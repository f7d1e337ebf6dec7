"""JSON schemas of the fields of requests, by name, for the OpenAPI document.

What a field may be is decided where it is checked (`params`, `requests`, …); a test holds this table to that.
"""

from __future__ import annotations

from typing import Any

from tandem.core.tenants import Priority
from tandem.gateway.api.grammar import MAX_GRAMMAR
from tandem.gateway.api.params import HARMLESS, INT64, MAX_BIASES, MAX_STOPS, REFUSED
from tandem.gateway.api.requests import CHAT_FIELDS, COMPLETION_FIELDS, MAX_CHOICES, MAX_LOGPROBS
from tandem.gateway.api.schemas import MAX_DEPTH
from tandem.gateway.api.thinking import EFFORTS
from tandem.gateway.api.tools import MAX_TOOLS, NAME

Schema = dict[str, Any]

INT32 = 2**31 - 1


def number(low: float, high: float, about: str) -> Schema:
    return {"type": ["number", "null"], "minimum": low, "maximum": high, "description": about}


def integer(low: int, high: int, about: str) -> Schema:
    return {"type": ["integer", "null"], "minimum": low, "maximum": high, "description": about}


def flag(about: str) -> Schema:
    return {"type": ["boolean", "null"], "description": about}


def string(about: str, **more: Any) -> Schema:
    return {"type": ["string", "null"], "description": about, **more}


def listed(values: list[Any], about: str) -> Schema:
    return {"enum": [*values, None], "description": about}


def closed(properties: dict[str, Schema], *required: str, **more: Any) -> Schema:
    """An object with these fields and no others."""
    found: Schema = {"type": "object", "properties": properties, "additionalProperties": False, **more}
    return {**found, "required": list(required)} if required else found


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def nullable(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


_STOPS: Schema = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": MAX_STOPS},
        {"type": "null"},
    ],
    "description": "Strings that end the answer; they are not part of it.",
}
_TOKENS: Schema = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": INT32}}
_NAME: Schema = {"type": "string", "pattern": f"^{NAME.pattern}$"}
METADATA: Schema = {
    "type": ["object", "null"],
    "maxProperties": 16,
    "propertyNames": {"maxLength": 64},
    "additionalProperties": {"type": "string", "maxLength": 512},
    "description": "Labels of your own; kept nowhere.",
}
PRIORITY: Schema = {
    "anyOf": [
        {"enum": [*Priority]},
        {"type": "integer", "minimum": -INT32 - 1, "maximum": INT32},
        {"type": "null"},
    ],
    "description": "The request's class, at most the tenant's own; or a number as in vLLM, lower going first.",
}
_THINKING: Schema = nullable(
    closed(
        {
            "type": {"enum": ["enabled", "disabled", "adaptive"]},
            "budget_tokens": integer(1, INT32, "Tokens of reasoning at most."),
        },
        "type",
    )
)
_TEMPLATE_ARGUMENTS: Schema = nullable(
    closed({"thinking": flag("Whether to think."), "enable_thinking": flag("The same.")})
)

SAMPLING_FIELDS: dict[str, Schema] = {
    "temperature": number(0, 2, "0 always takes the likeliest token."),
    "top_p": number(0, 1, "Sample from the likeliest tokens that have this probability together."),
    "top_k": integer(-1, INT32, "Sample from so many of the likeliest tokens; -1 and 0 = from all."),
    "min_p": number(0, 1, "Leave out tokens less likely than this part of the likeliest one's probability."),
    "frequency_penalty": number(-2, 2, "Makes tokens less likely the more often they have come."),
    "presence_penalty": number(-2, 2, "Makes tokens less likely that have come."),
    "repetition_penalty": {
        "type": ["number", "null"],
        "exclusiveMinimum": 0,
        "maximum": 2,
        "description": "Above 1, makes tokens less likely that are in the prompt or have come.",
    },
    "seed": integer(-INT64, INT64 - 1, "The same seed and request draw the same tokens."),
    "ignore_eos": flag("Go on where the model would end, up to the limit."),
    "stop_token_ids": {
        **_TOKENS,
        "type": ["array", "null"],
        "maxItems": MAX_BIASES,
        "description": "Token ids that end the answer.",
    },
}
_FIELDS: dict[str, Schema] = {
    **SAMPLING_FIELDS,
    "stream": flag("Send the answer as it comes, as server-sent events."),
    "stream_options": nullable(
        closed(
            {
                "include_usage": flag("One more chunk at the end has the usage."),
                "include_obfuscation": flag("Accepted; nothing is padded."),
            }
        )
    ),
    "max_tokens": integer(1, INT32, "Tokens of the answer at most, reasoning included."),
    "max_completion_tokens": integer(1, INT32, "The same as `max_tokens`, and goes before it."),
    "stop": _STOPS,
    "n": integer(1, MAX_CHOICES, "Answers to each prompt."),
    "best_of": integer(1, MAX_CHOICES, "Must equal `n`."),
    "logit_bias": {
        "type": ["object", "null"],
        "maxProperties": MAX_BIASES,
        "propertyNames": {"pattern": "^[0-9]{1,9}$"},
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        "description": "Token id → what to add to its logit.",
    },
    "user": string("Your name for who asks."),
    "metadata": METADATA,
    "priority": PRIORITY,
    "service_tier": listed(["auto", "default", "priority", "flex"], "The request's class in OpenAI's words."),
    "safety_identifier": string("Accepted; without effect."),
    "store": flag("Accepted; nothing is stored."),
    "prompt_cache_key": string("Requests with the same key begin alike: they go to the same workers."),
    "prompt_cache_retention": string("Accepted; without effect."),
    "include_obfuscation": flag("Accepted; without effect."),
    "regex": string("A regular expression that the answer matches.", minLength=1, maxLength=MAX_GRAMMAR),
    "ebnf": string("A grammar that the answer follows, in XGrammar's EBNF.", minLength=1, maxLength=MAX_GRAMMAR),
    "return_token_ids": flag("Token ids beside the text."),
    "skip_special_tokens": flag("False shows special tokens in the text."),
    "spaces_between_special_tokens": flag("Accepted; without effect."),
    "include_stop_str_in_output": flag("The stop string is part of the answer."),
    "response_format": nullable(ref("ResponseFormat")),
    "messages": {"type": "array", "minItems": 1, "items": ref("ChatMessage")},
    "top_logprobs": integer(0, MAX_LOGPROBS, "Alternatives to tell for each token; needs `logprobs`."),
    "tools": {"type": ["array", "null"], "maxItems": MAX_TOOLS, "items": ref("Tool")},
    "tool_choice": {"anyOf": [{"enum": ["none", "auto", "required", None]}, ref("ToolChoice")]},
    "parallel_tool_calls": flag("False: at most one call in an answer."),
    "thinking": _THINKING,
    "thinking_budget": integer(0, INT32, "Tokens of reasoning at most."),
    "enable_thinking": flag("Whether to think."),
    "reasoning_effort": listed([*EFFORTS], "How long to think."),
    "chat_template_kwargs": _TEMPLATE_ARGUMENTS,
    "echo": flag("The text begins with the prompt."),
    "prompt": {
        "anyOf": [
            {"type": "string"},
            {"type": "array", "minItems": 1, "items": {"type": "string"}},
            {**_TOKENS, "minItems": 1},
            {"type": "array", "minItems": 1, "items": {**_TOKENS, "minItems": 1}},
        ]
    },
}
_LOGPROBS = {
    "chat": flag("Tell the logarithm of each token's probability."),
    "completion": {
        "anyOf": [integer(0, MAX_LOGPROBS, ""), {"const": False}],
        "description": "Alternatives to tell for each token.",
    },
}


def request(kind: str, model: Schema) -> Schema:
    """The body of a "chat" or "completion" request."""
    known = CHAT_FIELDS if kind == "chat" else COMPLETION_FIELDS
    fields = {
        field: listed([*values], "Not supported; these values ask for nothing.") for field, values in REFUSED.items()
    }
    fields |= {field: _FIELDS[field] for field in sorted({*known, *SAMPLING_FIELDS, *HARMLESS}) if field in _FIELDS}
    fields |= {"model": model, "logprobs": _LOGPROBS[kind]}
    return closed(fields, "model", "messages" if kind == "chat" else "prompt")


def json_schema(about: str) -> Schema:
    return {"type": "object", "description": f"{about} At most {MAX_DEPTH} levels deep."}


_TEXT_PART = closed({"type": {"const": "text"}, "text": {"type": "string"}}, "type", "text")
_CONTENT: Schema = {"anyOf": [{"type": "string"}, {"type": "array", "items": _TEXT_PART}]}
_CALL = closed(
    {
        "id": {"type": "string"},
        "type": {"const": "function"},
        "function": closed({"name": {"type": "string"}, "arguments": {"type": "string"}}, "name", "arguments"),
    },
    "function",
)
_OF_TOOL = {"type": "string", "description": "The `id` of the call that this is the output of."}
REQUEST_PARTS: dict[str, Schema] = {
    "ChatMessage": {
        "oneOf": [
            closed(
                {
                    "role": {"enum": ["system", "developer", "user"]},
                    "content": _CONTENT,
                    "name": string("Of who speaks."),
                },
                "role",
                "content",
            ),
            {
                "type": "object",
                "properties": {
                    "role": {"const": "assistant"},
                    "content": nullable(_CONTENT),
                    "name": string("Of who speaks."),
                    "tool_calls": {"type": ["array", "null"], "items": _CALL},
                    "reasoning_content": string("Left out of the prompt."),
                    "prefix": flag("This, the last message, is the beginning of the answer."),
                },
                "required": ["role"],
                "anyOf": [
                    {"required": ["content"], "properties": {"content": _CONTENT}},
                    {"required": ["tool_calls"], "properties": {"tool_calls": {"type": "array", "minItems": 1}}},
                ],
            },
            closed(
                {
                    "role": {"const": "tool"},
                    "content": _CONTENT,
                    "name": string("Of the function."),
                    "tool_call_id": _OF_TOOL,
                },
                "role",
                "content",
                "tool_call_id",
            ),
        ]
    },
    "Tool": closed(
        {
            "type": {"const": "function"},
            "function": closed(
                {
                    "name": _NAME,
                    "description": string("What it does."),
                    "parameters": nullable(json_schema("JSON schema of the arguments.")),
                    "strict": flag("Hold the arguments to the schema."),
                },
                "name",
            ),
        },
        "type",
        "function",
    ),
    "ToolChoice": closed(
        {"type": {"const": "function"}, "function": closed({"name": _NAME}, "name")}, "type", "function"
    ),
    "ResponseFormat": {
        "oneOf": [
            closed({"type": {"enum": ["text", "json_object"]}}, "type"),
            closed(
                {
                    "type": {"const": "json_schema"},
                    "json_schema": closed(
                        {
                            "name": _NAME,
                            "description": string("What it is for."),
                            "schema": nullable(json_schema("JSON schema of the answer.")),
                            "strict": flag("Accepted; the answer always has the schema."),
                        },
                        "name",
                    ),
                },
                "type",
                "json_schema",
            ),
        ]
    },
}
