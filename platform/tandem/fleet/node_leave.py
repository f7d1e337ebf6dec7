"""`tandem node leave`: before its pod ends, the node's group gets the chance to move its streams elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing

from tandem.core.types import FleetSnapshot, GroupState
from tandem.fleet.control_client import ControlClient, ControlError

_ENDED = frozenset({GroupState.GONE, GroupState.FAILED})


async def leave(control: str, group: str, within: float, tell: Callable[[str], None]) -> None:
    """Have the group drained, and wait until it is gone, for `within` seconds at most. Never fails: the pod ends.

    Other groups take its streams at once; where there is no other of its role, they may end where they are.
    """
    try:
        async with asyncio.timeout(within), ControlClient(control, deadline=min(5.0, within)) as client:
            await _leave(client, group, within, tell)
    except TimeoutError:
        tell(f"{group} was not gone after {within:.0f} s")
    except ControlError as error:
        tell(f"{group} cannot be drained: {error}")


async def _leave(client: ControlClient, group: str, within: float, tell: Callable[[str], None]) -> None:
    if (why := _over(await client.fleet(), group)) is not None:
        tell(why)
        return
    try:
        await client.drain(group, within, migrate=True)
        tell(f"{group} drains; its streams move to other groups")
    except ControlError as error:
        if error.code == "NOT_FOUND":
            tell(f"{group} is not wanted any more")
            return
        if error.code != "FAILED_PRECONDITION":
            raise
        await client.drain(group, within, force=True)
        tell(f"{group} drains, although: {error}")
    async with aclosing(client.watch()) as snapshots:
        async for fleet in snapshots:
            if (why := _over(fleet, group)) is not None:
                tell(why)
                return


def _over(fleet: FleetSnapshot, group: str) -> str | None:
    """Why there is nothing to wait for; None = there is."""
    found = next((one for one in fleet.groups if one.group == group), None)
    if found is None:
        return f"{group} is gone"
    return f"{group} is {found.state}: no request runs there" if found.state in _ENDED else None
