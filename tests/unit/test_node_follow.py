"""A head follows its configuration: what differs from what was carried out is carried out, until that worked."""

from __future__ import annotations

import asyncio
import logging

import pytest

from tandem.fleet.host_steps import HostError
from tandem.fleet.node_follow import follow


class Follower:
    """Reads `said` one after the other, the last again and again; the first `failures` times it carries out nothing."""

    def __init__(self, *said: str | HostError, failures: int = 0) -> None:
        self.done: list[str] = []
        self.tries = 0
        self._said = list(said)
        self._failures = failures
        self._looks = 0

    def read(self) -> str:
        self._looks += 1
        found = self._said[min(self._looks, len(self._said)) - 1]
        if isinstance(found, HostError):
            raise found
        return found

    async def carry_out(self, new: str) -> None:
        self.tries += 1
        if self.tries <= self._failures:
            raise HostError("the controller did not start")
        self.done.append(new)

    async def run(self, *, looks: int) -> list[str]:
        """What was carried out after so many looks."""
        task = asyncio.create_task(follow(self.read, self.carry_out, "old", every_s=0))
        async with asyncio.timeout(10):
            # One look more: the one before it is over then.
            while self._looks <= looks:
                await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        return self.done


async def test_a_change_from_before_the_first_look_is_carried_out_once() -> None:
    assert await Follower("new").run(looks=5) == ["new"]


async def test_what_is_as_it_was_is_left_alone() -> None:
    assert await Follower("old").run(looks=5) == []


async def test_a_change_and_the_way_back_are_both_carried_out() -> None:
    assert await Follower("new", "old").run(looks=5) == ["new", "old"]


async def test_what_could_not_be_carried_out_is_tried_again_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    follower = Follower("new", failures=3)
    with caplog.at_level(logging.ERROR):
        assert await follower.run(looks=6) == ["new"]
    assert follower.tries == 4
    assert [one.message for one in caplog.records] == [
        "the controller did not start; the fleet goes on as it is, and this is tried again"
    ]


async def test_a_file_that_cannot_be_read_for_a_moment_is_read_again() -> None:
    assert await Follower(HostError("gone"), "new").run(looks=4) == ["new"]
