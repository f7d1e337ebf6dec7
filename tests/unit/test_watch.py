"""A watch over a feed that loses its history and breaks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tandem.state import bell, watch
from tandem.state.embedded import EmbeddedStore
from tandem.state.store import Change, Entry, StoreError
from tandem.state.watch import HistoryGone, follow

Step = tuple[int, list[Entry]] | tuple[int, list[Change]] | Exception


class ScriptedFeed:
    """Gives prepared answers, then waits for ever."""

    def __init__(self, *steps: Step) -> None:
        self.steps = list(steps)

    async def _step(self) -> Step:
        if not self.steps:
            await asyncio.Event().wait()
        step = self.steps.pop(0)
        if isinstance(step, Exception):
            raise step
        return step

    async def snapshot(self) -> tuple[int, list[Entry]]:
        return await self._step()  # type: ignore[return-value]

    async def after(self, cursor: int) -> tuple[int, list[Change]]:
        return await self._step()  # type: ignore[return-value]


async def read(changes: AsyncIterator[Change], count: int) -> list[Change]:
    async with asyncio.timeout(5):
        return [await anext(changes) for _ in range(count)]


async def test_after_lost_history_only_what_differs_is_told() -> None:
    before = [Entry("gone", b"1", 1), Entry("same", b"2", 2), Entry("new", b"3", 3)]
    after = [Entry("same", b"2", 2), Entry("new", b"9", 9)]
    changes = follow(ScriptedFeed((3, before), HistoryGone(), (9, after)), asyncio.Event())
    assert [change.key for change in await read(changes, 3)] == ["gone", "same", "new"]
    assert await read(changes, 2) == [Change("gone", None, 9), Change("new", b"9", 9)]


async def test_an_outage_is_logged_once_and_outlived(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(watch, "_RETRY_S", 0.001)
    outage = StoreError("it is away")
    changes = follow(
        ScriptedFeed((1, [Entry("k", b"1", 1)]), outage, outage, outage, (2, [Entry("k", b"2", 2)])), asyncio.Event()
    )
    assert await read(changes, 2) == [Change("k", b"1", 1), Change("k", b"2", 2)]
    assert [record.getMessage() for record in caplog.records] == ["A watch waits for its store: it is away"]


async def test_what_was_never_told_does_not_end() -> None:
    changes = follow(ScriptedFeed((0, []), (2, [Change("k", None, 1), Change("k", b"2", 2)])), asyncio.Event())
    assert await read(changes, 1) == [Change("k", b"2", 2)]


async def test_a_watch_of_a_closed_store_ends_instead_of_retrying() -> None:
    closed = asyncio.Event()
    changes = follow(ScriptedFeed((0, []), StoreError("closed")), closed)
    closed.set()
    assert [change async for change in changes] == []


async def test_without_inotify_changes_are_still_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_: Path) -> int:
        raise OSError("too many open files")

    monkeypatch.setattr(bell, "_watch_writes", refuse)
    monkeypatch.setattr(bell, "_DEAF_PERIOD_S", 0.01)
    reader, writer = [await EmbeddedStore.open(tmp_path / "f.state.db", deadline=5) for _ in range(2)]
    changes = reader.watch("")
    await writer.put("k", b"1")
    assert await read(changes, 1) == [Change("k", b"1", 1)]
    waiting = asyncio.ensure_future(read(changes, 1))
    await writer.put("k", b"2")
    assert await waiting == [Change("k", b"2", 2)]
    assert "No inotify (too many open files)" in caplog.text
    await reader.close()
    await writer.close()
