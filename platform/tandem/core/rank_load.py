"""The account of one DP rank: what this gateway has open there, what others have, and how fast it is. Pure."""

from __future__ import annotations

from tandem.core.route_cost import Rate, load_factor
from tandem.core.types import DpLoad, Role

LEAST_TOKENS = 64
"""Prompts with less to compute say nothing about a rank's rate: their time is all fixed cost."""
LEAST_STEPS = 8
"""Streams shorter than this say nothing about its pace."""


class RankAccount:
    """Loads of one DP rank of one epoch of a group.

    What others have is what the engine reports less what is ours. The report is of some moment since the poll before,
    and ours may have changed meanwhile, so the *most* that we had since then is taken off: a room of ours is never
    counted twice, while one of another gateway may go unseen until the next poll.
    """

    __slots__ = (
        "capacity",
        "heard",
        "other_rooms",
        "other_tokens",
        "other_waiting",
        "pace",
        "peak_rooms",
        "peak_tokens",
        "peak_waiting",
        "rate",
        "role",
        "rooms",
        "tokens",
        "waiting",
    )

    def __init__(self, role: Role, *, rate: float, pace: float) -> None:
        self.role = role
        self.rooms = 0
        """Our open rooms."""
        self.tokens = 0
        """Tokens of our prompts and answers."""
        self.waiting = 0
        """Uncached tokens of our prompts that are not computed yet; prefill only."""
        self.peak_rooms = self.peak_tokens = self.peak_waiting = 0
        """The most of each since the engine was last heard."""
        self.other_rooms = self.other_tokens = self.other_waiting = 0
        """The same of all others."""
        self.capacity = 0
        """Tokens that its KV pool holds; 0 = not known."""
        self.heard = float("-inf")
        """When the engine last reported."""
        self.rate = Rate(rate, weight=0.2)
        """Prompt tokens per second."""
        self.pace = Rate(pace, weight=20)
        """Seconds of a step with nobody else."""

    def add(self, tokens: int, waiting: int) -> None:
        """A room of ours was opened."""
        self.rooms += 1
        self.tokens += tokens
        self.waiting += waiting
        self.peak_rooms = max(self.peak_rooms, self.rooms)
        self.peak_tokens = max(self.peak_tokens, self.tokens)
        self.peak_waiting = max(self.peak_waiting, self.waiting)

    def grow(self, tokens: int) -> None:
        """A room of ours has so many more tokens."""
        self.tokens += tokens
        if self.tokens > self.peak_tokens:
            self.peak_tokens = self.tokens

    def hear(self, load: DpLoad, now: float) -> None:
        """Take what the engine reports."""
        self.other_rooms = max(0, load.running + load.waiting - self.peak_rooms)
        self.other_tokens = max(0, load.used_tokens - self.peak_tokens)
        self.other_waiting = max(0, load.waiting_uncached_tokens - self.peak_waiting)
        self.capacity = load.max_total_tokens
        self.heard = now
        self.peak_rooms, self.peak_tokens, self.peak_waiting = self.rooms, self.tokens, self.waiting

    def forget_others(self) -> None:
        """The engine's last report is too old to go by."""
        self.other_rooms = self.other_tokens = self.other_waiting = 0
        self.heard = float("-inf")

    def prefilled(self, tokens: int, seconds: float) -> None:
        """So many uncached tokens, those that waited before included, took so long."""
        if tokens >= LEAST_TOKENS:
            self.rate.observe(tokens, seconds)

    def decoded(self, steps: int, seconds: float) -> None:
        """A stream of ours had so many steps after its first token in this time."""
        if steps >= LEAST_STEPS:
            self.pace.observe(seconds / load_factor(max(1, self.streams), self.used()), steps)

    @property
    def streams(self) -> int:
        """Rooms of everybody."""
        return self.rooms + self.other_rooms

    @property
    def queued(self) -> int:
        """Uncached tokens of everybody."""
        return self.waiting + self.other_waiting

    def used(self, more: int = 0) -> float:
        """Share of the KV pool that is used with `more` tokens, above 1 if they do not fit; 0 while it is not known."""
        return (self.tokens + self.other_tokens + more) / self.capacity if self.capacity else 0.0
