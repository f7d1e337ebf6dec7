"""A gateway that is killed: its answers go on at another one, and nothing of it is left on the engines."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

from support.redis_server import RedisServer
from tandem.core.answers import AnswerState, Appended, Limits, Standing
from tandem.core.types import GatewayReplica, Group, GroupState, Role
from tandem.core.usage import UsageRecord
from tandem.engine.http1 import Pool, Response
from tandem.gateway.answers.journal import Journal, JournalDown
from tandem.gateway.answers.redis_journal import CONNECTIONS, RedisJournal
from tandem.gateway.usage.stream import UsageStream
from tandem.models.tokenizer import EOS_ID
from tandem.state import Store, open_store
from unit.gateway.engine_standin import Engine, Script, engine
from unit.gateway.gateway_model import ids_of, model_folder
from unit.gateway.journal_contract import LIMITS, ME, YOU, JournalContract, Opener, add, claim

_fleets = itertools.count()


# The journal in Redis


class TestRedisJournal(JournalContract):
    @pytest.fixture
    async def open_journal(self, redis_server: RedisServer) -> AsyncIterator[Opener]:
        fleet, made = f"answers-{next(_fleets)}", list[RedisJournal]()

        def make(incarnation: str, limits: Limits, lease_s: float = 3.0) -> Journal:
            # A busy machine must not be taken for a Redis that is away.
            one = RedisJournal(
                redis_server.url, limits, fleet=fleet, incarnation=incarnation, lease_s=lease_s, deadline=5.0
            )
            made.append(one)
            return one

        yield make
        for one in made:
            await one.close()

    async def test_an_answer_of_a_dead_gateway_is_for_the_first_that_takes_it(self, open_journal: Opener) -> None:
        mine, yours = open_journal(ME, LIMITS), open_journal(YOU, LIMITS)
        await claim(mine, f"{ME}:1")
        await add(mine, 1, b"a")
        assert (await claim(yours, f"{YOU}:1")).standing is Standing.JOINED
        assert not await yours.take("n", before=f"{ME}:1", owner=f"{YOU}:1")
        await kill(mine)
        found = await yours.news("n", after=1, within=1)
        assert found is not None
        assert (found.alive, found.state, found.owner) == (False, AnswerState.OPEN, f"{ME}:1")
        taken = await asyncio.gather(*(yours.take("n", before=f"{ME}:1", owner=f"{YOU}:{n}") for n in range(2, 6)))
        assert taken.count(True) == 1
        assert await add(mine, 2, b"b") is Appended.FENCED

    async def test_a_claim_goes_on_with_the_answer_of_a_dead_gateway(self, open_journal: Opener) -> None:
        mine, yours = open_journal(ME, LIMITS), open_journal(YOU, LIMITS)
        await claim(mine, f"{ME}:1")
        await add(mine, 1, b"a")
        await kill(mine)
        found = await claim(yours, f"{YOU}:1")
        assert (found.standing, found.number, found.log) == (Standing.OWNED, f"of-{ME}:1", [b"a"])

    async def test_a_gateway_that_lives_keeps_its_lease(self, open_journal: Opener) -> None:
        mine = open_journal(ME, LIMITS, lease_s=0.3)
        await claim(mine, f"{ME}:1")
        for _ in range(3):
            found = await mine.news("n", after=0, within=0.2)
            assert found is not None
            assert found.alive

    async def test_a_gateway_that_stops_gives_up_its_lease(self, open_journal: Opener) -> None:
        mine, yours = open_journal(ME, LIMITS), open_journal(YOU, LIMITS)
        await claim(mine, f"{ME}:1")
        await mine.close()
        assert (await claim(yours, f"{YOU}:1")).standing is Standing.OWNED

    async def test_two_gateways_that_claim_at_once_are_one_owner_and_one_follower(self, open_journal: Opener) -> None:
        mine, yours = open_journal(ME, LIMITS), open_journal(YOU, LIMITS)
        for number in range(20):
            name = f"n{number}"
            found = await asyncio.gather(claim(mine, f"{ME}:1", name), claim(yours, f"{YOU}:1", name))
            assert sorted(one.standing for one in found) == [Standing.JOINED, Standing.OWNED]

    async def test_any_number_follow_on_one_connection_and_hold_up_nobody(
        self, open_journal: Opener, redis_server: RedisServer
    ) -> None:
        journal = open_journal(ME, LIMITS)
        await claim(journal, f"{ME}:1")
        assert isinstance(journal, RedisJournal)
        waiting = [asyncio.create_task(journal.news("n", after=0, within=30)) for _ in range(300)]
        async with asyncio.timeout(20):
            while len(journal._heard._watching.get("n", ())) < 300 or not await journal.wanted("n"):
                await asyncio.sleep(0.01)
        found = await asyncio.gather(*(claim(journal, f"{ME}:2", f"n{at}", tenant=f"t{at}") for at in range(10)))
        assert {one.standing for one in found} == {Standing.OWNED}
        clients = await journal._redis.client_list()
        assert len(clients) <= 2 * CONNECTIONS
        await add(journal, 1, b"a")
        async with asyncio.timeout(20):
            told = await asyncio.gather(*waiting)
        assert {(one is not None and tuple(one.log)) for one in told} == {(b"a",)}

    async def test_three_hundred_owners_write_at_once(self, open_journal: Opener) -> None:
        journal = open_journal(ME, LIMITS)
        found = await asyncio.gather(*(add(journal, 1, name=f"n{at}") for at in range(300)))
        assert set(found) == {Appended.GONE}

    async def test_too_many_connections_are_no_outage(
        self, open_journal: Opener, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        journal = open_journal(ME, LIMITS)
        assert isinstance(journal, RedisJournal)
        with monkeypatch.context() as patch:
            patch.setattr(journal._redis.connection_pool, "max_connections", 0)
            with pytest.raises(JournalDown) as caught:
                await claim(journal, f"{ME}:1")
            assert not caught.value.sent
        assert (await claim(journal, f"{ME}:1")).standing is Standing.OWNED

    async def test_what_is_gone_is_counted_no_longer(self, open_journal: Opener, redis_server: RedisServer) -> None:
        journal = open_journal(ME, Limits(keep_s=0.03, open_s=0.03, tenant_bytes=4096, total_bytes=8192))
        for number in range(20):
            await claim(journal, f"{ME}:1", f"n{number}")
            await add(journal, 1, b"x" * 1000, name=f"n{number}")
        await asyncio.sleep(0.05)
        assert await journal.news("n0", after=0, within=0) is None
        assert isinstance(journal, RedisJournal)
        assert await journal._redis.hgetall(f"{journal._prefix}bytes") == {b"": b"0"}
        left = {key.rpartition(b":")[2] for key in await journal._redis.keys(f"{journal._prefix}*")}
        assert left <= {b"bytes", ME.encode()}


async def kill(journal: Journal) -> None:
    """Its gateway's lease runs out."""
    assert isinstance(journal, RedisJournal)
    assert journal._renewal is not None
    journal._renewal.cancel()
    await journal._redis.delete(journal._lease_key)


async def test_a_redis_that_is_away_is_found_out_once_and_is_there_again_later() -> None:
    server = RedisServer()
    server.start()
    journal = RedisJournal(server.url, LIMITS, fleet="t", incarnation=ME, deadline=0.3)
    await claim(journal, f"{ME}:1")
    server.stop()
    for _ in range(2):
        with pytest.raises(JournalDown):
            await claim(journal, f"{ME}:2")
    server.start()
    async with asyncio.timeout(10):
        while True:
            with contextlib.suppress(JournalDown):
                assert (await claim(journal, f"{ME}:3")).standing is Standing.OWNED
                break
            await asyncio.sleep(0.05)
    assert await add(journal, 1, owner=f"{ME}:1") is Appended.FENCED
    await journal.close()
    server.remove()


# Whole gateways

SAID = "hi there, you all of the world"
WHOLE = [*ids_of(SAID), EOS_ID]
BODY = json.dumps({"model": "tiny", "prompt": [5, 6], "stream": True}).encode()
LEASE_S = 2.0


def say(body: dict[str, Any]) -> Script:
    """Most of the answer, and then nothing more; to whom has that, the rest."""
    given = len(body["input_ids"]) - 2
    if not given:
        return Script(ids=WHOLE[:-2], finish=None)
    return Script(ids=WHOLE[given:], finish={"type": "stop", "matched": EOS_ID})


@dataclass
class Gateway:
    """A process."""

    process: asyncio.subprocess.Process
    record: GatewayReplica

    async def kill(self) -> None:
        self.process.kill()
        await self.process.wait()


@dataclass
class Place:
    """Two engines, Redis, and gateways in processes."""

    folder: Path
    url: str
    store: Store
    engines: dict[str, Engine]
    pool: Pool
    key: bytes
    gateways: list[Gateway] = field(default_factory=list)

    async def gateway(self, name: str) -> Gateway:
        script = Path(__file__).with_name("gateway_process.py")
        (self.folder / name).mkdir()
        process = await asyncio.create_subprocess_exec(
            *("setpriv", "--pdeathsig", "KILL", sys.executable, str(script)),
            *(str(self.folder), self.url, name, str(LEASE_S)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert process.stdout is not None
        async with asyncio.timeout(30):
            record = msgspec.json.decode(await process.stdout.readline(), type=GatewayReplica)
        made = Gateway(process, record)
        self.gateways.append(made)
        async with asyncio.timeout(10):
            while (await self.pool.fetch("GET", f"{record.url}/ready"))[0] != 200:
                await asyncio.sleep(0.02)
        return made

    async def ask(self, gateway: Gateway) -> Response:
        headers = ((b"idempotency-key", self.key), (b"content-type", b"application/json"))
        made = self.pool.begin("POST", f"{gateway.record.url}/v1/completions", body=BODY, headers=headers)
        response = made if isinstance(made, Response) else await made
        await response.head(20)
        return response

    async def records(self) -> list[UsageRecord]:
        stream = UsageStream(self.url, fleet="t")
        try:
            return [msgspec.json.decode(line, type=UsageRecord) async for line in stream.read()]
        finally:
            await stream.close()


@pytest.fixture
async def place(tmp_path: Path, redis_server: RedisServer) -> AsyncIterator[Place]:
    model_folder(tmp_path / "tiny")
    async with engine("prefill") as prefill, engine("decode") as decode:
        store = await open_store(redis_server.url, fleet="t", folder=tmp_path)
        for entry in await store.list(""):
            await store.delete(entry.key)
        for one in (prefill, decode):
            group = Group(group=one.role, role=Role(one.role), epoch=1, state=GroupState.READY, url=one.url)
            await store.put(f"groups/{one.role}", msgspec.json.encode(group))
        pool = Pool()
        decode.choose = say
        key = f"k{next(_fleets)}".encode()
        made = Place(tmp_path, redis_server.url, store, {"prefill": prefill, "decode": decode}, pool, key)
        yield made
        for gateway in made.gateways:
            if gateway.process.returncode is None:
                await gateway.kill()
        await pool.close()
        await store.close()


def events(data: bytes) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in data.decode().split("\n") if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def text_of(data: bytes) -> str:
    """The text of a completion, which is whole."""
    *pieces, done = events(data)
    assert done == "[DONE]"
    return "".join(choice["text"] for event in pieces for choice in event["choices"])


async def some(response: Response, part: bytes) -> bytes:
    """What has come when `part` is in it."""
    data = b""
    while part not in data:
        piece = await response.chunk(20)
        assert piece is not None, data
        data += piece
    return data


@pytest.mark.timeout(120)
async def test_the_answer_of_a_gateway_that_is_killed_goes_on_at_another_one(place: Place) -> None:
    decode = place.engines["decode"]
    one, two = await place.gateway("one"), await place.gateway("two")
    before = await some(await place.ask(one), b" of")
    await asyncio.sleep(0.2)  # what is on its way to Redis gets there: this test is of what does
    await one.kill()
    after = await (await place.ask(two)).read(20)
    assert text_of(after) == SAID
    assert len({(event["id"], event["created"]) for event in [*events(before), *events(after)[:-1]]}) == 1
    # It went on behind what the first had delivered, and once.
    assert [len(body["input_ids"]) for body in decode.bodies] == [2, 2 + len(WHOLE) - 2]
    # A third time it comes from the journal.
    assert text_of(await (await place.ask(two)).read(20)) == SAID
    assert len(decode.bodies) == 2
    # What the dead one had on the engines is aborted, on each, twice.
    wild = f"{one.record.incarnation}-*"
    for each in place.engines.values():
        async with asyncio.timeout(30):
            while each.aborted.count(wild) < 2:
                await asyncio.sleep(0.05)
    async with asyncio.timeout(20):
        while not (records := await place.records()):
            await asyncio.sleep(0.05)
        while [entry.key for entry in await place.store.list("incarnations/")] != [
            f"incarnations/{two.record.incarnation}"
        ]:
            await asyncio.sleep(0.05)
    [record] = [record for record in records if record.id == events(after)[0]["id"].removeprefix("cmpl-")]
    assert (record.replica, record.prompt_tokens, record.completion_tokens) == ("two", 2, len(WHOLE))
    assert record.migrations == 1


@pytest.mark.timeout(120)
async def test_who_waits_at_another_gateway_gets_the_rest_when_the_owner_is_killed(place: Place) -> None:
    decode = place.engines["decode"]
    one, two = await place.gateway("one"), await place.gateway("two")
    first, second = await place.ask(one), await place.ask(two)
    data = await some(second, b" of")
    await one.kill()
    data += await second.read(20)
    assert text_of(data) == SAID
    assert len(decode.bodies) == 2
    first.close()


@pytest.mark.timeout(120)
async def test_the_streams_of_a_gateway_that_stood_still_go_on(place: Place) -> None:
    decode = place.engines["decode"]
    one, _ = await place.gateway("one"), await place.gateway("two")
    response = await place.ask(one)
    data = await some(response, b" of")
    one.process.send_signal(signal.SIGSTOP)
    incarnation = one.record.incarnation
    async with asyncio.timeout(30):
        while f"{incarnation}-*" not in decode.aborted:
            await asyncio.sleep(0.05)
    for rid, aborted in decode.running.items():
        assert rid.startswith(f"{incarnation}-")
        aborted.set()
    one.process.send_signal(signal.SIGCONT)
    data += await response.read(20)
    assert text_of(data) == SAID
    async with asyncio.timeout(30):
        for key in (f"incarnations/{incarnation}", "gateways/one"):
            while await place.store.get(key) is None:
                await asyncio.sleep(0.05)
