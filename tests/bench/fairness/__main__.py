"""The command line: rounds of a polite tenant alone and beside a greedy one, taking turns.

The engines are stand-ins whose times are fixed and large against the machine's own noise, so their slots are all that
the two compete for. Engines, gateway and each tenant's client are processes of their own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import tempfile
import time
from http.client import HTTPConnection
from pathlib import Path
from statistics import median

import msgspec
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from bench.fairness import figures
from bench.fairness.client import Plan, Seen
from bench.fairness.figures import Round
from bench.gateway import report
from bench.gateway.gateways import START_S, Standins, spoken, standins, tiny_folder
from bench.gateway.processes import BenchError, Process
from bench.gateway.tandem_gateway import FLEET
from tandem.gateway.access.keys import keep, mint
from tandem.state import open_store

TENANTS = ("polite", "greedy")
HEAD_START_S = 4.0
"""The greedy tenant is here so long before the polite one: all slots are its own, and its queue is long."""
LEAD_S = 3.0
"""Whoever was alone may hold every slot when another comes: the first requests of a round do not count."""
DRAIN_S = 30.0
SPARE_S = 60.0
AIM = 1.2


class Bench:
    """Running stand-ins and a gateway, with two tenants' keys."""

    def __init__(self, options: argparse.Namespace, folder: Path, workers: Standins, url: str, keys: dict[str, str]):
        self._folder, self._workers, self._url, self._keys = folder, workers, url, keys
        self._seconds, self._most = options.seconds, options.most_tokens
        held = (options.ttft_ms + options.itl_ms * (options.most_tokens - 1) / 2) / 1e3
        self.capacity = options.slots / held
        """Requests per second."""
        self.polite_rate = options.part * self.capacity
        self.greedy_rate = options.times * self.polite_rate

    def queued(self) -> dict[float, int]:
        """How many of the polite tenant's requests waited in the gateway's queue for at most so long (seconds)."""
        host = self._url.removeprefix("http://")
        connection = HTTPConnection(host, timeout=10)
        try:
            connection.request("GET", "/metrics")
            page = connection.getresponse().read().decode()
        finally:
            connection.close()
        return {
            float(sample.labels["le"]): int(sample.value)
            for family in text_string_to_metric_families(page)
            for sample in family.samples
            if sample.name == "tandem_tenant_queue_seconds_bucket" and sample.labels["tenant"] == "polite"
        }

    def round(self, number: int, *, unfair: bool) -> Round:
        """One of each arm; every second round the other way round."""
        alone = None if number % 2 else self._alone(number)
        greedy, beside = self._beside(number, "polite")
        return Round(
            alone=alone or self._alone(number),
            beside=beside,
            greedy=greedy,
            unfair=self._beside(number, "greedy")[1] if unfair else None,
        )

    def _alone(self, seed: int) -> Seen:
        self._wait_until_idle()
        polite = self._start("polite", "polite", self.polite_rate, LEAD_S, self._seconds, seed)
        return self._end(polite)

    def _beside(self, seed: int, tenant: str) -> tuple[Seen, Seen]:
        self._wait_until_idle()
        before = HEAD_START_S + LEAD_S
        greedy = self._start("greedy", "greedy", self.greedy_rate, before, self._seconds + SPARE_S, 1000 + seed)
        try:
            time.sleep(HEAD_START_S)
            seen = self._end(self._start("polite", tenant, self.polite_rate, LEAD_S, self._seconds, seed))
            greedy.close()
            return self._end(greedy), seen
        finally:
            greedy.stop()

    def _start(self, name: str, tenant: str, rate: float, lead: float, seconds: float, seed: int) -> Process:
        log = self._folder / f"{name}.log"
        process = Process(f"the {name} client", [sys.executable, "-m", "bench.fairness.client"], log=log, lines=True)
        plan = Plan(
            url=self._url,
            key=self._keys[tenant],
            rate=rate,
            lead_s=lead,
            seconds=seconds,
            most_tokens=self._most,
            seed=seed,
        )
        process.tell(msgspec.json.encode(plan))
        process.line(START_S)
        return process

    def _end(self, process: Process) -> Seen:
        try:
            return msgspec.json.decode(process.line(LEAD_S + self._seconds + SPARE_S), type=Seen)
        finally:
            process.stop()

    def _wait_until_idle(self) -> None:
        end = time.monotonic() + DRAIN_S
        while (totals := self._workers.totals()).running or totals.waiting:
            if time.monotonic() > end:
                raise BenchError(f"{totals.running} legs still run {DRAIN_S:g} s after their clients have left")
            time.sleep(0.1)


async def _keys(folder: Path) -> dict[str, str]:
    store = await open_store("embedded", fleet=FLEET, folder=folder)
    keys = {}
    try:
        for tenant in TENANTS:
            record, keys[tenant] = mint(tenant, now=time.time())
            await keep(store, record)
    finally:
        await store.close()
    return keys


def measure(options: argparse.Namespace, folder: Path, console: Console) -> tuple[list[Round], dict[float, int]]:
    """Start everything, run the rounds, stop everything. Returns the rounds, and `Bench.queued`."""
    model = tiny_folder(folder / "tiny")
    place = folder / "gateway"
    place.mkdir()
    keys = asyncio.run(_keys(place))
    config = {
        "gateway": {"port": 0, "grpc_port": 0, "auth": "required"},
        "admission": {"running_per_decode_rank": options.slots, "queue_s": options.queue_s},
        "tenants": {name: {} for name in TENANTS},
        "metering": {"sink": "off"},
    }
    with standins(folder, spoken(model), ttft_ms=options.ttft_ms, itl_ms=options.itl_ms, workers=1) as workers:
        command = [sys.executable, "-m", "bench.gateway.tandem_gateway", "--model", str(model), "--folder", str(place)]
        command += ["--urls", json.dumps(workers.urls), "--config", json.dumps(config)]
        gateway = Process("Tandem's gateway", command, log=folder / "gateway.log", lines=True)
        try:
            bench = Bench(options, folder, workers, json.loads(gateway.line(START_S)), keys)
            console.print(
                f"the engines serve {bench.capacity:.0f} requests/s; the polite tenant asks for {bench.polite_rate:.1f}"
                f", the greedy one for {bench.greedy_rate:.0f}",
                highlight=False,
            )
            rounds: list[Round] = []
            for number in range(options.rounds):
                rounds.append(one := bench.round(number, unfair=options.unfair))
                seen = [
                    f"{figures.quantile(figures.pooled([arm]), 0.99):.0f} ms {name} (idle {arm.idle:.0%})"
                    for name, arm in (("alone", one.alone), ("beside", one.beside))
                ]
                console.print(f"round {number + 1} of {options.rounds}: p99 {', '.join(seen)}", highlight=False)
            return rounds, bench.queued()
        finally:
            gateway.stop()


def show(rounds: list[Round], queued: dict[float, int], console: Console) -> None:
    table = Table(title="Time to first token in ms, of the requests of all rounds")
    for name in ("", "answered", "refused", "p50", "p95", "p99", "generator late p99", "machine idle"):
        table.add_column(name, justify="right" if name else "left")
    arms = {
        "polite, alone": [one.alone for one in rounds],
        "polite, beside the greedy one": [one.beside for one in rounds],
        "the greedy one": [one.greedy for one in rounds],
        "polite, as if both were one tenant": [one.unfair for one in rounds if one.unfair is not None],
    }
    for name, seen in arms.items():
        if seen:
            times, counts = figures.pooled(seen), figures.statuses(seen)
            late = figures.quantile([1e3 * value for one in seen for value in one.late_s], 0.99)
            cells = [f"{figures.quantile(times, share):.0f}" for share in (0.5, 0.95, 0.99)]
            idle = f"{median(one.idle for one in seen):.0%}"
            table.add_row(name, f"{len(times):,}", f"{counts.get(429, 0):,}", *cells, f"{late:.1f}", idle)
    console.print(table)
    for limit in (0.01, 0.1):
        everyone = queued[float("inf")]
        console.print(
            f"{everyone - queued[limit]:,} of the polite tenant's {everyone:,} requests waited more than {limit:g} s"
            " in the gateway's queue",
            highlight=False,
        )
    low, high = figures.interval(rounds)
    console.print(
        f"p99 beside ÷ p99 alone: {figures.ratio(rounds):.3f} (95 %: {low:.3f} to {high:.3f}); aim: at most {AIM}",
        highlight=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.fairness", description="A greedy tenant beside a polite one.")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=20, help="that count, of each arm of a round")
    parser.add_argument("--slots", type=int, default=32, help="requests that the engines run at once")
    parser.add_argument("--ttft-ms", type=float, default=400)
    parser.add_argument("--itl-ms", type=float, default=200)
    parser.add_argument("--most-tokens", type=int, default=13, help="answers have from one to so many")
    parser.add_argument("--part", type=float, default=0.2, help="of what the engines serve the polite tenant asks for")
    parser.add_argument("--times", type=float, default=20, help="so much more the greedy one asks for")
    parser.add_argument("--queue-s", type=float, default=5, help="admission.queue_s")
    parser.add_argument("--unfair", action="store_true", help="a third arm: the same load, as one tenant")
    parser.add_argument("--json", type=Path, help="write all rounds there")
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        with tempfile.TemporaryDirectory(prefix="tandem-bench-") as name:
            rounds, queued = measure(options, Path(name), report.console(stderr=True))
    except BenchError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    show(rounds, queued, report.console())
    if options.json is not None:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(rounds)))
    polite = figures.statuses([seen for one in rounds for seen in (one.alone, one.beside)])
    if set(polite) != {200}:
        sys.exit(f"the polite tenant was answered with {polite}")
    if figures.ratio(rounds) > AIM:
        sys.exit(f"the greedy tenant raised the polite one's p99 by more than {AIM - 1:.0%}")


if __name__ == "__main__":
    main()
