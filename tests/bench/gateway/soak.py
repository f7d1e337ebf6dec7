"""Memory over many requests: small prompts of their own, quick workers, as fast as the machine goes."""

from __future__ import annotations

from rich.console import Console

from bench.gateway import report
from bench.gateway.gateways import Place, running
from bench.gateway.load import Plan, drive
from bench.gateway.processes import resident

PARTS = 10
PROMPT_BYTES = 1000
TOKENS = 4


def soak(place: Place, names: list[str], requests: int, clients: int, console: Console) -> list[report.Memory]:
    """Each contender in turn; its memory is read after each tenth of the requests."""
    found: list[report.Memory] = []
    for name in names:
        if name == "direct":
            continue
        with running(place, [name]) as [contender]:
            before = place.standins.totals()
            points = [(0, resident(contender.pids))]
            errors: dict[str, int] = {}
            seconds = 0.0
            completed = 0
            for part in range(PARTS):
                plan = Plan(
                    url=contender.url,
                    model=contender.model,
                    pids=contender.pids,
                    texts=[token.text for token in place.standins.tokens],
                    requests=requests // PARTS,
                    clients=clients,
                    prompt_bytes=PROMPT_BYTES,
                    shared=0.0,
                    tokens=TOKENS,
                    seed=1 + part,
                )
                result = drive(plan, place.folder / "load.log")
                seconds += result.seconds
                completed += result.completed
                for what, count in result.errors.items():
                    errors[what] = errors.get(what, 0) + count
                points.append(((part + 1) * (requests // PARTS), resident(contender.pids)))
                console.print(f"{name:14} {points[-1][0]:8,} requests  {points[-1][1]:7.1f} MiB", highlight=False)
            after = place.standins.totals()
            faults = []
            if after.pairs - before.pairs != completed or after.waiting:
                faults = [f"{after.pairs - before.pairs} pairs for {completed} answers, {after.waiting} rooms wait"]
            found.append(report.Memory(name, points, errors, faults, completed / seconds))
    return found
