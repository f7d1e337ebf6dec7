"""Requests of `tandem.v1.Inference` as the bodies that the HTTP API takes. Pure: protobuf in, JSON-shaped dict out.

Both fronts have one validation, which is the HTTP API's. So nothing is checked here but what a JSON body cannot even
say: enum values without a name, numbers that are not finite, JSON in a string. What a request leaves unset is not in
the body.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from tandem.gateway.errors import bad_value
from tandem.v1 import inference_pb2 as pb

Body = dict[str, Any]
GenerateAny = pb.GenerateRequest | pb.GenerateOnceRequest
ChatAny = pb.ChatRequest | pb.ChatOnceRequest

_ROLES: Mapping[int, str] = {
    pb.MESSAGE_ROLE_SYSTEM: "system",
    pb.MESSAGE_ROLE_USER: "user",
    pb.MESSAGE_ROLE_ASSISTANT: "assistant",
    pb.MESSAGE_ROLE_TOOL: "tool",
    pb.MESSAGE_ROLE_DEVELOPER: "developer",
}
_PRIORITIES: Mapping[int, str] = {
    pb.PRIORITY_HIGH: "high",
    pb.PRIORITY_NORMAL: "normal",
    pb.PRIORITY_LOW: "low",
}
_TOOL_MODES: Mapping[int, str] = {
    pb.TOOL_MODE_AUTO: "auto",
    pb.TOOL_MODE_NONE: "none",
    pb.TOOL_MODE_REQUIRED: "required",
}
_OPTIONAL = ("max_tokens", "n", "ignore_eos", "include_stop_str_in_output", "skip_special_tokens")


def generate_body(request: GenerateAny) -> Body:
    """The body of `POST /v1/completions` that says what `request` says. Raises ApiError."""
    body = _start(request.model, stream=isinstance(request, pb.GenerateRequest))
    form = request.prompt.WhichOneof("form")
    if form == "text":
        body["prompt"] = request.prompt.text
    elif form == "token_ids":
        body["prompt"] = list(request.prompt.token_ids.ids)
    if request.HasField("options"):
        _options(body, request.options)
        if request.options.HasField("logprobs"):
            body["logprobs"] = request.options.logprobs
    return body


def chat_body(request: ChatAny) -> Body:
    """The body of `POST /v1/chat/completions` that says what `request` says. Raises ApiError."""
    body = _start(request.model, stream=isinstance(request, pb.ChatRequest))
    body["messages"] = [_message(f"messages[{place}]", message) for place, message in enumerate(request.messages)]
    if request.HasField("options"):
        _options(body, request.options)
        if request.options.HasField("logprobs"):
            body["logprobs"] = True
            body["top_logprobs"] = request.options.logprobs
    if request.tools:
        body["tools"] = [_tool(f"tools[{place}]", tool) for place, tool in enumerate(request.tools)]
    choice = _tool_choice(request.tool_choice)
    if choice is not None:
        body["tool_choice"] = choice
    if request.HasField("parallel_tool_calls"):
        body["parallel_tool_calls"] = request.parallel_tool_calls
    if request.HasField("thinking"):
        body["thinking"] = _thinking(request.thinking)
    return body


def _start(model: str, *, stream: bool) -> Body:
    body: Body = {"stream": stream}
    if model:
        body["model"] = model
    return body


def _options(body: Body, options: pb.Options) -> None:
    for field, value in options.sampling.ListFields():
        if field.name == "logit_bias":
            body["logit_bias"] = {str(token): _finite("logit_bias", bias) for token, bias in value.items()}
        else:
            body[field.name] = _finite(field.name, value)
    for name in _OPTIONAL:
        if options.HasField(name):
            body[name] = getattr(options, name)
    for name in ("stop", "stop_token_ids"):
        if values := getattr(options, name):
            body[name] = list(values)
    for name in ("user", "prompt_cache_key"):
        if value := getattr(options, name):
            body[name] = value
    form = options.response_format.WhichOneof("form")
    if form in ("regex", "ebnf"):
        body[form] = getattr(options.response_format, form)
    elif form is not None:
        body["response_format"] = _response_format(options.response_format)
    if options.priority:
        body["priority"] = _name("priority", options.priority, _PRIORITIES)
    if options.metadata:
        body["metadata"] = dict(options.metadata)
    if options.return_token_ids:
        body["return_token_ids"] = True


def _response_format(wanted: pb.ResponseFormat) -> Body:
    if wanted.HasField("json_object"):
        return {"type": "json_object"}
    schema = wanted.json_schema
    where = "response_format.json_schema"
    inner: Body = {"name": schema.name, "schema": _json(f"{where}.schema", schema.schema)}
    if schema.description:
        inner["description"] = schema.description
    if schema.HasField("strict"):
        inner["strict"] = schema.strict
    return {"type": "json_schema", "json_schema": inner}


def _thinking(thinking: pb.Thinking) -> Body:
    body: Body = {"type": "enabled" if thinking.enabled else "disabled"}
    if not thinking.HasField("enabled"):
        body["type"] = "adaptive"  # the model's own way
    if thinking.HasField("budget_tokens"):
        body["budget_tokens"] = thinking.budget_tokens
    return body


def _message(where: str, message: pb.Message) -> Body:
    body: Body = {"role": _name(f"{where}.role", message.role, _ROLES)}
    if message.HasField("content"):
        body["content"] = message.content
    for name in ("name", "tool_call_id", "reasoning_content"):
        if value := getattr(message, name):
            body[name] = value
    if message.tool_calls:
        body["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    if message.prefix:
        body["prefix"] = True
    return body


def _tool(where: str, tool: pb.Tool) -> Body:
    function = tool.function
    inner: Body = {"name": function.name}
    if function.description:
        inner["description"] = function.description
    if function.parameters:
        inner["parameters"] = _json(f"{where}.function.parameters", function.parameters)
    if function.HasField("strict"):
        inner["strict"] = function.strict
    return {"type": "function", "function": inner}


def _tool_choice(choice: pb.ToolChoice) -> str | Body | None:
    form = choice.WhichOneof("choice")
    if form == "function":
        return {"type": "function", "function": {"name": choice.function}}
    if form == "mode" and choice.mode:
        return _name("tool_choice", choice.mode, _TOOL_MODES)
    return None


def _name(param: str, value: int, names: Mapping[int, str]) -> str:
    """The HTTP API's word for an enum value, which may be one that this version does not know."""
    if name := names.get(value):
        return name
    if not value:
        raise bad_value(param, f"Missing required parameter: '{param}'.", "missing_required_parameter")
    allowed = ", ".join(f"{name!r}" for name in names.values())
    raise bad_value(param, f"'{param}' has the value {value}, which has no meaning here; it must be one of {allowed}.")


def _finite(param: str, value: float) -> float:
    if math.isfinite(value):
        return value
    raise bad_value(param, f"Invalid value for '{param}': expected a finite number, but got {value} instead.")


def _json(param: str, text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise bad_value(param, f"'{param}' is not valid JSON: {error}. Write the schema as JSON text.") from error
