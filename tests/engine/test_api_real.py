"""What the API promises, held by the real engine: logprobs, grammars, tool calls, seeds, stop strings, budgets."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

import pytest
import torch

from support.fleet import Fleet
from support.oracle import Oracle

pytestmark = pytest.mark.timeout(300)

PROMPT = list(range(300, 340))
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Köln"]}, "warm": {"type": "boolean"}},
    "required": ["city", "warm"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
]
SEEDS = range(8)
"""A model of random weights may write white space to the end: then the next is tried."""


def send(fleet: Fleet, path: str, fields: dict[str, Any]) -> tuple[int, bytes]:
    body = json.dumps({"model": fleet.status_model, **fields}).encode()
    request = urllib.request.Request(fleet.base + path, body, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def complete(fleet: Fleet, **fields: Any) -> Any:
    asked = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    status, answer = send(fleet, "/v1/completions", {**asked, **fields})
    assert status == 200, answer
    return json.loads(answer)


def chat(fleet: Fleet, **fields: Any) -> Any:
    asked = {"messages": [{"role": "user", "content": "How warm is it?"}], "max_tokens": 300}
    status, answer = send(fleet, "/v1/chat/completions", {**asked, **fields})
    assert status == 200, answer
    return json.loads(answer)


def ended(fleet: Fleet, reason: str, **fields: Any) -> Any:
    """A choice that did not run into its limit."""
    for seed in SEEDS:
        choice = chat(fleet, temperature=1, seed=seed, thinking_budget=4, **fields)["choices"][0]
        if choice["finish_reason"] != "length":
            assert choice["finish_reason"] == reason
            return choice
    raise AssertionError(f"no answer to {fields} has an end")


def test_logprobs_are_the_models_own(fleet: Fleet, oracle: Oracle) -> None:
    choice = complete(fleet, logprobs=5)["choices"][0]
    ids, found = choice["token_ids"], choice["logprobs"]
    with torch.no_grad():
        logits = oracle.model(torch.tensor([PROMPT + ids]), use_cache=False).logits[0]
    expected = torch.log_softmax(logits[len(PROMPT) - 1 : -1], dim=-1)
    assert len(found["token_logprobs"]) == len(ids) == 12
    for place, token in enumerate(ids):
        assert found["token_logprobs"][place] == pytest.approx(expected[place, token].item(), abs=1e-4)
        best = expected[place].topk(5).values.tolist()
        told = sorted(found["top_logprobs"][place].values(), reverse=True)
        # Two tokens may read alike, and then have one entry.
        assert told == pytest.approx(best[: len(told)], abs=1e-4) or len(told) < 5


def test_logprobs_of_a_stream_are_those_of_the_whole(fleet: Fleet) -> None:
    whole = complete(fleet, logprobs=0)["choices"][0]["logprobs"]["token_logprobs"]
    asked = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "ignore_eos": True, "logprobs": 0, "stream": True}
    _, answer = send(fleet, "/v1/completions", asked)
    events = [json.loads(text.removeprefix("data: ")) for text in answer.decode().split("\n\n")[:-2]]
    told = [value for event in events for value in (event["choices"][0]["logprobs"] or {}).get("token_logprobs", [])]
    assert told == pytest.approx(whole, abs=1e-4)


def test_an_answer_of_a_schema_is_json_of_it(fleet: Fleet) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "report", "schema": SCHEMA, "strict": True}}
    message = ended(fleet, "stop", response_format=form)["message"]
    found = json.loads(message["content"])
    assert found["city"] in ("Rome", "Köln")
    assert isinstance(found["warm"], bool)


def test_a_required_call_is_a_call_of_one_of_the_tools(fleet: Fleet) -> None:
    choice = ended(fleet, "tool_calls", tools=TOOLS[:1], tool_choice="required")
    for call in choice["message"]["tool_calls"]:
        assert call["function"]["name"] == "weather"
        assert json.loads(call["function"]["arguments"])["city"] in ("Rome", "Köln")


def test_a_named_function_is_called_once(fleet: Fleet) -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    [call] = ended(fleet, "tool_calls", tools=TOOLS, tool_choice=named)["message"]["tool_calls"]
    assert call["function"]["name"] == "weather"


@pytest.mark.parametrize("budget", [0, 1, 7])
def test_reasoning_ends_with_its_budget(fleet: Fleet, budget: int) -> None:
    """The marker that ends it is one more token; this model never writes it by itself so early."""
    answer = chat(fleet, thinking_budget=budget, max_tokens=20, temperature=0, ignore_eos=True)
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == budget + 1
    assert answer["usage"]["completion_tokens"] == 20
    assert answer["choices"][0]["message"]["content"]


def test_choices_of_one_seed_differ_and_come_again(fleet: Fleet) -> None:
    asked = {"n": 3, "seed": 11, "temperature": 1, "max_tokens": 10}
    first, again = (complete(fleet, **asked) for _ in range(2))
    texts = [tuple(choice["token_ids"]) for choice in first["choices"]]
    assert len(set(texts)) == 3
    assert texts == [tuple(choice["token_ids"]) for choice in again["choices"]]
    assert first["usage"]["prompt_tokens"] == len(PROMPT)
    assert first["usage"]["completion_tokens"] == 30


def test_every_prompt_is_answered_as_if_it_came_alone(fleet: Fleet) -> None:
    prompts = [PROMPT, PROMPT[:20]]
    alone = [complete(fleet, prompt=prompt)["choices"][0]["token_ids"] for prompt in prompts]
    assert [choice["token_ids"] for choice in complete(fleet, prompt=prompts)["choices"]] == alone


def test_a_stop_string_ends_the_text_before_it(fleet: Fleet) -> None:
    text = complete(fleet, max_tokens=40)["choices"][0]["text"]
    stop = text[len(text) // 2 :][:3]
    choice = complete(fleet, max_tokens=40, stop=[stop])["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (text[: text.index(stop)], "stop")


def test_a_stop_token_and_a_bias_are_followed(fleet: Fleet) -> None:
    biased = complete(fleet, logit_bias={"500": 100})["choices"][0]
    assert biased["token_ids"] == [500] * 12
    choice = complete(fleet, logit_bias={"500": 100}, stop_token_ids=[500], ignore_eos=False)["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("", "stop")


def test_a_grammar_that_cannot_be_compiled_is_the_clients_mistake(fleet: Fleet) -> None:
    status, answer = send(fleet, "/v1/completions", {"prompt": PROMPT, "regex": "(unclosed"})
    assert status == 400
    assert json.loads(answer)["error"]["type"] == "invalid_request_error"
    assert len(complete(fleet)["choices"][0]["token_ids"]) == 12
