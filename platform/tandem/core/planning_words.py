"""How the planner says numbers, so that every reason reads alike."""

from __future__ import annotations

from tandem.core.planning_types import PlanPolicy
from tandem.core.planning_view import Seen
from tandem.core.types import Role

TOKENS = {Role.PREFILL: "uncached tokens", Role.DECODE: "tokens of answers"}
"""What each pool's load is counted in."""


def groups(count: int) -> str:
    """A number of groups."""
    return f"{count} group" if count == 1 else f"{count} groups"


def span(seconds: float) -> str:
    """A time, as people say it."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"


def number(value: float) -> str:
    """A load: three digits are enough."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def load(role: Role, value: float) -> str:
    """A pool's load with its unit."""
    return f"{number(value)} {TOKENS[role]}/s"


def percentile(share: float) -> str:
    """Such as p95."""
    return f"p{share * 100:g}"


def change(role: Role, target: int, current: int, why: str) -> str:
    """The sentence of a decision."""
    return f"{role}: {groups(target)} instead of {current}: {why}"


def not_counted(seen: Seen, now: float) -> str:
    """What a larger number makes up for; empty = nothing."""
    if not seen.stuck:
        return ""
    names = ", ".join(f"{name} ({state}, {span(now - since)})" for name, state, since in seen.stuck[:3])
    more = f" and {len(seen.stuck) - 3} others" if len(seen.stuck) > 3 else ""
    return f"; not counted, since overdue: {names}{more}"


def silent(seen: Seen, policy: PlanPolicy) -> str:
    """Whose load is missing."""
    return f"no load from {', '.join(seen.silent)} for {span(policy.stale_s)}"
