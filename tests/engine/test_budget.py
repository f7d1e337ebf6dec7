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

SPELLED = "</think>"
WORDS = "it is warm"


class Grammar:
    """As SGLang's `XGrammarGrammar`, whose module cannot be imported beside a test: it needs Triton."""

    def __init__(self, compiled: xgrammar.CompiledGrammar, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.current_token: int | None = None
        self._matcher = xgrammar.GrammarMatcher(compiled)

    def is_terminated(self) -> bool:
        return bool(self._matcher.is_terminated())

    def accept_token(self, token: int) -> None:
        if not self._matcher.accept_token(token):
            raise ValueError(token)
        self.current_token = token

    def allocate_vocab_mask(self, vocab_size: int, batch_size: int, device: str) -> torch.Tensor:
        assert device == "cpu"
        return xgrammar.allocate_token_bitmask(batch_size, vocab_size)

    def fill_vocab_mask(self, mask: torch.Tensor, index: int) -> None:
        self._matcher.fill_next_token_bitmask(mask, index)

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


@pytest.mark.parametrize("budget", [0, 1, 4, 10])
def test_wherever_a_stream_breaks_prefill_and_decode_allow_what_they_did(engine: Engine, budget: int) -> None:
    content = {"type": "regex", "pattern": r"[a-z ]{1,40}"}
    tag = structural_tag(content, thinking=True, budget=budget)
    assert tag is not None
    said = engine.ids(("so " * budget)[:budget] + SPELLED + WORDS)
    whole = engine.request(tag, []).grammar
    walked = []
    for token in said:
        walked.append(whole.allowed())
        assert token in walked[-1]
        whole.accept_token(token)
    assert any(len(one) == 1 for one in walked)
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
