"""Names for prefixes of token ids: one key per whole block, each chained to the one before. Pure.

A key is BLAKE2b over the key before it and the block's ids, 8 bytes long. It is in the standard library, faster there
than SHA-256 for inputs this short, the same in every process (unlike `hash()`), and two prefixes share a key only once
in 2^64, or when somebody has searched for it: then one request is sent to a rank that has to compute more than was
thought. No answer depends on a key.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

KEY_BYTES = 8
ROOT = bytes(KEY_BYTES)
"""The key before the first block."""
TOKEN_BYTES = 4
"""Bytes of one id as `pack` lays it out."""

_FRESH = blake2b(digest_size=KEY_BYTES)


def pack(ids: Sequence[int]) -> bytes:
    """Token ids as 32-bit words. Raises OverflowError for one below 0 or beyond 32 bits, TypeError for no int."""
    return array("I", ids).tobytes()


def next_key(before: bytes, block: bytes) -> bytes:
    """Key of the prefix that ends with `block`; `before` is the key of the prefix that it follows, or ROOT."""
    hashed = _FRESH.copy()  # cheaper than to make one
    hashed.update(before + block)
    return hashed.digest()


def block_keys(ids: Sequence[int], block_tokens: int) -> list[bytes]:
    """Keys of all whole blocks of a prompt, shortest prefix first; what is left over has none."""
    packed = pack(ids)
    size = block_tokens * TOKEN_BYTES
    keys: list[bytes] = []
    key = ROOT
    for start in range(0, len(packed) - size + 1, size):
        hashed = _FRESH.copy()
        hashed.update(key + packed[start : start + size])
        key = hashed.digest()
        keys.append(key)
    return keys
