"""A gateway that keeps answers under idempotency keys, over the stand-ins of `gateway_world`."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

from engine_standin import Script
from gateway_model import ids_of
from gateway_world import Answer, Call, World, world

from tandem.config import IdempotencyConfig
from tandem.core.answers import AnswerState, Limits, News
from tandem.core.types import FleetSnapshot
from tandem.gateway.answers.answers import Answers
from tandem.gateway.answers.journal import Journal, JournalDown, LocalJournal
from tandem.gateway.http.app import App
from tandem.gateway.http.pages import Pages
from tandem.gateway.http.server import HttpServer
from tandem.models.tokenizer import EOS_ID

LIMITS = Limits(keep_s=600, open_s=1200, tenant_bytes=2**20, total_bytes=2**20)
KEY = {"idempotency-key": "k1"}


class ShakyJournal(LocalJournal):
    """One that several gateways share, that can be away, and in which owners can die."""

    def __init__(self) -> None:
        super().__init__(LIMITS)
        self.away = False
        self.mute = False
        """What is claimed is done, but nobody hears of it."""
        self.dead: set[str] = set()

    @property
    def entries(self) -> int:
        """In the logs of all answers."""
        return sum(len(kept.log) for kept in self._table._answers.values())

    async def seize(self) -> None:
        """Somebody else owns all answers."""
        for name, kept in self._table._answers.items():
            assert await self.take(name, before=kept.owner, owner="somebody:1")

    def kill(self, incarnation: str) -> None:
        """The gateway is dead, as far as the others can know."""
        self.dead.add(incarnation)
        for name in list(self._waiting):
            self._changed(name)

    async def claim(self, name: str, **fields: Any) -> Any:
        self._check()
        await self._bury(name)
        found = await super().claim(name, **fields)
        if self.mute:
            raise JournalDown("it is mute")
        return found

    async def take(self, name: str, *, before: str, owner: str) -> bool:
        self._check()
        await self._bury(name)
        return await super().take(name, before=before, owner=owner)

    async def append(self, name: str, **fields: Any) -> Any:
        self._check()
        return await super().append(name, **fields)

    async def news(self, name: str, *, after: int, within: float) -> News | None:
        self._check()
        await self._bury(name)
        found = await super().news(name, after=after, within=within)
        await self._bury(name)
        return found if found is None or found.log else await super().news(name, after=after, within=0)

    def _check(self) -> None:
        if self.away:
            raise JournalDown("it is away")

    async def _bury(self, name: str) -> None:
        """What a dead gateway owned is free."""
        kept = self._table._answers.get(name)
        if kept is not None and kept.state is AnswerState.OPEN and kept.owner.partition(":")[0] in self.dead:
            kept.state = AnswerState.FREE


class Lossy(ShakyJournal):
    """Loses replies of what was done."""

    def __init__(self, loses: Callable[[str, dict[str, Any]], bool] = lambda call, fields: False) -> None:
        super().__init__()
        self.loses = loses
        self.lost = 0
        self.gate: asyncio.Event | None = None
        """`take` answers then."""
        self.taken = False

    async def take(self, name: str, **fields: Any) -> bool:
        found = await super().take(name, **fields)
        self.taken = True
        if self.gate is not None:
            await self.gate.wait()
        self._lose("take", fields)
        return found

    async def append(self, name: str, **fields: Any) -> Any:
        found = await super().append(name, **fields)
        self._lose("append", fields)
        return found

    async def restart(self, name: str, **fields: Any) -> bool:
        found = await super().restart(name, **fields)
        self._lose("restart", fields)
        return found

    def _lose(self, call: str, fields: dict[str, Any]) -> None:
        if self.loses(call, fields):
            self.lost += 1
            raise JournalDown("it is slow")

    @property
    def states(self) -> list[AnswerState]:
        return [kept.state for kept in self._table._answers.values()]


def once(state: AnswerState) -> Callable[[str, dict[str, Any]], bool]:
    """Loses the first reply to an append with this state."""
    seen: list[bool] = []

    def loses(call: str, fields: dict[str, Any]) -> bool:
        if call != "append" or fields["state"] is not state or seen:
            return False
        seen.append(True)
        return True

    return loses


@contextlib.asynccontextmanager
async def keeping(
    *names: str, journal: Journal | None = None, idempotency: dict[str, Any] | None = None, **config: Any
) -> AsyncIterator[World]:
    """`world(*names, **config)` whose gateway keeps answers in the journal."""
    async with world(*names, **config) as made:
        config_ = IdempotencyConfig(**(idempotency or {}))
        answers = Answers(made.service, journal or LocalJournal(LIMITS), config_)
        pages = Pages("g1", "test", made.service, lambda: FleetSnapshot(name="test"))
        server = HttpServer(App(made.service, pages, answers))
        listener = socket.create_server(("127.0.0.1", 0))
        await server.start(listener)
        try:
            yield dataclasses.replace(made, address=listener.getsockname())
            assert await server.stop(grace=5)
        finally:
            server.abort()
            await answers.close()


ASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "completion": ("/v1/completions", {"model": "tiny", "prompt": [5, 6]}),
    "chat": ("/v1/chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}),
    "messages": ("/v1/messages", {"model": "tiny", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}),
    "responses": ("/v1/responses", {"model": "tiny", "input": "hi"}),
}


def ask(made: World, kind: str = "completion", key: str = "k1", **fields: Any) -> Call:
    path, body = ASKS[kind]
    return made.call(path, {**body, **fields}, {"idempotency-key": key})


def work(made: World) -> int:
    """Requests that the decode engines have had."""
    return sum(len(one.bodies) for one in made.engines.values() if one.role == "decode")


WHOLE = [*ids_of("hi there, you all"), EOS_ID]


def rest(body: dict[str, Any]) -> Script:
    """What an engine says that goes on behind the tokens it is given."""
    return Script(ids=WHOLE[len(body["input_ids"]) - 2 :], finish={"type": "stop", "matched": EOS_ID})


def replayed(answer: Answer) -> bool:
    return answer.headers.get("idempotent-replayed") == "true"


@contextlib.asynccontextmanager
async def under_way(call: Call, part: bytes = b"") -> Any:
    """Have the call made, up to where `part` has come; gives the task of its answer."""
    task = asyncio.create_task(call.run())
    await call.until_body(part)
    yield task
    await task


async def left_in_half(made: World, journal: Lossy) -> None:
    """An answer whose client leaves before its last token: nobody owns it, and whoever asks again gets the rest."""
    made.engines["d1"].scripts.append(Script(ids=WHOLE[:-1], finish=None))
    call = ask(made, stream=True)
    async with under_way(call, b" all"):
        call.leave()
    await made.until(lambda: journal.states == [AnswerState.FREE])
    made.engines["d1"].choose = rest
