"""The reactive loop's eyes: is a pool too small now, and by how much? Each miss is blamed on the pool that causes it.

Late first tokens alone do not say which pool is short: a prompt waits for prefill, or for room in decode's KV, or for a
place that the gateways give. What waits where decides.
"""

from __future__ import annotations

import math

import msgspec

from tandem.core import planning_words as words
from tandem.core.planning_types import Observation, PlanPolicy, PoolMemory, Window
from tandem.core.planning_view import Seen
from tandem.core.types import Role

KV_FULL = 0.9
"""A KV pool so full makes SGLang retract requests, or keep them waiting."""
_ENOUGH = 3
"""So many must have been late: one long prompt is no lack of groups."""
_MOST_FACTOR = 2
"""A breach at most doubles a pool: a queue that has grown long says little about how many groups are missing."""


class Breach(msgspec.Struct, frozen=True, kw_only=True):
    """A pool that is too small now."""

    ratio: float
    """What was seen, as a multiple of what is aimed at; above 1."""
    why: str

    def groups(self, ready: int) -> int:
        """How many should serve instead of `ready`."""
        return max(ready + 1, min(math.ceil(ready * self.ratio - 1e-9), _MOST_FACTOR * ready))


class Signals(msgspec.Struct, frozen=True, kw_only=True):
    """What one pool's part of the fleet shows now."""

    breach: Breach | None = None
    note: str = ""
    """Why an aim that is missed does not count; empty = it does, or is kept."""


def look(
    observation: Observation, policy: PlanPolicy, seen: dict[Role, Seen], memory: dict[Role, PoolMemory], now: float
) -> dict[Role, Signals]:
    """Both pools' signals."""
    waited = memory[Role.PREFILL].waited_at
    # Engines report now and then: what waited a moment ago counts.
    prompts_wait = waited is not None and now - waited <= policy.fast_window_s
    kv = seen[Role.DECODE].kv
    full = kv is not None and kv >= policy.decode.target_use
    fast = observation.fast
    slow_steps = fast is not None and fast.itl_s is not None and fast.itl_s > policy.decode.aim_s
    decode_waits = bool(seen[Role.DECODE].waiting) and not prompts_wait
    by_decode = full or slow_steps or decode_waits
    return {
        Role.PREFILL: _prefill(observation, policy, seen[Role.PREFILL], prompts_wait, by_decode),
        Role.DECODE: _decode(observation, policy, seen[Role.DECODE], prompts_wait, by_decode),
    }


def _prefill(observation: Observation, policy: PlanPolicy, seen: Seen, prompts_wait: bool, by_decode: bool) -> Signals:
    breaches = []
    note = ""
    if late := _late_first_tokens(observation.fast, policy):
        if by_decode and not prompts_wait:
            note = f"{late.why}, but no prompt waits at prefill: decode is what is short"
        elif not prompts_wait and not seen.silent and not _queue(observation):
            note = f"{late.why}, but nothing waits at prefill: prompts take that long, and more groups would not help"
        else:
            breaches.append(late)
    if (queue := _queue_breach(observation, policy, seen)) and prompts_wait and not by_decode:
        breaches.append(queue)
    return _worst(breaches, note, seen)


def _decode(observation: Observation, policy: PlanPolicy, seen: Seen, prompts_wait: bool, by_decode: bool) -> Signals:
    breaches = []
    note = ""
    pool, fast = policy.decode, observation.fast
    if (
        fast is not None
        and fast.itl_s is not None
        and fast.itl_s > pool.aim_s
        and _enough(fast.itl_count, fast.itl_kept)
    ):
        why = (
            f"time between tokens {words.percentile(pool.percentile)} was {words.span(fast.itl_s)} "
            f"over {words.span(fast.seconds)}, aim {words.span(pool.aim_s)}"
        )
        if seen.running is not None and seen.running <= len(seen.ready):
            note = f"{why}, but with {seen.running} requests on {words.groups(len(seen.ready))} more would not help"
        else:
            breaches.append(Breach(ratio=fast.itl_s / pool.aim_s, why=why))
    if seen.kv is not None and seen.kv >= KV_FULL:
        why = f"the KV cache is {seen.kv:.0%} full, aim {pool.target_use:.0%}"
        breaches.append(Breach(ratio=seen.kv / pool.target_use, why=why))
    if (queue := _queue_breach(observation, policy, seen)) and (by_decode or not prompts_wait):
        breaches.append(queue)
    elif by_decode and not prompts_wait and seen.waiting and (late := _late_first_tokens(fast, policy)):
        breaches.append(
            Breach(ratio=late.ratio, why=f"{late.why}, and {seen.waiting} requests wait for room in decode")
        )
    return _worst(breaches, note, seen)


def _late_first_tokens(fast: Window | None, policy: PlanPolicy) -> Breach | None:
    pool = policy.prefill
    if fast is None or fast.ttft_s is None or fast.ttft_s <= pool.aim_s or not _enough(fast.ttft_count, fast.ttft_kept):
        return None
    why = (
        f"time to first token {words.percentile(pool.percentile)} was {words.span(fast.ttft_s)} "
        f"over {words.span(fast.seconds)}, aim {words.span(pool.aim_s)}"
    )
    return Breach(ratio=fast.ttft_s / pool.aim_s, why=why)


def _queue_breach(observation: Observation, policy: PlanPolicy, seen: Seen) -> Breach | None:
    """Requests that the gateways keep waiting too long, or turn away."""
    queue, fast = observation.queue, observation.fast
    if fast is not None and fast.refused_per_s:
        why = f"{words.number(fast.refused_per_s)} requests/s were turned away over {words.span(fast.seconds)}"
        return Breach(ratio=1 + fast.refused_per_s / max(fast.requests_per_s or 0.0, fast.refused_per_s), why=why)
    if queue is None or not queue.queued or queue.oldest_wait_s <= policy.prefill.aim_s:
        return None
    why = (
        f"{queue.queued} requests wait in the gateways, the first for {words.span(queue.oldest_wait_s)}, "
        f"aim {words.span(policy.prefill.aim_s)}"
    )
    return Breach(ratio=1 + queue.queued / max(1, seen.running or 0), why=why)


def _worst(breaches: list[Breach], note: str, seen: Seen) -> Signals:
    if not breaches or not seen.ready:
        return Signals(note="" if breaches else note)
    return Signals(breach=max(breaches, key=lambda breach: breach.ratio))


def _queue(observation: Observation) -> bool:
    return observation.queue is not None and observation.queue.queued > 0


def _enough(count: int | None, kept: float | None) -> bool:
    """Whether what was late was more than a few requests or tokens."""
    if count is None:
        return True
    return count * (1 - kept if kept is not None else 1.0) >= _ENOUGH - 1e-6
