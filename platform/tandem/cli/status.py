"""`tandem status`: the groups, their ranks and what they do."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any

import msgspec
import typer
from rich.live import Live

from tandem.cli.console import make_console
from tandem.cli.https import Access, Ca, Certificate, CertificateKey, GatewayClient, access_to
from tandem.cli.running import AsJson, FleetName, elsewhere, find, run, snapshot_from_store
from tandem.cli.tables import fleet_view
from tandem.core.types import DpLoad, FleetSnapshot
from tandem.engine.http1 import HttpFailure, Pool
from tandem.fleet.control_client import ControlClient, ControlError
from tandem.fleet.counters import Counters, read_counters
from tandem.fleet.run_folder import HostRecord, RunFolder

REFRESH_S = 1.0

Loads = dict[str, tuple[DpLoad, ...]]


def status(
    fleet: FleetName = "laptop",
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Stay and follow; Ctrl-C ends.")] = False,
    as_json: AsJson = False,
    ca: Ca = None,
    certificate: Certificate = None,
    certificate_key: CertificateKey = None,
) -> None:
    """Show the fleet: gateways, groups, ranks, load. The certificates are for --json, which asks the gateways."""
    if as_json:
        access = Access(ca=ca, certificate=certificate, certificate_key=certificate_key)
        print(msgspec.json.format(msgspec.json.encode(run(full_status(fleet, access)))).decode())
    elif watch:
        run(_watch(fleet))
    else:
        snapshot, loads = run(_read(fleet))
        make_console().print(fleet_view(snapshot, loads, time.time()))


async def full_status(fleet: str, access: Access | None = None) -> dict[str, Any]:
    """What `--json` prints: the snapshot, the load, and what every rank and gateway has counted ({} = not told)."""
    snapshot, loads = await _read(fleet)
    folder, record = (None, None) if elsewhere() else find(fleet)
    pool = Pool()
    gateways = GatewayClient(access_to(folder.config() if folder else None, access or Access()))
    asked: dict[str, Pool | GatewayClient] = {
        rank.metrics: pool for group in snapshot.groups for rank in group.ranks if rank.metrics
    }
    asked |= {f"{gateway.url}/metrics": gateways for gateway in snapshot.gateways}
    try:
        answers = await asyncio.gather(*(_counters(client, url) for url, client in asked.items()))
    finally:
        await pool.close()
    return {
        **msgspec.to_builtins(snapshot),
        "host": _host(folder, record) if folder and record else None,
        "loads": msgspec.to_builtins(loads),
        "counters": dict(zip(asked, answers, strict=True)),
    }


def _host(folder: RunFolder, record: HostRecord) -> dict[str, Any]:
    return {"pid": record.pid, "run": record.run, "logs": str(folder.logs), "scratch": record.scratch}


async def _counters(client: Pool | GatewayClient, url: str) -> Counters:
    try:
        status, body = await client.fetch("GET", url)
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
            return (await client.load()).groups
    except ControlError:  # the controller is being restarted; what the store says is still true
        return {}


async def _watch(fleet: str) -> None:
    with Live(console=make_console(), auto_refresh=False, screen=True) as live:
        while True:
            snapshot, loads = await _read(fleet)
            live.update(fleet_view(snapshot, loads, time.time()), refresh=True)
            await asyncio.sleep(REFRESH_S)
