"""One line to Redis for many small scripts: what is asked while a batch is on its way goes with the next one.

So a replica needs one connection, and under load pays one round trip for many requests. The line is *up* or *down*:
the first error or late answer takes it down; everything that waits for it is answered at once with `LineDown`, and
nobody waits again until Redis has answered the owner's `hello`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError

log = logging.getLogger(__name__)

BATCH = 256
RETRY_S = 0.5
"""Between two attempts to reach a Redis that is down."""
HELLO_S = 2.0
"""How long Redis may take to say that it is back; no request waits for it."""

Arguments = Sequence[str | int]


class LineDown(Exception):
    """Redis did not answer, or not in time."""


class Line:
    """Calls scripts, in order. `start` and `close` it."""

    def __init__(
        self,
        url: str,
        *,
        scripts: Mapping[str, str],
        deadline: float,
        hello: Callable[[], Awaitable[None]],
        on_up: Callable[[], None],
    ) -> None:
        """`scripts`: text → SHA-1. `deadline` in seconds is the longest that an answer takes. `hello` is awaited
        whenever Redis may be there again; it asks with `direct`, and raises LineDown if there is no answer. `on_up`
        is called when the line is up, before anybody else can use it.

        Raises ValueError for a URL that is none.
        """
        self._deadline = deadline
        self._hello = hello
        self._on_up = on_up
        self._scripts = scripts
        try:
            self._redis: Redis = Redis.from_url(
                url, protocol=2, retry=Retry(NoBackoff(), 0), socket_timeout=None, socket_connect_timeout=HELLO_S
            )
        except ValueError:
            # The parser's message may quote a part of the password.
            raise ValueError("state.url is not a Redis URL; write redis://[user:password@]host:port/db.") from None
        self._secret = str(self._redis.connection_pool.connection_kwargs.get("password") or "")
        self._urgent: list[_Call] = []
        self._patient: list[_Call] = []
        self._wake = asyncio.Event()
        self._closing = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.up = False

    async def start(self) -> None:
        """Try once to reach Redis, then go on in the background."""
        await self._come_back()
        self._task = asyncio.create_task(self._work(), name="limits")

    async def close(self) -> None:
        """Say what is still to be said, if Redis listens."""
        self._closing.set()
        self._wake.set()
        if self._task is not None:
            await asyncio.wait([self._task], timeout=HELLO_S)
            self._task.cancel()
        _fail(self._take_all(), "the gateway stops")
        await self._redis.connection_pool.disconnect(inuse_connections=True)
        await self._redis.aclose()

    def ask(self, script: str, keys: Sequence[str], arguments: Arguments) -> asyncio.Future[list[Any]]:
        """Call a script that somebody waits for: the reply, or LineDown, comes within the deadline."""
        return self._put(self._urgent, script, keys, arguments, asyncio.get_running_loop().time() + self._deadline)

    def tell(self, script: str, keys: Sequence[str], arguments: Arguments) -> asyncio.Future[list[Any]]:
        """Call a script that nobody waits for. These keep their order, and come after all that `ask` asks."""
        return self._put(self._patient, script, keys, arguments, math.inf)

    async def direct(self, script: str, keys: Sequence[str], arguments: Arguments) -> list[Any]:
        """For `hello`: call a script though the line is down. Raises LineDown."""
        try:
            async with asyncio.timeout(HELLO_S):
                return (await self._execute([_Call(script, keys, arguments, math.inf)]))[0]
        except (RedisError, OSError, TimeoutError) as error:
            await self._redis.connection_pool.disconnect(inuse_connections=True)
            raise LineDown(self._told(error, HELLO_S)) from None

    def take_down(self, why: str) -> None:
        """Nothing is asked until `hello` was answered again."""
        if self.up:
            self.up = False
            log.warning("limits are counted by each gateway for itself: %s", why)
        _fail(self._take_all(), why)
        self._wake.set()

    def _put(
        self, box: list[_Call], script: str, keys: Sequence[str], arguments: Arguments, due: float
    ) -> asyncio.Future[list[Any]]:
        call = _Call(script, keys, arguments, due)
        if self.up:
            box.append(call)
            self._wake.set()
        else:
            _fail([call], "Redis is down")
        return call.reply

    async def _work(self) -> None:
        while not self._closing.is_set() or (self.up and (self._urgent or self._patient)):
            if self.up:
                await self._wake.wait()
                self._wake.clear()
                while self.up and (self._urgent or self._patient):
                    await self._send()
            else:
                await self._come_back()
                if not self.up:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._closing.wait(), RETRY_S)

    async def _send(self) -> None:
        urgent, self._urgent = self._urgent[:BATCH], self._urgent[BATCH:]
        room = BATCH - len(urgent)
        patient, self._patient = self._patient[:room], self._patient[room:]
        batch = urgent + patient
        latest = asyncio.get_running_loop().time() + self._deadline
        try:
            async with asyncio.timeout_at(min(latest, batch[0].due)):
                replies = await self._execute(batch)
        except Exception as error:  # noqa: BLE001 - whatever it is, those who wait are told, and the line goes on
            # A reply that comes late must not be taken for that of the next call.
            await self._redis.connection_pool.disconnect(inuse_connections=True)
            why = self._told(error, self._deadline)
            _fail(batch, why)
            self.take_down(why)
            return
        for call, reply in zip(batch, replies, strict=True):
            if not call.reply.done():
                call.reply.set_result(reply)

    async def _execute(self, calls: Sequence[_Call]) -> list[list[Any]]:
        replies = await self._pipeline(calls)
        strangers = [index for index, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
        if strangers:
            for script in self._scripts:
                await self._redis.script_load(script)
            again = await self._pipeline([calls[index] for index in strangers])
            for index, reply in zip(strangers, again, strict=True):
                replies[index] = reply
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        return replies

    async def _pipeline(self, calls: Sequence[_Call]) -> list[Any]:
        async with self._redis.pipeline(transaction=False) as pipe:
            for call in calls:
                pipe.evalsha(self._scripts[call.script], len(call.keys), *call.keys, *call.arguments)
            return list(await pipe.execute(raise_on_error=False))

    async def _come_back(self) -> None:
        try:
            await self._hello()
        except LineDown as error:
            log.debug("Redis is still down: %s", error)
            return
        self.up = True
        self._on_up()
        self._wake.set()
        log.info("limits are counted in Redis, for all gateways together")

    def _take_all(self) -> list[_Call]:
        calls = self._urgent + self._patient
        self._urgent, self._patient = [], []
        return calls

    def _told(self, error: BaseException, deadline: float) -> str:
        if isinstance(error, TimeoutError):
            return f"Redis gave no answer within {deadline * 1000:g} ms"
        text = str(error)
        return f"Redis cannot be used: {text.replace(self._secret, '***') if self._secret else text}".rstrip(".")


class _Call:
    __slots__ = ("arguments", "due", "keys", "reply", "script")

    def __init__(self, script: str, keys: Sequence[str], arguments: Arguments, due: float) -> None:
        self.script = script
        self.keys = keys
        self.arguments = arguments
        self.due = due
        self.reply: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()


def _fail(calls: Sequence[_Call], why: str) -> None:
    for call in calls:
        if not call.reply.done():
            call.reply.set_exception(LineDown(why))
            call.reply.exception()  # nobody need look at it, and it must not be warned of then
