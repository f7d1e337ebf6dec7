"""What the runs came to, as tables and as JSON."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import msgspec
from rich.console import Console
from rich.table import Table

from bench.gateway.load import Result

COLUMNS = ("rate/s", "gateway", "TTFT p50", "p95", "p99", "added p50", "p95", "ITL p50", "p99")
COLUMNS += ("CPU ms/req", "µs/token", "RSS MiB", "idle", "others' cores", "late p99", "lost")


class Row(msgspec.Struct, frozen=True):
    """One run of one contender."""

    name: str
    rate: float
    tokens: int
    result: Result
    faults: list[str]

    @property
    def ms_per_request(self) -> float:
        return self.result.cpu.total * 1e3 / max(1, self.result.completed)

    @property
    def us_per_token(self) -> float:
        return self.result.cpu.total * 1e6 / max(1, self.result.completed * self.tokens)


class Memory(msgspec.Struct, frozen=True):
    """The memory of one contender over a soak."""

    name: str
    points: list[tuple[int, float]]
    """(requests so far, resident MiB)."""
    errors: dict[str, int]
    faults: list[str]
    requests_per_s: float


def console(stderr: bool = False) -> Console:
    """As wide as the table, also where the output is no terminal."""
    made = Console(stderr=stderr)
    return made if made.is_terminal else Console(stderr=stderr, width=190)


def line(row: Row, note: str = "") -> str:
    """One run in a line, as it ends."""
    r = row.result
    wrong = "".join(f"  ! {text}" for text in [*row.faults, *(f"{n}x {what}" for what, n in r.errors.items())])
    ttft = f"{r.ttft_ms.p50:6.1f} {r.ttft_ms.p95:6.1f}"
    cpu = f"{row.ms_per_request:6.2f} ms {row.us_per_token:6.1f} us/token"
    seen = f"idle {r.idle:4.0%}  late p99 {r.late_ms.p99:.1f} ms  {r.completed}/{r.sent}"
    return f"{row.name:14} {row.rate:4g}/s  ttft {ttft}  cpu {cpu}  {seen} {note}{wrong}"


def show(rows: Sequence[Row], console: Console) -> None:
    """The table: the median run of each contender at each rate, and what it adds to asking a worker directly."""
    table = Table(title="Gateways over the same stand-in workers; times in ms; medians over the runs")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == "gateway" else "right")
    for rate in sorted({row.rate for row in rows}):
        base = [row for row in rows if row.rate == rate and row.name == "direct"]
        for name in dict.fromkeys(row.name for row in rows):
            runs = [row for row in rows if row.rate == rate and row.name == name]
            if runs:
                table.add_row(f"{rate:g}", name, *_cells(runs, base))
        table.add_section()
    console.print(table)


def _cells(runs: list[Row], base: list[Row]) -> list[str]:
    results = [row.result for row in runs]
    p50 = median(r.ttft_ms.p50 for r in results)
    p95 = median(r.ttft_ms.p95 for r in results)
    added = ["", ""]
    if base:
        added = [
            f"{p50 - median(row.result.ttft_ms.p50 for row in base):.1f}",
            f"{p95 - median(row.result.ttft_ms.p95 for row in base):.1f}",
        ]
    wrong = sum(sum(r.errors.values()) for r in results) + sum(len(row.faults) for row in runs)
    none = all(not r.cpu.total for r in results)
    return [
        f"{p50:.1f}",
        f"{p95:.1f}",
        f"{median(r.ttft_ms.p99 for r in results):.1f}",
        *added,
        f"{median(r.itl_ms.p50 for r in results):.1f}",
        f"{median(r.itl_ms.p99 for r in results):.1f}",
        "" if none else f"{median(row.ms_per_request for row in runs):.2f}",
        "" if none else f"{median(row.us_per_token for row in runs):.1f}",
        "" if none else f"{median(r.rss_mib for r in results):.0f}",
        f"{median(r.idle for r in results):.0%}",
        f"{median(r.strangers_cpu for r in results):.2f}",
        f"{median(r.late_ms.p99 for r in results):.1f}",
        str(wrong) if wrong else "0",
    ]


def show_soak(found: Sequence[Memory], console: Console) -> None:
    """Memory after each tenth of the requests."""
    table = Table(title="Resident memory in MiB over a soak")
    table.add_column("gateway")
    for count, _ in found[0].points:
        table.add_column(f"{count:,}", justify="right")
    table.add_column("requests/s", justify="right")
    table.add_column("lost", justify="right")
    for one in found:
        wrong = sum(one.errors.values()) + len(one.faults)
        table.add_row(one.name, *(f"{mib:.0f}" for _, mib in one.points), f"{one.requests_per_s:.0f}", str(wrong))
    console.print(table)


def save(path: Path | None, options: argparse.Namespace, found: Sequence[Row] | Sequence[Memory]) -> None:
    """All of it as JSON, with what was asked for and on what machine."""
    if path is None:
        return
    cpus = [text for text in Path("/proc/cpuinfo").read_text().splitlines() if text.startswith("model name")]
    asked = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    machine = {
        "cpus": len(cpus),
        "cpu": cpus[0].partition(": ")[2] if cpus else "",
        "python": platform.python_version(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        msgspec.json.format(msgspec.json.encode({"options": asked, "machine": machine, "runs": list(found)}))
    )
