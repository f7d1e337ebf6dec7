"""Connections to fleets' control services go on for as long as somebody looks at the fleet."""

from __future__ import annotations

import asyncio

import pytest

from tandem_operator.control import FleetLink, Links


async def test_a_watch_that_has_ended_by_a_mistake_begins_again_at_the_next_look(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def ended(self: FleetLink) -> None:
        raise RuntimeError("nobody thought of this")

    async def lives(self: FleetLink) -> None:
        await asyncio.Event().wait()

    links = Links(lambda namespace, fleet: None)
    monkeypatch.setattr(FleetLink, "_follow", ended)
    first = links.open("ai", "r1")
    await asyncio.sleep(0)
    assert first.over
    monkeypatch.setattr(FleetLink, "_follow", lives)
    second = links.open("ai", "r1")
    assert second is not first
    assert (links.get("ai", "r1"), links.open("ai", "r1")) == (second, second)
    assert "The watch of fleet ai/r1 has ended, and begins again: nobody thought of this" in caplog.text
    await links.close_all()
