"""Clients that ask without a pause, over both gateways, and what came of all they asked."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import orjson

from chaos.client import SILENCE_S, Outcome, ask
from chaos.recipes import RECIPES, Expected, Recipe, prompt, stopping
from tandem.engine.http1 import Pool

_QUIET_S = 120.0
LOGPROB_NOISE = 1e-4
"""What the engine's logprobs may differ by from those of another batch (`engine/test_api_real.py`)."""


class WrongReference(AssertionError):
    """The undisturbed fleet does not answer as it must."""


class References:
    """What each recipe's answer is."""

    def __init__(self, recipes: Sequence[Recipe], answers: Mapping[str, Outcome]) -> None:
        self.recipes = recipes
        self._answers = answers

    def fault(self, outcome: Outcome) -> str:
        """What is wrong with an answer that is over; empty = it is complete and right."""
        wanted = self._answers[outcome.recipe]
        if outcome.left:
            size = len(outcome.tokens)
            return "" if outcome.tokens == wanted.tokens[:size] else f"other tokens among the first {size}"
        if outcome.error:
            return f"{outcome.code}: {outcome.error}"
        pairs: list[tuple[str, Sequence[Any], Sequence[Any]]] = [
            ("tokens", outcome.tokens, wanted.tokens),
            ("text", outcome.text, wanted.text),
            ("reasoning", outcome.reasoning, wanted.reasoning),
            ("tool calls", outcome.calls, wanted.calls),
            ("finish", outcome.finish, wanted.finish),
        ]
        for what, got, right in pairs:
            if got != right:
                return f"other {what}: {_first_difference(got, right)}"
        return _other_logprobs(outcome, wanted) or _other_usage(outcome, wanted)

    def prompt_tokens(self, recipe: str) -> int:
        """Of its prompt, as the undisturbed fleet counted them."""
        return int(self._answers[recipe].usage["prompt_tokens"])


def _other_logprobs(outcome: Outcome, wanted: Outcome) -> str:
    """They are computed in other batches, and after a move in one pass over the prompt and what was delivered: so
    sums come in another order."""
    for got, right in ((outcome.logprobs, wanted.logprobs), (outcome.tops, wanted.tops)):
        if len(got) != len(right):
            return f"{len(got)} logprobs, not {len(right)}"
        worst = max((abs(one - other) for one, other in zip(got, right, strict=True)), default=0.0)
        if worst > LOGPROB_NOISE:
            return f"other logprobs: by up to {worst:.2g}"
    return ""


def _other_usage(outcome: Outcome, wanted: Outcome) -> str:
    for what in ("completion_tokens", "prompt_tokens"):
        told, expected = outcome.usage.get(what), wanted.usage.get(what)
        if told != expected:
            return f"usage tells {told} {what}, not {expected}"
    return ""


def _first_difference(got: Sequence[Any], right: Sequence[Any]) -> str:
    place = next(
        (place for place, (one, other) in enumerate(zip(got, right, strict=False)) if one != other),
        min(len(got), len(right)),
    )
    end = place + 6
    return f"at {place} of {len(right)} (got {len(got)}): {got[place:end]!r} instead of {right[place:end]!r}"


async def take_references(base: str, model: str, expected: Expected) -> References:
    """Ask everything at once, and again; both must agree, with the oracle too where there is one.

    Raises WrongReference.
    """
    pool = Pool()
    try:
        recipes = list(RECIPES)
        first = await asyncio.gather(*(_asked(pool, base, model, recipe) for recipe in recipes))
        stops = [stopping(recipe, outcome.text) for recipe, outcome in zip(recipes[2:4], first[2:4], strict=True)]
        recipes += [recipe for recipe in stops if recipe is not None]
        further = await asyncio.gather(*(_asked(pool, base, model, recipe) for recipe in recipes[len(first) :]))
        answers = {outcome.recipe: outcome for outcome in (*first, *further)}
        references = References(recipes, answers)
        for outcome in await asyncio.gather(*(_asked(pool, base, model, recipe) for recipe in recipes)):
            if why := references.fault(outcome):
                raise WrongReference(f"{outcome.recipe!r} is not answered twice alike: {why}")
        for recipe in recipes:
            if recipe.oracle:
                ids = await _prompt_ids(pool, base, model, recipe)
                right = expected.answer(ids, recipe.fields["max_tokens"])
                got = answers[recipe.name].tokens
                if got != right:
                    raise WrongReference(f"{recipe.name!r} is not the oracle's: {_first_difference(got, right)}")
        return references
    finally:
        await pool.close()


async def _asked(pool: Pool, base: str, model: str, recipe: Recipe) -> Outcome:
    outcome = Outcome(name=f"reference-{uuid.uuid4().hex}", recipe=recipe.name)
    await ask(pool, base, model, recipe, outcome)
    if outcome.error:
        raise WrongReference(f"{recipe.name!r} was refused: {outcome.error}")
    return outcome


async def _prompt_ids(pool: Pool, base: str, model: str, recipe: Recipe) -> list[int]:
    if "prompt" in recipe.fields:
        return list(recipe.fields["prompt"])
    body = orjson.dumps({"model": model, "messages": recipe.fields["messages"]})
    status, answer = await pool.fetch("POST", f"{base}/tokenize", body=body, within=30)
    assert status == 200, answer
    return list(orjson.loads(answer)["tokens"])


class Traffic:
    """`clients` of each gateway, each asking one thing after the other. Belongs to the running loop."""

    def __init__(
        self,
        bases: Mapping[bool, str],
        model: str,
        references: References,
        rng: random.Random,
        *,
        silence_s: float = SILENCE_S,
    ) -> None:
        """`bases`: URL of the fleet's gateways (False), and of the side gateway (True) where there is one. `silence_s`:
        after so long without a word clients drop their connection and ask again."""
        self.done: list[Outcome] = []
        self.running: dict[str, Outcome] = {}
        self._bases = bases
        self._model = model
        self._references = references
        self._rng = rng
        self._silence_s = silence_s
        self._pool = Pool()
        self._numbers = itertools.count(1)
        self._going = asyncio.Event()
        self._going.set()
        self._news = asyncio.Condition()
        self._stopped = False
        self._clients: list[asyncio.Task[None]] = []
        self._run = uuid.uuid4().hex[:8]

    def start(self, clients: int, pause_s: float = 0.0) -> None:
        """Set `clients` going for each gateway. `pause_s`: the most that each waits before it asks again."""
        for side in self._bases:
            self._clients += [asyncio.create_task(self._client(side, pause_s), name="client") for _ in range(clients)]

    @property
    def tokens(self) -> int:
        """Tokens that clients have been given until now."""
        return sum(len(one.times) for one in (*self.done, *self.running.values()))

    async def progress(self, tokens: int, within: float) -> None:
        """Wait until clients have been given so many tokens more. Raises TimeoutError."""
        wanted = self.tokens + tokens
        async with asyncio.timeout(within):
            # A token rings no bell of ours: the loop of each client is its own.
            while self.tokens < wanted:
                await asyncio.sleep(0.02)

    async def settled(self, within: float) -> None:
        """Wait until every stream that runs now has had a token more, or has ended. Raises TimeoutError."""
        waiting = {name: len(one.times) for name, one in self.running.items()}
        async with asyncio.timeout(within):
            while waiting:
                await asyncio.sleep(0.02)
                running = self.running
                waiting = {
                    name: had for name, had in waiting.items() if name in running and len(running[name].times) <= had
                }

    @contextlib.asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """Let what runs end, and nothing new begin."""
        self._going.clear()
        try:
            async with asyncio.timeout(_QUIET_S), self._news:
                await self._news.wait_for(lambda: not self.running)
            yield
        finally:
            self._going.set()

    async def stop(self) -> None:
        """Let what runs end. Raises whatever broke a client."""
        self._stopped = True
        self._going.set()
        async with asyncio.timeout(_QUIET_S):
            await asyncio.gather(*self._clients)
        await self._pool.close()

    async def leave(self, clients: int, *, side: bool = False) -> list[Outcome]:
        """Let some clients go away in the middle of their streams; returns when the last has gone."""
        long = [recipe for recipe in self._references.recipes if recipe.fields["max_tokens"] >= 60]

        async def one() -> Outcome:
            return await self.ask_one(self._rng.choice(long), side=side, leave_after=self._rng.randrange(0, 30))

        return list(await asyncio.gather(*(one() for _ in range(clients))))

    @contextlib.asynccontextmanager
    async def endless(self, streams: int, tokens: int) -> AsyncIterator[None]:
        """Streams that have begun when the block is entered. They are not noted: nobody waits for their end."""
        body = {"model": self._model, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
        began = []
        for number in range(streams):
            data = orjson.dumps({**body, "prompt": prompt(number, 20 + number)})
            response = await self._pool.request("POST", f"{self._bases[False]}/v1/completions", body=data, fresh=True)
            began.append(response)
        try:
            for response in began:
                assert await response.head(SILENCE_S) == 200
                await response.chunk(SILENCE_S)
            yield
        finally:
            for response in began:
                response.close()

    async def clock_of_side(self) -> float:
        """The side gateway's time, in Unix seconds: that of an answer."""
        body = {"model": self._model, "prompt": prompt(1, 5), "max_tokens": 1, "temperature": 0}
        url = f"{self._bases[True]}/v1/completions"
        status, answer = await self._pool.fetch("POST", url, body=orjson.dumps(body), within=SILENCE_S)
        assert status == 200, answer
        return float(orjson.loads(answer)["created"])

    async def ask_one(self, recipe: Recipe, *, side: bool = False, leave_after: int | None = None) -> Outcome:
        """One request, noted like all others."""
        outcome = Outcome(name=f"chaos-{self._run}-{next(self._numbers)}", recipe=recipe.name, side=side)
        outcome.began = time.monotonic()
        self.running[outcome.name] = outcome
        try:
            await ask(
                self._pool,
                self._bases[side],
                self._model,
                recipe,
                outcome,
                leave_after=leave_after,
                silence_s=self._silence_s,
            )
        finally:
            del self.running[outcome.name]
            self.done.append(outcome)
            async with self._news:
                self._news.notify_all()
        return outcome

    async def _client(self, side: bool, pause_s: float) -> None:
        while not self._stopped:
            await asyncio.sleep(self._rng.random() * pause_s)
            await self._going.wait()
            if not self._stopped:
                await self.ask_one(self._rng.choice(self._references.recipes), side=side)
