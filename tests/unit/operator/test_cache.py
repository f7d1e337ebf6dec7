"""The cache: news in any order, and conditions and links between objects."""

from __future__ import annotations

from typing import Any

import pytest

from tandem_operator.cache import Cache
from tandem_operator.conditions import conditions, told
from tandem_operator.names import (
    CONFIG_MAP,
    EP_GROUP,
    FLEET,
    POD,
    POOL,
    POOLS,
    SERVICE,
    STATEFUL_SET,
    Key,
    Kind,
    Object,
)
from tandem_operator.watch import Feed, concerned
from unit.operator.world import World


def obj(name: str = "a", version: int = 1, uid: str = "u", **meta: Any) -> Object:
    return {"metadata": {"name": name, "namespace": "ai", "uid": uid, "resourceVersion": str(version), **meta}}


def listing(version: int, *items: Object) -> Object:
    return {"metadata": {"resourceVersion": str(version)}, "items": list(items)}


A = Key(SERVICE, "ai", "a")


def test_older_news_does_not_replace_newer() -> None:
    cache = Cache()
    assert cache.put(SERVICE, obj(version=10))
    assert not cache.put(SERVICE, obj(version=9))
    assert cache.get(A) == obj(version=10)


def test_late_news_does_not_bring_back_what_is_gone() -> None:
    cache = Cache()
    cache.put(SERVICE, obj())
    assert cache.remove(SERVICE, obj(version=2))
    assert not cache.put(SERVICE, obj())
    assert cache.get(A) is None


def test_a_new_object_of_the_same_name_is_another_one() -> None:
    cache = Cache()
    cache.put(SERVICE, obj())
    cache.put(SERVICE, obj(version=5, uid="v"))
    assert not cache.remove(SERVICE, obj(version=4))
    assert cache.get(A) == obj(version=5, uid="v")


def test_a_listing_tells_what_a_watch_has_missed() -> None:
    cache = Cache()
    cache.put(SERVICE, obj())
    found = list(cache.relist(SERVICE, None, listing(9, obj("b", 3, "w"))))
    assert [entry["metadata"]["name"] for entry in found] == ["b", "a"]
    assert cache.get(A) is None


def test_a_listing_does_not_remove_what_is_newer_than_it() -> None:
    cache = Cache()
    cache.put(SERVICE, obj(version=20))
    assert list(cache.relist(SERVICE, None, listing(9))) == []
    assert cache.get(A) is not None


def test_a_listing_of_one_namespace_says_nothing_of_others() -> None:
    cache = Cache()
    cache.put(SERVICE, obj())
    assert list(cache.relist(SERVICE, "other", listing(9))) == []


def test_objects_are_found_by_their_labels() -> None:
    cache = Cache()
    cache.put(SERVICE, obj("a", 1, "1", labels={"x": "1", "y": "2"}))
    cache.put(SERVICE, obj("b", 1, "2"))
    assert [entry["metadata"]["name"] for entry in cache.all(SERVICE, "ai", {"x": "1"})] == ["a"]


# -- what a change concerns


def child(kind: Kind, parent: Kind, name: str) -> Object:
    reference = {"kind": parent.kind, "name": name, "uid": "p", "controller": True}
    return obj("c", labels={"tandem.dev/fleet": "r1"}, ownerReferences=[reference])


@pytest.mark.parametrize(
    ("kind", "changed", "wanted"),
    [
        (FLEET, obj("r1"), {Key(FLEET, "ai", "r1"), Key(POOLS, "ai", "r1")}),
        (CONFIG_MAP, child(CONFIG_MAP, FLEET, "r1"), {Key(FLEET, "ai", "r1")}),
        (STATEFUL_SET, child(STATEFUL_SET, EP_GROUP, "r1-decode-0"), {Key(EP_GROUP, "ai", "r1-decode-0")}),
        (POOL, child(POOL, FLEET, "r1"), {Key(FLEET, "ai", "r1"), Key(POOLS, "ai", "r1")}),
        (
            EP_GROUP,
            child(EP_GROUP, POOL, "r1-decode"),
            {Key(EP_GROUP, "ai", "c"), Key(FLEET, "ai", "r1"), Key(POOLS, "ai", "r1")},
        ),
        (
            POD,
            obj("p", labels={"tandem.dev/fleet": "r1", "tandem.dev/group": "decode-0"}),
            {Key(EP_GROUP, "ai", "r1-decode-0"), Key(POOLS, "ai", "r1")},
        ),
        (SERVICE, obj("theirs"), set()),
    ],
)
def test_a_change_concerns_what_it_is_a_part_of(kind: Kind, changed: Object, wanted: set[Key]) -> None:
    assert set(concerned(kind, changed)) == wanted


# -- conditions


def with_conditions(*entries: Object) -> Object:
    return {"metadata": {"generation": 4}, "status": {"conditions": list(entries)}}


def test_a_condition_keeps_its_time_while_its_status_does() -> None:
    before = with_conditions({"type": "Ready", "status": "True", "lastTransitionTime": "then"})
    (after,) = conditions(before, [told("Ready", True, "Other", "why")], "now")
    assert (after["lastTransitionTime"], after["reason"], after["observedGeneration"]) == ("then", "Other", 4)


@pytest.mark.parametrize(("holds", "status"), [(False, "False"), (None, "Unknown")])
def test_a_condition_that_changes_has_a_new_time(holds: bool | None, status: str) -> None:
    before = with_conditions({"type": "Ready", "status": "True", "lastTransitionTime": "then"})
    (after,) = conditions(before, [told("Ready", holds, "R")], "now")
    assert (after["lastTransitionTime"], after["status"]) == ("now", status)


def test_conditions_of_others_stay() -> None:
    theirs = {"type": "Theirs", "status": "True", "lastTransitionTime": "then"}
    assert conditions(with_conditions(theirs), [told("Ready", True, "R")], "now")[0] == theirs


def test_a_watch_tells_of_our_own_writes_too() -> None:
    """The cache has them already, yet the pools that a fleet makes are for another key to look at."""
    world = World()
    pool = child(POOL, FLEET, "r1")
    world.cache.put(POOL, pool)
    Feed(world.ctx, ()).take(POOL, "ADDED", pool)
    assert len(world.ctx.queue) == 2


async def test_a_pod_that_tells_nothing_new_asks_for_no_work() -> None:
    world = World()
    feed = Feed(world.ctx, ())
    labels = {"tandem.dev/fleet": "r1", "tandem.dev/group": "decode-0"}
    feed.take(POD, "ADDED", obj("p", 1, labels=labels))
    for key in [await world.ctx.queue.get(), await world.ctx.queue.get()]:
        world.ctx.queue.done(key)
    feed.take(POD, "MODIFIED", {**obj("p", 2, labels=labels), "status": {"podIP": "10.0.0.1"}})
    assert len(world.ctx.queue) == 0
    (kept,) = world.cache.all(POD)
    assert (kept["metadata"]["resourceVersion"], "podIP" in kept["status"]) == ("2", False)
