"""The fleet's store, followed: what each group was when, and a way to wait for what it shall become."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import msgspec

from tandem.core.types import GatewayReplica, Group, GroupSpec, GroupState, Role
from tandem.state import Store

_T = TypeVar("_T")


class Seen(NamedTuple):
    """A group as it became at a moment; None = it is gone. `at` is on the monotonic clock."""

    at: float
    name: str
    group: Group | None


class NotInTime(AssertionError):
    """The fleet did not become what it should."""


class FleetWatch:
    """Belongs to the loop that `follow` runs on."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.groups: dict[str, Group] = {}
        self.desired: dict[str, GroupSpec] = {}
        self.gateways: dict[str, GatewayReplica] = {}
        self.control = ""
        """Address of the control service: another one after each start of the controller."""
        self.history: list[Seen] = []
        self._changed = asyncio.Condition()

    async def follow(self) -> None:
        """Take every change in, until the store is closed."""
        async for change in self.store.watch(""):
            folder, _, name = change.key.partition("/")
            match folder:
                case "groups":
                    group = None if change.value is None else msgspec.json.decode(change.value, type=Group)
                    self.history.append(Seen(time.monotonic(), name, group))
                    _set(self.groups, name, group)
                case "desired":
                    spec = None if change.value is None else msgspec.json.decode(change.value, type=GroupSpec)
                    _set(self.desired, name, spec)
                case "gateways":
                    found = None if change.value is None else msgspec.json.decode(change.value, type=GatewayReplica)
                    _set(self.gateways, name, found)
                case "control":
                    self.control = "" if change.value is None else msgspec.json.decode(change.value)["address"]
            async with self._changed:
                self._changed.notify_all()

    async def until(self, what: str, true: Callable[[], bool], within: float) -> None:
        """Return when `true` holds after some change. Raises NotInTime, with what is not ready."""
        try:
            async with asyncio.timeout(within), self._changed:
                await self._changed.wait_for(true)
        except TimeoutError:
            raise NotInTime(f"not within {within:g} s: {what}; {self.shortly()}") from None

    def of(self, role: Role) -> list[Group]:
        """The groups of a role that are wanted, as they are."""
        return [group for name, group in sorted(self.groups.items()) if group.role is role and name in self.desired]

    def ready(self, *roles: Role) -> bool:
        """Whether all wanted groups of these roles (none given: of all) are there and ready."""
        wanted = {name for name, spec in self.desired.items() if not roles or spec.role in roles}
        return bool(wanted) and all(
            name in self.groups and self.groups[name].state is GroupState.READY and not self.desired[name].draining
            for name in wanted
        )

    def since(self, name: str, at: float) -> list[Seen]:
        """What a group became after `at`."""
        return [seen for seen in self.history if seen.name == name and seen.at > at]

    def failures(self, name: str) -> int:
        """How often a group has failed since it was made: each time it waits longer before it starts again."""
        epochs: set[int] = set()
        for seen in self.history:
            if seen.name == name and seen.group is None:
                epochs.clear()
            elif seen.name == name and seen.group is not None and seen.group.state is GroupState.FAILED:
                epochs.add(seen.group.epoch)
        return len(epochs)

    def shortly(self) -> str:
        """The groups in one line."""
        return ", ".join(f"{name} {group.state} ({group.reason})" for name, group in sorted(self.groups.items()))


def _set(table: dict[str, _T], name: str, value: _T | None) -> None:
    if value is None:
        table.pop(name, None)
    else:
        table[name] = value
