"""The controller's clock: what it does when somebody sets the machine's."""

from __future__ import annotations

import inspect
import time

import pytest

from tandem.fleet import clock
from tandem.fleet.reconcile import Reconciler
from tandem.fleet.refresh import RefreshDriver


@pytest.mark.parametrize("jump", [3600.0, -3600.0])
def test_it_does_not_jump_with_the_machines(monkeypatch: pytest.MonkeyPatch, jump: float) -> None:
    before, wall = clock.now(), time.time
    monkeypatch.setattr(time, "time", lambda: wall() + jump)
    assert before <= clock.now() < before + 60


def test_it_goes_on_with_the_monotonic_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    before, monotonic = clock.now(), time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: monotonic() + 100)
    assert before + 100 <= clock.now() < before + 160


@pytest.mark.parametrize("whose", [Reconciler, RefreshDriver])
def test_whoever_decides_for_the_fleet_lives_by_it(whose: type) -> None:
    assert inspect.signature(whose).parameters["clock"].default is clock.now
