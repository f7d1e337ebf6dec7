"""Follows what somebody else may change at any time, such as a mounted file: a look every second, until it is done."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import NoReturn, TypeVar

from tandem.fleet.host_steps import HostError

log = logging.getLogger(__name__)

T = TypeVar("T")


async def follow(
    read: Callable[[], T], carry_out: Callable[[T], Awaitable[None]], carried: T, *, every_s: float = 1.0
) -> NoReturn:
    """Carry out what `read` gives, whenever it is not what was carried out last (`carried` at first).

    Compares with what was carried out, not with what was there at the last look: so no change is missed that comes
    before the first look, and what failed is tried again. `read` runs in a thread. A HostError of either is told once,
    and again when it says something else.
    """
    told = ""
    while True:
        await asyncio.sleep(every_s)
        try:
            found = await asyncio.to_thread(read)
            if found != carried:
                await carry_out(found)
                carried = found
        except HostError as error:
            if str(error) != told:
                log.error("%s; the fleet goes on as it is, and this is tried again", error)
            told = str(error)
        else:
            told = ""
