"""What clients ask, and what the answer to each is: taken from the fleet while nothing disturbs it.

Greedy answers must also be the oracle's. Seeds, penalties, grammars, schemas and tool calls have no oracle: their
reference is the fleet's own answer, which must come twice alike. So it is with logprobs, within float noise.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from support.oracle import Oracle

_CACHE = "chaos-oracle.json"


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of request."""

    name: str
    path: str
    fields: dict[str, Any]
    oracle: bool = False
    """Greedy over the whole vocabulary, without an end of its own."""


def prompt(seed: int, length: int) -> list[int]:
    """Token ids of no meaning."""
    return [random.Random(seed).randrange(300, 900) for _ in range(length)]


def _completion(name: str, length: int, tokens: int, *, oracle: bool = False, **fields: Any) -> Recipe:
    body = {"prompt": prompt(len(name) * 1000 + length, length), "max_tokens": tokens, "temperature": 0}
    return Recipe(
        name=name,
        path="/v1/completions",
        fields={**body, "ignore_eos": True, **fields},
        oracle=oracle,
    )


def _chat(name: str, content: str, tokens: int, *, oracle: bool = False, **fields: Any) -> Recipe:
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": tokens, "temperature": 0}
    return Recipe(
        name=name,
        path="/v1/chat/completions",
        fields={**body, "ignore_eos": True, **fields},
        oracle=oracle,
    )


_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "pattern": "^[a-z]{12}$"},
        "words": {"type": "array", "items": {"enum": ["sun", "rain", "wind"]}, "minItems": 4, "maxItems": 4},
        "warm": {"type": "boolean"},
    },
    "required": ["city", "words", "warm"],
    "additionalProperties": False,
}

RECIPES: Sequence[Recipe] = (
    _completion("one token of prompt", 1, 60, oracle=True),
    _completion("short", 12, 120, oracle=True),
    _completion("middle", 90, 80, oracle=True),
    _completion("long", 400, 60, oracle=True),
    _completion("longest", 900, 40, oracle=True),
    _completion("a few tokens", 33, 8, oracle=True),
    _completion("one token of answer", 20, 1, oracle=True),
    _chat("chat", "How warm is it in Rome?", 100, oracle=True),
    _chat("chat that thinks", "Why is the sky blue?", 90, thinking_budget=25),
    _completion("penalties", 40, 100, frequency_penalty=0.9, presence_penalty=0.4, repetition_penalty=1.15),
    _completion("seeded", 30, 100, temperature=1, seed=7, top_p=0.95),
    _completion("grammar", 25, 110, regex="[a-z ]{100}", ignore_eos=False),
    _chat("seeded chat", "Tell me a story.", 90, temperature=0.8, seed=11, thinking_budget=30),
    _completion("logprobs", 35, 70, oracle=True, logprobs=3),
    _chat("chat with logprobs", "What is the sea?", 60, thinking_budget=15, logprobs=True, top_logprobs=2),
    _chat(
        "tool call",
        "Is it warm in Rome?",
        90,
        ignore_eos=False,
        thinking_budget=10,
        tools=[{"type": "function", "function": {"name": "weather", "parameters": _SCHEMA}}],
        tool_choice="required",
        parallel_tool_calls=False,
    ),
    _chat(
        "schema",
        "Tell me about Rome.",
        90,
        ignore_eos=False,
        thinking_budget=10,
        response_format={"type": "json_schema", "json_schema": {"name": "report", "schema": _SCHEMA, "strict": True}},
    ),
)


def stopping(recipe: Recipe, text: str) -> Recipe | None:
    """The same request with a stop string from the last third of its answer's text; None if nothing there serves."""
    for start in range(2 * len(text) // 3, len(text) - 3):
        stop = text[start : start + 3]
        if stop.strip() == stop and "\ufffd" not in stop and text.index(stop) > len(text) // 2:
            return Recipe(name=f"{recipe.name}, stopped", path=recipe.path, fields={**recipe.fields, "stop": [stop]})
    return None


class Expected:
    """The oracle's answers, kept on disk: they take a while, and depend on model and prompt only."""

    def __init__(self, model: Path, folder: Path) -> None:
        self._model = model
        self._file = folder / _CACHE
        weights = [*sorted(model.glob("*.safetensors")), model / "config.json"]
        self._mark = hashlib.sha256(b"".join(path.read_bytes() for path in weights)).hexdigest()[:16]
        self._known: dict[str, list[int]] = json.loads(self._file.read_bytes()) if self._file.exists() else {}
        self._oracle: Oracle | None = None

    def answer(self, ids: list[int], tokens: int) -> list[int]:
        """The greedy continuation."""
        key = hashlib.sha256(json.dumps([self._mark, ids, tokens]).encode()).hexdigest()
        if key not in self._known:
            if self._oracle is None:
                from support.oracle import Oracle  # torch and transformers: seconds

                self._oracle = Oracle(self._model)
            self._known[key] = self._oracle.complete(ids, tokens)
            self._file.write_text(json.dumps(self._known))
        return self._known[key]
