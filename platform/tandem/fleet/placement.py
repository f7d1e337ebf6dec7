"""Placement groups: one per group, STRICT_SPREAD, one bundle per rank, kept over the group's epochs.

Ray's calls block, so each runs in a thread; each has a deadline.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util import placement_group, placement_group_table, remove_placement_group
from ray.util.placement_group import PlacementGroup, get_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from tandem.core.types import NO_NODES

PREFIX = "group/"
_SLICE_S = 2.0
"""A thread that waits for a placement comes back so often, so that it can be given up."""
_REMOVED_S = 15.0


def placement_name(group: str) -> str:
    """Name of a group's placement in the fleet's Ray namespace."""
    return PREFIX + group


async def place(group: str, nodes: int, bundle: Mapping[str, float]) -> AsyncIterator[str]:
    """Get a node for each of `nodes` ranks; ends when they all have one, also after a node was lost.

    Yields now and then, until then, one sentence on what is missing. Raises RayError.
    """
    while True:
        placed = await asyncio.to_thread(_find_or_make, group, nodes, bundle)
        if await asyncio.to_thread(placed.wait, _SLICE_S):
            return
        yield await asyncio.to_thread(_missing, nodes, bundle)


def rank_options(group: str, rank: int, bundle: Mapping[str, float]) -> dict[str, Any]:
    """Options of an actor that takes the whole bundle of one rank. Raises ValueError if the group has no placement."""
    others = {name: amount for name, amount in bundle.items() if name not in ("CPU", "GPU")}
    return {
        "num_cpus": bundle.get("CPU", 0.0),
        "num_gpus": bundle.get("GPU", 0.0),
        "resources": others,
        "scheduling_strategy": PlacementGroupSchedulingStrategy(
            placement_group=get_placement_group(placement_name(group)), placement_group_bundle_index=rank
        ),
    }


async def release(group: str) -> None:
    """Give a group's nodes back; harmless when there are none. Raises RayError, TimeoutError."""
    async with asyncio.timeout(_REMOVED_S):
        while await asyncio.to_thread(_remove, group):  # noqa: ASYNC110 - Ray has no event for it
            await asyncio.sleep(0.05)


async def placed_groups() -> list[str]:
    """Groups that have a placement, or wait for one."""
    table = await asyncio.to_thread(placement_group_table)
    return [
        entry["name"].removeprefix(PREFIX)
        for entry in table.values()
        if entry["name"].startswith(PREFIX) and entry["state"] != "REMOVED"
    ]


def _find(group: str) -> PlacementGroup | None:
    try:
        found: PlacementGroup = get_placement_group(placement_name(group))
    except ValueError:
        return None
    return found


def _find_or_make(group: str, nodes: int, bundle: Mapping[str, float]) -> PlacementGroup:
    return _find(group) or placement_group(
        [dict(bundle) for _ in range(nodes)],
        strategy="STRICT_SPREAD",
        name=placement_name(group),
        lifetime="detached",
    )


def _remove(group: str) -> bool:
    """Ask for the removal; return whether the placement is still there."""
    found = _find(group)
    if found is None:
        return False
    if placement_group_table(found).get("state") == "REMOVED":
        return False
    remove_placement_group(found)
    return True


def _missing(nodes: int, bundle: Mapping[str, float]) -> str:
    wanted = ", ".join(f"{amount:g} {name}" for name, amount in bundle.items())
    try:
        alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    except RayError as error:
        return f"{NO_NODES}: {nodes} with {wanted} each; Ray does not answer: {error}"
    fit = sum(all(offered.get(name, 0.0) >= amount for name, amount in bundle.items()) for offered in alive)
    return (
        f"{NO_NODES}: {nodes} with {wanted} free on each; "
        f"of the cluster's {len(alive)} nodes, {fit} have that, free or taken"
    )
