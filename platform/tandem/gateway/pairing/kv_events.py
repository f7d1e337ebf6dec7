"""Follows what the prefill engines say of their KV caches, and keeps the prefix index true to it.

SGLang 0.5.23 publishes from each DP rank (`srt/disaggregation/kv_events.py`), on a PUB socket of the rank's own node:
three frames: topic, number (8 bytes, big endian, from 0), and a batch in msgpack: `[time, [event, …], dp rank]`. Events
are maps tagged by `type`: BlockStored, BlockRemoved, AllBlocksCleared. A ROUTER socket sends the last batches again:
asked `["", first number]` it answers `["", topic, number, batch]` for each, and ends with the number -1.

The topic names group and epoch, so whatever comes to listen on an old engine's port is not taken for it. Every
`sync_s` seconds a rank is asked for what comes after the last batch that was seen. So batches that were lost without a
later one to show it (a connection that broke, a replica that has just started) are had after that time at the latest,
and all replicas agree within it.

All sockets are read on the gateway's own loop, and their batches applied in turns of at most `TURN_BYTES` or one batch:
streams go on between two turns, however many events come.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence

import msgspec
import zmq

from tandem.core.kv_source import KvSource
from tandem.core.prefix_index import PrefixIndex, Worker
from tandem.core.types import Group, GroupState, Role
from tandem.gateway.pairing.kv_sequence import FORGET, BatchSequence, Ordered

log = logging.getLogger(__name__)

TURN_BYTES = 64 * 1024
"""About a millisecond's work."""
SYNC_S = 2.0
REPLAY_S = 5.0
"""A replay that has brought nothing for so long is given up."""
_QUEUE = 1024
"""Messages that wait in one socket; what comes beyond stays with the publisher, or is lost and asked for again."""
_SOCKETS = 16384
_END = (-1).to_bytes(8, "big", signed=True)
_GPU = (None, "GPU")
_FOLLOWED = frozenset({GroupState.READY, GroupState.CORDONED, GroupState.DRAINING})


class _Stored(msgspec.Struct, tag="BlockStored"):
    block_hashes: list[int]
    token_ids: msgspec.Raw
    block_size: int
    parent_block_hash: int | None = None
    medium: str | None = None
    cache_salt: str | None = None
    lora_name: str | None = None
    lora_id: int | None = None


class _Removed(msgspec.Struct, tag="BlockRemoved"):
    block_hashes: list[int]
    medium: str | None = None


class _Cleared(msgspec.Struct, tag="AllBlocksCleared"):
    pass


class _Batch(msgspec.Struct, array_like=True):
    ts: float
    events: list[_Stored | _Removed | _Cleared]
    attn_dp_rank: int | None = None


_batches = msgspec.msgpack.Decoder(_Batch)
_ids = msgspec.msgpack.Decoder(list[int])
_pairs = msgspec.msgpack.Decoder(list[tuple[int, int]])


class KvEventCounts(msgspec.Struct):
    """What was seen since the start."""

    batches: int = 0
    stored: int = 0
    """Pages."""
    removed: int = 0
    """Pages."""
    cleared: int = 0
    forgotten: int = 0
    """Times that a rank's entries were dropped, as batches were lost or made no sense."""


class KvEvents:
    """Follows the prefill ranks of all groups that are put. Belongs to the running loop.

    Tell the router of a group first: only ranks that have joined the index can hold anything.
    """

    def __init__(self, index: PrefixIndex, *, sync_s: float = SYNC_S, replay_s: float = REPLAY_S) -> None:
        self.counts = KvEventCounts()
        self._index = index
        self._sync_s = sync_s
        self.replay_s = replay_s
        self._loop = asyncio.get_running_loop()
        self._context = zmq.Context(io_threads=1)
        self._context.set(zmq.MAX_SOCKETS, _SOCKETS)
        self._feeds: dict[str, list[_Feed]] = {}
        self._waiting: deque[_Feed] = deque()
        self._turn: asyncio.Handle | None = None
        self._warned: set[str] = set()

    def put_group(self, group: Group) -> None:
        """A group is there, or has changed."""
        sources = [source for rank in group.ranks for source in rank.kv_events]
        if group.role is Role.PREFILL and group.state in _FOLLOWED:
            self.follow(group.group, group.epoch, sources)
        else:
            self.remove_group(group.group)

    def remove_group(self, name: str) -> None:
        """A group is gone."""
        for feed in self._feeds.pop(name, ()):
            feed.close()

    def follow(self, group: str, epoch: int, sources: Sequence[KvSource]) -> None:
        """Follow these ranks of a group, and no others of it."""
        now = {(Worker(group, epoch, source.dp_rank), source) for source in sources}
        before = self._feeds.get(group, [])
        if {(feed.worker, feed.source) for feed in before} == now:
            return
        kept = [feed for feed in before if (feed.worker, feed.source) in now]
        for feed in before:
            if feed not in kept:
                feed.close()
        known = {feed.worker for feed in kept}
        kept += [_Feed(self, worker, source) for worker, source in now if worker not in known]
        self._feeds[group] = kept

    @property
    def feeds(self) -> int:
        """Ranks that are followed."""
        return sum(len(feeds) for feeds in self._feeds.values())

    def close(self) -> None:
        """Stop following."""
        for group in list(self._feeds):
            self.remove_group(group)
        if self._turn is not None:
            self._turn.cancel()
        self._context.destroy(linger=0)

    # For its feeds

    @property
    def now(self) -> float:
        return self._loop.time()

    def socket(self, kind: int, endpoint: str) -> zmq.Socket[bytes]:
        """A socket that is not connected yet."""
        made = self._context.socket(kind)
        made.set(zmq.LINGER, 0)
        made.set(zmq.RCVHWM, _QUEUE)
        made.set(zmq.RECONNECT_IVL_MAX, 2000)
        # A node that is gone says nothing: without these its connection would count as good for ever.
        made.set(zmq.HEARTBEAT_IVL, 5000)
        made.set(zmq.HEARTBEAT_TIMEOUT, 15000)
        made.set(zmq.IPV6, "[" in endpoint)
        return made

    def watch(self, socket: zmq.Socket[bytes], feed: _Feed) -> None:
        """Call the feed when there is something to read."""
        self._loop.add_reader(socket.fileno(), self.ready, feed)

    def unwatch(self, socket: zmq.Socket[bytes]) -> None:
        self._loop.remove_reader(socket.fileno())

    def later(self, call: Callable[[], None]) -> asyncio.TimerHandle:
        return self._loop.call_later(self._sync_s, call)

    # Turns

    def ready(self, feed: _Feed) -> None:
        """The feed may have something to read."""
        if not feed.waiting:
            feed.waiting = True
            self._waiting.append(feed)
        if self._turn is None:
            self._turn = self._loop.call_soon(self._take_turn)

    def _take_turn(self) -> None:
        self._turn = None
        spent = 0
        while self._waiting and spent < TURN_BYTES:
            feed = self._waiting.popleft()
            read = 0 if feed.closed else feed.read()
            spent += read
            if read:
                self._waiting.append(feed)
            else:
                feed.waiting = False
        if self._waiting:
            self._turn = self._loop.call_soon(self._take_turn)

    # Batches

    def apply(self, worker: Worker, batches: Ordered) -> None:
        """Bring the index up to date."""
        for batch in batches:
            if batch is FORGET:
                self._forget(worker)
                continue
            try:
                self._apply(worker, _batches.decode(batch))
            except (msgspec.MsgspecError, OverflowError, TypeError) as error:
                self._warn(f"the KV events of {worker.group} make no sense, its prefixes are forgotten: {error}")
                self._forget(worker)

    def _apply(self, worker: Worker, batch: _Batch) -> None:
        self.counts.batches += 1
        if batch.attn_dp_rank not in (None, worker.dp_rank):
            self._warn(f"{worker.group} sends KV events of DP rank {batch.attn_dp_rank} as those of {worker.dp_rank}")
            return
        for event in batch.events:
            match event:
                case _Stored():
                    self._store(worker, event)
                case _Removed(block_hashes=hashes, medium=medium):
                    if medium in _GPU:
                        self.counts.removed += len(hashes)
                        self._index.removed(worker, hashes)
                case _Cleared():
                    self.counts.cleared += 1
                    self._index.cleared(worker)

    def _store(self, worker: Worker, event: _Stored) -> None:
        if event.medium not in _GPU or event.cache_salt or event.lora_name or event.lora_id is not None:
            return  # not where a plain prompt would find it
        if not self._index.fits(event.block_size):
            self._warn(
                f"{worker.group} has pages of {event.block_size} tokens, which do not make blocks of"
                f" {self._index.block_tokens}: its prefixes are guessed; use --page-size {self._index.block_tokens}"
            )
            return
        try:
            tokens = _ids.decode(event.token_ids)
        except msgspec.ValidationError:
            # Speculative decoding keys the cache by pairs of neighbours.
            tokens = [first for first, _ in _pairs.decode(event.token_ids)]
        self.counts.stored += len(event.block_hashes)
        self._index.stored(worker, event.block_hashes, event.parent_block_hash, tokens, event.block_size)

    def _forget(self, worker: Worker) -> None:
        self.counts.forgotten += 1
        self._index.cleared(worker)

    def _warn(self, message: str) -> None:
        """Once each, and not without end: it may be the same for every batch."""
        if message not in self._warned and len(self._warned) < 100:
            self._warned.add(message)
            log.warning("%s", message)


class _Feed:
    """The two sockets of one rank."""

    def __init__(self, events: KvEvents, worker: Worker, source: KvSource) -> None:
        self.worker = worker
        self.source = source
        self.waiting = False
        """Whether it is in line for a turn."""
        self.closed = False
        self._events = events
        self._topic = source.topic.encode()
        self._sequence = BatchSequence()
        self._until = 0.0
        """When the replay that runs is given up; 0 = none runs."""
        self._from = -1
        """Where the replay that runs was to begin if it was asked for to fill a gap, else -1."""
        self._sub = events.socket(zmq.SUB, source.events)
        self._sub.subscribe(self._topic)
        self._sub.connect(source.events)
        events.watch(self._sub, self)
        self._replay: zmq.Socket[bytes] | None = None
        if source.replay:
            self._replay = events.socket(zmq.DEALER, source.replay)
            self._replay.connect(source.replay)
            events.watch(self._replay, self)
        self._ask()
        self._timer = events.later(self._sync)

    def close(self) -> None:
        """Stop following. Idempotent."""
        if self.closed:
            return
        self.closed = True
        self._timer.cancel()
        for socket in (self._sub, self._replay):
            if socket is not None:
                self._events.unwatch(socket)
                socket.close(linger=0)

    def read(self) -> int:
        """Take one message; return its size, 0 if there is none. ZeroMQ tells only once that there is something."""
        # What is sent again comes first: it is what the live ones wait for.
        if self._replay is not None and (parts := _receive(self._replay)) is not None:
            self._take_replayed(parts)
        elif (parts := _receive(self._sub)) is not None:
            self._take_live(parts)
        else:
            return 0
        return 1 + sum(map(len, parts))

    def _take_live(self, parts: list[bytes]) -> None:
        # A subscription is to all topics that begin like ours.
        if len(parts) != 3 or parts[0] != self._topic:
            return
        self._apply(self._sequence.live(int.from_bytes(parts[1], "big"), parts[2]))
        if self._sequence.gap and not self._until:
            self._ask()

    def _take_replayed(self, parts: list[bytes]) -> None:
        if len(parts) != 4:
            return
        _, topic, number, batch = parts
        if number == _END:
            self._replay_ended()
        elif topic == self._topic:
            if self._until:
                self._until = self._events.now + self._events.replay_s
            self._apply(self._sequence.replayed(int.from_bytes(number, "big"), batch))

    def _replay_ended(self) -> None:
        if not self._until:
            return
        self._until = 0.0
        if self._sequence.gap:
            if self._from == self._sequence.expected:
                self._apply(self._sequence.give_up())
            else:
                # What is missing now was lost after the replay had been asked for.
                self._ask()

    def _sync(self) -> None:
        """Ask for what was lost without a trace, and give up what does not come."""
        self._timer = self._events.later(self._sync)
        if self._until and self._events.now >= self._until:
            self._until = 0.0
            self._apply(self._sequence.give_up())
        if not self._until:
            self._ask()

    def _ask(self) -> None:
        """Ask for the next batch and all after it."""
        if self._replay is None:
            self._apply(self._sequence.give_up())
            return
        self._from = self._sequence.expected if self._sequence.gap else -1
        self._until = self._events.now + self._events.replay_s
        try:
            self._replay.send_multipart([b"", self._sequence.expected.to_bytes(8, "big")], zmq.NOBLOCK)
        except zmq.Again:
            # The engine takes no more questions. The time will run out, and it is asked again.
            log.debug("no replay of KV events can be asked of %s", self.source.replay)
        # Sending may take note of what has arrived, and then nothing else tells of it.
        self._events.ready(self)

    def _apply(self, batches: Ordered) -> None:
        self._events.apply(self.worker, batches)


def _receive(socket: zmq.Socket[bytes]) -> list[bytes] | None:
    try:
        return socket.recv_multipart(zmq.NOBLOCK)
    except zmq.Again:
        return None
