"""Finds the running fleet, for every command that speaks to one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
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

FleetName = Annotated[str, typer.Option("--fleet", help="Name of the fleet (`name` in fleet.yaml).")]
AsJson = Annotated[bool, typer.Option("--json", help="For machines.")]

errors = make_console(stderr=True)


class NotRunning(Exception):
    """There is no such fleet on this machine."""


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


def find(fleet: str) -> tuple[RunFolder, HostRecord]:
    """The run folder and the living host of `fleet`. Raises `NotRunning`."""
    folder = RunFolder(fleet)
    record = folder.record()
    if record is None or not record.alive:
        raise NotRunning(f"no fleet named {fleet} runs on this machine: start it with `tandem up`")
    return folder, record


async def snapshot_from_store(fleet: str) -> tuple[FleetSnapshot, str]:
    """The fleet as the store has it, and the address of its control service ("" while there is none)."""
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
