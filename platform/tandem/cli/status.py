"""`tandem status`: the groups, their ranks and what they do."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any

import msgspec
import typer
from rich.live import Live

from tandem.cli.console import make_console
from tandem.cli.running import AsJson, FleetName, find, run, snapshot_from_store
from tandem.cli.tables import fleet_view
from tandem.core.types import DpLoad, FleetSnapshot
from tandem.engine.http1 import HttpFailure, Pool
from tandem.fleet.control_client import ControlClient, ControlError
from tandem.fleet.counters import Counters, read_counters

REFRESH_S = 1.0

Loads = dict[str, tuple[DpLoad, ...]]


def status(
    fleet: FleetName = "laptop",
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Stay and follow; Ctrl-C ends.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the fleet: groups, ranks, load."""
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(run(full_status(fleet)))).decode())
    elif watch:
        run(_watch(fleet))
    else:
        snapshot, loads = run(_read(fleet))
        make_console().print(fleet_view(snapshot, loads, time.time()))


async def full_status(fleet: str) -> dict[str, Any]:
    """What `--json` prints: the snapshot, the load, and what every rank and gateway has counted."""
    snapshot, loads = await _read(fleet)
    folder, record = find(fleet)
    pool = Pool()
    try:
        urls = [rank.metrics for group in snapshot.groups for rank in group.ranks if rank.metrics]
        urls += [f"{gateway.url}/metrics" for gateway in snapshot.gateways]
        answers = await asyncio.gather(*(_counters(pool, url) for url in urls))
    finally:
        await pool.close()
    return {
        **msgspec.to_builtins(snapshot),
        "host": {"pid": record.pid, "run": record.run, "logs": str(folder.logs), "scratch": record.scratch},
        "loads": msgspec.to_builtins(loads),
        "counters": dict(zip(urls, answers, strict=True)),
    }


async def _counters(pool: Pool, url: str) -> Counters:
    try:
        status, body = await pool.fetch("GET", url)
    except HttpFailure:
        return {}
    return read_counters(body.decode()) if status == 200 else {}


async def _read(fleet: str) -> tuple[FleetSnapshot, Loads]:
    snapshot, address = await snapshot_from_store(fleet)
    return snapshot, await _loads(address)


async def _loads(address: str) -> Loads:
    if not address:
        return {}
    try:
        async with ControlClient(address, deadline=5) as client:
            return {group: tuple(load) for group, load in (await client.load()).items()}
    except ControlError:  # the controller is being restarted; what the store says is still true
        return {}


async def _watch(fleet: str) -> None:
    with Live(console=make_console(), auto_refresh=False, screen=True) as live:
        while True:
            snapshot, loads = await _read(fleet)
            live.update(fleet_view(snapshot, loads, time.time()), refresh=True)
            await asyncio.sleep(REFRESH_S)
