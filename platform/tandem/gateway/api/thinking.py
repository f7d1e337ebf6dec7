"""How long a model may think, in the words of all the APIs that have one for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from tandem.gateway.api.params import flag, integer, object_of, one_of
from tandem.gateway.errors import bad_value, unsupported

EFFORTS: dict[str, int | None] = {
    "none": 0,
    "minimal": 512,
    "low": 2048,
    "medium": None,
    "high": None,
    "xhigh": None,
    "max": None,
}
"""`reasoning_effort` → tokens of reasoning at most. R1 has no effort of its own: from "medium" on it thinks as long as
it likes; "none" is the same as no thinking at all."""


class Thinking(NamedTuple):
    """What a request says of the reasoning."""

    enabled: bool | None = None
    """None = as the model does it by itself."""
    budget: int | None = None
    """Tokens at most; None = as many as the answer may have."""


def checked_thinking(body: Mapping[str, Any]) -> Thinking:
    """From `thinking`, `thinking_budget`, `enable_thinking`, `reasoning_effort` and `chat_template_kwargs`; what is
    said more than once must not disagree. Raises ApiError."""
    enabled: dict[str, bool] = {}
    budgets: dict[str, int] = {}
    if body.get("thinking") is not None:
        _thinking(object_of("thinking", body["thinking"]), enabled, budgets)
    if body.get("enable_thinking") is not None:
        enabled["enable_thinking"] = flag(body, "enable_thinking")
    if body.get("chat_template_kwargs") is not None:
        kwargs = object_of("chat_template_kwargs", body["chat_template_kwargs"])
        for field in kwargs:
            name = f"chat_template_kwargs.{field:.80}"
            if field not in ("thinking", "enable_thinking"):
                raise unsupported(name, "only 'thinking' and 'enable_thinking' are")
            if kwargs[field] is not None:
                enabled[name] = flag(kwargs, field, where="chat_template_kwargs.")
    if body.get("thinking_budget") is not None:
        budgets["thinking_budget"] = integer(0, 2**31 - 1)("thinking_budget", body["thinking_budget"])
    if (effort := body.get("reasoning_effort")) is not None:
        budget = EFFORTS[one_of(*EFFORTS)("reasoning_effort", effort)]
        if budget == 0:
            enabled["reasoning_effort"] = False
        elif budget is not None:
            budgets["reasoning_effort"] = budget
    said = set(enabled.values())
    if len(said) > 1:
        fields = ", ".join(f"'{field}'" for field in enabled)
        raise bad_value(next(iter(enabled)), f"These fields contradict each other: {fields}.")
    # An explicit number goes before an effort.
    explicit = [budget for field, budget in budgets.items() if field != "reasoning_effort"]
    if len(set(explicit)) > 1:
        raise bad_value("thinking_budget", "'thinking_budget' and 'thinking.budget_tokens' differ; give one of them.")
    budget = next(iter(explicit), budgets.get("reasoning_effort"))
    return Thinking(said.pop() if said else None, budget)


def _thinking(thinking: Mapping[str, Any], enabled: dict[str, bool], budgets: dict[str, int]) -> None:
    for field in thinking:
        if field not in ("type", "budget_tokens"):
            raise unsupported(f"thinking.{field:.80}")
    kind = one_of("enabled", "disabled", "adaptive")("thinking.type", thinking.get("type"))
    if kind != "adaptive":
        enabled["thinking"] = kind == "enabled"
    if thinking.get("budget_tokens") is not None:
        budgets["thinking.budget_tokens"] = integer(1, 2**31 - 1)("thinking.budget_tokens", thinking["budget_tokens"])
