"""What a request would cost on a rank: seconds to the first token on a prefill rank, between tokens on a decode rank.

Both come from models with one learned number each, so that a few observations are enough and a rank that slows down is
soon known to:
- prefill: (uncached tokens that wait before it + its own) / tokens per second;
- decode: pace × (1 + streams / 64 + share of the KV in use). A step reads all weights once, whatever the batch, and a
  little more for each stream and for its KV; `pace` is the time of a step with nobody else.
"""

from __future__ import annotations

import msgspec

STREAMS_THAT_DOUBLE = 64
"""So many streams on one rank make a step about twice as long as one stream does (R1, expert parallel, H800)."""


class Slo(msgspec.Struct, frozen=True, kw_only=True):
    """What a request should get. In seconds."""

    ttft_s: float = 2.0
    """To the first token."""
    itl_s: float = 0.05
    """Between two tokens."""


class RouteSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How the router weighs. Times in seconds."""

    slo: Slo = Slo()
    tie: float = 0.02
    """Costs that differ by less than this share of their target are equal: estimates are no better."""
    affinity: float = 0.25
    """A session stays on its rank while that costs no more than this share above the best, and `affinity_s`."""
    affinity_s: float = 0.1
    prefill_rate: float = 5000.0
    """Tokens per second of a prefill rank of which nothing is known yet."""
    pace_s: float = 0.02
    """Step of a decode rank of which nothing is known yet."""
    stale_s: float = 10.0
    """What an engine last said about others' work is forgotten after this."""
    sessions: int = 65536
    """Sessions whose rank is remembered."""


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """Why a pair was chosen: what was expected of it."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of these, what the prefill rank was expected to hold."""
    confirmed: bool = False
    """Whether its engine has said so itself; else it follows from what was routed there."""
    ttft_s: float = 0.0
    itl_s: float = 0.0
    keeps_slo: bool = True
    """Whether both are within their targets, and the KV fits."""
    by: str = "cost"
    """"cost", "tie" (several were equal), "session", or "last resort" (only groups to avoid were left)."""

    @property
    def uncached_tokens(self) -> int:
        """Prompt tokens that prefill has to compute."""
        return self.prompt_tokens - self.cached_tokens


class Rate:
    """A learned ratio, as of tokens per second: the sums of both sides, the past fading with each observation.

    So large observations count more than small ones, whose fixed costs say little about the rate.
    """

    __slots__ = ("_over", "_under", "value")

    FADES = 0.2
    """Share of the past that each observation replaces."""

    def __init__(self, prior: float, weight: float = 1.0) -> None:
        """`weight` is the denominator (such as the seconds) that the prior counts for."""
        self._over = prior * weight
        self._under = weight
        self.value = prior

    def observe(self, over: float, under: float) -> None:
        """Count `over` per `under`; both must be above zero, else it is ignored."""
        if over <= 0 or under <= 0:
            return
        kept = 1 - self.FADES
        self._over = self._over * kept + over * self.FADES
        self._under = self._under * kept + under * self.FADES
        self.value = self._over / self._under


def cached_tokens(blocks: int, block_tokens: int, prompt_tokens: int) -> int:
    """Tokens that need not be computed: whole blocks, yet never the last token, whose output is the first answer's."""
    return min(blocks * block_tokens, max(0, prompt_tokens - 1))


def first_token_s(waiting: int, uncached: int, rate: float) -> float:
    """Until a prompt is computed on a rank that has `waiting` uncached tokens before it."""
    return (waiting + uncached) / rate


def load_factor(streams: int, used: float) -> float:
    """How much longer a step is than with an empty rank; `used` is the share of its KV, 0 to 1."""
    return 1.0 + streams / STREAMS_THAT_DOUBLE + used


def between_tokens_s(pace: float, streams: int, used: float) -> float:
    """Time of a step on a rank that has `streams`, this request's among them."""
    return pace * load_factor(streams, used)


def joint_cost(ttft_s: float, itl_s: float, slo: Slo) -> float:
    """One number for a pair: each time as a share of its target."""
    return ttft_s / slo.ttft_s + itl_s / slo.itl_s
