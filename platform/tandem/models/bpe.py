"""Learns byte-level BPE merges from a text: the same merges on every machine and with every library version.

The trainer of the `tokenizers` package would do, but nothing promises that its next release breaks ties alike, and the
model's checksum depends on the vocabulary. This one is a page long, and its ties are broken by the text of the pair.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from itertools import pairwise

Pair = tuple[str, str]

# Words as `tokenizer.py` splits them, as far as the standard library can say it: numbers by three digits, letters and
# signs with the blank before them, line ends, other blanks.
_WORD = re.compile(r"\d{1,3}| ?[^\W\d_]+| ?(?:[^\w\s]|_)+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def byte_alphabet() -> list[str]:
    """The printable character that stands for each byte, by byte value: GPT-2's mapping, which `ByteLevel` uses."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = (byte for byte in range(256) if byte not in set(plain))
    character = {byte: chr(byte) for byte in plain} | {byte: chr(256 + n) for n, byte in enumerate(shifted)}
    return [character[byte] for byte in range(256)]


def learn_merges(text: str, tokens: int) -> list[Pair]:
    """The merges that add `tokens` new tokens to the bytes, most frequent pair first, ties in alphabetical order.

    Raises ValueError when the text is too short to teach so many.
    """
    alphabet = byte_alphabet()
    counts = Counter(_WORD.findall(text))
    words = [[alphabet[byte] for byte in word.encode()] for word in counts]
    frequency = list(counts.values())

    pairs: Counter[Pair] = Counter()
    places: defaultdict[Pair, set[int]] = defaultdict(set)  # words that hold, or once held, the pair
    for at, word in enumerate(words):
        _count(word, frequency[at], pairs)
        for pair in pairwise(word):
            places[pair].add(at)

    merges: list[Pair] = []
    known = set(alphabet)
    while len(known) < len(alphabet) + tokens:
        best = max(pairs.values(), default=0)
        if best < 2:
            raise ValueError(
                f"the text teaches only {len(known) - len(alphabet)} of {tokens} tokens; give a longer one"
            )
        pair = min(pair for pair, count in pairs.items() if count == best)
        merges.append(pair)
        known.add(pair[0] + pair[1])
        for at in places.pop(pair):
            _count(words[at], -frequency[at], pairs)
            words[at] = _merged(words[at], pair)
            _count(words[at], frequency[at], pairs)
            for new in pairwise(words[at]):
                places[new].add(at)
    return merges


def _count(word: list[str], frequency: int, pairs: Counter[Pair]) -> None:
    for pair in pairwise(word):
        pairs[pair] += frequency


def _merged(word: list[str], pair: Pair) -> list[str]:
    out: list[str] = []
    for symbol in word:
        if out and (out[-1], symbol) == pair:
            out[-1] += symbol
        else:
            out.append(symbol)
    return out
