"""`tandem demo`: a fleet, one answer, and what happened between the question and the answer."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from rich import box
from rich.console import Console
from rich.table import Table

from tandem.bench.client import Timing
from tandem.cli.chat import say
from tandem.cli.console import make_console
from tandem.cli.running import run
from tandem.cli.status import full_status
from tandem.cli.up import follow, start_host, stop_host
from tandem.config import ControlConfig, FleetConfig, GatewayConfig
from tandem.core.types import FleetSnapshot, Group, Role
from tandem.engine.http1 import Pool
from tandem.fleet.counters import Counters, total

QUESTION = "Why do two halves ride a tandem faster than one?"
MAX_TOKENS = 64
CONFIG = FleetConfig(name="demo", gateway=GatewayConfig(port=0, grpc_port=0), control=ControlConfig(port=0))


def demo() -> None:
    """Start a fleet, stream one chat answer, show what happened, stop, leave nothing behind."""
    console = make_console()
    began = time.monotonic()
    host = start_host(CONFIG)
    try:
        ready = follow(host, console)
        console.print(f"\n[green]ready[/] after {ready.seconds:.1f} s. Asking: [bold]{QUESTION}[/]\n")
        before = run(full_status(CONFIG.name))
        timing = run(_ask(ready.http, before["model_name"], console))
        first = time.monotonic() - began - (timing.total - timing.ttft)
        after = run(full_status(CONFIG.name))
        console.print("\n(The tiny model has random weights: what is real here is the engine, not the answer.)")
        console.print(happened(before, after, timing, first))
    finally:
        with console.status("stopping …"):
            stop_host(CONFIG.name, host)
    console.print("stopped; nothing is left running. `make up` keeps a fleet.")


async def _ask(base: str, model: str, console: Console) -> Timing:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
    }
    pool = Pool()
    try:
        return (await say(pool, base, body, console))[1]
    finally:
        await pool.close()


def happened(before: dict[str, Any], after: dict[str, Any], timing: Timing, first: float) -> Table:
    """One line a rank: what it computed, sent and exchanged for the answer; the times below."""
    snapshot = msgspec.convert(
        {name: after[name] for name in FleetSnapshot.__struct_fields__}, FleetSnapshot, strict=False
    )
    table = Table(title="what happened", title_justify="left", box=box.SIMPLE_HEAD, show_footer=True)
    table.add_column("group", footer="answer")
    table.add_column("rank", footer="")
    table.add_column("PID", footer="")
    table.add_column("prompt tokens\ncomputed", justify="right", footer="")
    table.add_column("tokens\ndecoded", justify="right", footer=f"{timing.tokens} tokens")
    table.add_column("KV bytes\nmoved", justify="right", footer=f"TTFT {timing.ttft * 1000:.0f} ms")
    table.add_column("all-to-all\nrows sent", justify="right", footer=f"ITL {timing.itl * 1000:.0f} ms")
    table.add_column("all-to-all\nbytes sent", justify="right", footer=f"`up` to first token {first:.1f} s")
    for group in snapshot.groups:
        for number, cells in enumerate(rank_cells(group, before["counters"], after["counters"])):
            table.add_row(f"{group.group} (epoch {group.epoch})" if number == 0 else "", *cells)
    return table


def rank_cells(group: Group, before: dict[str, Counters], after: dict[str, Counters]) -> list[tuple[str, ...]]:
    """Rank, PID and the difference of its counters."""
    rows: list[tuple[str, ...]] = []
    for rank in group.ranks:
        old, new = before.get(rank.metrics, {}), after.get(rank.metrics, {})

        def grown(name: str, old: Counters = old, new: Counters = new, **labels: str) -> str:
            return f"{total(new, name, **labels) - total(old, name, **labels):,.0f}"

        rows.append(
            (
                str(rank.rank),
                str(rank.pid),
                grown("tandem_engine_batch_tokens_total", mode="extend"),
                grown("tandem_engine_batch_tokens_total", mode="decode"),
                grown("tandem_engine_kv_bytes_sent_total") if group.role is Role.PREFILL else "",
                grown("tandem_engine_a2a_rows_sent_total"),
                grown("tandem_engine_a2a_bytes_sent_total"),
            )
        )
    return rows
