"""Groups of a real fleet leave while streams go on: no request fails, and no answer is another one than without."""

from __future__ import annotations

import asyncio
import random

import pytest

from support.fleet import Fleet
from support.oracle import Oracle
from support.streams import Streams
from tandem.cli.groups import _scale_fleet
from tandem.cli.running import with_control
from tandem.core.types import Role
from tandem.fleet.control_client import ControlError

pytestmark = pytest.mark.timeout(400)

TOKENS = 96
PROMPTS = [[random.Random(seed).randrange(300, 900) for _ in range(40 + seed)] for seed in range(5)]


@pytest.fixture(scope="module")
def expected(oracle: Oracle) -> list[list[int]]:
    return [oracle.complete(prompt, TOKENS) for prompt in PROMPTS]


def drain(fleet: Fleet, group: str, **how: bool) -> None:
    asyncio.run(with_control(fleet.config.name, lambda control: control.drain(group, **how)))


def scale(fleet: Fleet, role: Role, groups: int) -> None:
    asyncio.run(_scale_fleet(fleet.config.name, role, groups))


def until_gone(fleet: Fleet, group: str) -> None:
    fleet.until(f"{group} is gone", lambda: group not in {one["group"] for one in fleet.status()["groups"]}, 120)


def until_whole(fleet: Fleet, role: Role, groups: int) -> None:
    def ready() -> bool:
        return [one["state"] for one in fleet.status()["groups"] if one["role"] == role] == ["ready"] * groups

    fleet.until(f"{groups} {role} groups are ready", ready, 120)


@pytest.mark.parametrize("role", list(Role))
@pytest.mark.parametrize("migrate", [False, True], ids=["streams end", "streams move"])
def test_a_group_leaves_and_another_comes_while_streams_go_on(
    four_groups: Fleet, expected: list[list[int]], role: Role, migrate: bool
) -> None:
    with Streams(four_groups, PROMPTS, TOKENS, workers=4) as streams:
        streams.go_on(4)
        drain(four_groups, f"{role}-1", migrate=migrate)
        until_gone(four_groups, f"{role}-1")
        streams.go_on(2)
        scale(four_groups, role, 2)
        until_whole(four_groups, role, 2)
        streams.go_on(4)
    assert streams.errors == []
    assert [one.ids for one in streams.answered] == [expected[one.prompt] for one in streams.answered]


def test_the_last_ready_group_of_a_role_is_not_drained(four_groups: Fleet) -> None:
    drain(four_groups, "decode-1")
    with pytest.raises(ControlError, match="decode-0 is the last decode group that is ready"):
        drain(four_groups, "decode-0")
    until_gone(four_groups, "decode-1")
    scale(four_groups, Role.DECODE, 2)
    until_whole(four_groups, Role.DECODE, 2)
