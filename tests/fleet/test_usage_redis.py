"""Usage records reach Redis once: with Redis away, frozen or emptied, and with gateways that die."""

from __future__ import annotations

import asyncio
import errno
import itertools
import json
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import typer
from typer.testing import CliRunner

from support.redis_server import RedisServer
from tandem.cli.usage import usage
from tandem.core.usage import UsageRecord
from tandem.gateway.observe.metrics import Metrics
from tandem.gateway.usage import journal as files
from tandem.gateway.usage.metering import Meter
from tandem.gateway.usage.sinks import RedisSink
from tandem.gateway.usage.stream import UsageStream, UsageStreamError

_fleets = itertools.count()


@pytest.fixture
def redis_server() -> Iterator[RedisServer]:
    """One for each test: they stop and freeze it."""
    server = RedisServer()
    server.start()
    yield server
    server.remove()


@pytest.fixture
def open_stream(redis_server: RedisServer) -> Callable[..., UsageStream]:
    fleet = f"usage-{next(_fleets)}"

    def make(deadline: float = 5.0, keep: int = 1_000_000) -> UsageStream:
        return UsageStream(redis_server.url, fleet=fleet, deadline=deadline, keep=keep)

    return make


@pytest.fixture
async def stream(open_stream: Callable[..., UsageStream]) -> AsyncIterator[UsageStream]:
    one = open_stream()
    yield one
    await one.close()


def record(number: int) -> UsageRecord:
    return UsageRecord(id=f"r{number}", at=time.time(), model="m")


async def ids(stream: UsageStream) -> list[str]:
    return [msgspec.json.decode(line, type=UsageRecord).id async for line in stream.read()]


async def until(wanted: list[str], stream: UsageStream, within: float = 20) -> None:
    async with asyncio.timeout(within):
        while (found := await ids(stream)) != wanted:
            assert len(found) <= len(wanted), f"doubled: {found}"
            await asyncio.sleep(0.02)


def meter_on(stream: UsageStream, folder: Path, **settings: object) -> Meter:
    return Meter(RedisSink(stream, folder, "gateway", **settings), Metrics(), linger_s=0)  # type: ignore[arg-type]


async def test_records_are_in_the_stream_and_no_longer_on_disk(
    open_stream: Callable[..., UsageStream], stream: UsageStream, tmp_path: Path
) -> None:
    meter = meter_on(open_stream(), tmp_path, segment_bytes=500)
    await meter.start()
    for number in range(20):
        meter.record(record(number))
        await until([f"r{n}" for n in range(number + 1)], stream)
    assert len(files.segments(tmp_path)) <= 2
    await meter.close()
    assert await ids(stream) == [f"r{number}" for number in range(20)]


async def test_a_delivery_made_again_adds_nothing(stream: UsageStream) -> None:
    assert await stream.deliver("w", 0, 10, [b"a", b"b"]) == 10
    assert await stream.deliver("w", 0, 10, [b"a", b"b"]) == 10
    assert await stream.deliver("w", 0, 15, [b"a", b"b", b"c"]) == 10
    assert await stream.deliver("w", 10, 15, [b"c"]) == 15
    assert [line async for line in stream.read()] == [b"a", b"b", b"c"]


async def test_the_stream_is_bounded_and_read_page_by_page(open_stream: Callable[..., UsageStream]) -> None:
    stream = open_stream(keep=2500)
    for start in range(0, 6000, 500):
        await stream.deliver("w", start, start + 500, [b"%d" % number for number in range(start, start + 500)])
    found = [int(line) async for line in stream.read()]
    assert found == list(range(6000 - len(found), 6000))
    assert 2500 <= len(found) < 3000
    assert [line async for line in stream.read(since=time.time() + 60)] == []
    await stream.close()


async def test_while_redis_is_away_records_wait_on_disk_and_come_once_it_is_back(
    open_stream: Callable[..., UsageStream], stream: UsageStream, tmp_path: Path, redis_server: RedisServer
) -> None:
    meter = meter_on(open_stream(), tmp_path)
    await meter.start()
    redis_server.stop()
    for number in range(5):
        meter.record(record(number))
    async with asyncio.timeout(10):
        while len(waiting(tmp_path)) < 5:
            await asyncio.sleep(0.02)
    redis_server.start()
    await until([f"r{number}" for number in range(5)], stream)
    await meter.close()


async def test_a_redis_that_hangs_in_the_middle_of_a_delivery_gets_it_once(
    open_stream: Callable[..., UsageStream], stream: UsageStream, tmp_path: Path, redis_server: RedisServer
) -> None:
    meter = meter_on(open_stream(deadline=0.3), tmp_path)
    await meter.start()
    meter.record(record(0))
    await until(["r0"], stream)
    with redis_server.frozen():
        # The server has these in its socket, and will carry them out although nobody waits for it any more.
        for number in range(1, 4):
            meter.record(record(number))
            await asyncio.sleep(0.4)
    await until([f"r{number}" for number in range(4)], stream)
    await meter.close()
    assert await ids(stream) == [f"r{number}" for number in range(4)]


async def test_without_a_usable_folder_records_go_from_memory_once(
    open_stream: Callable[..., UsageStream], stream: UsageStream, tmp_path: Path, redis_server: RedisServer
) -> None:
    (tmp_path / "file").write_text("")
    meter = meter_on(open_stream(deadline=0.3), tmp_path / "file")
    await meter.start()
    meter.record(record(0))
    await until(["r0"], stream)
    with redis_server.frozen():
        meter.record(record(1))
        await asyncio.sleep(0.8)
        meter.record(record(2))
    await until(["r0", "r1", "r2"], stream)
    await meter.close()
    assert await ids(stream) == ["r0", "r1", "r2"]


async def test_what_may_be_delivered_already_is_not_put_into_a_spool_that_works_again(
    open_stream: Callable[..., UsageStream],
    stream: UsageStream,
    tmp_path: Path,
    redis_server: RedisServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    meter = meter_on(open_stream(deadline=0.3), tmp_path)
    await meter.start()
    meter.record(record(0))
    await until(["r0"], stream)
    with redis_server.frozen():
        with monkeypatch.context() as broken:
            broken.setattr(files.Journal, "append", full_disk)
            meter.record(record(1))
            await asyncio.sleep(0.5)
        meter.record(record(2))
        await asyncio.sleep(0.5)
    await until(["r0", "r1", "r2"], stream)
    await meter.close()
    assert await ids(stream) == ["r0", "r1", "r2"]


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, "full")


async def test_a_full_spool_goes_on_from_memory(
    open_stream: Callable[..., UsageStream], stream: UsageStream, tmp_path: Path, redis_server: RedisServer
) -> None:
    redis_server.stop()
    meter = meter_on(open_stream(), tmp_path, spool_limit=1)
    await meter.start()
    meter.record(record(0))
    async with asyncio.timeout(10):
        while not waiting(tmp_path):
            await asyncio.sleep(0.02)
    meter.record(record(1))
    await asyncio.sleep(0.1)
    assert len(waiting(tmp_path)) == 1
    redis_server.start()
    async with asyncio.timeout(20):
        while sorted(await ids(stream)) != ["r0", "r1"]:
            await asyncio.sleep(0.02)
    await meter.close()


async def test_what_a_closed_gateway_could_not_deliver_is_delivered_by_the_next(
    open_stream: Callable[..., UsageStream], stream: UsageStream, tmp_path: Path, redis_server: RedisServer
) -> None:
    redis_server.stop()
    first = meter_on(open_stream(), tmp_path)
    await first.start()
    first.record(record(0))
    await first.close(within=0.5)
    redis_server.start()
    second = meter_on(open_stream(), tmp_path, adopt_s=0.05)
    await second.start()
    await until(["r0"], stream)
    async with asyncio.timeout(10):
        while files.segments(tmp_path):
            await asyncio.sleep(0.02)
    await second.close()


async def test_what_is_delivered_already_is_not_delivered_again_by_the_next(
    open_stream: Callable[..., UsageStream], stream: UsageStream, tmp_path: Path
) -> None:
    first = meter_on(open_stream(), tmp_path)
    await first.start()
    for number in range(3):
        first.record(record(number))
    await until(["r0", "r1", "r2"], stream)
    await first.close()
    assert files.segments(tmp_path), "the last segment is left to whoever looks next"
    second = meter_on(open_stream(), tmp_path, adopt_s=0.05)
    await second.start()
    async with asyncio.timeout(10):
        while files.segments(tmp_path):
            await asyncio.sleep(0.02)
    await second.close()
    assert await ids(stream) == ["r0", "r1", "r2"]


KILLED = """
import asyncio, itertools, sys
from pathlib import Path
from tandem.core.usage import UsageRecord
from tandem.gateway.usage.metering import Meter
from tandem.gateway.observe.metrics import Metrics
from tandem.gateway.usage.sinks import RedisSink
from tandem.gateway.usage.stream import UsageStream

async def main():
    url, folder = sys.argv[1:]
    sink = RedisSink(UsageStream(url, fleet="killed"), Path(folder), "gateway", segment_bytes=2000)
    metrics = Metrics()
    meter = Meter(sink, metrics, linger_s=0.001)
    await meter.start()
    for number in itertools.count():
        meter.record(UsageRecord(id=f"r{number}", at=1.0, model="m"))
        await asyncio.sleep(0.0005)
        print(int(metrics.registry.get_sample_value("tandem_usage_records_total")), flush=True)

asyncio.run(main())
"""


async def test_a_killed_gateway_loses_nothing_that_was_written_and_doubles_nothing(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, redis_server.url, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    written = 0
    for line in process.stdout:
        written = int(line)
        if written >= 300:
            process.send_signal(signal.SIGKILL)
            break
    process.stdout.close()
    process.wait(10)
    stream = UsageStream(redis_server.url, fleet="killed")
    heir = Meter(RedisSink(UsageStream(redis_server.url, fleet="killed"), tmp_path, "heir", adopt_s=0.05), Metrics())
    await heir.start()
    async with asyncio.timeout(20):
        while files.segments(tmp_path):
            await asyncio.sleep(0.02)
    await heir.close()
    found = await ids(stream)
    await stream.close()
    assert found == [f"r{number}" for number in range(len(found))]
    assert len(found) >= written


async def test_a_redis_that_lost_everything_gets_what_comes_after(
    open_stream: Callable[..., UsageStream], stream: UsageStream, tmp_path: Path, redis_server: RedisServer
) -> None:
    meter = meter_on(open_stream(), tmp_path)
    await meter.start()
    meter.record(record(0))
    await until(["r0"], stream)
    redis_server.stop()
    redis_server.start()
    meter.record(record(1))
    # What is still in the last segment comes again: the stream that had it is gone.
    fresh = open_stream()
    await until(["r0", "r1"], fresh)
    await fresh.close()
    await meter.close()


async def test_an_error_names_the_server_and_not_its_password() -> None:
    stream = UsageStream("redis://me:s3cret@127.0.0.1:1/0", fleet="f", deadline=2)
    with pytest.raises(UsageStreamError, match=r"127\.0\.0\.1:1") as caught:
        await stream.position("w")
    assert "s3cret" not in str(caught.value)
    await stream.close()


def test_the_command_line_reads_the_stream_and_counts_each_request_once(
    open_stream: Callable[..., UsageStream], redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def fill() -> str:
        stream = open_stream()
        lines = [msgspec.json.encode(record(number)) for number in (0, 1, 1, 2)]
        await stream.deliver("w", 0, 4, lines)
        await stream.close()
        return stream.fleet

    monkeypatch.setenv("TANDEM_HOME", str(tmp_path))
    cli = typer.Typer()
    cli.command()(usage)
    fleet = asyncio.run(fill())
    result = CliRunner().invoke(cli, ["--redis", redis_server.url, "--fleet", fleet, "--since", "1h", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["total"]["requests"], found["duplicates"]) == (3, 1)


def waiting(folder: Path) -> list[bytes]:
    return [line for segment in files.segments(folder) for line in files.read_lines(segment.path)]
