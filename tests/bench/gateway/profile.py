"""Where Tandem's gateway spends its time under the load: CPU by thread (undisturbed), then by what it does (py-spy).

    PYTHONPATH=tests .venv/bin/python -m bench.gateway.profile --rate 60 --seconds 20

The share of each kind of work is that of the samples of what is not idle. They are taken by the wall's clock: on a
busy machine a system call that wakes somebody (`send`) shows also the time in which others had the processor. py-spy
stops the process for each sample, so latencies meanwhile mean nothing.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import msgspec
from rich.table import Table

from bench.gateway.gateways import Contender, Place, Standins, running, spoken, standins, tiny_folder
from bench.gateway.load import Plan
from bench.gateway.processes import BenchError, Process
from bench.gateway.report import console

WAITING = "wait for events"
LEAVES = {
    "send (system call)": {"write", "writev", "send", "sendto", "sendmsg", "__send"},
    "receive (system call)": {"read", "recv", "recvfrom", "__recv", "__read"},
    WAITING: {"epoll_wait", "epoll_pwait", "epoll_ctl", "__select"},
    "garbage collection": {"gc_collect_main", "gc_collect_generations", "deduce_unreachable", "visit_decref"},
}
PLACES = (
    ("tokenize", ("tokenizers", "fastokens", "fast_encode.py")),
    ("chat template", ("jinja2", "<template>", "chat_template.py")),
    ("JSON", ("msgspec", "orjson", "json_")),
    ("metrics", ("prometheus_client", "gateway/observe/metrics.py", "metric_types.py")),
    ("tracing", ("opentelemetry", "gateway/observe/tracing.py")),
    ("HTTP parsing", ("httptools", "llhttp")),
    ("engine client", ("tandem/engine/",)),
    ("pair table", ("core/pairing.py", "core/pair_events.py", "gateway/pairing/pairs.py", "gateway/pairing/legs.py")),
    ("routing", ("core/routing.py", "core/prefix", "core/radix", "core/")),
    (
        "answer: detokenize, reasoning, tools",
        ("detokenize.py", "reasoning.py", "answer.py", "tool_parser.py", "stops.py"),
    ),
    ("writers", ("wire.py", "_writer.py", "choices.py")),
    ("http server", ("http_server.py", "app.py", "exchange.py", "uvicorn")),
    ("admission, tenants, metering", ("admission.py", "auth.py", "metering.py", "usage_", "keys.py", "limits.py")),
    ("gateway, else", ("tandem/",)),
    ("asyncio", ("asyncio", "_asynciomodule", "contextvars")),
)


def kind(frames: list[str]) -> str:
    """What a sample was busy with: the innermost frame that says so."""
    leaf = frames[-1].split(" ", 1)[0]
    for name, leaves in LEAVES.items():
        if leaf in leaves:
            return name
    for frame in reversed(frames):
        for name, places in PLACES:
            if any(place in frame for place in places):
                return name
    return "event loop, Python, else"


def threads(pid: int) -> dict[str, float]:
    """CPU seconds of each thread so far, to the nanosecond."""
    found: dict[str, float] = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        name = f"{(task / 'comm').read_text().strip()} {task.name}"
        found[name] = int((task / "schedstat").read_text().split()[0]) / 1e9
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=60)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--samples", type=int, default=40, help="a second")
    parser.add_argument("--model", type=Path, help="checkpoint folder")
    parser.add_argument("--raw", type=Path, help="keep py-spy's samples there")
    options = parser.parse_args()
    out = console()
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as name:
        folder = Path(name)
        model = options.model or tiny_folder(folder / "tiny")
        with (
            standins(folder, spoken(model), ttft_ms=25, itl_ms=20) as workers,
            running(Place(workers, folder, model), ["tandem"]) as [gateway],
        ):
            _load(gateway, workers, options, folder, seconds=3).stop()
            load = _load(gateway, workers, options, folder, seconds=options.seconds)
            time.sleep(1.5)
            before = threads(gateway.pids[0])
            time.sleep(options.seconds - 2)
            after = threads(gateway.pids[0])
            load.line(60)
            load.stop()
            table = Table("thread", "ms/request", "µs/token", title=f"CPU by thread at {options.rate:g} requests/s")
            for thread, spent in after.items():
                share = (spent - before.get(thread, 0.0)) / (options.seconds - 2) / options.rate
                if share > 5e-6:
                    table.add_row(thread, f"{share * 1e3:.2f}", f"{share * 1e6 / 64:.1f}")
            out.print(table)
            load = _load(gateway, workers, options, folder, seconds=options.seconds)
            time.sleep(1.5)
            raw = options.raw or folder / "samples"
            command = [str(Path(sys.executable).parent / "py-spy"), "record", "--pid", str(gateway.pids[0])]
            command += ["--duration", str(int(options.seconds) - 2), "--rate", str(options.samples)]
            command += ["--format", "raw", "--native", "--output", str(raw)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            load.line(120)
            load.stop()
            if done.returncode:
                raise BenchError(f"py-spy failed: {done.stderr[-500:]}")
            counts: Counter[str] = Counter()
            for sample in raw.read_text().splitlines():
                stack, _, count = sample.rpartition(" ")
                idle = kind(stack.split(";")) == WAITING
                if (
                    not idle
                    and "take_gil" not in stack
                    and "SimpleQueue" not in stack
                    and "<module> (bench/gateway" not in stack
                ):
                    counts[kind(stack.split(";"))] += int(count)
            table = Table("work", "share", title=f"Samples of all threads ({counts.total()})")
            for work, count in counts.most_common():
                table.add_row(work, f"{count / counts.total():.1%}")
            out.print(table)


def _load(
    gateway: Contender, workers: Standins, options: argparse.Namespace, folder: Path, *, seconds: float
) -> Process:
    plan = Plan(
        url=gateway.url,
        model=gateway.model,
        pids=gateway.pids,
        texts=[token.text for token in workers.tokens],
        rate=options.rate,
        seconds=seconds,
    )
    process = Process("the load", [sys.executable, "-m", "bench.gateway.load"], log=folder / "load.log", lines=True)
    process.feed(msgspec.json.encode(plan))
    if seconds <= 3:
        process.line(60)
    return process


if __name__ == "__main__":
    main()
