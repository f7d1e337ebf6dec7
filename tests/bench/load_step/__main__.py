"""The command line: a step up, and down again."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from bench.load_step.clients import Clients
from support.fleet import Fleet, ephemeral, running
from tandem.config import AutoscalingConfig, FleetConfig, PlanningConfig
from tandem.core.types import FleetSnapshot, GroupState, Role
from tandem.fleet.control_client import ControlClient
from tandem.models.tiny import ensure_tiny

LOOK_S = 0.05
WINDOW_S = 10.0
"""As the reactive loop's own (`planning.fast_window_s`)."""


class Moments(msgspec.Struct):
    """When what happened, in seconds since the step up; None = it did not."""

    breach: float | None = None
    """Clients' own percentile over the last `WINDOW_S` is above the aim."""
    decided: float | None = None
    """Two decode groups are wanted."""
    ready: float | None = None
    down: float | None = None
    """The load fell."""
    decided_down: float | None = None
    why: str = ""
    why_down: str = ""


def config(model: Path, autoscaling: AutoscalingConfig | None) -> FleetConfig:
    """One group a role, of one rank each: what two cores can bear twice."""
    made = ephemeral("step", model)
    prefill = made.prefill.model_copy(update={"groups": 1, "nodes": 1})
    decode = made.decode.model_copy(update={"groups": 1, "nodes": 1, "autoscaling": autoscaling})
    return made.model_copy(update={"prefill": prefill, "decode": decode, "planning": PlanningConfig()})


@contextlib.contextmanager
def fleet(model: Path, autoscaling: AutoscalingConfig | None) -> Iterator[Fleet]:
    """A running one."""
    with running(config(model, autoscaling)) as made:
        yield made


async def calibrate(base: str, model: str, many: int, seconds: float) -> tuple[float, float]:
    """Seconds between tokens that one stream and `many` see, at the 95th percentile."""
    found = []
    for count in (1, many):
        clients = Clients(base, model)
        clients.want(count)
        await asyncio.sleep(seconds)
        found.append(clients.itl(seconds / 2) or math.inf)
        await clients.stop()
    return found[0], found[1]


def decode(snapshot: FleetSnapshot) -> tuple[int, int]:
    """Decode groups that are wanted, and that are ready."""
    wanted = sum(one.role is Role.DECODE and not one.draining for one in snapshot.desired)
    ready = sum(one.role is Role.DECODE and one.state is GroupState.READY for one in snapshot.groups)
    return wanted, ready


def reason(snapshot: FleetSnapshot) -> str:
    """Why so many decode groups are wanted."""
    return next((plan.reason for plan in snapshot.plans if plan.role is Role.DECODE), "")


async def step(base: str, control: str, model: str, many: int, aim: float, limit_s: float) -> tuple[Moments, Clients]:
    """One stream, then `many` until two groups have been ready for a while, then one until one group is left."""
    moments, clients = Moments(), Clients(base, model)
    async with ControlClient(control) as client:
        clients.want(1)
        await asyncio.sleep(3 * WINDOW_S)
        began = time.monotonic()
        clients.want(many)
        enough: float | None = None
        while (now := time.monotonic() - began) < limit_s and moments.decided_down is None:
            snapshot = await client.fleet()
            wanted, ready = decode(snapshot)
            if moments.breach is None and (clients.itl(WINDOW_S) or 0.0) > aim:
                moments.breach = now
            if moments.decided is None and wanted == 2:
                moments.decided, moments.why = now, reason(snapshot)
            if moments.ready is None and ready == 2:
                moments.ready, enough = now, now + 2 * WINDOW_S
            if enough is not None and moments.down is None and now > enough:
                moments.down = now
                clients.want(1)
            if moments.down is not None and wanted == 1:
                moments.decided_down, moments.why_down = now, reason(snapshot)
            await asyncio.sleep(LOOK_S)
    await clients.stop()
    return moments, clients


def told(moments: Moments, clients: Clients, aim: float, calm: float, busy: float) -> Table:
    """As a person reads it."""
    table = Table("what", "when or how much", title="A load step on real engines")
    rows: list[tuple[str, Any]] = [
        ("seconds between tokens, p95: one stream; many; aim", f"{calm:.4f}; {busy:.4f}; {aim:.4f}"),
        ("clients' p95 above the aim, s after the step", moments.breach),
        ("two groups wanted, s after the step", moments.decided),
        ("why", moments.why),
        ("two groups ready", moments.ready),
        ("the load falls", moments.down),
        ("one group wanted", moments.decided_down),
        ("why", moments.why_down),
        ("requests; failed; otherwise than the first answer", f"{clients.answers}; {clients.failed}; {clients.other}"),
    ]
    for name, value in rows:
        table.add_row(name, f"{value:.1f}" if isinstance(value, float) else str(value))
    return table


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--many", type=int, default=12, help="streams after the step")
    parser.add_argument("--calibrate-seconds", type=float, default=15.0)
    parser.add_argument("--cooldown", type=float, default=30.0, help="autoscaling.down_cooldown_s")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds after the step in which all must come")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console = Console()
    model = Path(tempfile.gettempdir()) / "tandem-load-step" / "tiny"
    ensure_tiny(model)
    with console.status("what one stream and many see"), fleet(model, None) as plain:
        calm, busy = asyncio.run(calibrate(plain.base, plain.status_model, options.many, options.calibrate_seconds))
    if not math.isfinite(calm * busy):
        raise SystemExit("the fleet answered nothing while it was measured")
    aim = math.sqrt(calm * busy)
    policy = AutoscalingConfig(min_groups=1, max_groups=2, itl_s=aim, down_cooldown_s=options.cooldown)
    with console.status(f"the step; aim {aim:.4f} s"), fleet(model, policy) as scaled:
        moments, clients = asyncio.run(
            step(scaled.base, scaled.ready.control, scaled.status_model, options.many, aim, options.limit)
        )
    console.print(told(moments, clients, aim, calm, busy))
    if options.json:
        found = {"aim": aim, "calm": calm, "busy": busy, **msgspec.to_builtins(moments)}
        options.json.write_text(
            json.dumps({**found, "answers": clients.answers, "failed": clients.failed, "other": clients.other})
        )
    if clients.failed or clients.other or moments.decided_down is None:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
