"""The fleet as this gateway sees it, kept up to date by a watch of the store. Routing follows it at once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import msgspec

from tandem.core.types import FleetSnapshot, GatewayReplica, Group, GroupSpec, PoolPlan
from tandem.state import Store

log = logging.getLogger(__name__)

_Kind = TypeVar("_Kind", bound=msgspec.Struct)


class GroupListener(Protocol):
    """Who wants to know of groups."""

    def put_group(self, group: Group) -> None: ...
    def remove_group(self, name: str) -> None: ...


class _Record(msgspec.Struct, frozen=True, kw_only=True):
    """What the controller writes under `fleet`, as far as the gateway shows it."""

    name: str = ""
    model_path: str = ""
    model_name: str = ""
    model_version: str = ""


class FleetView:
    """Reads `groups/`, `desired/`, `gateways/`, `planning/`, `fleet`; tells its listeners of each change of a group."""

    def __init__(
        self, store: Store, listeners: Sequence[GroupListener], *, on_change: Callable[[], None] = lambda: None
    ) -> None:
        """`listeners` hear of each group, in this order; `on_change` is called after changes of groups or gateways."""
        self._store = store
        self._listeners = listeners
        self._on_change = on_change
        self._groups: dict[str, Group] = {}
        self._desired: dict[str, GroupSpec] = {}
        self._gateways: dict[str, GatewayReplica] = {}
        self._plans: dict[str, PoolPlan] = {}
        self._record = _Record()
        self._revision = 0

    async def load(self) -> None:
        """Take the state as it is now. Raises StoreError."""
        for entry in await self._store.list(""):
            self._take(entry.key, entry.value, entry.version)
        self._on_change()

    async def follow(self) -> None:
        """Follow every change until the store is closed; outages are the watch's own affair."""
        async for change in self._store.watch(""):
            self._take(change.key, change.value, change.version)
            if change.key.startswith(("groups/", "gateways/")):
                self._on_change()

    def snapshot(self) -> FleetSnapshot:
        return FleetSnapshot(
            name=self._record.name,
            model_path=self._record.model_path,
            model_name=self._record.model_name,
            model_version=self._record.model_version,
            groups=tuple(self._groups[name] for name in sorted(self._groups)),
            desired=tuple(self._desired[name] for name in sorted(self._desired)),
            gateways=tuple(self._gateways[name] for name in sorted(self._gateways)),
            revision=self._revision,
            plans=tuple(self._plans[name] for name in sorted(self._plans)),
        )

    def _take(self, key: str, value: bytes | None, version: int) -> None:
        self._revision = max(self._revision, version)
        folder, _, name = key.partition("/")
        match folder:
            case "groups":
                self._take_group(key, name, value)
            case "desired":
                _set(self._desired, key, name, value, GroupSpec)
            case "gateways":
                _set(self._gateways, key, name, value, GatewayReplica)
            case "planning":
                _set(self._plans, key, name, value, PoolPlan)
            case "fleet":
                self._record = _decode(key, value, _Record) or _Record()

    def _take_group(self, key: str, name: str, value: bytes | None) -> None:
        before = self._groups.get(name)
        _set(self._groups, key, name, value, Group)
        group = self._groups.get(name)
        if group == before:
            return
        for listener in self._listeners:
            if group is None:
                listener.remove_group(name)
            else:
                listener.put_group(group)


def _set(table: dict[str, _Kind], key: str, name: str, value: bytes | None, kind: type[_Kind]) -> None:
    found = _decode(key, value, kind)
    if found is None:
        table.pop(name, None)
    else:
        table[name] = found


def _decode(key: str, value: bytes | None, kind: type[_Kind]) -> _Kind | None:
    if value is None:
        return None
    try:
        return msgspec.json.decode(value, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        # One bad entry must not stop the traffic of all others; what can't be read is not there.
        log.error("ignored the key %r of the store, which is no %s: %s", key, kind.__name__, error)
        return None
