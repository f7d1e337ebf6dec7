"""A laptop fleet scales its decode pool by itself: a load step makes it go 1 → 2 → 1, and no request notices."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.fleet import Fleet, ephemeral, running
from support.oracle import Oracle
from support.streams import Streams
from tandem.config import AutoscalingConfig, PlanningConfig, PoolConfig

pytestmark = pytest.mark.timeout(300)

TOKENS = 64
PROMPTS = [[random.Random(seed).randrange(300, 900) for _ in range(40 + seed)] for seed in range(5)]
DECISION_S = 10.0
"""From when the fleet tells of the load to the decision, at most."""
SETTLE_S = 60.0


@pytest.fixture(scope="module")
def fleet(tiny: Path) -> Iterator[Fleet]:
    """One prefill group, and a decode pool whose aim several streams at once always miss on a CPU."""
    scaling = AutoscalingConfig(
        min_groups=1, max_groups=2, itl_s=0.002, up_cooldown_s=2, down_cooldown_s=6, manual_hold_s=5
    )
    config = ephemeral("scaled", tiny).model_copy(
        update={
            "prefill": PoolConfig(groups=1, nodes=1),
            "decode": PoolConfig(groups=1, nodes=1, autoscaling=scaling),
            "planning": PlanningConfig(tick_s=0.5, fast_window_s=3, slow_window_s=10),
        }
    )
    with running(config) as fleet:
        yield fleet


def plan(status: dict[str, Any]) -> dict[str, Any]:
    """What `tandem status` shows of the decode pool."""
    (shown,) = status["plans"]
    assert shown["role"] == "decode"
    return dict(shown)


def streams_of_decode(status: dict[str, Any]) -> int:
    """Streams that run on decode groups, as their engines last said."""
    return sum(rank["running"] for name, ranks in status["loads"].items() if "decode" in name for rank in ranks)


def load_is_told(fleet: Fleet) -> float:
    """Wait until the fleet tells of more than the one quiet stream, or has decided already; returns when, in Unix
    seconds. Before, engines had the prompts to compute, which on a busy machine takes any time."""

    def told() -> bool:
        status = fleet.status()
        return streams_of_decode(status) > 1 or plan(status)["wanted"] == 2

    fleet.until("decode has several streams", told, SETTLE_S)
    return time.time()


def decode_groups(status: dict[str, Any]) -> list[str]:
    return [group["state"] for group in status["groups"] if group["role"] == "decode"]


def test_a_load_step_makes_decode_go_from_one_group_to_two_and_back_without_a_failed_request(
    fleet: Fleet, oracle: Oracle
) -> None:
    expected = [oracle.complete(prompt, TOKENS) for prompt in PROMPTS]
    fleet.until("the planner has looked", lambda: bool(fleet.status()["plans"]), 20)
    assert plan(fleet.status())["wanted"] == 1
    with Streams(fleet, PROMPTS, TOKENS, workers=1) as quiet:
        quiet.go_on(1)
        with Streams(fleet, PROMPTS, TOKENS, workers=5) as busy:
            told = load_is_told(fleet)
            fleet.until("a second group is wanted", lambda: plan(fleet.status())["wanted"] == 2, SETTLE_S)
            decision = plan(fleet.status())
            fleet.until("both serve", lambda: decode_groups(fleet.status()) == ["ready", "ready"], SETTLE_S)
            busy.go_on(2)
        quiet.go_on(1)
        fleet.until("one is wanted again", lambda: plan(fleet.status())["wanted"] == 1, SETTLE_S)
        fleet.until("one is left", lambda: decode_groups(fleet.status()) == ["ready"], SETTLE_S)
        quiet.go_on(1)
    assert "decode: 2 groups instead of 1" in decision["reason"]
    # By the planner's own clock, which is this machine's: looking at the status takes time as well.
    assert decision["since"] - told <= DECISION_S, decision["reason"]
    for streams in (quiet, busy):
        assert streams.errors == []
        assert [one.ids for one in streams.answered] == [expected[one.prompt] for one in streams.answered]
