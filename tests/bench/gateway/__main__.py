"""The command line: which contenders, at which rates, how long and how often; or the soak."""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
from pathlib import Path

from bench.gateway import report
from bench.gateway.gateways import (
    CONTENDERS,
    FASTEST,
    Contender,
    Place,
    Standins,
    running,
    spoken,
    standins,
    tiny_folder,
)
from bench.gateway.load import Plan, Result, drive
from bench.gateway.processes import BenchError
from bench.gateway.soak import soak
from bench.gateway.standin import Totals

NAMES = "any of " + ", ".join(CONTENDERS)


def one_run(contender: Contender, place: Place, plan: Plan) -> report.Row:
    """Drive one contender once, and compare what the client saw with what the workers saw."""
    before = place.standins.totals()
    result = drive(plan, place.folder / "load.log")
    return report.Row(
        contender.name, plan.rate, plan.tokens, result, lost(contender, result, before, place.standins.totals())
    )


def lost(contender: Contender, result: Result, before: Totals, after: Totals) -> list[str]:
    """What the workers saw that does not fit what the client saw."""
    answers = result.completed
    wanted = {
        "requests": answers * (2 if contender.paired else 1),
        "finished": answers * (2 if contender.paired else 1),
        "pairs": answers if contender.paired else 0,
        "unlike": 0,
        "reused": 0,
        "aborted": 0,
        "disconnected": 0,
    }
    seen = {name: getattr(after, name) - getattr(before, name) for name in wanted}
    faults = [
        f"the workers saw {seen[name]} {name} instead of {wanted[name]}"
        for name in wanted
        if seen[name] != wanted[name]
    ]
    if after.waiting or after.running:
        faults.append(f"{after.waiting} rooms wait for a second leg, {after.running} legs run on")
    return faults


def compare(options: argparse.Namespace, place: Place, console: report.Console) -> list[report.Row]:
    """All contenders at all rates, in an order that is new each time, so that the machine's noise hits all alike."""
    rows: list[report.Row] = []
    dice = random.Random(options.seed)
    with running(place, options.contenders) as contenders:
        for turn in range(options.repeat + 1):
            order = [
                (rate, contender)
                for rate in options.rates
                for contender in contenders
                if rate <= FASTEST.get(contender.name, rate)
            ]
            if turn == 0:
                # Once without noting it: connections, caches, the allocator.
                order = [(options.rates[0], contender) for contender in contenders]
            dice.shuffle(order)
            for rate, contender in order:
                seconds = options.seconds if turn else 3.0
                plan = plan_for(options, contender, place.standins, rate, seconds, seed=options.seed + 1000 * turn)
                row = one_run(contender, place, plan)
                if turn:
                    rows.append(row)
                console.print(report.line(row, "" if turn else "(warm-up)"), highlight=False)
    return rows


def plan_for(
    options: argparse.Namespace, contender: Contender, found: Standins, rate: float, seconds: float, seed: int
) -> Plan:
    return Plan(
        url=contender.url,
        model=contender.model,
        pids=contender.pids,
        beside=[found.process.pid],
        texts=[token.text for token in found.tokens],
        rate=rate,
        seconds=seconds,
        prompt_bytes=options.prompt_bytes,
        tokens=options.tokens,
        seed=seed,
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.gateway", description="Compare gateways over stand-in workers.")
    parser.add_argument(
        "--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS), metavar="NAME", help=NAMES
    )
    parser.add_argument("--rates", nargs="+", type=float, default=[20, 60, 200], help="requests per second")
    parser.add_argument("--seconds", type=float, default=10, help="of each run")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--prompt-bytes", type=int, default=25_000)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--ttft-ms", type=float, default=25)
    parser.add_argument("--itl-ms", type=float, default=20)
    parser.add_argument("--model", type=Path, help="checkpoint folder with another tokenizer than the tiny model's")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write all runs there")
    parser.add_argument("--soak", type=int, metavar="REQUESTS", help="instead: memory over so many requests")
    parser.add_argument("--clients", type=int, default=32, help="with --soak: requests at a time")
    options = parser.parse_args()
    # SIGTERM takes the same way out as Ctrl-C, and neither is ignored where a shell started this in the background.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    console = report.console(stderr=True)
    try:
        with tempfile.TemporaryDirectory(prefix="tandem-bench-") as name:
            folder = Path(name)
            model = options.model or tiny_folder(folder / "tiny")
            quick = options.soak is not None
            timing = (
                {"ttft_ms": 0.0, "itl_ms": 0.0} if quick else {"ttft_ms": options.ttft_ms, "itl_ms": options.itl_ms}
            )
            with standins(folder, spoken(model), **timing) as found:
                place = Place(found, folder, model)
                if quick:
                    found_soak = soak(place, options.contenders, options.soak, options.clients, console)
                    report.show_soak(found_soak, report.console())
                    report.save(options.json, options, found_soak)
                    return
                rows = compare(options, place, console)
        report.show(rows, report.console())
        report.save(options.json, options, rows)
        if any(row.faults or row.result.errors for row in rows):
            sys.exit("some answers were lost or wrong: see above")
    except BenchError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
