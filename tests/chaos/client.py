"""One request as a client makes it: every token is timed, and a broken connection is tried again."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgspec
import orjson

from chaos.recipes import Recipe
from tandem.engine.http1 import HttpFailure, Pool, Response
from tandem.engine.sse import SseParser

SILENCE_S = 60.0
"""A stream that says nothing for so long is a failure: every wait of the gateway is shorter. A client that expects
gateways to stand still gives a silent connection up sooner, and asks again."""
RETRY_S = 30.0
"""How long a client whose connection broke tries again, beyond the silence that it bears."""
_PAUSE_S = 0.2


class Outcome(msgspec.Struct, kw_only=True):
    """A request that is over, or so far. Times are on the monotonic clock."""

    name: str
    """Unique; its `user` field, by which its usage records are found."""
    recipe: str
    side: bool = False
    """It went by the gateway behind the proxies."""
    began: float = 0.0
    ended: float = 0.0
    tokens: list[int] = msgspec.field(default_factory=list)
    times: list[float] = msgspec.field(default_factory=list)
    """When each token came, over all tries; of a later try only those that were new."""
    text: str = ""
    reasoning: str = ""
    logprobs: list[float] = msgspec.field(default_factory=list)
    """Of the tokens that are text, where they were asked for."""
    tops: list[float] = msgspec.field(default_factory=list)
    """For each of these the logprobs of the most likely tokens, falling."""
    calls: list[str] = msgspec.field(default_factory=list)
    """Tool calls: name and arguments."""
    finish: str = ""
    usage: dict[str, Any] = msgspec.field(default_factory=dict)
    version: str = ""
    """Of the weights, as the end of the answer names them."""
    error: str = ""
    code: str = ""
    """Of the error: OpenAI's code, or its HTTP status."""
    tries: int = 0
    left: bool = False
    """The client went away."""


class Refusal(Exception):
    """The gateway answered with an error."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


async def ask(
    pool: Pool,
    base: str,
    model: str,
    recipe: Recipe,
    outcome: Outcome,
    *,
    leave_after: int | None = None,
    silence_s: float = SILENCE_S,
) -> None:
    """Make the request and fill `outcome`.

    `leave_after`: drop the connection after so many tokens. Such a client sends no `Idempotency-Key`: an answer with
    one goes on without its client, who may come back.
    """
    body = {
        "model": model,
        "user": outcome.name,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
        **recipe.fields,
    }
    data = orjson.dumps(body)
    outcome.began = time.monotonic()
    give_up = outcome.began + RETRY_S + (0 if silence_s == SILENCE_S else 4 * silence_s)
    while True:
        outcome.tries += 1
        try:
            await _once(pool, base + recipe.path, data, outcome, leave_after, silence_s)
            outcome.error = outcome.code = ""
        except Refusal as error:
            outcome.error, outcome.code = str(error), error.code
        except HttpFailure as error:
            outcome.error, outcome.code = str(error), "connection"
            if not outcome.left and time.monotonic() < give_up:
                await asyncio.sleep(_PAUSE_S)
                continue
        outcome.ended = time.monotonic()
        return


async def _once(pool: Pool, url: str, body: bytes, outcome: Outcome, leave_after: int | None, silence_s: float) -> None:
    before = outcome.tokens
    outcome.tokens, outcome.text, outcome.reasoning, outcome.finish = [], "", "", ""
    outcome.logprobs, outcome.tops, outcome.calls = [], [], []
    key = () if leave_after is not None else ((b"idempotency-key", outcome.name.encode()),)
    made = pool.begin("POST", url, body=body, headers=key, fresh=True)
    response = made if isinstance(made, Response) else await made
    try:
        status = await response.head(silence_s)
        if status != 200:
            raise _refusal(status, await response.read(silence_s))
        parser = SseParser()
        while (data := await response.chunk(silence_s)) is not None:
            now = time.monotonic()
            for event in parser.feed(data):
                if event == b"[DONE]":
                    _check_retold(before, outcome)
                    return
                _take(orjson.loads(event), outcome, now)
            if leave_after is not None and len(outcome.tokens) >= leave_after:
                outcome.left = True
                return
    finally:
        response.close()
    raise Refusal("the stream ended without [DONE]", "truncated")


def _take(event: dict[str, Any], outcome: Outcome, now: float) -> None:
    if "error" in event:
        error = event["error"]
        raise Refusal(str(error.get("message", error)), str(error.get("code") or error.get("type")))
    if event.get("usage"):
        outcome.usage = event["usage"]
        outcome.version = event.get("system_fingerprint") or ""
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        ids = choice.get("token_ids") or []
        outcome.tokens += ids
        outcome.times += [now] * max(0, len(outcome.tokens) - len(outcome.times))
        outcome.text += choice.get("text") or delta.get("content") or ""
        outcome.reasoning += delta.get("reasoning_content") or ""
        outcome.finish = choice.get("finish_reason") or outcome.finish
        _take_logprobs(choice.get("logprobs") or {}, outcome)
        for call in delta.get("tool_calls") or ():
            _take_call(call, outcome)


def _take_logprobs(told: dict[str, Any], outcome: Outcome) -> None:
    """Of `/v1/completions` or of a chat."""
    outcome.logprobs += told.get("token_logprobs") or []
    for tops in told.get("top_logprobs") or []:
        outcome.tops += sorted(tops.values(), reverse=True)
    for entry in (*(told.get("reasoning_content") or ()), *(told.get("content") or ())):
        outcome.logprobs.append(entry["logprob"])
        outcome.tops += [top["logprob"] for top in entry["top_logprobs"]]


def _take_call(call: dict[str, Any], outcome: Outcome) -> None:
    outcome.calls += [""] * (call["index"] + 1 - len(outcome.calls))
    said = call["function"]
    outcome.calls[call["index"]] += f"{said['name']} " if said.get("name") else ""
    outcome.calls[call["index"]] += said.get("arguments") or ""


def _check_retold(before: list[int], outcome: Outcome) -> None:
    """What a client was told before its connection broke must be the beginning of what it is told again."""
    if outcome.tokens[: len(before)] != before:
        raise Refusal(f"the retried answer differs from its first {len(before)} tokens", "retold")


def _refusal(status: int, body: bytes) -> Refusal:
    try:
        error = orjson.loads(body)["error"]
        return Refusal(f"HTTP {status}: {error['message']}", str(error.get("code") or status))
    except (ValueError, KeyError, TypeError):
        return Refusal(f"HTTP {status}: {body[:200].decode(errors='replace')}", str(status))
