"""What the planner is told and what it answers, as values: policy, observation, decision.

None of a metric means that it is missing: nobody scales on it. Times are in Unix seconds, spans in seconds.
"""

from __future__ import annotations

import msgspec

from tandem.core.types import DpLoad, GroupState, Role

# -- policy


class ScheduleWindow(msgspec.Struct, frozen=True, kw_only=True):
    """Groups that a pool has at least during some hours of the week, in UTC."""

    days: tuple[int, ...]
    """On which it begins; 0 = Monday."""
    begin_min: int
    """Minutes after midnight."""
    end_min: int
    """Not after `begin_min` = on the next day."""
    min_groups: int


class PoolPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """How one pool follows its load. `config.AutoscalingConfig` says what each field is for."""

    gpus_per_group: int
    aim_s: float
    """Time to first token (prefill) or between tokens (decode) to keep, at `percentile`."""
    automatic: bool = True
    """False = as many groups as somebody says; its GPUs still count for the budget."""
    paused: bool = False
    min_groups: int = 1
    max_groups: int = 4
    percentile: float = 0.95
    target_use: float = 0.75
    up_cooldown_s: float = 15.0
    down_cooldown_s: float = 300.0
    idle_s: float = 600.0
    manual_hold_s: float = 900.0
    schedule: tuple[ScheduleWindow, ...] = ()
    start_s: float = 300.0
    """A group that is not ready after this is overdue: it no longer counts as capacity that is coming."""


class PlanPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """Both pools, and what they share."""

    prefill: PoolPolicy
    decode: PoolPolicy
    gpu_budget: int | None = None
    tick_s: float = 2.0
    fast_window_s: float = 10.0
    slow_window_s: float = 120.0
    stale_s: float = 10.0
    """A group's load that is older counts as missing."""

    def of(self, role: Role) -> PoolPolicy:
        """The policy of one pool."""
        return self.prefill if role is Role.PREFILL else self.decode


# -- observation


class GroupLoad(msgspec.Struct, frozen=True, kw_only=True):
    """What a group's engine last said of itself."""

    at: float
    """When that was."""
    ranks: tuple[DpLoad, ...]

    @property
    def running(self) -> int:
        """Requests that run on all of its DP ranks."""
        return sum(rank.running for rank in self.ranks)

    @property
    def waiting(self) -> int:
        """Requests that wait on all of its DP ranks."""
        return sum(rank.waiting for rank in self.ranks)

    @property
    def waiting_uncached_tokens(self) -> int:
        """Prompt tokens that still have to be computed."""
        return sum(rank.waiting_uncached_tokens for rank in self.ranks)

    @property
    def kv_use(self) -> float:
        """Share of the KV pool in use, 0 to 1, of its fullest DP rank."""
        return max((rank.token_usage for rank in self.ranks), default=0.0)


class GroupView(msgspec.Struct, frozen=True, kw_only=True):
    """One group that exists or should."""

    group: str
    state: GroupState
    since: float
    """When it entered this state; of a group that nobody has placed yet: when it was asked for."""
    leaving: bool = False
    """It drains for good. It holds its GPUs until it is gone, and is not among the wanted ones any more."""
    load: GroupLoad | None = None


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """What the gateways saw over the last `seconds`, all replicas together. Rates are per second."""

    seconds: float
    requests_per_s: float | None = None
    """Requests that arrived."""
    input_tokens_per_s: float | None = None
    cached_tokens_per_s: float | None = None
    """Of the input, what prefill did not have to compute."""
    output_tokens_per_s: float | None = None
    refused_per_s: float | None = None
    """Requests turned away because too much waited."""
    ttft_s: float | None = None
    """Time to first token at prefill's percentile; None also where no first token came."""
    ttft_kept: float | None = None
    """Share of requests that kept the aim, 0 to 1."""
    ttft_count: int | None = None
    """How many first tokens that is of; None = not counted."""
    itl_s: float | None = None
    """Time between tokens at decode's percentile; None also where no token came."""
    itl_kept: float | None = None
    itl_count: int | None = None
    """How many gaps or requests that is of; None = not counted."""


class Queue(msgspec.Struct, frozen=True, kw_only=True):
    """What waits in the gateways now."""

    queued: int = 0
    """Requests in the admission queue."""
    oldest_wait_s: float = 0.0
    """How long the first of them has waited."""
    waiting_prefill: int = 0
    """Requests that wait for a prefill group to come up, since none is ready."""
    waiting_decode: int = 0
    """The same for decode."""

    @property
    def anyone(self) -> bool:
        """Whether some request waits at all."""
        return bool(self.queued or self.waiting_prefill or self.waiting_decode)


class PoolView(msgspec.Struct, frozen=True, kw_only=True):
    """One pool."""

    wanted: int
    """Groups that should exist now, by whomever: `replicas` in Kubernetes, wishes that do not drain on a laptop."""
    groups: tuple[GroupView, ...] = ()
    """Those that are gone are left out."""
    by_hand: bool | None = None
    """Whether somebody else than the planner has set `wanted`; None = not known: seen from the number itself."""


class Observation(msgspec.Struct, frozen=True, kw_only=True):
    """All that is known at one tick."""

    prefill: PoolView
    decode: PoolView
    fast: Window | None = None
    """None = no gateway told anything."""
    slow: Window | None = None
    queue: Queue | None = None

    def of(self, role: Role) -> PoolView:
        """One pool's part."""
        return self.prefill if role is Role.PREFILL else self.decode


# -- decision


class PoolDecision(msgspec.Struct, frozen=True, kw_only=True):
    """What one pool should have."""

    wanted: int
    """Groups. Who carries out a smaller number removes groups that are not ready before any that is."""
    changed: bool = False
    """Whether it differs from what is there now: then `wanted` is to be written."""
    reason: str = ""
    """Why it is this number, in one sentence with the numbers in it. Stays until the next change."""
    since: float = 0.0
    """When that was decided."""
    held: str = ""
    """What keeps it from acting now; empty = nothing."""
    needed: float | None = None
    """Groups that the load asks for, as a fraction; None = not known."""


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """What the fleet should have."""

    prefill: PoolDecision
    decode: PoolDecision
    gpus: int = 0
    """That the wanted groups and those that still drain take together."""

    def of(self, role: Role) -> PoolDecision:
        """One pool's part."""
        return self.prefill if role is Role.PREFILL else self.decode


# -- memory


class Capacity(msgspec.Struct, frozen=True, kw_only=True):
    """What a group can bear, as the fleet has shown: uncached tokens/s (prefill), tokens of answers/s (decode).

    Not requests at once: with fewer groups each token takes longer, so the same requests stay for longer.
    """

    kept: float | None = None
    """The most per group with which the aim was kept over a slow window."""
    broke: float | None = None
    """The least per group with which it was missed; the capacity that is reckoned with. None = never seen."""
    base_load: float | None = None
    base_s: float | None = None
    """The best time seen over a slow window, and what went with it per group: uncached tokens/s, running requests."""
    at: float = 0.0
    """When all this was last aged."""


class Need(msgspec.Struct, frozen=True, kw_only=True):
    """The most groups that the load asked for in a span of time."""

    at: float
    """When the span began."""
    groups: int


class PoolMemory(msgspec.Struct, frozen=True, kw_only=True):
    """What the planner remembers of one pool. Losing it costs a cool-down, nothing else."""

    began: float | None = None
    """When the planner first saw the pool."""
    wanted: int | None = None
    """What it decided last, or took over."""
    before: int | None = None
    """What was wanted before its last change, until that is seen to be written."""
    changed_at: float | None = None
    """When it last changed the number."""
    reason: str = ""
    since: float = 0.0
    manual_until: float = 0.0
    """Until then a number set by hand stands."""
    breach_since: float | None = None
    """Since when each tick has shown a breach."""
    breach_learned: bool = False
    """Whether this breach has told of the capacity."""
    breach_acted: bool = False
    """Whether this breach has led to more groups."""
    breach_worst: float = 0.0
    """The largest ratio of this breach."""
    idle_since: float | None = None
    """Since when nobody has asked anything."""
    away: dict[str, float] = {}
    """Groups that should serve and do not, with since when."""
    starts: dict[str, float] = {}
    """Groups that are starting, with since when."""
    ready: int = 0
    ready_since: float = 0.0
    """Since when so many have been ready."""
    ready_grew: bool = True
    """Whether there were fewer before."""
    serving_since: float | None = None
    """Since when it has had a ready group; None = it has none."""
    waited_at: float | None = None
    """When something last waited at its groups."""
    queued_at: float | None = None
    """When something last waited in the gateways."""
    warmup_s: float | None = None
    """How long a group takes to be ready, as seen."""
    rate: float | None = None
    """Requests per second over the slow window."""
    slope: float = 0.0
    """How fast that grows, in requests per second squared, smoothed."""
    running: float | None = None
    """Requests that run at once at the pool's groups, smoothed over the slow window."""
    seen_at: float | None = None
    """The last tick."""
    capacity: Capacity = Capacity()
    needs: tuple[Need, ...] = ()
    """Over the last cool-down, so that one quiet moment removes no group."""


class PlanState(msgspec.Struct, frozen=True, kw_only=True):
    """What the planner remembers. Keep it over restarts where that is easy (`msgspec.json`)."""

    prefill: PoolMemory = PoolMemory()
    decode: PoolMemory = PoolMemory()

    def of(self, role: Role) -> PoolMemory:
        """One pool's part."""
        return self.prefill if role is Role.PREFILL else self.decode
