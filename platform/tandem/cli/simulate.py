"""`tandem simulate`: the pure core under a simulated clock."""

from __future__ import annotations

import time
from typing import Annotated

import msgspec
import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tandem.cli.console import make_console
from tandem.cli.running import AsJson
from tandem.sim.chaos import Broken, Report, add, percentile, run_all, run_seed
from tandem.sim.ledger import Invariant, Violation
from tandem.sim.schedule import Schedule, draw
from tandem.sim.shrink import shrink
from tandem.sim.world import World

app = typer.Typer(name="simulate", help="Run the decisions of a fleet under a simulated clock.", no_args_is_help=True)


@app.callback()
def simulate() -> None:
    """Run the decisions of a fleet under a simulated clock."""


@app.command()
def chaos(
    seeds: Annotated[int, typer.Option(min=1, help="How many runs, each with faults of its own.")] = 1000,
    requests: Annotated[int, typer.Option(min=1, help="Of each run.")] = 1000,
    first_seed: Annotated[int, typer.Option(min=0)] = 0,
    jobs: Annotated[int, typer.Option(min=1, help="Processes.")] = 2,
    seed: Annotated[int | None, typer.Option(min=0, help="Only this run; if it fails, it is made small.")] = None,
    trace: Annotated[bool, typer.Option(help="With --seed: print all that happens.")] = False,
    as_json: AsJson = False,
) -> None:
    """Break simulated groups, connections and messages in every way, and see that no request suffers.

    Exit code 1 if one does. Nothing is started: the pair tables and routers are the real ones, the engines are not.
    """
    console = make_console(stderr=as_json)
    if seed is not None:
        report, small = _replay(seed, requests, console, trace=trace)
    else:
        report, small = _many(first_seed, seeds, requests, jobs, console), None
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(_as_json(report, small))).decode())
    else:
        console.print(_table(report))
        for broken in report.broken[:10]:
            console.print(f"[red]{broken.invariant}[/] {broken.message}", highlight=False)
            console.print(f"    tandem simulate chaos --seed {broken.seed} --requests {requests}", highlight=False)
    if report.broken:
        raise typer.Exit(1)


def _many(first: int, seeds: int, requests: int, jobs: int, console: Console) -> Report:
    report = Report()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[speed]}"),
    )
    began = time.monotonic()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("seeds", total=seeds, speed="")
        for done in run_all(first, seeds, requests, jobs):
            add(report, done)
            speed = report.total.requests / max(0.001, time.monotonic() - began)
            progress.update(task, completed=report.total.seeds, speed=f"{speed:,.0f} requests/s")
    return report


def _replay(seed: int, requests: int, console: Console, *, trace: bool) -> tuple[Report, Schedule | None]:
    def tell(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    report = run_seed(seed, requests, story=tell if trace else None)
    if not report.broken:
        return report, None
    with console.status("making it small …"):
        small, violation = shrink(draw(seed, requests))
    report.broken = [Broken(seed=seed, invariant=violation.invariant.value, message=violation.message)]
    tell(f"\nThis much of it is enough: {len(small.asks)} requests and {len(small.faults)} faults.")
    tell(
        f"{small.prefill} prefill and {small.decode} decode groups of {small.dp_size} ranks, {small.gateways} gateways"
    )
    for part in (*small.asks, *small.faults):
        tell(f"  {type(part).__name__} {msgspec.json.encode(part).decode()}")
    tell("\nWhat happens:")
    world = World(small, story=tell)
    try:
        world.run()
    except Violation as error:
        tell(f"{error}")
    return report, small


def _as_json(report: Report, small: Schedule | None) -> dict[str, object]:
    total = msgspec.to_builtins(report.total)
    recovered = total.pop("recovered_ms")
    return {
        **total,
        "faults_total": sum(report.total.faults.values()),
        "next_token_after_fault_ms": {
            "count": sum(recovered.values()),
            "p50": percentile(report.total.recovered_ms, 0.5),
            "p99": percentile(report.total.recovered_ms, 0.99),
        },
        "broken": msgspec.to_builtins(report.broken),
        "smallest_schedule": msgspec.to_builtins(small),
    }


def _table(report: Report) -> Table:
    total = report.total
    shown = Table(box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    shown.add_column("what")
    shown.add_column("count", justify="right")
    shown.add_row("runs", f"{total.seeds:,}")
    shown.add_row("requests", f"{total.requests:,}")
    shown.add_row("tokens delivered", f"{total.tokens:,}", end_section=True)
    shown.add_row("faults that took place", f"{sum(total.faults.values()):,}")
    for name, count in sorted(total.faults.items(), key=lambda item: -item[1]):
        shown.add_row(f"  {name}", f"{count:,}")
    shown.add_section()
    shown.add_row("new pairs before the first token", f"{total.retries:,}")
    shown.add_row("migrations in mid-stream", f"{total.migrations:,}")
    shown.add_row("  of these off draining groups", f"{total.moves:,}")
    for share, name in ((0.5, "p50"), (0.99, "p99")):
        found = percentile(total.recovered_ms, share)
        shown.add_row(f"fault → next token, {name}, virtual", "" if found is None else f"{found / 1000:.2f} s")
    shown.add_section()
    for name, count in sorted(total.outcomes.items(), key=lambda item: -item[1]):
        shown.add_row(f"ended with: {name}", f"{count:,}")
    shown.add_section()
    always = (Invariant.LOST, Invariant.DOUBLED, Invariant.ALTERED, Invariant.LEAKED)
    for invariant in Invariant:
        count = sum(broken.invariant == invariant.value for broken in report.broken)
        if count or invariant in always:
            colour = "red" if count else "green"
            shown.add_row(f"[{colour}]{invariant.value}[/]", f"[{colour}]{count:,}[/]")
    shown.add_section()
    shown.add_row("virtual time", f"{total.virtual_s / 3600:,.1f} h")
    shown.add_row("requests per second and core", f"{total.requests / max(0.001, total.seconds):,.0f}")
    return shown
