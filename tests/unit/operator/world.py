"""A server and a control service in memory, for the reconcilers."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any, cast

from msgspec.structs import replace

from tandem.core.group_check import CheckVerdict, GroupCheck
from tandem.core.types import FleetSnapshot, Group, GroupSpec, GroupState, Rank, RankState
from tandem.fleet.control_client import ControlError
from tandem_operator.apply import Applier
from tandem_operator.cache import Cache
from tandem_operator.names import BUDGET, EP_GROUP, FLEET, POOL, POOLS, Key, Kind, Object, key_of
from tandem_operator.reconcile.context import Context
from tandem_operator.reconcile.fleet import reconcile_fleet
from tandem_operator.reconcile.group import reconcile_group
from tandem_operator.reconcile.pools import reconcile_pools
from tandem_operator.watch import watched
from tandem_operator.workqueue import WorkQueue
from unit.operator.objects import fleet

NOW = 1_800_000_000.0
STAMP = "2027-01-15T08:00:00Z"
"""The same."""


class Server:
    """Objects by key; every write is counted."""

    def __init__(self, cache: Cache) -> None:
        self.objects: dict[Key, Object] = {}
        self.writes: list[str] = []
        self._versions = itertools.count(100)
        self._dropped: Counter[Key] = Counter()
        self._cache = cache

    def put(self, key: Key, obj: Object) -> Object:
        uid = f"uid-{'pool-' * (key.kind is POOL)}{key.name}{'-again' * self._dropped[key]}"
        meta = {"uid": uid, "generation": 1, **obj["metadata"], "name": key.name, "namespace": "ai"}
        self.objects[key] = {**obj, "metadata": {**meta, "resourceVersion": str(next(self._versions))}}
        self._cache.put(key.kind, self.objects[key])
        return self.objects[key]

    async def get(self, key: Key) -> Object | None:
        return self.objects.get(key)

    async def find(self, key: Key) -> Object | None:
        return self.objects.get(key)

    async def apply(self, key: Key, obj: Object) -> Object:
        self.writes.append(f"apply {key.kind.kind}/{key.name}")
        known = self.objects.get(key, {"metadata": {}})
        return self.put(key, {**known, **obj, "metadata": {**known["metadata"], **obj["metadata"]}})

    async def patch(self, key: Key, change: Object, *, part: str = "") -> Object:
        self.writes.append(f"patch {key.kind.kind}/{key.name} {part}".rstrip())
        done = self.put(key, merged(self.objects[key], change))
        if done["metadata"].get("deletionTimestamp") and not done["metadata"].get("finalizers"):
            self.drop(key)
        return done

    async def delete(self, key: Key, uid: str, *, orphan: bool = False) -> None:
        self.writes.append(f"delete {key.kind.kind}/{key.name}")
        obj = self.objects[key]
        if obj["metadata"].get("finalizers"):
            self.put(key, {**obj, "metadata": {**obj["metadata"], "deletionTimestamp": STAMP}})
        else:
            self.drop(key)

    def drop(self, key: Key) -> None:
        self._dropped[key] += 1
        self._cache.remove(key.kind, self.objects.pop(key))


class Control:
    """A fleet's groups; ready at once."""

    def __init__(self) -> None:
        self.desired: dict[str, GroupSpec] = {}
        self.groups: dict[str, Group] = {}
        self.calls: list[str] = []
        self.answers: dict[str, GroupCheck] = {}
        """What groups answer when they are checked; others answer well."""
        self.refuses = ""
        self.bad_weights = ""
        """Why it takes no other weights; empty = it does."""
        self.refreshing = ""

    @property
    def snapshot(self) -> FleetSnapshot:
        return FleetSnapshot(
            name="r1",
            groups=tuple(self.groups.values()),
            desired=tuple(self.desired.values()),
            refreshing=self.refreshing,
        )

    async def fleet(self) -> FleetSnapshot:
        return self.snapshot

    async def put_group(self, spec: GroupSpec) -> GroupSpec:
        self.calls.append(f"put {spec.group}")
        self.desired[spec.group] = spec
        ranks = tuple(Rank(rank=rank, state=RankState.READY) for rank in range(spec.nodes))
        self.groups.setdefault(
            spec.group,
            Group(
                group=spec.group,
                role=spec.role,
                epoch=1,
                state=GroupState.READY,
                weight_version=spec.declared_version,
                kv_format=spec.kv_format,
                since=NOW - 3600,
                ranks=ranks,
            ),
        )
        group = self.groups[spec.group]
        if group.state in (GroupState.READY, GroupState.CORDONED):
            state = GroupState.CORDONED if spec.cordoned else GroupState.READY
            since = group.since if group.state is state else NOW
            self.groups[spec.group] = replace(group, state=state, since=since)
        return spec

    async def check(self, group: str) -> GroupCheck:
        self.calls.append(f"check {group}")
        answer = self.answers.get(group, GroupCheck(verdict=CheckVerdict.OK))
        return replace(answer, epoch=self.groups[group].epoch)

    async def check_weights(self, path: str, version: str) -> None:
        self.calls.append(f"weights {version} in {path}")
        if self.bad_weights:
            raise ControlError(self.bad_weights, "FAILED_PRECONDITION")

    async def drain(
        self, group: str, deadline_s: float | None = None, *, migrate: bool = False, force: bool = False
    ) -> GroupSpec:
        if self.refuses and not force:
            raise ControlError(self.refuses, "FAILED_PRECONDITION")
        self.calls.append(f"drain {group}" + (" by force" if force else ""))
        self.desired[group] = replace(self.desired[group], draining=True, drain_deadline=NOW + 60)
        self.groups[group] = replace(self.groups[group], state=GroupState.DRAINING)
        return self.desired[group]

    async def remove(self, group: str) -> None:
        self.calls.append(f"remove {group}")
        self.desired.pop(group)
        self.groups[group] = replace(self.groups[group], state=GroupState.DRAINING)

    def gone(self, group: str) -> None:
        self.desired.pop(group, None)
        self.groups.pop(group, None)


class Link:
    """The connection to it."""

    def __init__(self, control: Control) -> None:
        self.control = control
        self.reachable = True
        self.known = True
        self.why = ""
        self.away_s = 0.0
        self.loads: dict[str, Any] = {}

    @property
    def snapshot(self) -> FleetSnapshot:
        return self.control.snapshot

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[Control]:
        if not self.reachable:
            raise ControlError("away", "UNAVAILABLE")
        yield self.control


class Links:
    def __init__(self, link: Link) -> None:
        self.link = link

    def open(self, namespace: str, name: str) -> Link:
        return self.link

    def get(self, namespace: str, name: str) -> Link:
        return self.link

    async def close(self, namespace: str, name: str) -> None:
        return None


class Recorder:
    def __init__(self) -> None:
        self.told: list[str] = []

    async def tell(self, kind: Kind, obj: Object, reason: str, message: str, *, type_: str = "Normal") -> None:
        self.told.append(f"{reason}: {message}")


class FixedContext(Context):
    at = NOW

    def now(self) -> float:
        return self.at


class World:
    """One Fleet, r1."""

    def __init__(self, **spec: Any) -> None:
        self.cache = Cache()
        self.server = Server(self.cache)
        self.control = Control()
        self.link = Link(self.control)
        self.recorder = Recorder()
        kube: Any = self.server
        self.ctx = FixedContext(
            kube=kube,
            cache=self.cache,
            applier=Applier(kube, self.cache, watched(BUDGET)),
            queue=WorkQueue(),
            links=cast(Any, Links(self.link)),
            recorder=cast(Any, self.recorder),
            budget=BUDGET,
        )
        self.say(**spec)

    def say(self, **spec: Any) -> None:
        """What the Fleet says from now on."""
        calm = {"rollout": {"canarySeconds": 0}}
        made = fleet(**{"prefill": calm, "decode": calm, **spec})
        self.server.put(Key(FLEET, "ai", "r1"), made)

    def scale(self, role: str, replicas: int) -> None:
        key = Key(POOL, "ai", f"r1-{role}")
        pool = self.server.objects[key]
        self.server.put(key, {**pool, "spec": {**pool["spec"], "replicas": replicas}})

    async def look(self, times: int = 4) -> None:
        """Look at everything, so often."""
        for _ in range(times):
            await reconcile_fleet(self.ctx, Key(FLEET, "ai", "r1"))
            await reconcile_pools(self.ctx, Key(POOLS, "ai", "r1"))
            for group in self.cache.all(EP_GROUP):
                await reconcile_group(self.ctx, key_of(EP_GROUP, group))
            await self.ctx.checks.settled()

    def group(self, name: str) -> Object | None:
        return self.server.objects.get(Key(EP_GROUP, "ai", f"r1-{name}"))

    def groups(self) -> list[str]:
        return [group["spec"]["group"] for group in self.cache.all(EP_GROUP)]

    async def delete(self, name: str) -> None:
        """`kubectl delete epg`."""
        await self.server.delete(Key(EP_GROUP, "ai", f"r1-{name}"), "")

    def condition(self, obj: Object | None, kind: str) -> Object:
        assert obj is not None
        return next(entry for entry in obj["status"]["conditions"] if entry["type"] == kind)


def merged(live: Any, change: Any) -> Any:
    """RFC 7386, as the server does it."""
    if not isinstance(change, dict):
        return change
    result = dict(live) if isinstance(live, dict) else {}
    for name, value in change.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = merged(result.get(name), value)
    return result
