"""The load: streaming chat requests at random times (open loop), timed at the client.

Requests come as a Poisson process whether or not earlier ones are answered. A prompt is one of `kinds` long prefixes
and a tail of its own, both English text with code (Python's own help pages). Each stream is kept as it arrives, with
its times, and read only when it is complete: the text must be what the stand-ins said, to the last letter.

Run as a process it takes a `Plan` as JSON and prints a `Result` as JSON.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
from bisect import bisect_left
from collections import Counter
from itertools import accumulate, pairwise
from pathlib import Path
from pydoc_data import topics
from time import monotonic
from urllib.parse import urlsplit

import httptools
import msgspec
import orjson
import uvloop

from bench.gateway.processes import Process, Spent, cpu, machine, resident

SLACK_S = 60.0
"""Beyond the planned seconds, for the process to start, and to read what it received."""
CLOSED_S = 1200.0
"""For a closed loop, whose length depends on the gateway."""


class Plan(msgspec.Struct, kw_only=True):
    """What to ask, of whom."""

    url: str
    model: str
    pids: list[int]
    """The gateway's processes; their CPU time is read before and after."""
    beside: list[int] = []
    """Other processes of the benchmark, to tell their CPU time from that of strangers."""
    texts: list[str]
    """What the stand-ins say, token by token, over and over."""
    rate: float = 0.0
    """Requests per second; 0 = closed loop with `clients` at a time."""
    seconds: float = 10.0
    requests: int = 0
    """Closed loop: how many in all."""
    clients: int = 64
    prompt_bytes: int = 25_000
    shared: float = 0.8
    """Share of a prompt that is one of the `kinds`."""
    kinds: int = 64
    tokens: int = 64
    seed: int = 1
    drain_s: float = 20.0


class Quantiles(msgspec.Struct):
    """Milliseconds."""

    p50: float = 0.0
    p95: float = 0.0
    p99: float = 0.0
    worst: float = 0.0


class Result(msgspec.Struct, kw_only=True):
    """What the client saw, and what it cost."""

    sent: int = 0
    completed: int = 0
    errors: dict[str, int] = {}
    ttft_ms: Quantiles
    itl_ms: Quantiles
    late_ms: Quantiles
    """How much later than planned the generator sent."""
    seconds: float = 0.0
    cpu: Spent
    """The gateway's, seconds."""
    own_cpu: float = 0.0
    """Of the generator."""
    beside_cpu: float = 0.0
    strangers_cpu: float = 0.0
    """Cores that other processes of the machine kept busy."""
    idle: float = 0.0
    """Share of the machine's CPU time that nobody used."""
    rss_mib: float = 0.0


class Stream(asyncio.Protocol):
    """One keep-alive connection, one request at a time."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.done: asyncio.Future[str] | None = None
        self._loop = asyncio.get_running_loop()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def ask(self, request: bytes) -> asyncio.Future[str]:
        """Send it; the future ends with "" or what was wrong."""
        assert self.transport is not None
        self.done = self._loop.create_future()
        self.parser = httptools.HttpResponseParser(self)
        self.pieces: list[bytes] = []
        self.times: list[float] = []
        self.status = 0
        self.sent = monotonic()
        self.transport.write(request)
        return self.done

    def data_received(self, data: bytes) -> None:
        self.now = monotonic()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(f"no HTTP: {error}")

    def on_headers_complete(self) -> None:
        self.status = self.parser.get_status_code()

    def on_body(self, piece: bytes) -> None:
        self.pieces.append(piece)
        self.times.append(self.now)

    def on_message_complete(self) -> None:
        self._end("" if self.status == 200 else f"status {self.status}")

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self._end("connection lost")

    def _end(self, wrong: str) -> None:
        if self.done is not None and not self.done.done():
            self.done.set_result(wrong)


class Script:
    """What every complete stream says, and where its tokens end."""

    def __init__(self, texts: list[str], tokens: int) -> None:
        said = [texts[n % len(texts)] for n in range(tokens)]
        self.text = "".join(said)
        self.tokens = tokens
        self._ends = list(accumulate(len(text) for text in said))

    def times(self, pieces: list[bytes], times: list[float]) -> list[float] | str:
        """When each token came, or what is wrong with the stream."""
        ends = list(accumulate(len(piece) for piece in pieces))
        body = b"".join(pieces)
        text, came, at, finished, done, usage = "", [], 0, False, False, 0
        for event in body.split(b"\n\n"):
            at += len(event) + 2
            if not event or event.startswith(b":"):
                continue
            if event == b"data: [DONE]":
                done = True
                continue
            found = orjson.loads(event.removeprefix(b"data: "))
            if "error" in found:
                return f"error event: {found['error'].get('message')}"
            if found.get("usage"):
                usage = found["usage"]["completion_tokens"]
            for choice in found["choices"]:
                delta = choice["delta"]
                text += (delta.get("reasoning_content") or "") + (delta.get("content") or "")
                finished |= choice["finish_reason"] == "length"
            time = times[bisect_left(ends, at)]
            while len(came) < self.tokens and self._ends[len(came)] <= len(text):
                came.append(time)
        if text != self.text:
            return "the text is not what the workers said"
        if not (done and finished and usage == self.tokens):
            return f"incomplete: done {done}, finish reason {finished}, usage {usage}"
        return came


class Prompts:
    """Requests, made one by one so that no two are alike."""

    def __init__(self, plan: Plan) -> None:
        self._random = random.Random(plan.seed)
        self._book = "\n".join(topics.topics[name] for name in sorted(topics.topics))
        self._tail = max(1, int(plan.prompt_bytes * (1 - plan.shared)))
        length = plan.prompt_bytes - self._tail
        self._prefixes = [self._text(length) for _ in range(plan.kinds)] if length else [b""]
        host = urlsplit(plan.url).netloc
        body = {
            "model": plan.model,
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": plan.tokens,
            "temperature": 0,
            "ignore_eos": True,
            "messages": [{"role": "user", "content": "@"}],
        }
        before, after = orjson.dumps(body).split(b"@")
        self._before, self._after = before, after
        self._head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
        self._count = 0

    def next(self) -> bytes:
        self._count += 1
        name = b"%d. " % self._count
        tail = self._text(self._tail)
        body = b"".join((self._before, self._random.choice(self._prefixes), b" ", name, tail, self._after))
        return f"{self._head}content-length: {len(body)}\r\n\r\n".encode() + body

    def _text(self, length: int) -> bytes:
        begin = self._random.randrange(len(self._book) - length)
        return orjson.dumps(self._book[begin : begin + length])[1:-1]


class Load:
    """One run of a plan."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._prompts = Prompts(plan)
        self._script = Script(plan.texts, plan.tokens)
        self._idle: list[Stream] = []
        self._errors: Counter[str] = Counter()
        self._streams: list[tuple[float, list[bytes], list[float]]] = []
        self._ttft: list[float] = []
        self._itl: list[float] = []
        self._late: list[float] = []
        self._address = urlsplit(plan.url)
        self._loop = asyncio.get_running_loop()
        self._sent = 0

    async def run(self) -> Result:
        plan = self._plan
        ours = [os.getpid()]
        before, beside, own = cpu(plan.pids), cpu(plan.beside), cpu(ours)
        busy, total = machine()
        begin = self._loop.time()
        await (self._open() if plan.rate else self._closed())
        seconds = self._loop.time() - begin
        busy_then, total_then = machine()
        spent, own_spent = cpu(plan.pids).since(before), cpu(ours).since(own)
        beside_spent = cpu(plan.beside).since(beside).total
        strangers = busy_then - busy - spent.total - own_spent.total - beside_spent
        # Reading the streams costs the generator more than receiving them: it is done when nothing is measured.
        for sent, pieces, times in self._streams:
            self._read(sent, pieces, times)
        return Result(
            sent=self._sent,
            completed=len(self._ttft),
            errors=dict(self._errors),
            ttft_ms=quantiles(self._ttft),
            itl_ms=quantiles(self._itl),
            late_ms=quantiles(self._late),
            seconds=seconds,
            cpu=spent,
            own_cpu=own_spent.total,
            beside_cpu=beside_spent,
            strangers_cpu=max(0.0, strangers) / seconds,
            idle=1 - (busy_then - busy) / (total_then - total),
            rss_mib=resident(plan.pids),
        )

    async def _open(self) -> None:
        plan = self._plan
        dice = random.Random(plan.seed)
        begin = self._loop.time()
        when, following = begin, self._prompts.next()
        running: set[asyncio.Task[None]] = set()
        while (when := when + dice.expovariate(plan.rate)) < begin + plan.seconds:
            await asyncio.sleep(when - self._loop.time())
            self._late.append(self._loop.time() - when)
            task = self._loop.create_task(self._one(following))
            running.add(task)
            task.add_done_callback(running.discard)
            following = self._prompts.next()
        if running:
            _, pending = await asyncio.wait(running, timeout=plan.drain_s)
            for task in pending:
                self._errors[f"not answered {plan.drain_s:g} s after the last was sent"] += 1
                task.cancel()

    async def _closed(self) -> None:
        async def client() -> None:
            while self._sent < self._plan.requests:
                await self._one(self._prompts.next())

        await asyncio.gather(*(client() for _ in range(self._plan.clients)))

    async def _one(self, request: bytes) -> None:
        self._sent += 1
        try:
            stream = self._take() or await self._connect()
        except OSError as error:
            self._errors[f"no connection: {error.strerror}"] += 1
            return
        wrong = await stream.ask(request)
        if wrong:
            self._errors[wrong] += 1
            if stream.transport is not None:
                stream.transport.abort()
            return
        if self._plan.rate:
            self._streams.append((stream.sent, stream.pieces, stream.times))
        else:
            self._read(stream.sent, stream.pieces, stream.times)
        self._idle.append(stream)

    def _take(self) -> Stream | None:
        while self._idle:
            stream = self._idle.pop()
            if stream.transport is not None and not stream.transport.is_closing():
                return stream
        return None

    async def _connect(self) -> Stream:
        _, stream = await self._loop.create_connection(Stream, self._address.hostname, self._address.port)
        return stream

    def _read(self, sent: float, pieces: list[bytes], times: list[float]) -> None:
        came = self._script.times(pieces, times)
        if isinstance(came, str):
            self._errors[came] += 1
            return
        self._ttft.append(came[0] - sent)
        self._itl += [after - before for before, after in pairwise(came)]


def quantiles(values: list[float]) -> Quantiles:
    """Of seconds, in milliseconds."""
    if not values:
        return Quantiles()
    ordered = sorted(values)
    at = [ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1e3 for share in (0.5, 0.95, 0.99)]
    return Quantiles(*at, ordered[-1] * 1e3)


def drive(plan: Plan, log: Path) -> Result:
    """Run a plan in a process of its own. Raises BenchError."""
    process = Process("the load", [sys.executable, "-m", "bench.gateway.load"], log=log, lines=True)
    try:
        process.feed(msgspec.json.encode(plan))
        within = plan.seconds + plan.drain_s + SLACK_S if plan.rate else CLOSED_S
        return msgspec.json.decode(process.line(within), type=Result)
    finally:
        process.stop()


async def _main() -> None:
    plan = msgspec.json.decode(sys.stdin.buffer.read(), type=Plan)
    print(msgspec.json.encode(await Load(plan).run()).decode(), flush=True)


if __name__ == "__main__":
    uvloop.run(_main())
