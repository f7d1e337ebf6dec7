"""Signals to the processes around the engines: gateways, controller, rank actors, guards, Ray's own, the nursery."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Callable

import psutil

from chaos.engine_faults import NOTICE_S, Happening, made_good, one_at_work, stopped, title
from chaos.faults import HitController, HitGateway, HitPlatform
from chaos.stage import Stage
from tandem.core.types import GroupState, Rank
from tandem.fleet.control_client import ControlError

CONTROL_S = 60.0
HANG_S = 90.0
"""What stands still in Ray's or Serve's care must be replaced by then."""
GCS_PAUSE_S = 40.0
"""A GCS that dies three times within a minute ends the fleet, by design (docs/failures.md)."""
_LOOK_S = 0.1

Struck = Callable[[], None]


async def hit_platform(
    stage: Stage, fault: HitPlatform, rng: random.Random, happening: Happening, struck: Struck
) -> None:
    """Send the signal; return when what died was made good."""
    if fault.role is None:
        await _hit_single(stage, fault, happening)
        return
    # The head's node has no spare: with its raylet the fleet ends.
    head = _head(stage)
    group = await one_at_work(
        stage,
        fault.role,
        rng,
        lambda group: fault.which != "raylet" or any(rank.node != head for rank in group.ranks),
    )
    rank = rng.choice([rank for rank in group.ranks if fault.which != "raylet" or rank.node != head])
    victim = _of_rank(stage, fault, rank)
    engine = [psutil.Process(rank.pid), *psutil.Process(rank.pid).children(recursive=True)]
    happening.where = f"{group.group} rank {rank.rank}"
    happening.at = time.monotonic()
    # An actor that stands still is given up after 20 s without an answer, a node after 15 s.
    within = NOTICE_S if fault.how == "kill" else 1.5 * NOTICE_S
    with stage.hitting(group.group):
        os.kill(victim.pid, signal.SIGKILL if fault.how == "kill" else signal.SIGSTOP)
        await made_good(stage, group, rank, happening, struck, within)
    if left := await _living([victim, *engine]):
        happening.problem = f"processes {left} of the old epoch live on"


async def _hit_single(stage: Stage, fault: HitPlatform, happening: Happening) -> None:
    """What belongs to no group: another one takes its place, and no group restarts."""
    if fault.which == "GCS":
        await stage.pause_after("GCS", GCS_PAUSE_S)
    epochs = _epochs(stage)
    victim = _single(stage, fault)
    happening.at = time.monotonic()
    victim.kill()
    async with asyncio.timeout(CONTROL_S):
        while not [one for one in _singles(stage, fault) if one.pid != victim.pid]:
            await asyncio.sleep(_LOOK_S)
        happening.back = time.monotonic() - happening.at
        while not await _answers(stage):
            await asyncio.sleep(_LOOK_S)
    await stage.whole()
    happening.problem = _restarted(stage, epochs, happening.at)


async def hit_gateway(stage: Stage, fault: HitGateway, rng: random.Random, happening: Happening) -> None:
    """Returns when its entry is out of the store (a pause: when that is over); the caller waits for another replica."""
    replica = rng.choice(sorted(stage.watch.gateways.values(), key=lambda one: one.replica))
    happening.where = replica.replica
    happening.at = time.monotonic()
    if fault.how == "pause":
        async with stopped(replica.pid):
            await asyncio.sleep(fault.seconds)
        return
    victim = psutil.Process(replica.pid)
    victim.send_signal(signal.SIGKILL if fault.how == "kill" else signal.SIGSTOP)
    watch = stage.watch
    await watch.until(f"{replica.replica} is out of the store", lambda: replica.replica not in watch.gateways, NOTICE_S)
    happening.noticed = time.monotonic() - happening.at
    happening.reason = "its entry in the store has expired"
    await stage.whole()
    happening.back = time.monotonic() - happening.at
    try:
        await asyncio.to_thread(victim.wait, HANG_S)
    except psutil.TimeoutExpired:
        happening.problem = f"nobody has ended the frozen replica in {HANG_S:g} s"
        victim.kill()


def controller(stage: Stage) -> psutil.Process:
    """The process of the fleet's controller (not Serve's)."""
    return next(one for one in _titled(stage, "ray::Controller"))


async def hit_controller(stage: Stage, fault: HitController, happening: Happening) -> None:
    """Returns when a controller answers; none of the groups that nobody hit may have been restarted."""
    epochs = _epochs(stage)
    victim = controller(stage)
    happening.at = time.monotonic()
    match fault.how:
        case "pause":
            async with stopped(victim.pid):
                await asyncio.sleep(fault.seconds)
        case "kill":
            victim.kill()
            await asyncio.to_thread(victim.wait, 10)
        case "freeze":
            victim.suspend()
            try:
                await asyncio.to_thread(victim.wait, HANG_S)
                happening.noticed = time.monotonic() - happening.at
                happening.reason = "it was ended"
            except psutil.TimeoutExpired:
                happening.problem = f"nobody has noticed in {HANG_S:g} s that the controller stands still"
                victim.kill()
    async with asyncio.timeout(CONTROL_S):
        while not await _answers(stage):
            await asyncio.sleep(_LOOK_S)
    happening.back = time.monotonic() - happening.at
    await stage.whole()
    happening.problem = happening.problem or _restarted(stage, epochs, happening.at)


def _epochs(stage: Stage) -> dict[str, int]:
    """Of the groups that are ready."""
    return {name: group.epoch for name, group in stage.watch.groups.items() if group.state is GroupState.READY}


def _restarted(stage: Stage, epochs: dict[str, int], at: float) -> str:
    """Of the groups that were ready and that no other fault has hit, those that have another epoch."""
    now = stage.watch.groups
    anew = [
        name
        for name, epoch in epochs.items()
        if not stage.hit_since(name, at) and (name not in now or now[name].epoch != epoch)
    ]
    return f"{sorted(anew)} were restarted with it" if anew else ""


async def _answers(stage: Stage) -> bool:
    try:
        async with stage.control() as control:
            return bool((await control.load()).groups)
    except ControlError:
        return False


async def _living(processes: list[psutil.Process], within: float = 5.0) -> list[int]:
    """Those that live on, given that the end of some takes a moment."""
    ends = time.monotonic() + within
    while left := [one.pid for one in processes if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]:
        if time.monotonic() > ends:
            break
        await asyncio.sleep(_LOOK_S)
    return left


# -- which process is which


def _titled(stage: Stage, begin: str) -> list[psutil.Process]:
    return [process for process in stage.fleet.processes() if title(process).startswith(begin)]


def _raylets(stage: Stage) -> dict[str, psutil.Process]:
    """By the node's id."""
    found = {}
    for process in stage.fleet.processes():
        words = title(process).split()
        if words and words[0].endswith("/raylet"):
            node = next(word.partition("=")[2] for word in words if word.startswith("--node_id="))
            found[node] = process
    return found


def _head(stage: Stage) -> str:
    """Id of the node that may not end."""
    return next(node for node, process in _raylets(stage).items() if "--head" in title(process).split())


def _of_rank(stage: Stage, fault: HitPlatform, rank: Rank) -> psutil.Process:
    raylet = _raylets(stage)[rank.node]
    match fault.which:
        case "raylet":
            return raylet
        case "guard":
            guard = psutil.Process(rank.pid).parent()
            assert guard is not None
            return guard
        case "rank actor":
            # A node has room for one rank.
            return next(child for child in raylet.children() if title(child).startswith("ray::RankActor"))
    raise AssertionError(f"a rank has no {fault.which}")


def _singles(stage: Stage, fault: HitPlatform) -> list[psutil.Process]:
    """The process, or the ones that take its place: none in between."""
    match fault.which:
        case "GCS":
            return [one for one in stage.fleet.processes() if title(one).partition(" ")[0].endswith("/gcs_server")]
        case "Serve controller":
            return _titled(stage, "ray::ServeController")
        case "nursery":
            # Guards of engines that it forked have its title, but are others' children once it is dead.
            host = stage.fleet.host.pid
            return [
                one
                for one in stage.fleet.processes()
                if "tandem.engine.nursery" in title(one).split() and one.ppid() == host
            ]
    raise AssertionError(f"{fault.which} belongs to a group")


def _single(stage: Stage, fault: HitPlatform) -> psutil.Process:
    (found,) = _singles(stage, fault)
    return found
