"""A fleet whose planning a test drives, tick by tick."""

from __future__ import annotations

from typing import Any

from tandem.core.traffic import TrafficReport
from tandem.core.types import DpLoad
from tandem.fleet.control_client import FleetLoad
from tandem_operator.names import CONFIG_MAP, POOL, Key
from tandem_operator.reconcile.scaling import FleetPlanner
from unit.operator.world import World

DECODE = Key(POOL, "ai", "r1-decode")
PREFILL = Key(POOL, "ai", "r1-prefill")
MEMORY = Key(CONFIG_MAP, "ai", "r1-planning")
SCALING = {"minGroups": 2, "maxGroups": 4}


class Told:
    """What the control service tells of the load."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.reports: tuple[TrafficReport, ...] = ()
        self.silent: set[str] = set()
        """Groups whose engines do not answer."""

    async def __call__(self) -> FleetLoad:
        ranks = (DpLoad(dp_rank=0, running=3, token_usage=0.12345),)
        told = [group for group in self._world.control.groups if group not in self.silent]
        return FleetLoad(dict.fromkeys(told, ranks), self.reports)


async def planned(**decode: Any) -> tuple[World, FleetPlanner]:
    world = World(decode={"rollout": {"canarySeconds": 0}, **decode})
    await world.look()
    world.link.load = Told(world)  # type: ignore[attr-defined]
    return world, FleetPlanner(world.ctx, "ai", "r1")
