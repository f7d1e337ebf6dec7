"""Prefill's scheduler waits a moment for the transfers that it has just begun."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from tandem.engine.plugin import word

FAILED, BOOTSTRAPPING, TRANSFERRING, SUCCESS = 0, 1, 3, 4


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """How long it slept; time passes in no other way."""
    slept: list[float] = []
    monkeypatch.setattr(word, "time", SimpleNamespace(monotonic=lambda: sum(slept), sleep=slept.append))
    return slept


def request(*states: int, pending: bool = False) -> SimpleNamespace:
    """A request whose transfer is in these states, one after the other; the last stays."""
    left = list(states)
    sender = SimpleNamespace(poll=lambda: left.pop(0) if len(left) > 1 else left[0])
    return SimpleNamespace(disagg_kv_sender=sender, pending_bootstrap=pending)


def scheduler(*requests: SimpleNamespace) -> SimpleNamespace:
    return SimpleNamespace(disagg_prefill_inflight_queue=list(requests))


def test_it_waits_until_all_are_over(slept: list[float]) -> None:
    word.wait(scheduler(request(TRANSFERRING, SUCCESS), request(TRANSFERRING, TRANSFERRING, FAILED)))
    assert 1 <= len(slept) <= 3


def test_it_waits_no_longer_than_it_may_and_for_none_twice(slept: list[float]) -> None:
    busy = scheduler(request(TRANSFERRING))
    word.wait(busy)
    assert word.WAIT_S <= sum(slept) < 2 * word.WAIT_S
    before = len(slept)
    word.wait(busy)
    assert len(slept) == before


@pytest.mark.parametrize("one", [request(BOOTSTRAPPING, pending=True), request(SUCCESS), request(FAILED)])
def test_it_does_not_wait_for_what_has_not_begun_or_is_over(slept: list[float], one: SimpleNamespace) -> None:
    word.wait(scheduler(one))
    assert slept == []
