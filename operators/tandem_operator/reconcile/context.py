"""What every reconciler needs."""

from __future__ import annotations

import datetime
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from tandem.core.group_record import Weights
from tandem_operator.apply import Applier
from tandem_operator.cache import Cache
from tandem_operator.checks import Checks
from tandem_operator.conditions import Told, conditions
from tandem_operator.control import Links
from tandem_operator.events import Recorder
from tandem_operator.kube import Kube
from tandem_operator.names import BUDGET, BUDGET_BETA, FLEET, Key, Kind, Object, leaving
from tandem_operator.workqueue import WorkQueue

_PLANNERS = ("scaling", "load", "slo")
"""Fields of a status that the planner writes, at times of its own."""


@dataclass
class Context:
    """The operator's hands and eyes."""

    kube: Kube
    cache: Cache
    applier: Applier
    queue: WorkQueue[Key]
    links: Links
    recorder: Recorder
    budget: Kind | None
    """The server's kind of PodDisruptionBudget, if it has one."""
    orphans: dict[tuple[str, str, str], float] = field(default_factory=dict)
    """Groups that a fleet has and Kubernetes has not, with since when (Unix seconds)."""

    absent: dict[Key, float] = field(default_factory=dict)
    """Groups that leave and that their fleet, asked, does not know, with since when (Unix seconds)."""

    checks: Checks = field(default_factory=Checks)

    weights: dict[tuple[Key, Weights], tuple[float, str]] = field(default_factory=dict)
    """What fleets were asked of weights that a change declares: when (Unix seconds), and why not (empty = they take
    them)."""

    def now(self) -> float:
        """Unix seconds."""
        return time.time()

    def fleet_of(self, obj: Object) -> Object | None:
        """The Fleet of a pool or a group, if there is one that is not being deleted."""
        fleet = self.cache.get(Key(FLEET, obj["metadata"]["namespace"], obj["spec"]["fleet"]))
        return fleet if fleet is not None and not leaving(fleet) else None

    async def tell_status(self, key: Key, obj: Object, status: Object, told: Sequence[Told]) -> bool:
        """Write an object's status with these conditions, if it is different; return whether it was.

        What the planner tells stays as it is at this moment.
        """
        obj = self.cache.get(key) or obj
        now = obj.get("status") or {}
        body = {
            **{name: value for name, value in status.items() if name not in _PLANNERS},
            **{name: now[name] for name in _PLANNERS if name in now},
            "observedGeneration": obj["metadata"].get("generation", 0),
            "conditions": conditions(obj, told, rfc3339(self.now())),
        }
        return await self.applier.status(key, obj, body)


def rfc3339(at: float) -> str:
    """Unix seconds as Kubernetes writes times."""
    return datetime.datetime.fromtimestamp(at, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def unix(stamp: str) -> float:
    """Kubernetes' time as Unix seconds."""
    return datetime.datetime.fromisoformat(stamp).timestamp()


async def find_budget(kube: Kube) -> Kind | None:
    """The newest kind of PodDisruptionBudget that the server has."""
    for kind in (BUDGET, BUDGET_BETA):
        if await kube.serves(kind):
            return kind
    return None
