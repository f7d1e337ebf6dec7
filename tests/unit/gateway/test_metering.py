"""A usage record is written once, whatever happens to the file system or to Redis, and no request fails for it."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import pytest

from tandem.core.usage import UsageRecord
from tandem.gateway.observe.metrics import Metrics
from tandem.gateway.usage import journal as files
from tandem.gateway.usage.journal import Journal
from tandem.gateway.usage.metering import Meter, make_meter
from tandem.gateway.usage.sinks import FileSink, SinkError


class Clock:
    def __init__(self) -> None:
        self.now = 1_795_485_600.0  # 2026-11-24

    def __call__(self) -> float:
        return self.now


class MemorySink:
    """Keeps what it is given; fails as often as it is told to."""

    def __init__(self, failures: int = 0) -> None:
        self.failures = failures
        self.lines: list[bytes] = []
        self.tried = asyncio.Event()

    async def open(self) -> None: ...
    async def idle(self) -> None: ...
    async def close(self, within: float) -> None: ...

    async def write(self, lines: Sequence[bytes]) -> None:
        self.tried.set()
        if self.failures:
            self.failures -= 1
            raise SinkError("no room")
        self.lines += lines


def record(number: int, **fields: object) -> UsageRecord:
    return UsageRecord(**{"id": f"r{number}", "at": float(number), "model": "m", **fields})  # type: ignore[arg-type]


def ids(lines: Sequence[bytes]) -> list[str]:
    return [msgspec.json.decode(line, type=UsageRecord).id for line in lines]


def written(folder: Path) -> list[bytes]:
    return [line for segment in files.segments(folder) for line in files.read_lines(segment.path)]


def counted(metrics: Metrics, name: str) -> float:
    return metrics.registry.get_sample_value(name) or 0.0


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def journal(tmp_path: Path, clock: Clock) -> Callable[..., Journal]:
    def make(writer: str = "gateway-1", **settings: object) -> Journal:
        made = Journal(tmp_path, writer, clock=clock, **settings)  # type: ignore[arg-type]
        made.open()
        return made

    return make


def half_written(monkeypatch: pytest.MonkeyPatch, share: float = 0.5) -> None:
    """The disk takes a part of the next write, and is full."""
    write = os.write

    def once(file: int, data: bytes) -> int:
        monkeypatch.setattr(os, "write", write)
        return write(file, data[: int(len(data) * share)])

    monkeypatch.setattr(os, "write", once)


# The meter


async def test_records_are_in_the_sink_when_the_meter_is_closed() -> None:
    sink, metrics = MemorySink(), Metrics()
    meter = Meter(sink, metrics, batch=3)
    await meter.start()
    for number in range(10):
        meter.record(record(number))
    await meter.close()
    assert ids(sink.lines) == [f"r{number}" for number in range(10)]
    assert counted(metrics, "tandem_usage_records_total") == 10
    assert counted(metrics, "tandem_usage_records_pending") == 0


async def test_who_waits_for_a_record_goes_on_when_it_is_in_the_sink() -> None:
    sink = MemorySink()
    meter = Meter(sink, Metrics())
    await meter.start()
    await meter.written(record(1))
    assert ids(sink.lines) == ["r1"]
    await meter.close()


@pytest.mark.parametrize("started", [False, True])
async def test_nobody_waits_for_a_sink_that_cannot_write(started: bool) -> None:
    meter = Meter(MemorySink(failures=10**9), Metrics())
    if started:
        await meter.start()
    async with asyncio.timeout(5):
        await meter.written(record(1), within=60)
        await meter.written(record(2), within=60)
    await meter.close(within=0.1)


async def test_nobody_waits_for_long_for_a_sink_that_takes_long() -> None:
    class Stuck(MemorySink):
        async def write(self, lines: Sequence[bytes]) -> None:
            self.tried.set()
            await asyncio.Event().wait()

    sink = Stuck()
    meter = Meter(sink, Metrics())
    await meter.start()
    async with asyncio.timeout(5):
        await meter.written(record(1), within=0.05)
        assert sink.tried.is_set()
        await meter.written(record(2), within=60)
    await meter.close(within=0.1)


async def test_nobody_waits_for_a_second_record_of_a_request() -> None:
    sink = MemorySink()
    meter = Meter(sink, Metrics())
    await meter.start()
    await meter.written(record(1))
    async with asyncio.timeout(5):
        await meter.written(record(1), within=60)
    await meter.close()
    assert ids(sink.lines) == ["r1"]


async def test_a_disk_that_hangs_does_not_hold_the_end_of_the_gateway(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    goes_on = threading.Event()
    monkeypatch.setattr(os, "fdatasync", lambda file: goes_on.wait(10))
    sink = FileSink(Journal(tmp_path, "w", fsync_s=60))
    await sink.open()
    await sink.write([b"{}"])
    await asyncio.wait_for(sink.close(within=0.01), 5)
    assert "did not take the last usage records within 0.01 s" in caplog.text
    goes_on.set()
    assert written(tmp_path) == [b"{}\n"]


async def test_a_batch_that_could_not_be_written_is_written_again_once() -> None:
    sink = MemorySink(failures=2)
    meter = Meter(sink, Metrics(), linger_s=0)
    await meter.start()
    meter.record(record(1))
    while sink.failures:
        await asyncio.sleep(0.01)
    await meter.close()
    assert ids(sink.lines) == ["r1"]


async def test_a_second_record_of_a_request_is_ignored() -> None:
    sink = MemorySink()
    meter = Meter(sink, Metrics())
    await meter.start()
    meter.record(record(1, outcome="ok"))
    meter.record(record(1, outcome="client_gone"))
    await meter.close()
    assert [msgspec.json.decode(line)["outcome"] for line in sink.lines] == ["ok"]


async def test_beyond_the_queue_records_are_dropped_and_counted_but_nothing_is_raised() -> None:
    sink, metrics = MemorySink(failures=10**9), Metrics()
    meter = Meter(sink, metrics, queue=5)
    await meter.start()
    for number in range(8):
        meter.record(record(number))
    assert counted(metrics, "tandem_usage_records_dropped_total") == 3
    assert counted(metrics, "tandem_usage_records_pending") == 5
    await meter.close(within=1)
    assert counted(metrics, "tandem_usage_records_dropped_total") == 8


async def test_text_that_cannot_be_written_does_not_stop_the_meter() -> None:
    sink = MemorySink()
    meter = Meter(sink, Metrics())
    await meter.start()
    meter.record(record(1, user="half \ud83d of an emoji"))
    meter.record(record(2))
    await meter.close()
    assert ids(sink.lines) == ["r1", "r2"]


async def test_a_meter_that_is_off_takes_records_and_keeps_none(tmp_path: Path) -> None:
    meter = make_meter(Metrics(), sink="off", folder=tmp_path, replica="g", fleet="f", store_url="embedded")
    await meter.start()
    meter.record(record(1))
    await meter.close()
    assert list(tmp_path.iterdir()) == []


async def test_with_embedded_state_auto_means_files(tmp_path: Path) -> None:
    meter = make_meter(Metrics(), sink="auto", folder=tmp_path, replica="g", fleet="f", store_url="embedded")
    await meter.start()
    meter.record(record(1))
    await meter.close()
    assert ids(written(tmp_path)) == ["r1"]


async def test_a_folder_that_cannot_be_used_is_said_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    meter = Meter(FileSink(Journal(tmp_path / "file", "g")), Metrics())
    with pytest.raises(SinkError, match=r"metering\.folder"):
        await meter.start()


async def test_a_full_disk_delays_records_and_loses_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meter = Meter(FileSink(Journal(tmp_path, "g")), Metrics(), linger_s=0)
    await meter.start()
    meter.record(record(1))
    while not ids(written(tmp_path)):
        await asyncio.sleep(0.01)
    half_written(monkeypatch)
    meter.record(record(2))
    while ids(written(tmp_path)) != ["r1", "r2"]:
        await asyncio.sleep(0.01)
    await meter.close()


# The journal


def test_a_segment_ends_at_its_size_and_with_its_day(
    journal: Callable[..., Journal], tmp_path: Path, clock: Clock
) -> None:
    one = journal(rotate_bytes=10)
    one.append(b'{"a":1234567}\n')
    one.append(b'{"a":2}\n')
    one.append(b'{"a":3}\n')
    clock.now += 86400
    one.append(b'{"a":4}\n')
    assert [segment.base for segment in files.segments(tmp_path)] == [0, 14, 30]
    assert b"".join(written(tmp_path)) == b'{"a":1234567}\n{"a":2}\n{"a":3}\n{"a":4}\n'


def test_names_of_segments_sort_by_time_whoever_wrote_them(
    journal: Callable[..., Journal], tmp_path: Path, clock: Clock
) -> None:
    late, early = journal("a"), journal("z")
    early.append(b"1\n")
    clock.now += 1
    late.append(b"2\n")
    assert written(tmp_path) == [b"1\n", b"2\n"]


def test_what_was_half_written_is_taken_back(
    journal: Callable[..., Journal], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = journal()
    one.append(b"first\n")
    half_written(monkeypatch, 0.8)
    with pytest.raises(OSError, match="could be written"):
        one.append(b"second\nthird\n")
    assert written(tmp_path) == [b"first\n"]
    one.append(b"second\nthird\n")
    assert written(tmp_path) == [b"first\n", b"second\n", b"third\n"]


def test_what_cannot_be_taken_back_is_stepped_over(
    journal: Callable[..., Journal], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    one = journal()
    one.append(b"first\n")
    half_written(monkeypatch, 0.8)
    with monkeypatch.context() as broken:
        broken.setattr(os, "ftruncate", _broken_disk)
        with pytest.raises(OSError, match="could be written"):
            one.append(b"second\nthird\n")
    clock.now += 1
    one.append(b"other\nlines\n")
    assert len(files.segments(tmp_path)) == 2
    lines, end = files.read_from(tmp_path, "gateway-1", 0)
    rest, _ = files.read_from(tmp_path, "gateway-1", end)
    assert lines + rest == [b"first", b"other", b"lines"]


def test_a_torn_file_is_never_gone_on_with(
    journal: Callable[..., Journal], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    one = journal()
    half_written(monkeypatch)
    with monkeypatch.context() as broken:
        broken.setattr(os, "ftruncate", _broken_disk)
        with pytest.raises(OSError, match="could be written"):
            one.append(b"first\n")
    # A second has not passed, so the next file would have the same name.
    with pytest.raises(FileExistsError):
        one.append(b"first\n")
    clock.now += 1
    one.append(b"first\n")
    assert written(tmp_path) == [b"first\n"]


def _broken_disk(*_: object) -> None:
    raise OSError(errno.EIO, "broken")


def test_a_line_torn_by_a_crash_is_cut_off_at_the_next_start(journal: Callable[..., Journal], tmp_path: Path) -> None:
    torn = tmp_path / "usage-20261123T000000Z-dead-0000000000000000.jsonl"
    torn.write_bytes(b'{"whole":1}\n{"to')
    all_torn = tmp_path / "usage-20261123T000001Z-dead-0000000000000012.jsonl"
    all_torn.write_bytes(b'{"to')
    journal()
    assert (torn.read_bytes(), all_torn.read_bytes()) == (b'{"whole":1}\n', b"")


def test_the_file_of_a_living_gateway_is_never_cut(journal: Callable[..., Journal], tmp_path: Path) -> None:
    living = journal("living")
    living.append(b"whole\n")
    [segment] = files.segments(tmp_path)
    with segment.path.open("ab") as file:
        file.write(b"half")  # as if its write were under way
    journal("second")
    assert segment.path.read_bytes() == b"whole\nhalf"


def test_segments_beyond_their_retention_are_removed(
    journal: Callable[..., Journal], tmp_path: Path, clock: Clock
) -> None:
    for age, name in ((3, "old"), (1, "new")):
        path = tmp_path / f"usage-2026112{age}T000000Z-{name}-0000000000000000.jsonl"
        path.write_bytes(b"x\n")
        os.utime(path, (clock.now - age * 86400, clock.now - age * 86400))
    journal(retention_days=2).append(b"y\n")
    assert {segment.writer for segment in files.segments(tmp_path)} == {"new", "gateway-1"}


def test_lines_reach_the_disk_within_the_promised_time(
    journal: Callable[..., Journal], monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    one = journal(fsync_s=5)
    one.append(b"1\n")
    one.append(b"2\n")
    assert synced == []
    clock.now += 5
    one.sync_if_due()
    assert len(synced) == 1
    one.sync_if_due()
    assert len(synced) == 1


def test_a_sync_that_fails_does_not_make_the_lines_be_written_twice(
    journal: Callable[..., Journal], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    one = journal(fsync_s=0)
    monkeypatch.setattr(os, "fdatasync", _broken_disk)
    one.append(b"1\n")
    assert written(tmp_path) == [b"1\n"]


@pytest.mark.parametrize("limit", [1, 5, 7, 1000])
def test_reading_on_from_a_position_gives_every_line_once(
    journal: Callable[..., Journal], tmp_path: Path, limit: int
) -> None:
    one = journal(rotate_bytes=20)
    lines = [str(number) * (1 + number % 9) for number in range(30)]
    for line in lines:
        one.append(line.encode() + b"\n")
    found: list[bytes] = []
    position = 0
    while True:
        more, position = files.read_from(tmp_path, "gateway-1", position, limit=limit)
        if not more:
            break
        found += more
    assert [line.decode() for line in found] == lines
    assert position == one.position


def test_only_what_is_delivered_whole_is_removed(journal: Callable[..., Journal], tmp_path: Path) -> None:
    one = journal(rotate_bytes=4)
    for line in (b"one\n", b"two\n", b"six\n"):
        one.append(line)
    files.remove(tmp_path, "gateway-1", 7)
    assert [segment.base for segment in files.segments(tmp_path)] == [4, 8]
    files.remove(tmp_path, "gateway-1", 12)
    assert [segment.base for segment in files.segments(tmp_path)] == [8]
