"""What declared weights stand for, and how weights are named."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from tandem.core.declared import (
    contradiction,
    declarations,
    given,
    kept,
    known_weights,
    stands_for,
    taken_version,
    version_of,
    with_replaced,
)
from tandem.core.group_record import Weights
from tandem.core.types import Group, GroupSpec, GroupState, Role

A, B, C = Weights("/a", "1"), Weights("/b", "2"), Weights("/c", "3")
SPEC = GroupSpec(group="decode-0", role=Role.DECODE, nodes=1, declared_path="/a", declared_version="1")


def test_a_version_is_made_of_the_path_alone_and_reads_like_it() -> None:
    """Another one here would give every fleet whose version nobody named other weights by name."""
    assert version_of("/models/DeepSeek-R1") == "DeepSeek-R1-8ec56a2e"


@pytest.mark.parametrize("other", ["/models/x/r1", "/models/r1/", "/models/R1", "/models/r 1"])
def test_two_paths_never_share_a_version(other: str) -> None:
    assert version_of(other) != version_of("/models/r1")


@pytest.mark.parametrize("path", ["/", "/" + "x" * 300, "/models/\u00fc\n"])
def test_every_path_makes_a_version_that_the_control_service_takes(path: str) -> None:
    version = version_of(path)
    assert 0 < len(version) <= 64
    assert version.isprintable()


def test_what_was_never_replaced_stands_for_itself() -> None:
    assert stands_for(A, with_replaced((), [C], B)) == A


def test_what_was_refreshed_stands_for_the_last_weights_that_were_put_in_its_place() -> None:
    replaced = with_replaced(with_replaced((), [A], B), [A], C)
    assert stands_for(A, replaced) == C
    assert len(replaced) == 1


def test_what_was_refreshed_back_stands_for_itself_again() -> None:
    assert with_replaced(with_replaced((), [A], B), [A], A) == ()


def test_what_drains_or_declares_nothing_is_no_declaration() -> None:
    drains = replace(SPEC, group="decode-1", draining=True, declared_version="9")
    assert declarations([SPEC, drains, replace(SPEC, declared_path="", declared_version="")]) == {A}


def test_a_version_that_another_folder_has_is_taken() -> None:
    group = Group(group="g", role=Role.DECODE, epoch=1, state=GroupState.READY, weights_path="/c", weight_version="3")
    known = known_weights(A, with_replaced((), [A], B), [], [group])
    assert known == {A, B, C}
    assert [taken_version(Weights("/x", version), known) for version in ("1", "2", "3", "4")] == ["/a", "/b", "/c", ""]
    assert taken_version(C, known) == ""


def test_a_group_that_exists_keeps_its_weights_and_its_declaration() -> None:
    now = replace(SPEC, weights_path="/b", weight_version="2")
    assert kept(replace(SPEC, cordoned=True), now) == replace(now, cordoned=True)
    assert kept(replace(SPEC, declared_path="", declared_version=""), now) == now


def test_a_group_may_be_told_other_weights_whatever_it_declares() -> None:
    told = replace(SPEC, weights_path="/c", weight_version="3")
    assert (kept(told, SPEC), given(told, B)) == (told, told)


def test_what_a_group_declares_is_fixed_once_it_declares_something() -> None:
    other = replace(SPEC, declared_path="/b", declared_version="2")
    assert contradiction(other, SPEC).startswith("decode-0 was made with the weights in /a, version 1; drain it")
    assert contradiction(other, replace(SPEC, declared_path="", declared_version="")) == ""
    assert contradiction(SPEC, SPEC) == ""
