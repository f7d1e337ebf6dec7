"""The grammar of a resumed request has read what was said before, on the prefill side and on the decode side.

Each request has a grammar of its own: SGLang puts an unread copy into its cache before the request reads, and copies it
for the next one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tandem.engine.plugin import budget
from tandem.engine.plugin.resume import ResumeError, resumed_tokens


def read_at_once(original: Callable[..., bool], self: Any, request: Any) -> bool:
    """Around `GrammarManager.process_req_with_grammar`: True = the grammar has yet to be compiled."""
    try:
        tokens = resumed_tokens(request)
    except ResumeError as error:
        # Only an admissible request gets a grammar: what is aborted must not have one.
        request.set_finish_with_abort(str(error))
        return False
    waits = original(self, request)
    if tokens and not waits:
        read(request, tokens)
    return waits


def read_when_compiled(ready: list[Any], self: Any) -> list[Any]:
    """After `GrammarManager.get_ready_grammar_requests`."""
    for request in ready:
        if request.to_finish is None and (tokens := resumed_tokens(request)):
            read(request, tokens)
    return ready


def read(request: Any, tokens: list[int]) -> None:
    """Have the request's grammar read `tokens`; abort the request for good if they do not fit."""
    grammar = request.grammar
    if grammar is None or request.to_finish is not None:
        return
    masked = budget.places(request, tokens)
    spare = grammar.copy() if masked else None
    why = _read(grammar, tokens, masked)
    if why and spare is not None:
        # Said by an engine that went beyond its budget: with speculation, or without this.
        request.grammar = grammar = spare
        why = _read(grammar, tokens, range(0))
    if why:
        _refuse(request, why)
        return
    # To the decode side, a current token means that the one from prefill has been read too.
    grammar.current_token = None


def _read(grammar: Any, tokens: list[int], masked: range) -> str:
    """Why it cannot read them, or go on; empty = it can."""
    for place, token in enumerate(tokens):
        if grammar.is_terminated():
            return f"goes on behind the end of its grammar, from token {place} of {len(tokens)}"
        try:
            if place in masked:
                budget.fill(grammar)
            grammar.accept_token(token)
        except (ValueError, RuntimeError):  # their texts hold the request's words
            return f"does not fit its grammar, from token {place} of {len(tokens)}"
    return "is complete" if grammar.is_terminated() else ""


def before_prefills_token(batch: Any, *_: Any, **__: Any) -> None:
    """Before `ScheduleBatch.process_prebuilt`, where decode's grammar reads the token that prefill has sampled."""
    for request in batch.reqs:
        grammar = request.grammar
        if grammar is None or grammar.current_token is not None or grammar.is_terminated():
            continue
        try:
            said = resumed_tokens(request)
        except ResumeError:
            continue  # it is refused already
        # What began here has no budget that could be spent: XGrammar makes nothing of one of 0.
        if said and len(said) in budget.places(request, said):
            budget.fill(grammar)


def _refuse(request: Any, why: str) -> None:
    request.set_finish_with_abort(f"the output to resume {why}")
