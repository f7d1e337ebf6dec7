"""Feeds the cache and the work queue from watches (kopf) and listings.

kopf only watches here: there are no handlers of changes, so it writes neither finalizers nor annotations.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Collection, Iterator
from typing import Any

import kopf

from tandem_operator.kube import KubeError
from tandem_operator.names import (
    CONFIG_MAP,
    EP_GROUP,
    FLEET,
    FLEET_LABEL,
    GROUP_LABEL,
    OWN,
    POD,
    POOL,
    POOLS,
    SERVICE,
    STATEFUL_SET,
    Key,
    Kind,
    Object,
    group_name,
    key_of,
    owner,
    watched_label,
)
from tandem_operator.pod_state import same, slim
from tandem_operator.reconcile.context import Context

_log = logging.getLogger(__name__)
_INACTIVE_S = 60.0


class _Retries:
    """Seconds between tries of a watch: without an end, or kopf would give up the watch of a kind in silence."""

    def __iter__(self) -> Iterator[float]:
        return itertools.chain((1, 1, 2, 3), itertools.repeat(5))


def watched(budget: Kind | None) -> tuple[Kind, ...]:
    """The kinds that the operator looks at."""
    return (*OWN, STATEFUL_SET, SERVICE, CONFIG_MAP, POD, *((budget,) if budget else ()))


class Feed:
    """Takes in what is told and asks for work on what it concerns."""

    def __init__(self, ctx: Context, namespaces: Collection[str]) -> None:
        """`namespaces`: those to look at; empty = all."""
        self._ctx = ctx
        self._namespaces = tuple(namespaces)
        self.kinds = watched(ctx.budget)

    async def relist(self) -> None:
        """Take over all that there is, and look at all of it. Raises KubeError."""
        for kind in self.kinds:
            for namespace in self._namespaces or (None,):
                listing = await self._ctx.kube.list(kind, namespace)
                if kind is POD:
                    listing = {**listing, "items": [slim(pod) for pod in listing["items"] or ()]}
                for obj in self._ctx.cache.relist(kind, namespace, listing):
                    self._ask(kind, obj)
        self.look_again()

    def look_again(self, namespace: str | None = None) -> None:
        """Ask for a look at all that is the operator's own; None = in all namespaces."""
        for kind in OWN:
            for obj in self._ctx.cache.all(kind, namespace):
                self._ask(kind, obj)

    async def relist_forever(self, every: float) -> None:
        """Do that again and again: what a watch missed is found, and what waits for time goes on."""
        while True:
            await asyncio.sleep(every)
            try:
                await self.relist()
            except KubeError as error:
                _log.warning("The regular listing failed: %s", error)

    def take(self, kind: Kind, event: str | None, obj: Object) -> None:
        """Take in one event of a watch: None (listed), ADDED, MODIFIED or DELETED."""
        before = self._ctx.cache.get(key_of(kind, obj))
        if kind is POD:
            obj = slim(obj)
        if event == "DELETED":
            self._ctx.cache.remove(kind, obj)
        else:
            self._ctx.cache.put(kind, obj)
            if kind is POD and same(before, obj):
                return
        # Also where it is no news to the cache: then it was our own write, which concerns other keys too.
        self._ask(kind, obj)

    def fleet_changed(self, namespace: str, fleet: str) -> None:
        """A fleet's control service has news: of the fleet itself, its pools and its groups."""
        self._ctx.queue.add(Key(FLEET, namespace, fleet))
        self._ctx.queue.add(Key(POOLS, namespace, fleet))
        for group in self._ctx.cache.all(EP_GROUP, namespace, {FLEET_LABEL: fleet}):
            self._ctx.queue.add(key_of(EP_GROUP, group))

    def registry(self) -> kopf.OperatorRegistry:
        """kopf's handlers: one for each kind."""
        registry = kopf.OperatorRegistry()

        # Not kopf's own: that would load the whole of the official client once more, which takes seconds.
        @kopf.on.login(registry=registry, errors=kopf.ErrorsMode.TEMPORARY)
        async def login(**_: Any) -> kopf.ConnectionInfo:
            return await self._ctx.kube.credentials()

        for kind in self.kinds:
            self._watch(registry, kind)
        return registry

    def settings(self) -> kopf.OperatorSettings:
        """kopf's settings: it watches what carries our label, and neither posts nor scans."""
        settings = kopf.OperatorSettings()
        settings.posting.enabled = False
        settings.scanning.disabled = True  # no rights on namespaces and CRDs are needed for that
        settings.peering.standalone = True
        settings.watching.inactivity_timeout = _INACTIVE_S
        settings.watching.server_timeout = 240
        settings.watching.connect_timeout = 10
        settings.networking.request_timeout = 30
        settings.networking.error_backoffs = _Retries()
        for kind in self.kinds:
            if label := watched_label(kind):
                settings.watching.label_selectors[kind.group, kind.version, kind.plural] = label
        return settings

    def _watch(self, registry: kopf.OperatorRegistry, kind: Kind) -> None:
        @kopf.on.event(kind.group, kind.version, kind.plural, registry=registry)
        async def seen(event: Any, **_: Any) -> None:
            self.take(kind, event["type"], dict(event["object"]))

    def _ask(self, kind: Kind, obj: Object) -> None:
        for key in concerned(kind, obj):
            self._ctx.queue.add(key)


def concerned(kind: Kind, obj: Object) -> Iterator[Key]:
    """What to look at when an object has changed: itself, if there is work on it, and what it is a part of."""
    meta = obj["metadata"]
    namespace = meta["namespace"]
    if kind is FLEET:
        yield Key(FLEET, namespace, meta["name"])
        yield Key(POOLS, namespace, meta["name"])
        return
    fleet = (meta.get("labels") or {}).get(FLEET_LABEL)
    if kind is EP_GROUP:
        yield Key(EP_GROUP, namespace, meta["name"])
    if fleet is None:
        return
    if kind is POD:
        yield Key(EP_GROUP, namespace, group_name(fleet, meta["labels"][GROUP_LABEL]))
        yield Key(POOLS, namespace, fleet)
        return
    parent = owner(obj) or {"kind": "", "name": ""}
    if kind in (POOL, EP_GROUP):
        yield Key(POOLS, namespace, fleet)
        yield Key(FLEET, namespace, fleet)
    elif parent["kind"] == EP_GROUP.kind:
        yield Key(EP_GROUP, namespace, parent["name"])
    elif parent["kind"] == POOL.kind:
        yield Key(POOLS, namespace, fleet)
    else:
        yield Key(FLEET, namespace, fleet)
