"""`tandem keys`: make, list and revoke the API keys of tenants."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich import box
from rich.table import Table
from rich.text import Text

from tandem.cli.console import make_console
from tandem.cli.running import AsJson, FleetName, fail, find, run
from tandem.cli.up import read_config
from tandem.config import FleetConfig
from tandem.fleet.host_steps import HostError
from tandem.fleet.node_config import with_secrets
from tandem.fleet.run_folder import RunFolder
from tandem.gateway.access.keys import KEY_ID, KEY_PATTERN, PREFIX, KeyRecord, keep, mint, read_keys, revoke
from tandem.state import Store, open_store

app = typer.Typer(name="keys", help="Make, list and revoke the API keys of tenants.", no_args_is_help=True)

File = Annotated[
    Path | None,
    typer.Option(
        "-f",
        "--file",
        envvar="TANDEM_CONFIG",
        help="The fleet's configuration, for one that does not run on this machine. TANDEM_STATE_URL and "
        "TANDEM_TENANTS (a file) count with it, as for `tandem node head`: its pod has all three.",
    ),
]

_UNITS = {"m": 60.0, "h": 3600.0, "d": 86400.0, "w": 7 * 86400.0, "y": 365 * 86400.0}
_LONGEST_S = 10 * _UNITS["y"]
_COMMENT_LIMIT = 200
_STYLES = {"valid": "green", "expired": "yellow", "revoked": "red"}


@app.command()
def create(
    tenant: Annotated[str, typer.Option(help="Whose key it is: a name under `tenants` in fleet.yaml.")],
    expires: Annotated[str | None, typer.Option(help="Its life, such as 12h, 30d or 1y; none = until revoked.")] = None,
    comment: Annotated[str, typer.Option(help="What it is for; `tandem keys list` shows it.")] = "",
    as_json: AsJson = False,
    file: File = None,
    fleet: FleetName = "laptop",
) -> None:
    """Make a key, and print it: this once, for only its hash is kept."""
    lives_s = None if expires is None else _seconds(expires)
    if len(comment) > _COMMENT_LIMIT:
        fail(f"--comment has {len(comment)} characters; at most {_COMMENT_LIMIT} are kept")
    record, key, asked_for = run(_create(fleet, file, tenant, lives_s, comment))
    if as_json:
        _print_json({**_shown(record, time.time()), "key": key})
        return
    # Only the key goes to stdout, so that $(tandem keys create …) is the key.
    notes = make_console(stderr=True)
    until = "until it is revoked" if record.expires is None else f"until {_date(record.expires)}"
    notes.print(f"key {record.id} of tenant {tenant}, good {until}; it is shown this once:", highlight=False)
    print(key)
    if not asked_for:
        notes.print("(this fleet also serves who shows no key: gateway.auth)", style="dim")


@app.command(name="list")
def list_keys(as_json: AsJson = False, file: File = None, fleet: FleetName = "laptop") -> None:
    """Show the keys there are: whose, how old, whether they are still good. The keys themselves nobody can show."""
    records, now = run(_list(fleet, file)), time.time()
    if as_json:
        _print_json([_shown(record, now) for record in records])
    elif records:
        make_console().print(_table(records, now))
    else:
        make_console().print("no keys yet: `tandem keys create --tenant NAME` makes one")


@app.command(name="revoke")
def revoke_key(
    key: Annotated[str, typer.Argument(metavar="ID", help="As `tandem keys list` shows it.")],
    file: File = None,
    fleet: FleetName = "laptop",
) -> None:
    """End a key: every gateway replica refuses it from now on. Requests that run end as they would."""
    name = _id(key)
    record = run(_revoke(fleet, file, name))
    if record is None:
        fail(f"there is no key {name}; `tandem keys list` shows those there are")
    make_console().print(f"key {record.id} of tenant {record.tenant} is revoked", highlight=False)


async def _create(
    fleet: str, file: Path | None, tenant: str, lives_s: float | None, comment: str
) -> tuple[KeyRecord, str, bool]:
    """The record, the key, and whether the fleet asks for keys."""
    async with _opened(fleet, file) as (store, config):
        _check_tenant(tenant, config)
        while True:
            record, key = mint(tenant, now=time.time(), lives_s=lives_s, comment=comment)
            if await keep(store, record):
                return record, key, config.gateway.auth_required


async def _list(fleet: str, file: Path | None) -> list[KeyRecord]:
    async with _opened(fleet, file) as (store, _):
        return await read_keys(store)


async def _revoke(fleet: str, file: Path | None, name: str) -> KeyRecord | None:
    async with _opened(fleet, file) as (store, _):
        return await revoke(store, name, now=time.time())


@contextlib.asynccontextmanager
async def _opened(fleet: str, file: Path | None) -> AsyncIterator[tuple[Store, FleetConfig]]:
    """The fleet's store and configuration. Raises NotRunning, StoreError."""
    config = None if file is None else _of_file(file)
    if config is None or config.state.url == "embedded":
        # The file of an embedded store is this machine's, and its fleet runs here.
        folder, record = find(config.name if config else fleet)
        config, url = config or folder.config(), record.store
    else:
        url = config.state.url
    store = await open_store(url, fleet=config.name, folder=RunFolder(config.name).store)
    try:
        yield store, config
    finally:
        await store.close()


def _of_file(file: Path) -> FleetConfig:
    """The configuration as the head has it: the URL of the store, and tenants, may be in Secrets."""
    tenants = os.environ.get("TANDEM_TENANTS")
    try:
        return with_secrets(
            read_config(file),
            tenants=Path(tenants) if tenants else None,
            state_url=os.environ.get("TANDEM_STATE_URL", ""),
        )
    except HostError as error:
        fail(str(error))


def _check_tenant(tenant: str, config: FleetConfig) -> None:
    if tenant in config.tenants:
        return
    if not config.tenants:
        fail(f"fleet {config.name} has no tenants: name them in fleet.yaml, such as `tenants: {{{tenant}: {{}}}}`")
    fail(f"fleet {config.name} has no tenant {tenant!r}; its fleet.yaml has: {', '.join(sorted(config.tenants))}")


def _seconds(text: str) -> float:
    found = re.fullmatch(r"(\d{1,6})([mhdwy])", text.strip())
    seconds = int(found[1]) * _UNITS[found[2]] if found else 0.0
    if not 0 < seconds <= _LONGEST_S:
        fail(f"--expires {text}: give a number of m, h, d, w or y, such as 30d, and at most 10y")
    return seconds


def _id(key: str) -> str:
    """The id in what a user may give: the id, with or without the prefix, or the whole key."""
    if form := KEY_PATTERN.fullmatch(key.encode()):
        return form[1].decode()
    name = key.removeprefix(PREFIX)
    if not KEY_ID.fullmatch(name):
        fail("this is no id of a key: it has eight letters and digits, as `tandem keys list` shows it")
    return name


def _state(record: KeyRecord, now: float) -> str:
    if record.revoked is not None:
        return "revoked"
    return "expired" if record.expires is not None and record.expires <= now else "valid"


def _shown(record: KeyRecord, now: float) -> dict[str, Any]:
    """A record for machines, without its hash."""
    shown: dict[str, Any] = msgspec.to_builtins(record)
    del shown["hash"]
    return {**shown, "state": _state(record, now)}


def _table(records: list[KeyRecord], now: float) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("id", "tenant", "state", "created", "expires"):
        table.add_column(column, no_wrap=True)
    table.add_column("comment", overflow="fold")
    for record in records:
        state = _state(record, now)
        created = _date(record.created)
        expires = "never" if record.expires is None else _date(record.expires)
        cells = (record.id, record.tenant, Text(state, style=_STYLES[state]), created, expires, Text(record.comment))
        table.add_row(*cells)
    return table


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _print_json(value: Any) -> None:
    print(msgspec.json.format(msgspec.json.encode(value)).decode())
