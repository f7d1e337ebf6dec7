"""What is compared, what is written, and what is left to others."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem_operator.apply import Applier, Busy, NotOurs, Refused, Trouble, difference, without_empty
from tandem_operator.cache import Cache
from tandem_operator.compare import covers
from tandem_operator.kube import KubeError
from tandem_operator.names import CONFIG_MAP, FLEET, SERVICE, STATEFUL_SET, Key, Kind, Object, labels, owned_by
from unit.operator.objects import fleet
from unit.operator.world import merged

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)
objects = st.dictionaries(st.text(max_size=3), values, max_size=4)


@given(objects)
def test_an_object_covers_itself(obj: Object) -> None:
    assert covers(obj, obj)


def test_what_the_server_adds_is_no_difference() -> None:
    assert covers({"spec": {"a": 1, "default": 2}, "status": {}}, {"spec": {"a": 1}})


@pytest.mark.parametrize("live", [{}, {"a": None}, {"a": 2}, {"a": {}}, None])
def test_what_is_missing_or_other_is_a_difference(live: Any) -> None:
    assert not covers(live, {"a": 1})


def test_entries_of_a_list_are_found_by_name() -> None:
    assert covers(
        {"env": [{"name": "b"}, {"name": "a", "value": "1"}]}, {"env": [{"name": "a", "value": "1"}, {"name": "b"}]}
    )


def test_an_entry_that_nobody_asked_for_is_a_difference() -> None:
    assert not covers({"env": [{"name": "a"}, {"name": "b"}]}, {"env": [{"name": "a"}]})


def test_two_mounts_of_one_volume_are_told_apart() -> None:
    mounts = [{"name": "v", "mountPath": "/a"}, {"name": "v", "mountPath": "/b"}]
    assert covers({"volumeMounts": mounts}, {"volumeMounts": mounts})
    assert not covers({"volumeMounts": mounts}, {"volumeMounts": [mounts[0], {"name": "v", "mountPath": "/c"}]})


def test_others_may_add_owners_and_finalizers() -> None:
    live = {"finalizers": ["theirs", "ours"], "ownerReferences": [{"uid": "1"}, {"uid": "2"}]}
    assert covers(live, {"finalizers": ["ours"], "ownerReferences": [{"uid": "2"}]})


@pytest.mark.parametrize(("live", "rendered"), [("1", "1000m"), ("1Gi", "1024Mi"), ("2", 2), ("500m", "0.5")])
def test_amounts_are_compared_by_what_they_mean(live: str, rendered: Any) -> None:
    assert covers({"limits": {"cpu": live}}, {"limits": {"cpu": rendered}})
    assert not covers({"limits": {"cpu": live}}, {"limits": {"cpu": "3"}})


# -- status


plain = st.dictionaries(
    st.text(max_size=2), st.integers() | st.dictionaries(st.text(max_size=2), st.integers()), max_size=4
)


@given(plain, plain)
def test_the_difference_makes_one_of_the_other(live: Object, wanted: Object) -> None:
    after = merged(live, difference(live, wanted))
    assert difference(after, wanted) == {}
    assert {name: value for name, value in after.items() if value != {}} == {
        name: value for name, value in wanted.items() if value != {}
    }


@given(objects)
def test_there_is_no_difference_to_itself(obj: Object) -> None:
    assert difference(obj, obj) == {}


def test_empty_text_is_not_written() -> None:
    assert without_empty({"a": "", "b": [{"c": "", "d": 0}]}) == {"b": [{"d": 0}]}


# -- writing


class Server:
    """Takes what is applied, as an API server would."""

    def __init__(self) -> None:
        self.applied: list[Object] = []
        self.deleted: list[str] = []
        self.unlabelled: dict[Key, Object] = {}
        self.refuses: KubeError | None = None

    async def find(self, key: Key) -> Object | None:
        return self.unlabelled.get(key)

    async def apply(self, key: Key, obj: Object) -> Object:
        if self.refuses is not None:
            raise self.refuses
        self.applied.append(obj)
        meta = {**obj["metadata"], "name": key.name, "namespace": key.namespace, "uid": "u"}
        return {**obj, "metadata": {**meta, "resourceVersion": str(10 + len(self.applied))}}

    async def delete(self, key: Key, uid: str, *, orphan: bool = False) -> None:
        self.deleted.append(f"{uid} {'without' if orphan else 'with'} its pods")


KEY = Key(CONFIG_MAP, "ai", "r1-config")
PARENT = fleet()


def child(**data: str) -> Object:
    return {"metadata": {"ownerReferences": owned_by(FLEET, PARENT)}, "data": data}


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def applier(server: Server) -> Applier:
    kinds: tuple[Kind, ...] = (CONFIG_MAP, STATEFUL_SET, SERVICE)
    return Applier(server, Cache(), kinds)  # type: ignore[arg-type]


async def test_a_second_pass_writes_nothing(applier: Applier, server: Server) -> None:
    assert await applier.ensure(KEY, child(a="1"), PARENT)
    assert not await applier.ensure(KEY, child(a="1"), PARENT)
    assert len(server.applied) == 1


async def test_a_field_that_is_not_rendered_any_more_is_taken_away(applier: Applier, server: Server) -> None:
    await applier.ensure(KEY, child(a="1", b="2"), PARENT)
    assert await applier.ensure(KEY, child(a="1"), PARENT)
    assert server.applied[-1]["data"] == {"a": "1"}


async def test_what_somebody_changed_is_put_back(applier: Applier) -> None:
    await applier.ensure(KEY, child(a="1"), PARENT)
    live = applier.cache.get(KEY)
    assert live is not None
    meta = {**live["metadata"], "resourceVersion": "99"}
    applier.cache.put(CONFIG_MAP, {**live, "metadata": meta, "data": {"a": "2"}})
    assert await applier.ensure(KEY, child(a="1"), PARENT)


def live(**meta: Any) -> Object:
    return {"metadata": {"name": KEY.name, "namespace": "ai", "uid": "x", "resourceVersion": "1", **meta}}


async def test_one_of_ours_that_has_lost_its_owner_is_adopted(applier: Applier) -> None:
    applier.cache.put(CONFIG_MAP, live(labels=labels("r1", "config")))
    assert await applier.ensure(KEY, child(), PARENT)


@pytest.mark.parametrize(
    "meta",
    [
        {},
        {"labels": {"app.kubernetes.io/managed-by": "Helm"}},
        {"ownerReferences": [{"kind": "Deployment", "name": "theirs", "uid": "y", "controller": True}]},
    ],
)
async def test_an_object_without_our_label_is_not_taken_over(
    applier: Applier, server: Server, meta: dict[str, Any]
) -> None:
    server.unlabelled[KEY] = live(**meta)  # the cache has only what carries the label of a fleet
    with pytest.raises(NotOurs, match="give this fleet another name"):
        await applier.ensure(KEY, child(), PARENT)
    assert server.applied == []


async def test_a_child_that_somebody_took_the_label_from_is_put_right(applier: Applier, server: Server) -> None:
    server.unlabelled[KEY] = live(ownerReferences=owned_by(FLEET, PARENT))
    assert await applier.ensure(KEY, child(), PARENT)


STATEFUL_WORDS = [
    "'replicas', 'template', and 'updateStrategy'",  # 1.20
    "'replicas', 'ordinals', 'template', 'updateStrategy', 'revisionHistoryLimit',"
    " 'persistentVolumeClaimRetentionPolicy' and 'minReadySeconds'",  # since 1.32 or so
]
IMMUTABLE = [
    *(
        f"Forbidden: updates to statefulset spec for fields other than {words} are forbidden"
        for words in STATEFUL_WORDS
    ),
    "Invalid value: v1.RollingUpdateStatefulSetStrategy{}: only allowed for updateStrategy 'RollingUpdate'",
    'Invalid value: "None": field is immutable',
    'Invalid value: []string{"None"}: may not change once set',
]
WRONG = 'Invalid value: "a b": a valid label must be an empty string or consist of alphanumeric characters'


def invalid(*causes: str, listed: bool = True) -> KubeError:
    said = f'StatefulSet.apps "r1-head" is invalid: {", ".join(causes)}'
    return KubeError(f"PATCH /x: 422: {said}", 422, "Invalid", said=said, causes=causes if listed else ())


async def written_again(applier: Applier, key: Key) -> None:
    ours = live(name=key.name, ownerReferences=owned_by(FLEET, PARENT))
    applier.cache.put(key.kind, ours)
    await applier.ensure(key, child(), PARENT)


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("words", IMMUTABLE)
@pytest.mark.parametrize("kind", [STATEFUL_SET, SERVICE])
async def test_what_cannot_be_changed_is_made_anew_and_its_pods_stay(
    applier: Applier, server: Server, kind: Kind, words: str, listed: bool
) -> None:
    server.refuses = invalid(words, listed=listed)
    with pytest.raises(Busy):
        await written_again(applier, Key(kind, "ai", "r1-head"))
    assert server.deleted == ["x without its pods"]


@pytest.mark.parametrize("causes", [(WRONG,), (IMMUTABLE[0], WRONG)])
async def test_a_wrong_value_is_told_and_deletes_nothing(
    applier: Applier, server: Server, causes: tuple[str, ...]
) -> None:
    server.refuses = invalid(*causes)
    with pytest.raises(Refused, match=r"r1-head: .* a valid label must be"):
        await written_again(applier, Key(STATEFUL_SET, "ai", "r1-head"))
    assert server.deleted == []


async def test_a_config_map_that_is_refused_is_trouble_and_stays(applier: Applier, server: Server) -> None:
    server.refuses = invalid(IMMUTABLE[3])
    with pytest.raises(Trouble):
        await written_again(applier, KEY)
    assert server.deleted == []


async def test_what_belongs_to_somebody_else_is_left_alone(applier: Applier, server: Server) -> None:
    other = {"kind": "Deployment", "name": "theirs", "uid": "y", "controller": True}
    applier.cache.put(CONFIG_MAP, live(ownerReferences=[other]))
    with pytest.raises(NotOurs, match="Deployment theirs"):
        await applier.ensure(KEY, child(), PARENT)
    assert not await applier.remove(KEY, PARENT)
    assert (server.applied, server.deleted) == ([], [])


async def test_what_is_being_deleted_is_waited_for(applier: Applier) -> None:
    applier.cache.put(CONFIG_MAP, live(deletionTimestamp="2026-01-01T00:00:00Z"))
    with pytest.raises(Busy):
        await applier.ensure(KEY, child(), PARENT)


async def test_fields_of_others_are_kept_if_nobody_was_faster(applier: Applier, server: Server) -> None:
    await applier.ensure(KEY, {**child(), "spec": {"a": 1}}, PARENT, keep={"replicas": 3})
    await applier.ensure(KEY, {**child(), "spec": {"a": 2}}, PARENT, keep={"replicas": 5})
    first, second = server.applied
    assert first["spec"] == {"a": 1, "replicas": 3}
    assert second["spec"] == {"a": 2, "replicas": 5}
    assert "resourceVersion" not in first["metadata"]
    assert second["metadata"]["resourceVersion"] == "11"


async def test_fields_of_others_are_no_reason_to_write(applier: Applier, server: Server) -> None:
    await applier.ensure(KEY, {**child(), "spec": {"a": 1}}, PARENT, keep={"replicas": 3})
    assert not await applier.ensure(KEY, {**child(), "spec": {"a": 1}}, PARENT, keep={"replicas": 9})
