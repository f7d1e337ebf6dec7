"""Finds the running fleet, for every command that speaks to one.

That is a fleet of this machine, unless the environment names the control service of one elsewhere: `TANDEM_CONTROL`,
host:port. In the pod of a head, which has `TANDEM_CONFIG`, it is that head's own.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import msgspec
import typer
from rich.markup import escape

from tandem.bench.client import RequestFailed
from tandem.cli.console import make_console
from tandem.cli.https import AccessError
from tandem.core.types import FleetSnapshot
from tandem.fleet.control_client import ControlClient, ControlError
from tandem.fleet.run_folder import HostRecord, RunFolder
from tandem.fleet.snapshot import read_snapshot
from tandem.state import StoreError, open_store

Result = TypeVar("Result")

DEFAULT_FLEET = "laptop"
FleetName = Annotated[
    str,
    typer.Option(
        "--fleet", help="Name of a fleet on this machine. TANDEM_CONTROL (host:port) names one elsewhere instead."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="For machines.")]

errors = make_console(stderr=True)


class NotRunning(Exception):
    """There is no such fleet here, or not where the environment says."""


class _Control(msgspec.Struct):
    port: int = 9000


class _Config(msgspec.Struct):
    """What is needed here of a head's fleet.json."""

    control: _Control = msgspec.field(default_factory=_Control)


def fail(message: str) -> NoReturn:
    """Say what was wrong, and end with code 1."""
    errors.print(f"[red]tandem:[/] {escape(message)}", highlight=False, soft_wrap=True)
    raise typer.Exit(1)


def run(work: Coroutine[Any, Any, Result]) -> Result:
    """Run a command's work; what a user can do something about ends as one sentence."""
    try:
        return asyncio.run(work)
    except (NotRunning, ControlError, StoreError, RequestFailed, AccessError) as error:
        fail(str(error))


def elsewhere() -> str:
    """Address of the control service that the environment names; "" = the fleet is one of this machine. Raises
    `NotRunning`."""
    if address := os.environ.get("TANDEM_CONTROL", ""):
        if not re.fullmatch(r"\S+:\d{1,5}", address):
            raise NotRunning(f"TANDEM_CONTROL is {address!r}: write host:port, such as r1-head:9000, or unset it")
        return address
    if not (file := os.environ.get("TANDEM_CONFIG", "")):
        return ""
    try:
        config = msgspec.json.decode(Path(file).read_bytes(), type=_Config)
    except (OSError, msgspec.MsgspecError) as error:
        raise NotRunning(f"TANDEM_CONFIG names {file}, which cannot be read ({error}): mend or unset it") from error
    return f"127.0.0.1:{config.control.port}"


def find(fleet: str) -> tuple[RunFolder, HostRecord]:
    """The run folder and the living host of `fleet`. Raises `NotRunning`."""
    if address := elsewhere():
        raise NotRunning(
            f"this needs a fleet of this machine, and the environment names one at {address}: unset TANDEM_CONTROL and "
            "TANDEM_CONFIG. (The size of a pool in Kubernetes is set by `kubectl scale epp`.)"
        )
    folder = RunFolder(fleet)
    record = folder.record()
    if record is None or not record.alive:
        raise NotRunning(f"no fleet named {fleet} runs on this machine: start it with `tandem up`")
    return folder, record


async def snapshot_from_store(fleet: str) -> tuple[FleetSnapshot, str]:
    """The fleet as the store has it, and the address of its control service ("" while there is none).

    One that is elsewhere tells itself how it is. Raises `NotRunning`, `ControlError`, `StoreError`.
    """
    if address := elsewhere():
        async with ControlClient(address) as client:
            snapshot = await client.fleet()
        if fleet not in (DEFAULT_FLEET, snapshot.name):
            raise NotRunning(f"the fleet at {address} is {snapshot.name}, not {fleet}: leave --fleet out, or go there")
        return snapshot, address
    folder, record = find(fleet)
    store = await open_store(record.store, fleet=fleet, folder=folder.store)
    try:
        entry = await store.get("control")
        address = msgspec.json.decode(entry.value)["address"] if entry else ""
        return await read_snapshot(store), address
    finally:
        await store.close()


async def with_control(fleet: str, ask: Callable[[ControlClient], Awaitable[Result]]) -> Result:
    """Ask the fleet's control service. Raises `NotRunning`, `ControlError`."""
    _, address = await snapshot_from_store(fleet)
    if not address:
        raise NotRunning(f"fleet {fleet} is still starting: its control service does not listen yet")
    async with ControlClient(address) as client:
        return await ask(client)
