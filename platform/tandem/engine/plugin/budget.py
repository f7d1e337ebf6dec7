"""Where a grammar has to be asked for its mask while it reads, so that a budget of tokens ends where it ended before.

XGrammar holds `max_tokens` (0.2.7, `cpp/grammar_matcher.cc`) in the mask: `FillNextTokenBitmask` notes that the budget
is spent, and the next `AcceptToken` drops what goes on beyond it. Without a mask in between, what goes on is kept, and
the end marker, half written, may begin anew. An engine that generates fills a mask for each token. One that reads what
was said before need not, but in those places; it would take up to a millisecond for each token.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any


def places(request: Any, tokens: Sequence[int]) -> range:
    """Before which tokens, by their index, the mask must be filled; `len(tokens)` is the one that comes next.

    Args:
        request: of SGLang, with `sampling_params.structural_tag` and `tokenizer`.
        tokens: what the grammar reads, from its beginning.
    """
    tag = getattr(request.sampling_params, "structural_tag", None)
    if not tag or '"max_tokens"' not in tag:
        return range(0)
    found = _budget(json.loads(tag))
    if found is None:
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


def _budget(tag: Any) -> tuple[int, str] | None:
    """The tokens of a free text that the answer begins with, and the marker that ends it (`gateway/api/grammar.py`)."""
    form = tag.get("format", {})
    first, *others = form["elements"] if form.get("type") == "sequence" else [form]
    content = first.get("content", {}) if first.get("type") == "tag" and first.get("begin") == "" else {}
    if content.get("type") != "any_text" or "max_tokens" not in content or not isinstance(first.get("end"), str):
        return None
    return None if '"max_tokens"' in json.dumps(others) else (content["max_tokens"], first["end"])


def _holds(request: Any, tokens: Sequence[int], text: str) -> bool:
    return text in request.tokenizer.decode(list(tokens))
