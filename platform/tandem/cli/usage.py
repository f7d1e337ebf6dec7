"""`tandem usage`: what was used, by whom, and what it costs."""

from __future__ import annotations

import asyncio
import csv
import os
import re
import sqlite3
import sys
import time
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from tandem.cli.console import make_console
from tandem.cli.running import DEFAULT_FLEET, AsJson, FleetName, errors, fail
from tandem.core.usage import (
    R1_PRICE,
    Aggregation,
    By,
    GpuCost,
    Price,
    PriceError,
    Prices,
    Totals,
    UsageRecord,
    gpu_cost,
    price,
)
from tandem.fleet.run_folder import RunFolder
from tandem.gateway.usage import journal as files
from tandem.gateway.usage.stream import UsageStream, UsageStreamError

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_SKEW_S = 300.0
"""How far the clocks of gateways and Redis may be apart."""

_COLUMNS = ("requests", "failed", "prompt_tokens", "cached_tokens", "completion_tokens", "reasoning_tokens")


class _PriceText(msgspec.Struct):
    hit: Decimal
    miss: Decimal
    output: Decimal


class _Metering(msgspec.Struct):
    sink: str = "auto"
    folder: str | None = None
    default_price: _PriceText | None = None
    prices: dict[str, _PriceText] = {}
    gpu_hour_price: Decimal | None = None


class _State(msgspec.Struct):
    url: str = "embedded"


class _Pool(msgspec.Struct):
    groups: int = 1
    nodes: int = 2
    gpus_per_node: int = 1


class _Config(msgspec.Struct):
    """What this command needs of the configuration that the fleet last ran with (`config.json`), or in the pod of a
    head of that which it has (`TANDEM_CONFIG`)."""

    name: str = "laptop"
    metering: _Metering = msgspec.field(default_factory=_Metering)
    state: _State = msgspec.field(default_factory=_State)
    prefill: _Pool = msgspec.field(default_factory=_Pool)
    decode: _Pool = msgspec.field(default_factory=_Pool)


class UsageError(Exception):
    """The question cannot be answered; the message says why and what to do."""


class IdsOnDisk:
    """Remembers ids in a temporary SQLite file that goes with the process, and a few MB of memory."""

    def __init__(self) -> None:
        # The empty name is a private file, used only for what does not fit into the cache.
        self._database = sqlite3.connect("", isolation_level=None)
        for pragma in ("journal_mode = OFF", "synchronous = OFF", "cache_size = -32768"):
            self._database.execute(f"PRAGMA {pragma}")
        self._database.execute("CREATE TABLE seen (id TEXT PRIMARY KEY) WITHOUT ROWID")
        self._database.execute("BEGIN")

    def first(self, identity: str) -> bool:
        """Whether it is seen for the first time."""
        return self._database.execute("INSERT OR IGNORE INTO seen VALUES (?)", (identity,)).rowcount == 1


class _Source(msgspec.Struct):
    """Where the records are: files, or a stream with the spool of this node before it."""

    folders: list[Path]
    redis: str = ""
    fleet: str = ""


def usage(
    by: Annotated[list[By] | None, typer.Option("--by", help="Group by this; may be given several times.")] = None,
    since: Annotated[
        str | None, typer.Option(help="From then on: 90s, 30m, 6h, 1d, 2w ago, or a date or time as in ISO 8601 (UTC).")
    ] = None,
    until: Annotated[str | None, typer.Option(help="Before then; written like --since.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Only this tenant.")] = None,
    gpu_hours: Annotated[
        bool,
        typer.Option(
            "--gpu-hours",
            help="Also what the GPUs cost: --gpus × the time from --since to --until (without them: from the first to "
            "the last record) × --gpu-price, and that per million tokens. Idle GPUs cost as much as busy ones.",
        ),
    ] = False,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="Number of GPUs; default: all of both pools in the fleet's configuration.")
    ] = None,
    gpu_price: Annotated[
        str | None, typer.Option(help="Dollars for a GPU-hour; default: metering.gpu_hour_price of the configuration.")
    ] = None,
    model_price: Annotated[
        list[str] | None,
        typer.Option(
            "--price",
            metavar="[MODEL=]HIT/MISS/OUTPUT",
            help="Dollars per million tokens of the prompt in the cache, of the rest of it, of the answer. Default: "
            "the configuration's, else DeepSeek-R1's 0.14/0.55/2.19.",
        ),
    ] = None,
    folder: Annotated[Path | None, typer.Option(help="Read the files in this folder instead of the fleet's.")] = None,
    redis: Annotated[str | None, typer.Option(help="Read the stream of --fleet in this Redis (URL).")] = None,
    as_json: AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="One line a group, for spreadsheets.")] = False,
    fleet: FleetName = "laptop",
) -> None:
    """Show what was used and what it costs: requests, tokens, money. Each request counts once."""
    now = time.time()
    try:
        config = _config(fleet)
        if os.environ.get("TANDEM_CONFIG") and config is not None:
            fleet = config.name
        wanted = by or []
        start, end = _moment(since, now), _moment(until, now)
        table = _prices(config, model_price or [])
        source = _source(config, fleet, folder, redis)
        found = Aggregation(wanted, prices=table, since=start, until=end, tenant=tenant, first=IdsOnDisk().first)
        unreadable = asyncio.run(_fill(found, source, start))
        cost = _gpu_cost(config, found, start, end, now, gpus, gpu_price) if gpu_hours else None
    except (UsageError, UsageStreamError, PriceError, OSError) as error:
        fail(str(error))
    if unreadable:
        errors.print(f"[yellow]tandem:[/] {unreadable} lines are no usage records and were left out")
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(_as_json(wanted, found, cost))).decode())
    elif as_csv:
        _print_csv(wanted, found)
    else:
        _print_table(wanted, found, cost)


# Reading


async def _fill(found: Aggregation, source: _Source, since: float | None) -> int:
    """Read all records, one at a time; return how many lines could not be read."""
    decoder = msgspec.json.Decoder(UsageRecord)
    unreadable = 0
    async for line in _lines(source, since):
        try:
            record = decoder.decode(line)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            unreadable += 1
            continue
        found.add(record)
    return unreadable


async def _lines(source: _Source, since: float | None) -> AsyncIterator[bytes]:
    # The spool before the stream: what is delivered in between is read twice, and counts once.
    for folder in source.folders:
        for segment in files.segments(folder):
            try:
                if since is not None and segment.path.stat().st_mtime < since - _SKEW_S:
                    continue
                for line in files.read_lines(segment.path):
                    yield line
            except FileNotFoundError:
                continue  # its retention is over, or it was delivered
    if source.redis:
        stream = UsageStream(source.redis, fleet=source.fleet)
        try:
            async for line in stream.read(None if since is None else since - _SKEW_S):
                yield line
        finally:
            await stream.close()


def _source(config: _Config | None, fleet: str, folder: Path | None, redis: str | None) -> _Source:
    if folder is not None:
        if not folder.is_dir():
            raise UsageError(f"there is no folder {folder}")
        return _Source(folders=[folder])
    if redis is not None:
        return _Source(folders=[], redis=redis, fleet=fleet)
    if config is None:
        raise UsageError(
            f"no fleet named {fleet} ever ran here: name another, or where to read with --folder or --redis"
        )
    run = RunFolder(fleet)
    record = run.record()
    store = record.store if record is not None else config.state.url
    own = Path(config.metering.folder) if config.metering.folder else run.path / "usage"
    match config.metering.sink:
        case "off":
            raise UsageError(f"metering.sink of fleet {fleet} is off: nothing was recorded")
        case "file":
            return _Source(folders=[own])
        case "auto" if not store.startswith(("redis://", "rediss://", "unix://")):
            return _Source(folders=[own])
    return _Source(folders=[own / "spool"], redis=store, fleet=fleet)


def _config(fleet: str) -> _Config | None:
    pods = os.environ.get("TANDEM_CONFIG", "")
    path = Path(pods) if pods else RunFolder(fleet).path / "config.json"
    try:
        config = msgspec.json.decode(path.read_bytes(), type=_Config)
    except FileNotFoundError:
        return None
    except msgspec.MsgspecError as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    if pods:
        if fleet not in (DEFAULT_FLEET, config.name):
            raise UsageError(
                f"{path} is of fleet {config.name}, not {fleet}: leave --fleet out, or unset TANDEM_CONFIG"
            )
        if url := os.environ.get("TANDEM_STATE_URL"):
            config.state.url = url
    return config


# What the options mean


def _moment(text: str | None, now: float) -> float | None:
    """Unix seconds of `1d` (ago) or an ISO date or time, in UTC unless it says otherwise."""
    if text is None:
        return None
    if ago := re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text):
        return now - float(ago[1]) * _UNITS[ago[2]]
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(
            f"{text!r} is no time: write 30m, 6h, 1d, 2w (ago), or 2026-11-24 or 2026-11-24T06:30"
        ) from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _prices(config: _Config | None, options: Sequence[str]) -> Prices:
    metering = config.metering if config is not None else _Metering()
    default = R1_PRICE if metering.default_price is None else _exact(metering.default_price)
    models = {model: _exact(given) for model, given in metering.prices.items()}
    for option in options:
        model, _, text = option.rpartition("=")
        parts = text.split("/")
        if len(parts) != 3:
            raise UsageError(f"--price {option}: write HIT/MISS/OUTPUT, like 0.14/0.55/2.19")
        if model:
            models[model] = price(*parts)
        else:
            default = price(*parts)
    return Prices(models=models, default=default)


def _exact(given: _PriceText) -> Price:
    return price(given.hit, given.miss, given.output)


def _gpu_cost(
    config: _Config | None,
    found: Aggregation,
    since: float | None,
    until: float | None,
    now: float,
    gpus: int | None,
    hour_price: str | None,
) -> GpuCost:
    if gpus is None:
        if config is None:
            raise UsageError("say with --gpus how many GPUs there are")
        gpus = sum(pool.groups * pool.nodes * pool.gpus_per_node for pool in (config.prefill, config.decode))
        if not gpus:  # in Kubernetes the operator knows how many groups there are
            raise UsageError("say with --gpus how many GPUs there are: the configuration has no groups")
    dollars = hour_price if hour_price is not None else (config.metering.gpu_hour_price if config is not None else None)
    if dollars is None:
        raise UsageError("say with --gpu-price, or metering.gpu_hour_price in fleet.yaml, what a GPU-hour costs")
    start = since if since is not None else found.from_at
    end = min(until, now) if until is not None else (now if since is not None else found.to_at)
    seconds = 0.0 if start is None or end is None else max(0.0, end - start)
    return gpu_cost(found.total(), gpus=gpus, seconds=seconds, hour_price=dollars)


# Showing


def _numbers(totals: Totals) -> dict[str, int]:
    return {name: getattr(totals, name) for name in _COLUMNS}


def _as_json(by: Sequence[By], found: Aggregation, cost: GpuCost | None) -> dict[str, Any]:
    """Money is text: it is exact."""
    shown: dict[str, Any] = {
        "from": found.from_at,
        "to": found.to_at,
        "by": list(by),
        "groups": [
            {**dict(zip(by, labels, strict=True)), **_numbers(totals), "dollars": f"{totals.money:f}"}
            for labels, totals in found.rows()
        ],
        "total": {**_numbers(found.total()), "dollars": f"{found.total().money:f}"},
        "duplicates": found.duplicates,
    }
    if cost is not None:
        shown["gpu"] = {
            name: None if (value := getattr(cost, name)) is None else f"{value:f}" for name in cost.__struct_fields__
        }
    return shown


def _print_csv(by: Sequence[By], found: Aggregation) -> None:
    out = csv.writer(sys.stdout, lineterminator="\n")
    out.writerow([*by, *_COLUMNS, "dollars"])
    for labels, totals in found.rows():
        out.writerow([*map(_cell, labels), *_numbers(totals).values(), f"{totals.money:f}"])


def _cell(label: str) -> str:
    """A label as a spreadsheet shows it: never as a formula, whatever a client sent as its user."""
    return "'" + label if label.startswith(("=", "+", "-", "@", "\t", "\r")) else label


def _print_table(by: Sequence[By], found: Aggregation, cost: GpuCost | None) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_footer=bool(by))
    total = found.total()
    for place, label in enumerate(by):
        table.add_column(label, footer="" if place else "total")
    for heading, value in zip(
        ("requests", "failed", "tokens in", "cached", "out", "reasoning", "money"), _shown(total), strict=True
    ):
        table.add_column(heading, justify="right", no_wrap=True, footer=value)
    for labels, totals in found.rows() if by else [((), total)]:
        table.add_row(*(escape(label) or "–" for label in labels), *_shown(totals))
    console = make_console()
    console.print(table)
    if cost is not None:
        each = "no tokens" if cost.per_million_tokens is None else f"${cost.per_million_tokens:,.2f} per million tokens"
        out = cost.per_million_completion_tokens
        console.print(
            f"GPUs: {cost.hours:,.2f} hours, ${cost.money:,.2f}; {each}"
            + ("" if out is None else f" (${out:,.2f} out)")
        )


def _shown(totals: Totals) -> list[str]:
    return [*(f"{value:,}" for value in _numbers(totals).values()), f"${totals.money:,.4f}"]
