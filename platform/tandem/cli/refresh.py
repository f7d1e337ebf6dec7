"""`tandem refresh`: give the fleet other weights while it goes on serving."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from tandem.cli.console import make_console
from tandem.cli.running import FleetName, fail, run, with_control
from tandem.core.refresh import OVER, Refresh, RefreshPhase
from tandem.fleet.control_client import ControlClient, ControlError
from tandem.fleet.refresh_ask import RefreshAsk

_LOOK_S = 0.5
_AWAY_S = 60.0
"""So long the control service may be away: the controller may be killed, and the refresh goes on after it."""


def refresh(
    model: Annotated[
        Path | None, typer.Argument(metavar="MODEL_DIR", help="The new checkpoint, on every node.")
    ] = None,
    version: Annotated[str, typer.Option(help="Its version, which answers will carry.")] = "",
    canary: Annotated[str, typer.Option(help="Prompt that each group must answer before it serves again.")] = "",
    expect: Annotated[str, typer.Option(help="What the greedy answer to it must begin with.")] = "",
    rollback: Annotated[bool, typer.Option(help="After a failure, go back to the old weights.")] = True,
    allow_pause: Annotated[
        bool, typer.Option("--allow-pause", help="Also where a role has one group, so that service pauses.")
    ] = False,
    drain: Annotated[float | None, typer.Option(help="Seconds that a group may take to be empty.")] = None,
    wait: Annotated[bool, typer.Option(help="Return only when it is over.")] = True,
    stop: Annotated[
        bool,
        typer.Option(
            "--stop", help="End the refresh that goes on, as if it had failed; said again, also the way back."
        ),
    ] = False,
    fleet: FleetName = "laptop",
) -> None:
    """Give the fleet other weights, one group at a time, without a pause. Without MODEL_DIR: tell how far it is."""
    console = make_console()
    if stop:
        run(with_control(fleet, lambda client: client.stop_refresh()))
    elif model is None:
        console.print(escape(sentence(run(with_control(fleet, lambda client: client.refresh_state())))))
        return
    else:
        if not version:
            fail("--version is missing: it names the new weights, and must be another one than the fleet has")
        ask = RefreshAsk(
            path=str(model.resolve()),
            version=version,
            canary=canary,
            expect=expect,
            rollback=rollback,
            allow_pause=allow_pause,
            drain_s=drain,
        )
        run(with_control(fleet, lambda client: client.refresh(ask)))
    if not wait:
        console.print(f"the refresh {'is told to stop' if stop else 'has begun'}; `tandem refresh` tells how far it is")
        return
    with console.status("refreshing …") as status:
        over = run(_follow(fleet, lambda now: status.update(escape(sentence(now)))))
    if over.phase is not RefreshPhase.DONE:
        fail(sentence(over))
    console.print(escape(sentence(over)))


def sentence(refresh: Refresh) -> str:
    """How far a refresh is."""
    match refresh.phase:
        case RefreshPhase.RUNNING:
            return f"taking version {refresh.version}: {refresh.note or 'has just begun'}"
        case RefreshPhase.ROLLING_BACK:
            return f"going back to version {refresh.old_version}, since {refresh.failure}: {refresh.note}"
        case RefreshPhase.DONE:
            seconds = refresh.ended - refresh.began
            return f"every group has version {refresh.version} from {refresh.path} ({seconds:.0f} s)"
        case RefreshPhase.ROLLED_BACK:
            return f"every group has version {refresh.old_version} again, since {refresh.failure}"
        case RefreshPhase.FAILED:
            return f"the refresh to version {refresh.version} failed, groups may differ: {refresh.failure}"


async def _follow(fleet: str, tell: Callable[[Refresh], None]) -> Refresh:
    """Wait for the end, also over a restart of the controller. Raises ControlError."""
    loop = asyncio.get_running_loop()
    heard = loop.time()
    while True:
        try:
            now = await with_control(fleet, _state)
            heard = loop.time()
        except ControlError as error:
            if error.code not in ("UNAVAILABLE", "DEADLINE_EXCEEDED") or loop.time() - heard > _AWAY_S:
                raise
        else:
            tell(now)
            if now.phase in OVER:
                return now
        await asyncio.sleep(_LOOK_S)


async def _state(client: ControlClient) -> Refresh:
    return await client.refresh_state()
