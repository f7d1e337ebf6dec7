"""The tiny model's tokenizer: byte-level BPE with DeepSeek R1's special tokens and conversation format.

It is plain data, written here rather than by a library, so its bytes depend on nothing but this folder. `tokenizers`
and transformers' `AutoTokenizer` both load it.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

from tandem.models.bpe import Pair, byte_alphabet, learn_merges

VOCAB_SIZE = 1024

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"


class SpecialToken(NamedTuple):
    text: str
    hidden: bool
    """Left out when text is decoded with `skip_special_tokens`, as R1 has it."""


# Strings, order and roles as in R1, where the first three begin the vocabulary and the others end it.
FIRST = (SpecialToken(BOS, True), SpecialToken(EOS, True), SpecialToken(PAD, True))
LAST = (
    SpecialToken("<think>", False),
    SpecialToken("</think>", False),
    SpecialToken("<｜fim▁hole｜>", False),
    SpecialToken("<｜fim▁begin｜>", False),
    SpecialToken("<｜fim▁end｜>", False),
    SpecialToken("<｜User｜>", False),
    SpecialToken("<｜Assistant｜>", False),
    SpecialToken("<|EOT|>", True),
    SpecialToken("<｜tool▁calls▁begin｜>", False),
    SpecialToken("<｜tool▁calls▁end｜>", False),
    SpecialToken("<｜tool▁call▁begin｜>", False),
    SpecialToken("<｜tool▁call▁end｜>", False),
    SpecialToken("<｜tool▁outputs▁begin｜>", False),
    SpecialToken("<｜tool▁outputs▁end｜>", False),
    SpecialToken("<｜tool▁output▁begin｜>", False),
    SpecialToken("<｜tool▁output▁end｜>", False),
    SpecialToken("<｜tool▁sep｜>", False),
)

SPECIAL_IDS = {token.text: number for number, token in enumerate(FIRST)} | {
    token.text: VOCAB_SIZE - len(LAST) + n for n, token in enumerate(LAST)
}
BOS_ID, EOS_ID = SPECIAL_IDS[BOS], SPECIAL_IDS[EOS]

# Numbers by three digits, letters and signs with the blank before them, line ends, other blanks: nothing merges across.
_NUMBERS = r"\p{N}{1,3}"
_WORDS = r" ?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

_HERE = Path(__file__).parent


def chat_template() -> str:
    """The Jinja template of a conversation; it needs `messages` and `bos_token`, and takes `tools` and
    `add_generation_prompt`."""
    return (_HERE / "chat_template.jinja").read_text(encoding="utf-8")


@cache
def _merges() -> list[Pair]:
    learned = VOCAB_SIZE - len(FIRST) - len(byte_alphabet()) - len(LAST)
    return learn_merges((_HERE / "corpus.txt").read_text(encoding="utf-8"), learned)


def tokenizer_json() -> dict[str, object]:
    """The content of `tokenizer.json`, as the `tokenizers` library reads it."""
    merges = _merges()
    # dict.fromkeys: two merges may spell the same token.
    words = dict.fromkeys(
        [*(token.text for token in FIRST), *byte_alphabet(), *(left + right for left, right in merges)]
    )
    vocabulary = {word: number for number, word in enumerate(words)}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": SPECIAL_IDS[token.text],
                "content": token.text,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": token.hidden,
            }
            for token in (*FIRST, *LAST)
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": _NUMBERS}, "behavior": "Isolated", "invert": False},
                {"type": "Split", "pattern": {"Regex": _WORDS}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                {"SpecialToken": {"id": BOS, "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {BOS: {"id": BOS, "ids": [SPECIAL_IDS[BOS]], "tokens": [BOS]}},
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [f"{left} {right}" for left, right in merges],
        },
    }


def tokenizer_config(context: int) -> dict[str, object]:
    """The content of `tokenizer_config.json`: what transformers adds to the tokenizer."""
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": BOS,
        "chat_template": chat_template(),
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "model_max_length": context,
        # R1 pads with its end token, although it has one for padding.
        "pad_token": EOS,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
