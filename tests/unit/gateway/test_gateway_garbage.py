"""A request that is over leaves nothing for the cycle collector: in a busy gateway that would be memory for minutes."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Awaitable, Callable

import pytest
from gateway_world import World, world


async def stream(w: World) -> None:
    assert (await w.complete(stream=True)).events()[-1] == "[DONE]"


async def whole(w: World) -> None:
    assert (await w.chat()).status == 200


async def several(w: World) -> None:
    assert len((await w.complete(n=3)).json()["choices"]) == 3


async def refused(w: World) -> None:
    assert (await w.complete(temperature=9)).status == 400


@pytest.mark.parametrize("ask", [stream, whole, several, refused])
async def test_no_cycle_of_ours_is_left(ask: Callable[[World], Awaitable[None]]) -> None:
    async with world("p0", "d0") as w:
        await ask(w)
        await w.quiet()
        gc.collect()
        gc.disable()
        try:
            for _ in range(5):
                await ask(w)
            await w.quiet()
            gc.set_debug(gc.DEBUG_SAVEALL)
            gc.collect()
            found = Counter(type(one).__qualname__ for one in gc.garbage if type(one).__module__.startswith("tandem."))
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()
    assert found == {}
