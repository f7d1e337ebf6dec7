"""Makes a checkpoint folder whose tokenizer is of R1's kind and size, without a download.

The pre-tokenizer's three expressions, the byte-level model, the special tokens and the size of the vocabulary are
R1's; the merges are learned from the Python files and documents of the environment that runs this. So token ids differ
from R1's, while what it costs to encode a text is alike.

    python -m bench.gateway.big_tokenizer bench-results/r1-like [--megabytes 160]
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from tandem.models.tokenizer import FIRST, LAST, tokenizer_config

NUMBERS = r"\p{N}{1,3}"
CJK = "[一-龥\u3040-ゟ゠-ヿ]+"
WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
).replace(r"\r\n", "\r\n")
"""With the line ends themselves, as R1's file has it: fastokens knows the expression by its text."""
WORD_TOKENS = 128_000
"""Tokens before the added ones, R1's special tokens at the front among them."""
PLACEHOLDERS = 798
VOCAB_SIZE = 129_280
"""Of the model's embedding: larger than the tokenizer's vocabulary, as in R1."""
SUFFIXES = {".py", ".md", ".rst", ".txt", ".json", ".c", ".h", ".hpp", ".cu", ".cuh", ".js", ".html", ".jinja"}


def make(folder: Path, megabytes: float) -> None:
    """Learn the merges and write the folder."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    splits = [
        pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated", invert=False) for pattern in (NUMBERS, CJK, WORDS)
    ]
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=WORD_TOKENS,
        min_frequency=2,
        special_tokens=[token.text for token in FIRST],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        max_token_length=128,
    )
    tokenizer.train_from_iterator(_texts(megabytes * 1e6), trainer)
    learned: dict[str, Any] = json.loads(tokenizer.to_str())
    size = len(learned["model"]["vocab"])
    print(f"learned {len(learned['model']['merges'])} merges, {size} tokens", file=sys.stderr)
    if size < WORD_TOKENS:
        print("the text is too short for R1's number of tokens; give more megabytes", file=sys.stderr)
    learned["added_tokens"] = [_added(number, token.text, token.hidden) for number, token in enumerate(FIRST)] + [
        _added(size + number, text, hidden)
        for number, (text, hidden) in enumerate(
            [(f"<｜place▁holder▁no▁{n}｜>", True) for n in range(PLACEHOLDERS)] + [(t.text, t.hidden) for t in LAST]
        )
    ]
    folder.mkdir(parents=True, exist_ok=True)
    context = 131_072
    config = {"architectures": ["DeepseekV3ForCausalLM"], "max_position_embeddings": context, "vocab_size": VOCAB_SIZE}
    for name, content in (
        ("tokenizer.json", learned),
        ("tokenizer_config.json", tokenizer_config(context)),
        ("config.json", config),
    ):
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _added(number: int, text: str, special: bool) -> dict[str, object]:
    return {
        "id": number,
        "content": text,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": special,
    }


def _texts(limit: float) -> Iterator[str]:
    """Files in a shuffled order that does not change, until `limit` bytes."""
    roots = [Path(sys.prefix) / "lib", Path(json.__file__).parent.parent]
    paths = sorted(path for root in roots for path in root.rglob("*") if path.suffix in SUFFIXES and path.is_file())
    random.Random(1).shuffle(paths)
    size = 0
    for path in paths:
        data = path.read_bytes()
        if len(data) > 2e6:
            continue
        size += len(data)
        if size > limit:
            return
        yield data.decode("utf-8", "replace")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--megabytes", type=float, default=160)
    options = parser.parse_args()
    begin = time.monotonic()
    make(options.folder, options.megabytes)
    print(f"{options.folder}: {time.monotonic() - begin:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
