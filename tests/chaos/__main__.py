"""`python -m chaos --faults 300 --seed 1`: all scenarios, one after the other, each on a fleet of its own."""

from __future__ import annotations

import asyncio
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console

from chaos.measure import Report, table
from chaos.play import play
from chaos.scenarios import SCENARIOS, Scenario, by_name, left_out
from chaos.stage import home


def main(
    faults: Annotated[
        int, typer.Option(help="In all, over all scenarios by their shares. Drains and scale-downs come on top.")
    ] = 300,
    seed: Annotated[int, typer.Option(help="Of the order of the faults, and of what they hit.")] = 1,
    scenario: Annotated[list[str] | None, typer.Option(help="Only these; all faults are theirs.")] = None,
    kind: Annotated[str, typer.Option(help="Only faults whose kind has this in it.")] = "",
    minutes: Annotated[float | None, typer.Option(help="After so many, no further fault begins.")] = None,
    json: Annotated[Path | None, typer.Option(help="Where the reports go.")] = None,
    keep: Annotated[Path | None, typer.Option(help="Where logs and usage records go.")] = None,
) -> None:
    """Kill, stop and cut off parts of real fleets under traffic, and check that nothing is lost, doubled or altered."""
    console = Console()
    chosen = [
        msgspec.structs.replace(one, faults=few, aims=() if kind else one.aims)
        for one in ([by_name(name) for name in scenario] if scenario else SCENARIOS)
        if (few := tuple(fault for fault in one.faults if kind in fault.kind))
    ]
    if not chosen:
        raise typer.BadParameter(f"there is no fault whose kind has {kind!r} in it", param_hint="--kind")
    for line in left_out():
        console.print(f"[yellow]left out:[/] {line}", highlight=False)
    cache = Path(tempfile.gettempdir())
    reports: list[Report] = []
    until = None if minutes is None else time.monotonic() + 60 * minutes
    for one, count in _counts(chosen, faults):
        with home() as folder, console.status(one.name) as status:

            def show(line: str) -> None:
                status.update(line)
                console.log(line)

            report = asyncio.run(play(one, count, seed, home=folder, cache=cache, keep=keep, show=show, until=until))
        reports.append(report)
        console.print(table(report))
        for line in report.wrong:
            console.print(f"[red]✗[/] {line}", highlight=False)
        if json is not None:
            json.write_bytes(msgspec.json.format(msgspec.json.encode(reports)))
    sys.exit(1 if any(report.wrong for report in reports) else 0)


_ROUNDING = 1e-9
"""A share of all is all, whatever the division says."""


def _counts(chosen: list[Scenario], faults: int) -> list[tuple[Scenario, int]]:
    """How many faults each scenario gets, at least one: together no fewer than wanted. Where nothing does harm, its
    share comes on top of theirs, if there are any."""
    shares = {scenario.name: scenario.share or 1.0 for scenario in chosen}
    whole = sum(shares[scenario.name] for scenario in chosen if scenario.harms)
    on_top = 1.0 if whole else sum(shares.values())
    return [
        (
            scenario,
            max(1, math.ceil(faults * shares[scenario.name] / (whole if scenario.harms else on_top) - _ROUNDING)),
        )
        for scenario in chosen
    ]


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    app()
