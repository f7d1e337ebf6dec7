"""How long requests hold their slots, estimated from what is observed."""

from __future__ import annotations

import math

_MEMORY_S = 60.0
"""What was observed so long ago counts 1/e of what is observed now."""
_ENOUGH = 4.0
"""Ends that must have been seen (old ones count less) before there is an estimate."""


class ServiceRate:
    """Mean holding time = slot-seconds that were used ÷ requests that ended, both fading with age.

    Requests that still run are in the slot-seconds, so long ones count before they end: the estimate is not too short
    in the beginning (for exponential times it is the maximum-likelihood estimate with censoring).
    """

    __slots__ = ("_at", "_ends", "_seconds")

    def __init__(self) -> None:
        self._at: float | None = None
        self._seconds = 0.0
        self._ends = 0.0

    def observe(self, now: float, running: int, ended: int = 0) -> None:
        """`running` requests ran since the last call; now `ended` of them end."""
        if self._at is not None and now > self._at:
            span = now - self._at
            fade = math.exp(-span / _MEMORY_S)
            self._seconds = self._seconds * fade + running * _MEMORY_S * (1 - fade)
            self._ends *= fade
        self._at = now
        self._ends += ended

    @property
    def holding_s(self) -> float | None:
        """Mean seconds from a request's start to its end; None = too little was seen."""
        return self._seconds / self._ends if self._ends >= _ENOUGH and self._seconds > 0 else None
