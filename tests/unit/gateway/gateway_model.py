"""The tiny model's tokenizer for the gateway's tests, in memory and as a folder."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import tokenizers

from tandem.gateway.text.chat_template import ChatTemplate
from tandem.gateway.text.detokenize import Vocabulary
from tandem.gateway.text.model_card import ModelCard
from tandem.gateway.text.tokenize import Tokenizer
from tandem.models.tokenizer import BOS, EOS, VOCAB_SIZE, chat_template, tokenizer_config, tokenizer_json

CONTEXT = 4096
CARD = ModelCard(name="tiny", path="", context=CONTEXT, vocab_size=VOCAB_SIZE, sampling={})


@cache
def inner() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json()))


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer(inner(), ChatTemplate(chat_template(), {"bos_token": BOS, "eos_token": EOS}), BOS)


@cache
def vocabulary() -> Vocabulary:
    return Vocabulary(inner())


def ids_of(text: str) -> list[int]:
    """Token ids of a text, special tokens by their names."""
    return list(inner().encode(text, add_special_tokens=False).ids)


def model_folder(at: Path) -> Path:
    """The small files of a checkpoint."""
    at.mkdir(parents=True, exist_ok=True)
    files: dict[str, object] = {
        "config.json": {"max_position_embeddings": CONTEXT, "vocab_size": VOCAB_SIZE},
        "tokenizer.json": tokenizer_json(),
        "tokenizer_config.json": tokenizer_config(CONTEXT),
    }
    for name, content in files.items():
        (at / name).write_text(json.dumps(content), encoding="utf-8")
    return at
