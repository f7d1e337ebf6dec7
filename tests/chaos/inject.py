"""The hands: carries out one fault on a stage, and sees how it is noticed and made good."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import psutil

from chaos import network
from chaos.engine_faults import NOTICE_S, Happening, hit_engine
from chaos.faults import (
    Drain,
    Fault,
    FillDisk,
    HitController,
    HitEngine,
    HitGateway,
    HitNetwork,
    HitPlatform,
    HitRedis,
    HitWire,
    JumpClock,
    Leave,
    Orphan,
    ScaleDown,
)
from chaos.idle import all_idle
from chaos.platform_faults import CONTROL_S, hit_controller, hit_gateway, hit_platform
from chaos.stage import WHOLE_S, Stage
from chaos.traffic import Traffic
from chaos.watch import NotInTime
from chaos.wire_faults import hit_wire
from tandem.cli import groups
from tandem.core.types import GroupState, Role
from tandem.fleet.control_client import ControlClient, ControlError
from tandem.fleet.plan import pool_of
from tandem.fleet.snapshot import read_snapshot
from tandem.state import StoreError

IDLE_S = 15.0
ORPHANS_S = 30.0
"""The same after their gateway has died: its entry in the store lives for 10 s more."""
CLOCK_S = 30.0
"""An answer tells when it was begun, in whole seconds."""
SLOW_S = 0.2
"""So late are replies of a slow Redis: more than limits wait for it, less than what stands still for good."""
STORE_S = 60.0
DRAIN_S = 60.0
_LOOK_S = 0.1


Struck = Callable[[], None]


async def carry_out(
    stage: Stage, traffic: Traffic, fault: Fault, rng: random.Random, struck: Struck = lambda: None
) -> Happening:
    """Do it, and return when the fleet has made it good, or has failed to. `struck` is called once a group is hit."""
    happening = Happening(kind=fault.kind, at=time.monotonic(), harms=fault.harms)
    try:
        await _do(stage, traffic, fault, rng, happening, struck)
    except (NotInTime, ControlError, StoreError, TimeoutError, OSError, psutil.Error) as error:
        happening.problem = str(error) or f"{type(error).__name__} after {time.monotonic() - happening.at:.0f} s"
    return happening


async def _do(
    stage: Stage, traffic: Traffic, fault: Fault, rng: random.Random, happening: Happening, struck: Struck
) -> None:
    match fault:
        case HitEngine():
            await hit_engine(stage, fault, rng, happening, struck)
        case HitGateway():
            await hit_gateway(stage, fault, rng, happening)
        case HitController():
            await hit_controller(stage, fault, happening)
        case HitPlatform():
            await hit_platform(stage, fault, rng, happening, struck)
        case HitRedis():
            names = set(stage.watch.desired)
            await _hit_redis(stage, fault)
            await _in_store(stage, names)
        case HitWire():
            await hit_wire(stage, fault, rng, happening)
        case HitNetwork():
            await _hit_network(stage, fault, rng, happening)
        case FillDisk(what=what, seconds=seconds):
            with _filled(stage.disks[what]):
                await asyncio.sleep(seconds)
        case JumpClock():
            await _jump_clock(stage, traffic, fault, happening)
        case Drain(role=role):
            await _drain(stage, role, rng, happening, struck)
        case ScaleDown(role=role):
            await _scale_down(stage, role, happening, struck)
        case Leave():
            await _leave(stage, traffic, fault, happening)
        case Orphan():
            await _orphan(stage, traffic, fault, happening)
        case _:
            raise AssertionError(f"nobody knows how to do {fault}")
    if happening.back is None:
        await stage.whole()
        happening.back = time.monotonic() - happening.at


async def _hit_redis(stage: Stage, fault: HitRedis) -> None:
    import redis

    server = stage.redis
    assert server is not None
    if fault.how == "hang":
        with server.frozen():
            await asyncio.sleep(fault.seconds)
        return
    if fault.how == "slow":
        until = time.monotonic() + fault.seconds
        while time.monotonic() < until:
            with server.frozen():
                await asyncio.sleep(SLOW_S)
            await asyncio.sleep(SLOW_S / 4)
        return
    path = Path(server.url.removeprefix("unix://"))
    dump = path.parent / "dump.rdb"
    if fault.how == "kill":
        await asyncio.to_thread(redis.Redis(unix_socket_path=str(path)).save)
    else:
        dump.unlink(missing_ok=True)
    await asyncio.to_thread(server.stop)
    await asyncio.sleep(fault.seconds)
    await asyncio.to_thread(server.start)


async def _in_store(stage: Stage, names: set[str]) -> None:
    """Wait until the store itself names these groups, and all replicas: a watch may not have seen yet that it was
    emptied.
    """
    replicas = stage.shape.replicas
    ends = time.monotonic() + STORE_S
    while True:
        told = "the store does not answer"
        with contextlib.suppress(StoreError):
            snapshot = await read_snapshot(stage.watch.store)
            ready = {group.group for group in snapshot.groups if group.state is GroupState.READY}
            if (
                names <= ready
                and len(snapshot.gateways) >= replicas
                and names <= {spec.group for spec in snapshot.desired}
            ):
                return
            told = f"ready groups: {sorted(ready)}, {len(snapshot.gateways)} gateways, {len(snapshot.desired)} wanted"
        if time.monotonic() > ends:
            raise NotInTime(f"{STORE_S:g} s after Redis came back, the store is not whole: {told}")
        await asyncio.sleep(_LOOK_S)


async def _hit_network(stage: Stage, fault: HitNetwork, rng: random.Random, happening: Happening) -> None:
    prefill, decode = (rng.choice(stage.watch.of(role)).ranks[0].host for role in (Role.PREFILL, Role.DECODE))
    happening.where = f"{prefill} and {decode}"
    happening.at = time.monotonic()
    made = network.dropped(prefill, decode) if fault.how == "drop" else network.slowed(decode, fault.kbit)
    with made:
        await asyncio.sleep(fault.seconds)


async def _drain(stage: Stage, role: Role, rng: random.Random, happening: Happening, struck: Struck) -> None:
    watch = stage.watch
    group = max(watch.of(role), key=lambda one: (watch.failures(one.group), rng.random())).group
    happening.where = group
    with stage.hitting(group):
        await _drained(stage, role, group, happening, struck)


async def _drained(stage: Stage, role: Role, group: str, happening: Happening, struck: Struck) -> None:
    watch = stage.watch
    spec = watch.desired[group]
    happening.at = time.monotonic()
    await _told(stage, lambda control: control.drain(group, DRAIN_S, migrate=True))
    struck()
    await watch.until(
        f"{group} is gone", lambda: group not in watch.groups and group not in watch.desired, DRAIN_S + 30
    )
    happening.noticed = time.monotonic() - happening.at
    happening.reason = "gone"
    await _told(stage, lambda control: control.put_group(spec))
    await watch.until(f"{group} is wanted again", lambda: group in watch.desired, 20)
    await watch.until(f"{group} is ready again", lambda: watch.ready(role), WHOLE_S)
    happening.back = time.monotonic() - happening.at


async def _scale_down(stage: Stage, role: Role, happening: Happening, struck: Struck) -> None:
    """As `tandem scale` does it; that picks the group."""
    watch = stage.watch
    before = {group.group for group in watch.of(role)}
    happening.at = time.monotonic()
    await _scale(stage, role, len(before) - 1)
    await watch.until(
        f"a {role} group drains",
        lambda: any(name not in watch.desired or watch.desired[name].draining for name in before),
        20,
    )
    struck()
    (group,) = (name for name in before if name not in watch.desired or watch.desired[name].draining)
    happening.where = group
    with stage.hitting(group):
        await watch.until(
            f"{group} is gone", lambda: group not in watch.groups and group not in watch.desired, stage.drain_s + 30
        )
        happening.noticed = time.monotonic() - happening.at
        happening.reason = "gone"
        await _scale(stage, role, len(before))
        await watch.until(
            f"{role} has {len(before)} groups again",
            lambda: len(watch.of(role)) == len(before) and watch.ready(role),
            WHOLE_S,
        )
    happening.back = time.monotonic() - happening.at


async def _scale(stage: Stage, role: Role, number: int) -> None:
    await _told(stage, lambda control: groups._scale(control, role, pool_of(stage.fleet.config, role), number))


async def _told(stage: Stage, tell: Callable[[ControlClient], Awaitable[object]]) -> None:
    """Tell the controller something that may be told twice. Another fault may have killed it meanwhile, and the next
    one listens elsewhere: then it is told again."""
    ends = time.monotonic() + CONTROL_S
    while True:
        try:
            async with stage.control() as control:
                await tell(control)
            return
        except ControlError as error:
            if error.code != "UNAVAILABLE" or time.monotonic() > ends:
                raise
        await asyncio.sleep(0.5)


async def _leave(stage: Stage, traffic: Traffic, fault: Leave, happening: Happening) -> None:
    async with traffic.held():
        await _idle(stage, IDLE_S)
        happening.at = time.monotonic()
        await traffic.leave(fault.clients)
        gone = time.monotonic()
        last = await _idle(stage, IDLE_S)
        happening.noticed = time.monotonic() - gone
        happening.reason = "all engines idle after the last client left"
        happening.where = f"last: {last}"
        if happening.noticed > fault.within:
            happening.problem = f"engines were busy for {happening.noticed:.1f} s after their clients had left: {last}"


async def _orphan(stage: Stage, traffic: Traffic, fault: Orphan, happening: Happening) -> None:
    async with traffic.held():
        await _idle(stage, IDLE_S)
        replicas = list(stage.watch.gateways.values())
        async with traffic.endless(fault.streams, fault.tokens):
            happening.at = time.monotonic()
            for replica in replicas:
                os.kill(replica.pid, signal.SIGKILL)
        happening.where = f"{len(replicas)} replicas, last: {await _idle(stage, ORPHANS_S)}"
        happening.noticed = time.monotonic() - happening.at
        happening.reason = "all engines idle"
        gone = {replica.replica for replica in replicas}
        await stage.watch.until(
            "the dead replicas are out of the store", lambda: not gone & stage.watch.gateways.keys(), NOTICE_S
        )
        await stage.whole()


async def _idle(stage: Stage, within: float) -> str:
    """Wait until every engine says that it is idle now; return what was last there."""
    return await all_idle(lambda: stage.ready_urls, within, since=time.time())


async def _jump_clock(stage: Stage, traffic: Traffic, fault: JumpClock, happening: Happening) -> None:
    assert stage.side is not None
    stage.side.set_clock(fault.by)
    await asyncio.sleep(fault.seconds)
    ahead = await traffic.clock_of_side() - time.time()
    stage.side.set_clock(0)
    happening.where = f"{ahead:+.0f} s"
    if abs(ahead - fault.by) > CLOCK_S:
        happening.problem = (
            f"the gateway's clock was {ahead:+.0f} s ahead, not {fault.by:+.0f} s: the fault did nothing"
        )


@contextlib.contextmanager
def _filled(disk: Path) -> Iterator[None]:
    ballast = disk / "ballast"
    try:
        with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))
        with contextlib.suppress(OSError), open(ballast, "ab", buffering=0) as file:
            while True:  # the last pages
                file.write(bytes(64))
        yield
    finally:
        ballast.unlink(missing_ok=True)
