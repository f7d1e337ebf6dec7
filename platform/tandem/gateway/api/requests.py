"""Request bodies, checked once at the edge: JSON in, `Wanted` out, or an ApiError that names the field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from tandem.core.tenants import Priority
from tandem.gateway.api.grammar import response_grammar
from tandem.gateway.api.messages import checked_messages
from tandem.gateway.api.params import (
    check_fields,
    flag,
    integer,
    metadata,
    object_of,
    priority,
    sampling_params,
    stop_strings,
    text,
    wrong_type,
)
from tandem.gateway.api.thinking import Thinking, checked_thinking
from tandem.gateway.api.tools import Choice, checked_choice, checked_tools
from tandem.gateway.errors import ApiError, bad_value, unsupported
from tandem.gateway.text.model_card import PROMPT_RESERVE, ModelCard

CHAT_DEFAULT_TOKENS = 32_768
"""Tokens of a chat answer when the request says nothing, as DeepSeek's API has it for R1 (reasoning included)."""
COMPLETION_DEFAULT_TOKENS = 16
"""The same for /v1/completions, as OpenAI's API has it."""
MAX_CHOICES = 128
"""Answers that one request may ask for, over all of its prompts."""
MAX_LOGPROBS = 20

COMMON_FIELDS = frozenset(
    {
        *("model", "stream", "stream_options", "max_tokens", "stop", "n", "logprobs", "logit_bias"),
        *("user", "metadata", "priority", "service_tier", "prompt_cache_key", "regex", "ebnf"),
        *("return_token_ids", "skip_special_tokens", "spaces_between_special_tokens", "include_stop_str_in_output"),
    }
)
CHAT_FIELDS = COMMON_FIELDS | {
    *("messages", "max_completion_tokens", "top_logprobs", "response_format"),
    *("tools", "tool_choice", "parallel_tool_calls"),
    *("thinking", "thinking_budget", "enable_thinking", "reasoning_effort", "chat_template_kwargs"),
}
COMPLETION_FIELDS = COMMON_FIELDS | {"prompt", "echo", "best_of", "response_format"}


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What a request asks for, checked. Either `messages` or `prompts` is what to answer."""

    model: str
    stream: bool = False
    include_usage: bool = False
    return_token_ids: bool = False
    """Our extension, as vLLM has it: token ids beside the text."""
    max_tokens: int | None = None
    default_tokens: int = CHAT_DEFAULT_TOKENS
    stops: tuple[str, ...] = ()
    include_stop: bool = False
    """The stop string that ends an answer is part of it."""
    special_tokens: bool = False
    """Special tokens are shown as text."""
    sampling: dict[str, Any] = {}
    """SGLang's `sampling_params`, all but what depends on the prompt and the choice (see `choices.sampling_for`)."""
    grammar: dict[str, Any] | None = None
    """XGrammar's structural-tag format that the content must have."""
    engine: dict[str, Any] = {}
    """Further fields of SGLang's `/generate` body, the same for prefill and decode."""
    messages: list[dict[str, Any]] | None = None
    prompts: tuple[str | list[int], ...] = ()
    """Of a completion: each a text or token ids, and each answered `n` times."""
    n: int = 1
    echo: bool = False
    """A completion's text begins with its prompt."""
    logprobs: int | None = None
    """How many alternatives to tell for each token, 0 to 20; None = no logprobs at all."""
    tools: list[dict[str, Any]] = []
    tool_choice: Choice = Choice("none")
    parallel_tool_calls: bool = True
    prefix: bool = False
    """The last message is the beginning of the answer (DeepSeek's chat prefix completion)."""
    thinking: Thinking = Thinking()
    priority: Priority | None = None
    """None = the tenant's own."""
    service_tier: str | None = None
    """As asked for."""
    session: str = ""
    """`prompt_cache_key`: requests with the same one begin alike."""
    user: str = ""
    metadata: dict[str, str] = {}

    @property
    def choices(self) -> int:
        """Answers that the reply holds."""
        return self.n * max(1, len(self.prompts))

    @property
    def thinking_budget(self) -> int | None:
        return self.thinking.budget


def parse_json(body: bytes) -> dict[str, Any]:
    """The JSON object of a request; raises ApiError."""
    try:
        found = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, f"We could not parse the JSON body of your request: {error}") from error
    if not isinstance(found, dict):
        raise ApiError(400, "The body of the request must be a JSON object.")
    return found


def chat_request(body: Mapping[str, Any], card: ModelCard) -> Wanted:
    """`POST /v1/chat/completions`. Raises ApiError."""
    _check_model(body, card)
    check_fields(body, CHAT_FIELDS)
    limit_field = "max_tokens" if body.get("max_completion_tokens") is None else "max_completion_tokens"
    messages, prefix = checked_messages(body.get("messages"))
    tools = checked_tools(body.get("tools"))
    choice = checked_choice(body.get("tool_choice"), tools)
    grammar = response_grammar(body)
    if grammar is not None and choice.mode in ("required", "function"):
        raise unsupported("tool_choice", "an answer cannot be a tool call and have a 'response_format' at once")
    return _wanted(
        body,
        card,
        limit_field=limit_field,
        default_tokens=CHAT_DEFAULT_TOKENS,
        grammar=grammar,
        logprobs=_chat_logprobs(body),
        messages=messages,
        prefix=prefix,
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=flag(body, "parallel_tool_calls", default=True),
        thinking=checked_thinking(body),
    )


def completion_request(body: Mapping[str, Any], card: ModelCard) -> Wanted:
    """`POST /v1/completions`. Raises ApiError."""
    _check_model(body, card)
    check_fields(body, COMPLETION_FIELDS)
    logprobs, echo = body.get("logprobs"), flag(body, "echo")
    if isinstance(logprobs, bool) and not logprobs:
        logprobs = None
    if logprobs is not None:
        logprobs = integer(0, MAX_LOGPROBS)("logprobs", logprobs)
        if echo:
            raise unsupported("echo", "not together with 'logprobs', as those of a prompt are not computed")
    best, n = body.get("best_of"), body.get("n")
    if best is not None and integer(1, MAX_CHOICES)("best_of", best) != (1 if n is None else n):
        raise unsupported("best_of", "it must equal 'n': all answers are returned")
    return _wanted(
        body,
        card,
        limit_field="max_tokens",
        default_tokens=COMPLETION_DEFAULT_TOKENS,
        grammar=response_grammar(body),
        logprobs=logprobs,
        prompts=_prompts(body.get("prompt"), card),
        echo=echo,
    )


def check_length(wanted: Wanted, prompt_tokens: int, card: ModelCard) -> int:
    """How many tokens the answer may have; raises ApiError when prompt and answer do not fit."""
    param = "messages" if wanted.messages is not None else "prompt"
    if prompt_tokens == 0:
        raise bad_value(param, f"'{param}' is empty: there is nothing to continue.", "empty_prompt")
    asked = wanted.max_tokens or 0
    if prompt_tokens > card.context - PROMPT_RESERVE or prompt_tokens + asked > card.context:
        answer = f" and {asked} in the answer" if asked else ""
        message = (
            f"This model's maximum context length is {card.context} tokens. However, your request has {prompt_tokens} "
            f"tokens in the {param}{answer}. Please shorten one or the other."
        )
        raise ApiError(400, message, param=param, code="context_length_exceeded")
    return wanted.max_tokens or min(wanted.default_tokens, card.context - prompt_tokens)


def model_not_found(name: str) -> ApiError:
    message = f"The model `{name}` does not exist or you do not have access to it."
    return ApiError(404, message, param="model", code="model_not_found")


def _check_model(body: Mapping[str, Any], card: ModelCard) -> None:
    name = body.get("model")
    if name is None:
        raise bad_value("model", "Missing required parameter: 'model'.", "missing_required_parameter")
    if text("model", name) != card.name:
        raise model_not_found(name)


def _wanted(body: Mapping[str, Any], card: ModelCard, *, limit_field: str, **fields: Any) -> Wanted:
    """What both endpoints read alike, with `fields`, which are one endpoint's own."""
    stream = flag(body, "stream")
    limit, stop, tier = body.get(limit_field), body.get("stop"), body.get("service_tier")
    n = 1 if body.get("n") is None else integer(1, MAX_CHOICES)("n", body["n"])
    prompts = len(fields.get("prompts", ()))
    if n * prompts > MAX_CHOICES:
        message = f"The request asks for {n} answers to each of {prompts} prompts; the most is {MAX_CHOICES} in all."
        raise bad_value("n" if n > 1 else "prompt", message, "array_above_max_length")
    logprobs = fields["logprobs"]
    flag(body, "spaces_between_special_tokens", default=True)
    return Wanted(
        model=card.name,
        stream=stream,
        include_usage=_include_usage(body.get("stream_options"), stream),
        return_token_ids=flag(body, "return_token_ids"),
        max_tokens=None if limit is None else integer(1, 2**31 - 1)(limit_field, limit),
        stops=() if stop is None else stop_strings("stop", stop),
        include_stop=flag(body, "include_stop_str_in_output"),
        special_tokens=not flag(body, "skip_special_tokens", default=True),
        sampling=sampling_params(body, card.sampling, card.vocab_size),
        engine={} if logprobs is None else {"return_logprob": True, "top_logprobs_num": logprobs},
        n=n,
        priority=priority(body),
        service_tier=tier,
        session="" if body.get("prompt_cache_key") is None else text("prompt_cache_key", body["prompt_cache_key"]),
        user="" if body.get("user") is None else text("user", body["user"]),
        metadata={} if body.get("metadata") is None else metadata("metadata", body["metadata"]),
        **fields,
    )


def _include_usage(options: Any, stream: bool) -> bool:
    if options is None:
        return False
    object_of("stream_options", options)
    if not stream:
        raise bad_value("stream_options", "'stream_options' is only allowed when 'stream' is true.")
    for key in options:
        if key not in ("include_usage", "include_obfuscation"):
            raise unsupported(f"stream_options.{key:.80}")
    return flag(options, "include_usage", where="stream_options.")


def _chat_logprobs(body: Mapping[str, Any]) -> int | None:
    asked, top = flag(body, "logprobs"), body.get("top_logprobs")
    top = 0 if top is None else integer(0, MAX_LOGPROBS)("top_logprobs", top)
    if top and not asked:
        raise bad_value("top_logprobs", "'top_logprobs' is only allowed when 'logprobs' is true.")
    return top if asked else None


def _prompts(prompt: Any, card: ModelCard) -> tuple[str | list[int], ...]:
    if prompt is None:
        raise bad_value("prompt", "Missing required parameter: 'prompt'.", "missing_required_parameter")
    if isinstance(prompt, str):
        return (prompt,)
    expected = "a string, an array of strings, an array of token ids, or an array of such arrays"
    if not isinstance(prompt, list):
        raise wrong_type("prompt", expected, prompt)
    if not prompt:
        raise bad_value("prompt", "'prompt' is empty: there is nothing to continue.", "empty_prompt")
    if all(isinstance(part, str) for part in prompt):
        return tuple(prompt)
    lists = prompt if isinstance(prompt[0], list) else [prompt]
    for ids in lists:
        if not isinstance(ids, list) or not all(type(token) is int for token in ids):
            raise wrong_type("prompt", expected, prompt)
        if ids and not 0 <= min(ids) <= max(ids) < card.vocab_size:
            raise bad_value("prompt", f"'prompt' has token ids outside 0 … {card.vocab_size - 1}.")
    return tuple(lists)
