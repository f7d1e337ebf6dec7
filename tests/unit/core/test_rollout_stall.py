"""A change that only waits says so when that takes too long. It is not taken back for it, and goes on by itself."""

from __future__ import annotations

import pytest
from rollout_world import D, P, World, change, until_canary, world

from tandem.core.rollout_types import Create, Memory, Phase

LONG = 100.0
"""`progress_s` of these pools."""


def without_answer() -> World:
    """Decode's canary is up, and what it is asked says nothing."""
    fleet = world(decode=3)
    fleet.prompts = True
    change(fleet, D)
    up(fleet)
    return fleet


def without_partner() -> World:
    """Decode alone has another KV format."""
    fleet = world(decode=3)
    change(fleet, D, kv_format="kv2")
    up(fleet)
    return fleet


def without_nodes() -> World:
    fleet = world(decode=3)
    fleet.nodes = 5
    change(fleet, D)
    up(fleet)
    return fleet


def up(fleet: World) -> None:
    fleet.step()
    fleet.place()
    fleet.serve()
    fleet.step()


@pytest.mark.parametrize("wait", [without_answer, without_partner, without_nodes])
def test_a_canary_that_waits_for_long_is_told_as_stalled_and_stays(wait: object) -> None:
    assert callable(wait)
    fleet: World = wait()
    waits = fleet.status(D)
    fleet.now += LONG - 1
    fleet.step()
    assert fleet.status(D) == waits
    fleet.now += 1
    assert fleet.step() == []
    told = fleet.status(D)
    assert (told.phase, told.reason) == (Phase.STOPPED, "Stalled")
    assert told.message == (
        f"{waits.message}; it has waited for more than 100 s. It goes on by itself when that is over"
    )
    assert (fleet.revisions(D), fleet.memory(D).failed) == ("A A A B", "")


def test_it_goes_on_when_the_wait_is_over() -> None:
    fleet = without_answer()
    fleet.now += LONG
    fleet.step()
    fleet.answer()
    fleet.step()
    assert (fleet.status(D).phase, fleet.status(D).reason) == (Phase.PROGRESSING, "Canary")
    fleet.run()
    assert (fleet.status(D).phase, fleet.revisions(D)) == (Phase.COMPLETE, "B B B")


def test_a_partner_that_comes_and_goes_does_not_make_it_a_new_wait() -> None:
    fleet = without_answer()
    fleet.now += LONG / 2
    for group in ("prefill-0", "prefill-1"):
        fleet.fail(group)
    fleet.step()
    assert fleet.status(D).reason == "WaitingForPair"
    fleet.now += LONG / 2
    fleet.step()
    assert fleet.status(D).reason == "Stalled"


def test_what_it_has_waited_counts_anew_when_it_gets_further() -> None:
    fleet = without_nodes()
    fleet.now += LONG - 1
    fleet.prompts = True
    fleet.put("decode-3", canary=True, checked=False)
    fleet.nodes = None
    up(fleet)
    fleet.now += LONG - 1
    fleet.step()
    assert fleet.status(D).reason == "Canary"


def test_a_pause_ends_the_wait() -> None:
    fleet = without_answer()
    fleet.now += LONG - 1
    fleet.want(D, paused=True)
    fleet.step()
    fleet.want(D, paused=False)
    fleet.now += 1
    fleet.step()
    assert fleet.status(D).reason == "Canary"


def test_a_canary_that_must_serve_for_longer_than_that_does_not_wait() -> None:
    fleet = until_canary(canary_s=10 * LONG)
    for _ in range(3):
        fleet.step()
        fleet.now += LONG
    assert (fleet.status(D).phase, fleet.status(D).reason) == (Phase.PROGRESSING, "Canary")


def test_a_canary_that_is_not_ready_fails_instead() -> None:
    fleet = world(decode=3)
    change(fleet, D)
    fleet.step()
    fleet.place()
    fleet.step()
    fleet.now += LONG
    fleet.step()
    assert fleet.memory(D).failed == "B"


def test_the_rest_of_a_change_that_waits_for_the_other_pool_is_told_too() -> None:
    fleet = world(prefill=2, decode=2)
    change(fleet, P, D, kv_format="kv2")
    while not fleet.memory(D).passed:
        fleet.run(1)
    fleet.want(P, paused=True)
    fleet.run(8)
    assert (fleet.status(P).reason, fleet.status(D).reason) == ("Paused", "Stalled")
    fleet.want(P, paused=False)
    fleet.run(30)
    assert (fleet.revisions(P), fleet.revisions(D)) == ("B B", "B B")


def test_a_pool_that_grows_does_not_stall_for_want_of_nodes() -> None:
    fleet = world(decode=2)
    fleet.nodes = 4
    fleet.want(D, groups=3)
    up(fleet)
    fleet.now += LONG
    fleet.step()
    assert (fleet.status(D).phase, fleet.status(D).reason) == (Phase.PROGRESSING, "WaitingForNodes")


def test_a_new_pool_that_finds_no_nodes_is_told() -> None:
    fleet = world()
    fleet.want(D, groups=1, members=(), memory=Memory())
    fleet.nodes = 2
    up(fleet)
    fleet.now += LONG
    fleet.step()
    assert fleet.status(D).reason == "Stalled"


def test_without_a_memory_it_waits_anew() -> None:
    fleet = without_answer()
    fleet.now += LONG
    fleet.step()
    fleet.want(D, memory=Memory())
    fleet.step()
    assert fleet.status(D).reason == "Canary"


def test_what_stalls_is_counted_among_the_groups_and_nothing_is_made_for_it() -> None:
    fleet = without_answer()
    fleet.now += LONG
    fleet.put("decode-0", leaving=True)
    assert fleet.step() == [Create(group="decode-4", revision="A")]
    assert fleet.status(D).updated == 1
