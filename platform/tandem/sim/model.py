"""The simulated model: each token is a function of all tokens before it and of the weights, so every answer is known.

A *state* stands for the KV cache of a sequence: who has the state of `[a, b, c]` can go on behind `c`, and two ways to
the same tokens lead to the same state. Weights of another version have other states, and make garbage of foreign ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache

VOCABULARY = 50_000
END_EVERY = 40
"""One token of so many ends the answer."""
_PRIME = 2**61 - 1
_MIX = 0x9E3779B97F4A7C15


@cache
def salt_of(version: str) -> int:
    """The weights of a version, as a number."""
    salt = 17
    for byte in version.encode():
        salt = (salt * 257 + byte + 1) * _MIX % _PRIME
    return salt


def prefill(salt: int, tokens: Iterable[int]) -> int:
    """The state after these tokens, with the weights `salt`."""
    state = salt
    for token in tokens:
        state = (state * _MIX + token + 1 + salt) % _PRIME
    return state


def token_after(state: int) -> int:
    """What the model says next."""
    return (state >> 17) % VOCABULARY


def advance(state: int, token: int, salt: int) -> int:
    """The state one token later."""
    return (state * _MIX + token + 1 + salt) % _PRIME


def ends(token: int) -> bool:
    """Whether the answer ends with this token."""
    return token % END_EVERY == 0


def answer(salt: int, prompt: Sequence[int], limit: int) -> list[int]:
    """The whole answer to a prompt, the token that ends it included."""
    state = prefill(salt, prompt)
    tokens: list[int] = []
    while len(tokens) < limit:
        token = token_after(state)
        tokens.append(token)
        if ends(token):
            break
        state = advance(state, token, salt)
    return tokens
