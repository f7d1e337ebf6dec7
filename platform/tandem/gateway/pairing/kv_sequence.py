"""Puts one publisher's batches into order: each is applied once, and what was lost is noticed. No I/O.

A publisher numbers its batches from 0, and sends the last of them again on request. Live ones may come late, twice or
never (a subscriber that is slow or was away misses some). A batch that cannot be had any more may have told of blocks
that were removed; then nothing that was known of the rank is certain, and it is forgotten: a FORGET stands before the
batches that come after the gap.
"""

from __future__ import annotations

from typing import Final

FORGET: Final = None
"""In the place of batches that are lost for good."""

Ordered = list[bytes | None]
"""Batches to apply in this order; FORGET = drop what is known first."""


class BatchSequence:
    """See the module. All methods return what can be applied now."""

    def __init__(self, *, most_bytes: int = 16 * 2**20) -> None:
        """`most_bytes` bounds the batches that are held back for want of one before them."""
        self.expected = 0
        """The next number that can be applied."""
        self._most_bytes = most_bytes
        self._held: dict[int, bytes] = {}
        self._held_bytes = 0

    @property
    def gap(self) -> bool:
        """Whether batches are held back, as one before them is missing: ask for `expected` and what follows."""
        return bool(self._held)

    def live(self, number: int, batch: bytes) -> Ordered:
        """A batch as it was published."""
        if number < self.expected or number in self._held:
            return []
        if number == self.expected:
            return [*self._next(batch), *self._follow()]
        self._held[number] = batch
        self._held_bytes += len(batch)
        return self.give_up() if self._held_bytes > self._most_bytes else []

    def replayed(self, number: int, batch: bytes) -> Ordered:
        """A batch that was sent again. They come in order, so what is before the first cannot be had any more."""
        if number < self.expected:
            return []
        lost = number > self.expected
        self.expected = number
        for old in [held for held in self._held if held <= number]:
            self._held_bytes -= len(self._held.pop(old))
        return [*([FORGET] if lost else []), *self._next(batch), *self._follow()]

    def give_up(self) -> Ordered:
        """What is missing will not come: go on with what is held."""
        if not self._held:
            return []
        self.expected = min(self._held)
        return [FORGET, *self._follow()]

    def _next(self, batch: bytes) -> Ordered:
        self.expected += 1
        return [batch]

    def _follow(self) -> Ordered:
        """What was held back and is in order now."""
        ready: Ordered = []
        while (batch := self._held.pop(self.expected, None)) is not None:
            self._held_bytes -= len(batch)
            ready += self._next(batch)
        return ready
