"""What a caller says in Python, as protobuf. The server checks values; here is refused what protobuf cannot say."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypedDict

from tandem.client.types import Message
from tandem.v1 import inference_pb2 as pb

Priority = Literal["high", "normal", "low"]
Prompt = str | Sequence[int]
Turn = Message | Mapping[str, Any]

_ROLES = {name.removeprefix("MESSAGE_ROLE_").lower(): number for name, number in pb.MessageRole.items() if number}
_PRIORITIES = {name.removeprefix("PRIORITY_").lower(): number for name, number in pb.Priority.items() if number}
_TOOL_MODES = {name.removeprefix("TOOL_MODE_").lower(): number for name, number in pb.ToolMode.items() if number}
_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "seed",
    "logit_bias",
)
_OPTIONS = (
    "max_tokens",
    "n",
    "stop_token_ids",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "logprobs",
    "user",
    "metadata",
    "prompt_cache_key",
    "return_token_ids",
    "ignore_eos",
)


class GenerateParams(TypedDict, total=False):
    """What every call takes; None or left out = the server's default. docs/grpc.md says what each may be."""

    model: str | None
    """Default: the client's."""
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    frequency_penalty: float | None
    presence_penalty: float | None
    repetition_penalty: float | None
    seed: int | None
    logit_bias: Mapping[int, float] | None
    max_tokens: int | None
    n: int | None
    """Number of choices."""
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    include_stop_str_in_output: bool | None
    skip_special_tokens: bool | None
    logprobs: int | None
    """How many of the likeliest tokens to tell for each place, 0 to 20."""
    response_format: Mapping[str, Any] | None
    """`{"type": "json_object"}` or `{"type": "json_schema", "json_schema": {"name": …, "schema": …}}`."""
    regex: str | None
    ebnf: str | None
    priority: Priority | None
    user: str | None
    metadata: Mapping[str, str] | None
    prompt_cache_key: str | None
    return_token_ids: bool | None
    ignore_eos: bool | None
    timeout: float | None
    """Seconds for the whole answer, tries included. Default: the client's."""
    request_id: str | None
    """The request's id in the server's logs and traces. Default: the server makes one."""


class ChatParams(GenerateParams, total=False):
    """What a chat takes beside that."""

    tools: Sequence[Mapping[str, Any]] | None
    """As OpenAI has them: `{"type": "function", "function": {"name": …, "description": …, "parameters": …}}`."""
    tool_choice: str | Mapping[str, Any] | None
    """"auto", "none", "required", or `{"type": "function", "function": {"name": …}}`."""
    parallel_tool_calls: bool | None
    thinking: bool | None
    """Whether the model thinks before it answers."""
    thinking_budget: int | None
    """Most tokens of reasoning."""


def generate_fields(prompt: Prompt, params: GenerateParams, model: str) -> dict[str, Any]:
    """Fields of a `GenerateRequest` or `GenerateOnceRequest`. Raises TypeError and ValueError."""
    _check_names(params, GenerateParams)
    form: dict[str, Any] = {"text": prompt} if isinstance(prompt, str) else {"token_ids": pb.TokenIds(ids=prompt)}
    return {"model": params.get("model") or model, "prompt": pb.Prompt(**form), "options": _options(params)}


def chat_fields(messages: Iterable[Turn], params: ChatParams, model: str) -> dict[str, Any]:
    """Fields of a `ChatRequest` or `ChatOnceRequest`. Raises TypeError and ValueError."""
    _check_names(params, ChatParams)
    fields: dict[str, Any] = {
        "model": params.get("model") or model,
        "messages": [_message(turn) for turn in messages],
        "options": _options(params),
        "tools": [_tool(tool) for tool in params.get("tools") or ()],
        "parallel_tool_calls": params.get("parallel_tool_calls"),
    }
    if (choice := params.get("tool_choice")) is not None:
        fields["tool_choice"] = _tool_choice(choice)
    enabled, budget = params.get("thinking"), params.get("thinking_budget")
    if enabled is not None or budget is not None:
        fields["thinking"] = pb.Thinking(enabled=enabled, budget_tokens=budget)
    return fields


def _check_names(params: Mapping[str, Any], known: type) -> None:
    """A misspelt parameter must not be left out in silence."""
    if unknown := params.keys() - known.__annotations__.keys():
        raise TypeError(f"unknown parameters {sorted(unknown)}; known are {sorted(known.__annotations__)}.")


def _options(params: GenerateParams) -> pb.Options:
    given: Mapping[str, Any] = params
    sampling = pb.Sampling(**{name: given.get(name) for name in _SAMPLING})
    options = pb.Options(sampling=sampling, **{name: given.get(name) for name in _OPTIONS})
    if stop := params.get("stop"):
        options.stop.extend([stop] if isinstance(stop, str) else stop)
    if priority := params.get("priority"):
        options.priority = _known("priority", priority, _PRIORITIES)
    forms = [name for name in ("response_format", "regex", "ebnf") if params.get(name) is not None]
    if len(forms) > 1:
        raise ValueError(f"{' and '.join(forms)} contradict each other; give one of them.")
    if wanted := params.get("response_format"):
        options.response_format.CopyFrom(_response_format(wanted))
    elif forms:
        options.response_format.CopyFrom(pb.ResponseFormat(regex=params.get("regex"), ebnf=params.get("ebnf")))
    return options


def _response_format(wanted: Mapping[str, Any]) -> pb.ResponseFormat:
    kind = wanted.get("type")
    if kind == "text":
        return pb.ResponseFormat()
    if kind == "json_object":
        return pb.ResponseFormat(json_object=pb.JsonObject())
    if kind != "json_schema":
        raise ValueError(f"response_format has the type {kind!r}; it must be 'text', 'json_object' or 'json_schema'.")
    given = _inner("response_format", wanted, "json_schema")
    schema = pb.JsonSchema(
        name=given.get("name"),
        schema=_json(given.get("schema")),
        description=given.get("description"),
        strict=given.get("strict"),
    )
    return pb.ResponseFormat(json_schema=schema)


def _message(turn: Turn) -> pb.Message:
    if isinstance(turn, Message):
        calls = [pb.ToolCall(id=call.id, name=call.name, arguments=call.arguments) for call in turn.tool_calls]
        return pb.Message(
            role=_known("role", turn.role, _ROLES),
            content=turn.content,
            name=turn.name,
            tool_calls=calls,
            tool_call_id=turn.tool_call_id,
            reasoning_content=turn.reasoning_content,
            prefix=turn.prefix,
        )
    known = {"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "prefix"}
    if unknown := turn.keys() - known:
        raise ValueError(f"A message has the unknown fields {sorted(unknown)}; known are {sorted(known)}.")
    plain = {name: turn.get(name) for name in known - {"role", "tool_calls"}}
    calls = [_tool_call(call) for call in turn.get("tool_calls") or ()]
    return pb.Message(role=_known("role", turn.get("role"), _ROLES), tool_calls=calls, **plain)


def _tool_call(call: Mapping[str, Any]) -> pb.ToolCall:
    function = _inner("tool_calls", call, "function")
    return pb.ToolCall(id=call.get("id"), name=function.get("name"), arguments=function.get("arguments"))


def _tool(tool: Mapping[str, Any]) -> pb.Tool:
    function = _inner("tools", tool, "function")
    return pb.Tool(
        function=pb.FunctionDefinition(
            name=function.get("name"),
            description=function.get("description"),
            parameters=_json(function.get("parameters")),
            strict=function.get("strict"),
        )
    )


def _tool_choice(choice: str | Mapping[str, Any]) -> pb.ToolChoice:
    if isinstance(choice, str):
        return pb.ToolChoice(mode=_known("tool_choice", choice, _TOOL_MODES))
    return pb.ToolChoice(function=_inner("tool_choice", choice, "function").get("name"))


def _json(value: Any) -> str | None:
    """JSON text with the keys in their order; text is taken for JSON already."""
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _inner(what: str, outer: Mapping[str, Any], field: str) -> Mapping[str, Any]:
    inner = outer.get(field)
    if isinstance(inner, Mapping):
        return inner
    raise ValueError(f"{what} needs an object in {field!r}, as OpenAI's API has it; got {inner!r:.80}.")


def _known(what: str, name: Any, numbers: Mapping[str, Any]) -> Any:
    if isinstance(name, str) and name in numbers:
        return numbers[name]
    raise ValueError(f"{what} is {name!r:.80}; it must be one of {', '.join(map(repr, numbers))}.")
