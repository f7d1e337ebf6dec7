"""A grammar that has read what was said, with XGrammar: it allows what it would have allowed without a break."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import xgrammar
from transformers import AutoTokenizer

from tandem.engine.plugin import grammars
from tandem.engine.plugin.resume import RESUMED
from tandem.gateway.api.grammar import structural_tag

WORDS = "it is warm"


class Grammar:
    """As SGLang's `XGrammarGrammar`, whose module cannot be imported beside a test: it needs Triton."""

    def __init__(self, compiled: xgrammar.CompiledGrammar, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.current_token: int | None = None
        self.compiled = compiled
        self.matcher = xgrammar.GrammarMatcher(compiled)

    def copy(self) -> Grammar:
        return Grammar(self.compiled, self.vocab_size)

    def is_terminated(self) -> bool:
        return bool(self.matcher.is_terminated())

    def accept_token(self, token: int) -> None:
        if not self.matcher.accept_token(token):
            raise ValueError(token)
        self.current_token = token

    def allocate_vocab_mask(self, vocab_size: int, batch_size: int, device: str) -> torch.Tensor:
        assert device == "cpu"
        return xgrammar.allocate_token_bitmask(batch_size, vocab_size)

    def fill_vocab_mask(self, mask: torch.Tensor, index: int) -> None:
        self.matcher.fill_next_token_bitmask(mask, index)

    def allowed(self) -> frozenset[int]:
        """Which tokens may come next."""
        mask = self.allocate_vocab_mask(self.vocab_size, 1, "cpu")
        self.fill_vocab_mask(mask, 0)
        logits = torch.zeros(1, self.vocab_size)
        xgrammar.apply_token_bitmask_inplace(logits, mask)
        return frozenset(torch.isfinite(logits[0]).nonzero().flatten().tolist())


class Engine:
    """Compiles grammars, and has requests that bring a part of their output along."""

    def __init__(self, model: Path) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model)
        self._size = len(self.tokenizer)
        eos = [self.tokenizer.eos_token_id]
        info = xgrammar.TokenizerInfo.from_huggingface(self.tokenizer, vocab_size=self._size, stop_token_ids=eos)
        self._compiler = xgrammar.GrammarCompiler(info)

    def request(self, tag: str, said: list[int]) -> Any:
        return SimpleNamespace(
            sampling_params=SimpleNamespace(structural_tag=tag, custom_params={RESUMED: len(said)}),
            origin_input_ids=[0, *said],
            tokenizer=self.tokenizer,
            to_finish=None,
            grammar=Grammar(self._compiler.compile_structural_tag(tag), self._size),
        )

    def ids(self, text: str) -> list[int]:
        """One token for each letter, as a model may spell it that is forced to."""
        return [self.tokenizer.convert_tokens_to_ids(one) for piece in text for one in self.tokenizer.tokenize(piece)]


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Engine:
    return Engine(tiny)


END = "</think>"
WIDE = "ж"
"""Two bytes, two tokens."""


def reasoning(engine: Engine, how: str) -> tuple[list[int], int]:
    """The tokens of an answer's reasoning, with its end, and the budget."""
    marker = engine.tokenizer.convert_tokens_to_ids(END)
    spelled = engine.ids(END)
    assert len(spelled) == len(END)
    free = engine.ids("so we do")
    match how:
        case "none":
            return spelled, 0
        case "spelled behind the budget":
            return [*free, *spelled], len(free)
        case "one token behind the budget":
            return [*free, marker], len(free)
        case "spelled before it is spent":
            return [*free, *spelled], 40
        case "one token before it is spent":
            return [*free, marker], 40
        case "spelled up to the budget":
            return [*free, *spelled], len(free) + len(spelled)
        case "half spelled when it is spent":
            return [*free, *spelled], len(free) + 3
        case "half spelled twice":
            return [*free, *spelled[:4], *spelled], len(free) + 4
        case "half a letter when it is spent":
            wide = engine.ids(WIDE)
            assert len(wide) == 2
            return [*free, wide[0], *spelled], len(free) + 1  # XGrammar leaves it at that
    raise ValueError(how)


@pytest.mark.parametrize(
    "how",
    [
        "none",
        "spelled behind the budget",
        "one token behind the budget",
        "spelled before it is spent",
        "one token before it is spent",
        "spelled up to the budget",
        "half spelled when it is spent",
        "half spelled twice",
        "half a letter when it is spent",
    ],
)
def test_wherever_a_stream_breaks_prefill_and_decode_allow_what_they_did(engine: Engine, how: str) -> None:
    thought, budget = reasoning(engine, how)
    tag = structural_tag({"type": "regex", "pattern": r"[a-z ]{1,40}"}, thinking=True, budget=budget)
    assert tag is not None
    said = [*thought, *engine.ids(WORDS)]
    whole = engine.request(tag, []).grammar
    walked = []
    for token in said:
        walked.append(whole.allowed())
        assert token in walked[-1], f"token {len(walked)} of {how} cannot come"
        whole.accept_token(token)
    for place in range(len(said)):
        prefill = engine.request(tag, said[:place])
        decode = engine.request(tag, said[:place])
        for one in (prefill, decode):
            grammars.read(one, said[:place])
        assert prefill.grammar.allowed() == walked[place], f"prefill, from token {place} on"
        grammars.before_prefills_token(SimpleNamespace(reqs=[decode]))
        decode.grammar.accept_token(said[place])
        if place + 1 < len(said):
            assert decode.grammar.allowed() == walked[place + 1], f"decode, behind token {place}"
