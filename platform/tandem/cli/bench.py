"""`tandem bench`: the numbers of a fleet on this machine."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Annotated

import msgspec
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from tandem.bench.client import timed
from tandem.bench.laptop import Report, footprint, speed
from tandem.cli.console import make_console
from tandem.cli.running import AsJson, find, run, snapshot_from_store
from tandem.cli.up import follow, start_host, stop_host
from tandem.config import ControlConfig, FleetConfig, GatewayConfig
from tandem.engine.http1 import Pool

CONFIG = FleetConfig(name="bench", gateway=GatewayConfig(port=0, grpc_port=0), control=ControlConfig(port=0))
GIB = 2**30


def bench(
    as_json: AsJson = False,
    rounds: Annotated[int, typer.Option(min=1, help="How often each speed is measured, one after the other.")] = 3,
) -> None:
    """Start a fleet of the default size and measure it: start, memory, one stream, eight at once."""
    console = make_console(stderr=as_json)
    report = Report(cores=len(os.sched_getaffinity(0)))
    began = time.monotonic()
    host = start_host(CONFIG)
    try:
        base = follow(host, console).http
        report.up_s = time.monotonic() - began
        run(_measure(base, report, began, rounds, console))
    finally:
        stop_host(CONFIG.name, host)
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(report)).decode())
    else:
        console.print(table(report))


async def _measure(base: str, report: Report, began: float, rounds: int, console: Console) -> None:
    snapshot, _ = await snapshot_from_store(CONFIG.name)
    model = snapshot.model_name
    pool = Pool()
    before = time.monotonic() - began
    first = await timed(pool, base, "/v1/completions", {"model": model, "prompt": "Hello", "max_tokens": 8})
    report.first_token_s = before + first.ttft
    await pool.close()
    with console.status("measuring one stream …"):
        report.single = await speed(base, model, 1, rounds=rounds)
    with console.status("measuring eight streams at once …"):
        await speed(base, model, 8)  # the first batch of a new size allocates
        report.eight = await speed(base, model, 8, rounds=rounds)
    with console.status("measuring memory and idle CPU …"):
        await asyncio.sleep(3)  # caches settle; idle begins
        engines = [rank.pid for group in snapshot.groups for rank in group.ranks]
        report.footprint = await footprint(find(CONFIG.name)[1].run, engines)


def table(report: Report) -> Table:
    """The report for people, beside what is aimed at."""
    shown = Table(title=f"default fleet, {report.cores} cores", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("what", "measured", "aim"):
        shown.add_column(column)
    single, eight, foot = report.single, report.eight, report.footprint
    if report.first_token_s is not None:
        shown.add_row("`tandem up` to ready", f"{report.up_s:.1f} s", "")
        shown.add_row("`tandem up` to first token", f"{report.first_token_s:.1f} s", "under 60 s")
    if single:
        shown.add_row("one stream", f"{single.tokens_per_s:.1f} tok/s", "15 tok/s or more")
        shown.add_row("  TTFT p50, ITL p50", f"{single.ttft_p50_s * 1e3:.0f} ms, {single.itl_p50_s * 1e3:.1f} ms", "")
    if eight:
        shown.add_row("eight streams at once", f"{eight.tokens_per_s:.1f} tok/s", "60 tok/s or more")
        shown.add_row("  TTFT p50, ITL p50", f"{eight.ttft_p50_s * 1e3:.0f} ms, {eight.itl_p50_s * 1e3:.1f} ms", "")
    if foot:
        shown.add_row("memory (PSS), all processes", f"{foot.pss_bytes / GIB:.2f} GiB", "under 6 GiB")
        shown.add_row("processes", str(foot.processes), "")
        shown.add_row("CPU while idle, busiest engine", f"{foot.idle_cores_engine:.1%} of a core", "under 15 %")
        shown.add_row("CPU while idle, all processes", f"{foot.idle_cores:.2f} cores", "")
    return shown
