"""The router's words: targets and pairs, what is asked, and what it tells of itself."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from tandem.core.prefix_index import PrefixIndex, Worker
from tandem.core.rank_load import RankAccount
from tandem.core.route_cost import Choice
from tandem.core.types import Role


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """Where one leg goes: a DP rank of one epoch of one group."""

    role: Role
    group: str
    epoch: int
    dp_rank: int
    dp_size: int
    url: str


class Pair(msgspec.Struct, frozen=True, kw_only=True):
    """The two targets of one attempt, and where decode finds prefill's KV bootstrap server."""

    prefill: Target
    decode: Target
    bootstrap_host: str
    bootstrap_port: int
    choice: Choice = Choice()
    """Why these."""

    def target(self, role: Role) -> Target:
        return self.prefill if role is Role.PREFILL else self.decode


class NoCapacity(msgspec.Struct, frozen=True, kw_only=True):
    """Why no pair could be chosen; `retry_after` is in seconds."""

    reason: str
    retry_after: float = 2.0
    coming: bool = False
    """Groups that would end the shortage are starting."""
    asleep: bool = False
    """All that is missing comes when somebody asks."""


class RankLoad(msgspec.Struct, frozen=True, kw_only=True):
    """Open rooms of one DP rank, and the tokens of their prompts and answers so far."""

    group: str
    epoch: int
    dp_rank: int
    rooms: int
    tokens: int


class RankView(msgspec.Struct, frozen=True, kw_only=True):
    """What the router goes by for one DP rank."""

    role: Role
    group: str
    epoch: int
    dp_rank: int
    rooms: int
    """Of this gateway."""
    other_rooms: int
    """Of everybody else, as the engine last reported."""
    waiting_tokens: int
    """Uncached prompt tokens of all that prefill has still to compute."""
    kv_used: float
    """Share of the KV pool; 0 while it is not known."""
    tokens_per_second: float
    """Learned, prefill."""
    pace_s: float
    """Learned, decode: a step with nobody else."""


class RouteAsk:
    """A request to be routed. Its blocks are hashed once, however often it is tried."""

    __slots__ = ("_keys", "_keys_of", "output_tokens", "prompt", "session")

    def __init__(self, prompt: Sequence[int], session: str = "", *, output_tokens: int = 0) -> None:
        """`output_tokens`: what the answer may take, as far as known; decode must have room for it."""
        self.prompt = prompt
        self.session = session
        self.output_tokens = output_tokens
        self._keys: list[bytes] = []
        self._keys_of = 0

    def behind(self, delivered: Sequence[int]) -> RouteAsk:
        """The same request, when its answer has these tokens already."""
        left = max(0, self.output_tokens - len(delivered))
        return RouteAsk([*self.prompt, *delivered], self.session, output_tokens=left)

    def keys(self, index: PrefixIndex) -> list[bytes]:
        """The prompt's blocks as `index` calls them."""
        if self._keys_of != index.block_tokens:
            self._keys, self._keys_of = index.keys(self.prompt), index.block_tokens
        return self._keys


class RoutableRank:
    """A DP rank that may be chosen, its account, and its slot in the prefix index (-1 for decode)."""

    __slots__ = ("account", "slot", "target", "worker")

    def __init__(self, target: Target, worker: Worker, account: RankAccount, slot: int) -> None:
        self.target = target
        self.worker = worker
        self.account = account
        self.slot = slot
