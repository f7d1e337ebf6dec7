"""Connections between the side gateway and one group: cut, refused, stalled, delayed, while a leg goes over them."""

from __future__ import annotations

import asyncio
import random
import time

from chaos.engine_faults import Happening
from chaos.fault_proxy import FaultProxy
from chaos.faults import HitWire
from chaos.stage import Stage
from chaos.watch import NotInTime
from tandem.core.types import Role

LEG_S = 60.0
"""By then a client of the side gateway must have had a leg that can be hit."""
_LOOK_S = 0.005
_ANSWER_BYTES = {Role.PREFILL: 300, Role.DECODE: 4000}
"""Fewer than most answers have."""


async def hit_wire(stage: Stage, fault: HitWire, rng: random.Random, happening: Happening) -> None:
    """Do it to a group that has a leg, in mid-stream if it is a decode group. Raises NotInTime if none has one."""
    name, proxy = await _one_with_a_leg(stage, fault.role, rng)
    streaming = proxy.legs_streaming if fault.role is Role.DECODE else 0
    happening.where = f"{name}, {proxy.legs_open} legs, {streaming} in mid-stream"
    before, streams = _hit(proxy, fault), proxy.legs_open
    happening.at = time.monotonic()
    try:
        match fault.how:
            case "cut":
                happening.must_move = streaming
                proxy.cut()
            case "cut_after":
                await _cut_after(proxy, fault, rng)
            case "refuse":
                proxy.refusing = True
                proxy.cut_idle()
                await asyncio.sleep(fault.seconds)
                await _refused(proxy, name, before)
                happening.must_move = 1
            case "stall":
                proxy.stall()
                await asyncio.sleep(fault.seconds)
            case "delay":
                proxy.delay_s = 0.3
                await asyncio.sleep(fault.seconds)
    finally:
        proxy.mend()
    happening.legs = _hit(proxy, fault) - before
    if fault.how in ("cut", "stall", "delay"):
        happening.legs += streams
    happening.back = time.monotonic() - happening.at


async def _cut_after(proxy: FaultProxy, fault: HitWire, rng: random.Random) -> None:
    """Whose answer has fewer bytes left gets through: then others are cut, until it has hit one."""
    before, ends = proxy.legs_cut, time.monotonic() + LEG_S
    most = _ANSWER_BYTES[fault.role]
    while True:
        proxy.cut_after(fault.bytes or rng.randrange(1, most))
        await asyncio.sleep(fault.seconds)
        if proxy.legs_cut > before:
            return
        if time.monotonic() > ends:
            raise NotInTime(f"in {LEG_S:g} s no leg was cut after some of its bytes")


async def _one_with_a_leg(stage: Stage, role: Role, rng: random.Random) -> tuple[str, FaultProxy]:
    """A group as it is when this returns: nothing else runs until the caller waits."""
    assert stage.side is not None
    ends = time.monotonic() + LEG_S
    while True:
        names = {group.group for group in stage.watch.of(role)}
        proxies = {name: proxy for name, proxy in stage.side.proxies.items() if name in names}
        found = [
            (name, proxy)
            for name, proxy in proxies.items()
            if (proxy.legs_streaming if role is Role.DECODE else proxy.legs_open)
        ]
        if found:
            return rng.choice(found)
        if time.monotonic() > ends:
            raise NotInTime(f"for {LEG_S:g} s no {role} group has had a leg of the side gateway: the fault hit nobody")
        # Bytes that pass ring no bell.
        await asyncio.sleep(_LOOK_S)


async def _refused(proxy: FaultProxy, name: str, before: int) -> None:
    ends = time.monotonic() + LEG_S
    while proxy.legs_refused == before:
        if time.monotonic() > ends:
            raise NotInTime(f"for {LEG_S:g} s no leg was sent to {name}: nobody was refused")
        await asyncio.sleep(_LOOK_S)


def _hit(proxy: FaultProxy, fault: HitWire) -> int:
    """Legs that a fault of this kind has hit, ever; those that were open when it began are not in it."""
    match fault.how:
        case "cut_after":
            return proxy.legs_cut
        case "refuse":
            return proxy.legs_refused
    return proxy.legs
