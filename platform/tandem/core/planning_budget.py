"""GPUs for two pools out of one budget: what is free goes, group by group, to the pool that lacks the larger share."""

from __future__ import annotations

from collections.abc import Mapping

from tandem.core.types import Role


def share(
    budget: int | None,
    used: int,
    size: Mapping[Role, int],
    have: Mapping[Role, int],
    asked: Mapping[Role, int],
) -> dict[Role, int]:
    """How many groups each pool may come to have, at most what it asks for, and never fewer than it has.

    `used` are the GPUs that are taken now, `size` those of a group. Equal needs: prefill first, since nothing begins
    without it.
    """
    granted = dict(have)
    if budget is None:
        return {role: max(have[role], asked[role]) for role in have}
    free = budget - used
    while True:
        short = [role for role in granted if granted[role] < asked[role] and size[role] <= free]
        if not short:
            return granted
        role = min(short, key=lambda one: (granted[one] / asked[one], one is not Role.PREFILL))
        granted[role] += 1
        free -= size[role]
