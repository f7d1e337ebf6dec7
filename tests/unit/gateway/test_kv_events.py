"""KV events over real sockets: the index follows a publisher that speaks as SGLang's does, and survives its losses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import msgspec
import pytest
import zmq

from tandem.core.kv_source import KvSource
from tandem.core.prefix_index import PrefixIndex, Worker
from tandem.core.routing import Pair, RouteAsk, Router
from tandem.core.types import Group, GroupState, Rank, Role
from tandem.gateway.pairing import kv_events
from tandem.gateway.pairing.kv_events import KvEvents

BLOCK = 4
PROMPT = list(range(100, 112))
WORKER = Worker("prefill-0", 1, 0)
TOPIC = "prefill-0/1/"


class Publisher:
    """One DP rank's publisher, as in SGLang 0.5.23: numbered batches, and the last of them again on request."""

    def __init__(self, *, topic: str = TOPIC, dp_rank: int = 0) -> None:
        self._context = zmq.Context(io_threads=1)
        self._pub = self._context.socket(zmq.XPUB)  # as PUB, and it tells who subscribes
        self._pub.set(zmq.XPUB_VERBOSE, 1)
        self._router = self._context.socket(zmq.ROUTER)
        self._loop = asyncio.get_running_loop()
        self._topic = topic.encode()
        self._dp_rank = dp_rank
        self.buffer: list[tuple[int, bytes]] = []
        self.number = 0
        self.asked: list[int] = []
        ports = [socket.bind_to_random_port("tcp://127.0.0.1") for socket in (self._pub, self._router)]
        events, replay = (f"tcp://127.0.0.1:{port}" for port in ports)
        self.source = KvSource(dp_rank=dp_rank, events=events, replay=replay, topic=topic)

    async def subscribed(self) -> None:
        """Wait until somebody has subscribed."""
        await until(lambda: self._pub.poll(0) > 0)
        while self._pub.poll(0):
            self._pub.recv()

    def publish(self, *events: dict[str, Any], lose: bool = False, keep: bool = True) -> None:
        batch = msgspec.msgpack.encode([1.0, events, self._dp_rank])
        if keep:
            self.buffer.append((self.number, batch))
        if not lose:
            self._pub.send_multipart([self._topic, self.number.to_bytes(8, "big"), batch])
        self.number += 1

    def answer(self) -> None:
        """Answer what was asked for."""
        while self._router.poll(0):
            who, _, first = self._router.recv_multipart()
            self.asked.append(int.from_bytes(first, "big"))
            for number, batch in self.buffer:
                if number >= self.asked[-1]:
                    self._router.send_multipart([who, b"", self._topic, number.to_bytes(8, "big"), batch])
            self._router.send_multipart([who, b"", b"", (-1).to_bytes(8, "big", signed=True), b""])

    def close(self) -> None:
        self._context.destroy(linger=0)


def names(tokens: Sequence[int], page: int = BLOCK) -> list[int]:
    return [hash(tuple(tokens[: end + page])) for end in range(0, len(tokens), page)]


def stored(tokens: Sequence[int], **extra: Any) -> dict[str, Any]:
    event = {"type": "BlockStored", "block_hashes": names(tokens), "parent_block_hash": None, "token_ids": list(tokens)}
    return {**event, "block_size": BLOCK, "lora_id": None, "medium": "GPU", **extra}


def removed(tokens: Sequence[int], **extra: Any) -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": names(tokens), "medium": "GPU", **extra}


async def until(true: Callable[[], object], *publishers: Publisher, within: float = 10.0) -> None:
    async with asyncio.timeout(within):
        while not true():
            for publisher in publishers:
                publisher.answer()
            await asyncio.sleep(0.005)


@pytest.fixture
def index() -> PrefixIndex:
    made = PrefixIndex(block_tokens=BLOCK, max_bytes=2**20)
    made.join(WORKER)
    return made


@pytest.fixture
async def publisher() -> AsyncIterator[Publisher]:
    made = Publisher()
    yield made
    made.close()


@pytest.fixture
async def second() -> AsyncIterator[Publisher]:
    made = Publisher(dp_rank=1)
    yield made
    made.close()


@pytest.fixture
async def events(index: PrefixIndex) -> AsyncIterator[KvEvents]:
    made = KvEvents(index, sync_s=0.05, replay_s=1.0)
    yield made
    made.close()


def held(index: PrefixIndex, tokens: Sequence[int] = PROMPT, worker: Worker = WORKER) -> int:
    return index.match(index.keys(tokens), 0.0)[index.join(worker)]


async def follow(events: KvEvents, publisher: Publisher) -> None:
    events.follow("prefill-0", 1, [publisher.source])
    await publisher.subscribed()


async def test_what_an_engine_stores_removes_and_clears_is_known(
    events: KvEvents, publisher: Publisher, index: PrefixIndex
) -> None:
    await follow(events, publisher)
    publisher.publish(stored(PROMPT))
    await until(lambda: held(index) == 3)
    publisher.publish({"type": "BlockRemoved", "block_hashes": names(PROMPT)[2:], "medium": "GPU"})
    await until(lambda: held(index) == 2)
    publisher.publish({"type": "AllBlocksCleared"})
    await until(lambda: held(index) == 0)
    assert (events.counts.stored, events.counts.removed, events.counts.cleared) == (3, 1, 1)


async def test_one_that_comes_late_is_told_what_was_before(
    events: KvEvents, publisher: Publisher, index: PrefixIndex
) -> None:
    publisher.publish(stored(PROMPT))
    await follow(events, publisher)
    await until(lambda: held(index) == 3, publisher)
    assert events.counts.forgotten == 0


async def test_a_batch_lost_on_the_way_is_sent_again(
    events: KvEvents, publisher: Publisher, index: PrefixIndex
) -> None:
    await follow(events, publisher)
    publisher.publish(stored(PROMPT[:8]))
    publisher.publish(stored([7] * 8), lose=True)
    publisher.publish(stored(PROMPT[8:], parent_block_hash=names(PROMPT)[1], block_hashes=names(PROMPT)[2:]))
    await until(lambda: held(index) == 3 and held(index, [7] * 8) == 2, publisher)
    assert events.counts.forgotten == 0


async def test_the_last_batch_may_be_lost_without_a_trace_and_is_had_all_the_same(
    events: KvEvents, publisher: Publisher, index: PrefixIndex
) -> None:
    await follow(events, publisher)
    publisher.publish(stored(PROMPT), lose=True)
    await until(lambda: held(index) == 3, publisher)


async def test_what_is_lost_for_good_makes_the_rank_forgotten(
    events: KvEvents, publisher: Publisher, index: PrefixIndex
) -> None:
    await follow(events, publisher)
    publisher.publish(stored(PROMPT))
    await until(lambda: held(index) == 3, publisher)
    publisher.publish(removed(PROMPT), lose=True, keep=False)
    publisher.publish(stored([7] * 8))
    await until(lambda: held(index, [7] * 8) == 2, publisher)
    assert (held(index), events.counts.forgotten) == (0, 1)


async def test_a_publisher_that_does_not_answer_is_given_up_in_time(
    events: KvEvents, publisher: Publisher, index: PrefixIndex
) -> None:
    events.replay_s = 0.05
    await follow(events, publisher)
    publisher.publish(stored(PROMPT), lose=True)
    publisher.publish(stored([7] * 8))
    await until(lambda: held(index, [7] * 8) == 2)
    assert events.counts.forgotten == 1


async def test_without_a_replay_endpoint_a_gap_is_a_loss(
    events: KvEvents, publisher: Publisher, index: PrefixIndex
) -> None:
    events.follow("prefill-0", 1, [msgspec.structs.replace(publisher.source, replay="")])
    await publisher.subscribed()
    publisher.publish(stored(PROMPT), lose=True)
    publisher.publish(stored([7] * 8))
    await until(lambda: held(index, [7] * 8) == 2)
    assert events.counts.forgotten == 1


@pytest.fixture
async def other() -> AsyncIterator[Publisher]:
    """Its topic begins like ours, so the subscription lets it through."""
    made = Publisher(topic=TOPIC + "0/")
    yield made
    made.close()


async def test_another_engine_on_the_port_is_not_taken_for_the_old_one(
    events: KvEvents, other: Publisher, index: PrefixIndex
) -> None:
    events.follow("prefill-0", 1, [msgspec.structs.replace(other.source, topic=TOPIC)])
    await other.subscribed()
    other.publish(stored(PROMPT))
    await until(lambda: len(other.asked) > 2, other)
    assert (held(index), events.counts.batches) == (0, 0)


@pytest.fixture
async def restarted() -> AsyncIterator[Publisher]:
    made = Publisher(topic="prefill-0/2/")
    yield made
    made.close()


async def test_a_new_epoch_is_followed_and_the_old_one_no_more(
    events: KvEvents, publisher: Publisher, restarted: Publisher, index: PrefixIndex
) -> None:
    await follow(events, publisher)
    index.leave(WORKER)
    new = Worker("prefill-0", 2, 0)
    index.join(new)
    events.follow("prefill-0", 2, [restarted.source])
    await restarted.subscribed()
    publisher.publish(stored([7] * 8))
    restarted.publish(stored(PROMPT))
    await until(lambda: held(index, worker=new) == 3, restarted, publisher)
    assert (held(index, [7] * 8, new), events.feeds) == (0, 1)


async def test_blocks_that_a_plain_prompt_would_not_find_are_left_out(
    events: KvEvents, publisher: Publisher, index: PrefixIndex
) -> None:
    await follow(events, publisher)
    publisher.publish(
        stored([1] * 8, medium="CPU_PINNED"), stored([2] * 8, cache_salt="x"), stored([3] * 8, lora_name="y")
    )
    publisher.publish(stored(PROMPT), removed(PROMPT, medium="CPU_PINNED"))
    await until(lambda: held(index) == 3)
    assert [held(index, [token] * 8) for token in (1, 2, 3)] == [0, 0, 0]


async def test_pairs_of_tokens_count_as_their_first(events: KvEvents, publisher: Publisher, index: PrefixIndex) -> None:
    await follow(events, publisher)
    pairs = [[token, token + 1] for token in PROMPT]
    publisher.publish(stored(PROMPT, token_ids=pairs))
    await until(lambda: held(index) == 3)


@pytest.mark.parametrize(
    "event",
    [{"type": "Unheard"}, {"type": "BlockStored"}, stored(PROMPT, token_ids=["a"] * 12), stored([-1] * 12), {}],
)
async def test_what_makes_no_sense_makes_the_rank_forgotten_and_is_told_once(
    events: KvEvents,
    publisher: Publisher,
    index: PrefixIndex,
    event: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    await follow(events, publisher)
    publisher.publish(stored([7] * 8))
    publisher.publish(event)
    publisher.publish(event)
    publisher.publish(stored(PROMPT))
    await until(lambda: held(index) == 3)
    assert (held(index, [7] * 8), len(caplog.records)) == (0, 1)


async def test_pages_that_do_not_make_a_block_are_told_once(
    events: KvEvents, publisher: Publisher, index: PrefixIndex, caplog: pytest.LogCaptureFixture
) -> None:
    await follow(events, publisher)
    for _ in range(2):
        publisher.publish(stored(PROMPT, block_size=3, block_hashes=[1, 2, 3, 4]))
    publisher.publish(stored(PROMPT))
    await until(lambda: held(index) == 3)
    assert [record.message for record in caplog.records] == [
        "prefill-0 has pages of 3 tokens, which do not make blocks of 4: its prefixes are guessed; use --page-size 4"
    ]


async def test_a_flood_of_events_leaves_turns_for_others(
    events: KvEvents, publisher: Publisher, index: PrefixIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_events, "TURN_BYTES", 1000)
    await follow(events, publisher)
    tokens = list(range(400))
    for _ in range(300):
        publisher.publish(stored(tokens))
    most = 0
    async with asyncio.timeout(10):
        while events.counts.batches < 300:
            before = events.counts.batches
            await asyncio.sleep(0)
            most = max(most, events.counts.batches - before)
    assert 0 < most <= 2


async def test_only_the_ranks_of_prefill_groups_with_engines_are_followed(
    events: KvEvents, publisher: Publisher
) -> None:
    ranks = (Rank(rank=0, kv_events=(publisher.source,)),)
    group = Group(group="prefill-0", role=Role.PREFILL, epoch=1, state=GroupState.READY, ranks=ranks)
    events.put_group(group)
    assert events.feeds == 1
    for change in ({"state": GroupState.FAILED}, {"state": GroupState.STARTING}, {"role": Role.DECODE}):
        events.put_group(msgspec.structs.replace(group, **change))
        assert events.feeds == 0
        events.put_group(group)
    events.put_group(msgspec.structs.replace(group, state=GroupState.DRAINING))
    assert events.feeds == 1
    events.remove_group("prefill-0")
    assert events.feeds == 0


@pytest.fixture
async def gateways() -> AsyncIterator[list[tuple[Router, KvEvents]]]:
    """Two replicas, each with a router and followers of its own."""
    made = []
    for _ in range(2):
        router = Router(index=PrefixIndex(block_tokens=BLOCK, max_bytes=2**22))
        for name, role in (("prefill-0", Role.PREFILL), ("decode-0", Role.DECODE)):
            router.put(Group(group=name, role=role, epoch=1, state=GroupState.READY, url="u", dp_size=2))
        made.append((router, KvEvents(router.index, sync_s=0.05, replay_s=1.0)))
    yield made
    for _, events in made:
        events.close()


async def test_two_gateways_agree_within_the_bounded_lag(
    publisher: Publisher, second: Publisher, gateways: list[tuple[Router, KvEvents]]
) -> None:
    for _, events in gateways:
        events.follow("prefill-0", 1, [publisher.source, second.source])
        for one in (publisher, second):
            await one.subscribed()
    prompts = [[topic] * 4000 for topic in range(6)]
    for topic, prompt in enumerate(prompts):
        (publisher, second)[topic % 2].publish(stored(prompt), lose=topic in (2, 5))
    await until(lambda: all(len(router.index) == 6000 for router, _ in gateways), publisher, second)
    for router, _ in gateways:
        pairs = [router.choose(RouteAsk(prompt)) for prompt in prompts]
        assert [pair.prefill.dp_rank for pair in pairs if isinstance(pair, Pair)] == [0, 1, 0, 1, 0, 1]
