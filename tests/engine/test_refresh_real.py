"""A real fleet takes other weights while streams go on, and keeps the old ones where the new ones are bad."""

from __future__ import annotations

import asyncio
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from support.fleet import Fleet
from support.oracle import Oracle
from support.streams import Streams
from tandem.cli.running import with_control
from tandem.core.group_check import CheckVerdict, GroupCheck
from tandem.core.refresh import OVER, Refresh, RefreshPhase
from tandem.fleet.control_client import ControlClient
from tandem.fleet.refresh_ask import RefreshAsk
from tandem.models.tiny import ensure_tiny

pytestmark = pytest.mark.timeout(500)

TOKENS = 64
PROMPTS = [[random.Random(seed).randrange(300, 900) for _ in range(30 + seed)] for seed in range(5)]


@pytest.fixture(scope="module")
def second(home: Path) -> Path:
    ensure_tiny(home / "second", seed=1)
    return home / "second"


@pytest.fixture(scope="module")
def old(oracle: Oracle) -> list[list[int]]:
    return [oracle.complete(prompt, TOKENS) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def new(second: Path) -> list[list[int]]:
    oracle = Oracle(second)
    return [oracle.complete(prompt, TOKENS) for prompt in PROMPTS]


def refresh(fleet: Fleet, path: Path, version: str, **more: Any) -> Refresh:
    """Refresh the weights and wait for the end."""

    async def whole(control: ControlClient) -> Refresh:
        now = await control.refresh(RefreshAsk(path=str(path), version=version, **more))
        async with asyncio.timeout(240):
            while now.phase not in OVER:
                await asyncio.sleep(0.2)
                now = await control.refresh_state()
        return now

    return asyncio.run(with_control(fleet.config.name, whole))


def lives(fleet: Fleet) -> dict[str, tuple[str, int, str]]:
    """State, epoch and weight version of each group."""
    return {
        group["group"]: (group["state"], group["epoch"], group["weight_version"]) for group in fleet.status()["groups"]
    }


def test_streams_go_on_while_every_group_takes_other_weights_and_each_is_of_one_version(
    four_groups: Fleet, second: Path, tiny: Path, old: list[list[int]], new: list[list[int]]
) -> None:
    before = lives(four_groups)
    assert all(a != b for a, b in zip(old, new, strict=True))
    with Streams(four_groups, PROMPTS, TOKENS, workers=4) as streams:
        streams.go_on(4)
        assert refresh(four_groups, second, "2").phase is RefreshPhase.DONE
        streams.go_on(8)
    assert streams.errors == []
    for one in streams.answered:
        assert one.ids in (old[one.prompt], new[one.prompt]), "an answer by two versions"
    assert [one.ids for one in streams.answered[-4:]] == [new[one.prompt] for one in streams.answered[-4:]]
    assert lives(four_groups) == {name: ("ready", epoch, "2") for name, (_, epoch, _) in before.items()}
    assert refresh(four_groups, tiny, "1").phase is RefreshPhase.DONE
    assert four_groups.complete(PROMPTS[0], TOKENS) == old[0]


def test_every_group_answers_the_known_prompt_as_the_others_do_and_a_cordoned_one_too(four_groups: Fleet) -> None:
    groups = sorted(lives(four_groups))

    async def ask(control: ControlClient) -> list[GroupCheck]:
        await control.cordon("decode-1")
        try:
            return [await control.check(group) for group in groups]
        finally:
            await control.cordon("decode-1", False)

    checks = asyncio.run(with_control(four_groups.config.name, ask))
    assert [(one.verdict, one.message) for one in checks] == [(CheckVerdict.OK, "")] * 4
    assert {one.partner for one in checks} == {"prefill-0", "decode-0"}


def test_bad_weights_cost_one_group_a_restart_and_the_fleet_serves_the_old_ones_throughout(
    four_groups: Fleet, second: Path, home: Path, old: list[list[int]]
) -> None:
    bad = home / "bad"
    shutil.copytree(second, bad, dirs_exist_ok=True)
    for file in bad.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    before = lives(four_groups)
    with Streams(four_groups, PROMPTS, TOKENS, workers=3) as streams:
        streams.go_on(2)
        ended = refresh(four_groups, bad, "3")
        streams.go_on(2)
    assert (ended.phase, "prefill-1" in ended.failure) == (RefreshPhase.ROLLED_BACK, True)
    assert streams.errors == []
    assert [one.ids for one in streams.answered] == [old[one.prompt] for one in streams.answered]
    after = lives(four_groups)
    assert {group: epoch - before[group][1] for group, (_, epoch, _) in after.items()} == {
        **dict.fromkeys(after, 0),
        "prefill-1": 1,
    }
    assert {version for _, _, version in after.values()} == {"1"}


def test_groups_of_two_nodes_take_other_weights_on_every_rank(
    fleet: Fleet, second: Path, tiny: Path, old: list[list[int]], new: list[list[int]]
) -> None:
    before = lives(fleet)
    assert refresh(fleet, second, "2", allow_pause=True).phase is RefreshPhase.DONE
    assert fleet.complete_all(PROMPTS, TOKENS) == new
    assert lives(fleet) == {name: ("ready", epoch, "2") for name, (_, epoch, _) in before.items()}
    assert refresh(fleet, tiny, "1", allow_pause=True).phase is RefreshPhase.DONE
    assert fleet.complete_all(PROMPTS, TOKENS) == old
