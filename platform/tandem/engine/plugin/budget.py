"""Where a grammar has to be asked for its mask while it reads, so that a budget of tokens ends where it ended before.

XGrammar holds `max_tokens` (0.2.7, `cpp/grammar_matcher.cc`) in the mask: `FillNextTokenBitmask` notes that the budget
is spent, and the next `AcceptToken` drops what goes on beyond it. Without a mask in between, what goes on is kept, and
the end marker, half written, may begin anew. Engines that generate fill a mask for each token, unless they speculate.
One that reads what was said before need not, but in those places; it would take up to a millisecond for each token.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any


def places(request: Any, tokens: Sequence[int]) -> range:
    """Before which tokens, by their index, the mask must be filled; `len(tokens)` is the one that comes next.

    Args:
        request: of SGLang, with `grammar`, `sampling_params.structural_tag` and `tokenizer`. A grammar that is not
            XGrammar's has no such places.
        tokens: what the grammar reads, from its beginning.
    """
    tag = getattr(request.sampling_params, "structural_tag", None)
    if not tag or '"max_tokens"' not in tag or not hasattr(request.grammar, "matcher"):
        return range(0)
    form = json.loads(tag).get("format", {})  # SGLang's older kind of tag has none, and no budget either
    limited = _limited(form)
    if not limited:
        return range(0)
    found = _reasoning(form)
    if found is None or len(limited) > 1:
        return range(len(tokens) + 1)  # another shape than ours: slow, and right
    budget, end = found
    if len(tokens) < budget or _holds(request, tokens[:budget], end):
        return range(0)
    span = len(end.encode())  # it has no more tokens than bytes
    for place in range(budget, len(tokens)):
        if _holds(request, tokens[max(0, place + 1 - span) : place + 1], end):
            return range(budget, place + 1)
    return range(budget, len(tokens) + 1)


def fill(grammar: Any) -> None:
    """Have it work out which tokens may come, as before each token that is sampled."""
    grammar.fill_vocab_mask(grammar.allocate_vocab_mask(grammar.vocab_size, 1, "cpu"), 0)


def _limited(form: Any) -> list[dict[str, Any]]:
    """The formats with a budget, however deep. What a JSON schema has of that name is none."""
    if isinstance(form, list):
        return [one for part in form for one in _limited(part)]
    if not isinstance(form, dict):
        return []
    found = [form] if isinstance(form.get("max_tokens"), int) else []
    return found + [one for name, part in form.items() if name != "json_schema" for one in _limited(part)]


def _reasoning(form: dict[str, Any]) -> tuple[int, str] | None:
    """The budget of the free text that an answer begins with, and what ends it (`gateway/api/grammar.py`)."""
    first = form["elements"][0] if form.get("type") == "sequence" else form
    if first.get("type") != "tag" or first["begin"] != "" or not isinstance(first["end"], str):
        return None
    budget = first["content"].get("max_tokens")
    return (budget, first["end"]) if isinstance(budget, int) else None


def _holds(request: Any, tokens: Sequence[int], text: str) -> bool:
    return text in request.tokenizer.decode(list(tokens))
