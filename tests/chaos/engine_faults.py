"""Signals to the processes of engines, and how the fleet takes them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Callable

import msgspec
import psutil

from chaos.faults import HitEngine, Process
from chaos.idle import busy_lines
from chaos.stage import WHOLE_S, Stage
from chaos.watch import NotInTime, Seen
from tandem.core.types import Group, GroupState, Rank, Role
from tandem.engine.http1 import Pool

NOTICE_S = 30.0
"""A dead process that nobody has noticed by then is a failure of the fleet."""
WORK_S = 8.0
_LOOK_S = 0.02


class Happening(msgspec.Struct, kw_only=True):
    """A fault that was carried out. Times in seconds after `at`, which is on the monotonic clock; None = never."""

    kind: str
    at: float
    harms: bool = True
    """False: a drain or a scale-down, which somebody asked for."""
    where: str = ""
    noticed: float | None = None
    reason: str = ""
    """The group's, when it was noticed."""
    back: float | None = None
    problem: str = ""
    """What went wrong with it that is the fleet's fault."""
    legs: int = 0
    """That a fault on connections has hit, as far as that can be counted."""
    must_move: int = 0
    """Streams of the side gateway that must have taken another pair for it."""


async def hit_engine(
    stage: Stage, fault: HitEngine, rng: random.Random, happening: Happening, struck: Callable[[], None]
) -> None:
    """Send the signal; return when the group is ready again. It counts as struck once that was noticed: what else is
    done meanwhile must not be measured with it.
    """
    group = await one_at_work(stage, fault.role, rng, lambda group: fault.rank == "leader" or len(group.ranks) > 1)
    rank = group.ranks[0] if fault.rank == "leader" else rng.choice(group.ranks[1:])
    victim = process_of(rank, fault.process)
    happening.where = f"{group.group} rank {rank.rank}"
    with stage.hitting(group.group):
        await _hit(stage, fault, group, rank, victim, happening, struck)


async def _hit(
    stage: Stage,
    fault: HitEngine,
    group: Group,
    rank: Rank,
    victim: psutil.Process,
    happening: Happening,
    struck: Callable[[], None],
) -> None:
    watch = stage.watch
    engine = [victim, *psutil.Process(rank.pid).children(recursive=True)]
    happening.at = time.monotonic()
    if fault.how == "pause":
        async with stopped(victim.pid):
            await asyncio.sleep(fault.seconds)
        await watch.until(f"{group.group} is ready", lambda: watch.ready(fault.role), WHOLE_S)
        happening.back = time.monotonic() - happening.at
        if watch.groups[group.group].epoch != group.epoch:
            happening.noticed = happening.back
            happening.reason = "restarted, though it was only slow"
        return
    os.kill(victim.pid, signal.SIGKILL if fault.how == "kill" else signal.SIGSTOP)
    await made_good(stage, group, rank, happening, struck, NOTICE_S)
    if left := [process.pid for process in engine if process.is_running() and process.status() != "zombie"]:
        happening.problem = f"processes {left} of the old epoch live on"


async def made_good(
    stage: Stage, group: Group, rank: Rank, happening: Happening, struck: Callable[[], None], within: float
) -> None:
    """Wait until somebody has noticed what was done to a group's rank, and until the group is ready at a later epoch.
    One whose loss nobody has noticed `within` seconds is ended, for the run to go on.
    """
    watch = stage.watch
    try:
        seen = await _noticed(stage, group, happening.at, within)
        happening.noticed = seen.at - happening.at
        happening.reason = "gone" if seen.group is None else seen.group.reason
    except NotInTime as error:
        happening.problem = f"nobody noticed: {error}"
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank.pid, signal.SIGKILL)
    struck()
    later = group.epoch + 1
    await watch.until(
        f"{group.group} is ready at epoch {later}",
        lambda: (
            (now := watch.groups.get(group.group)) is not None and now.epoch >= later and now.state is GroupState.READY
        ),
        WHOLE_S,
    )
    happening.back = time.monotonic() - happening.at


async def one_at_work(
    stage: Stage, role: Role, rng: random.Random, able: Callable[[Group], bool] = lambda group: True
) -> Group:
    """A group that has a request right now, if one gets any in a while: a fault that hits nobody shows little."""
    pool = Pool()
    ends = time.monotonic() + WORK_S
    try:
        while True:
            found = [group for group in stage.watch.of(role) if able(group)]
            rng.shuffle(found)
            found.sort(key=lambda group: stage.watch.failures(group.group))
            for group in found:
                if await busy_lines(pool, group.group, group.url):
                    return group
            if time.monotonic() > ends:
                return found[0]
            await asyncio.sleep(_LOOK_S)
    finally:
        await pool.close()


async def _noticed(stage: Stage, group: Group, at: float, within: float) -> Seen:
    def change() -> Seen | None:
        return next(
            (
                seen
                for seen in stage.watch.since(group.group, at)
                if seen.group is None or seen.group.epoch > group.epoch or seen.group.state is GroupState.FAILED
            ),
            None,
        )

    await stage.watch.until(f"{group.group} is seen to have failed", lambda: change() is not None, within)
    found = change()
    assert found is not None
    return found


def process_of(rank: Rank, which: Process) -> psutil.Process:
    """A process of an engine; the main one where it has none of that kind (followers have no detokenizer)."""
    main = psutil.Process(rank.pid)
    if which == "main":
        return main
    children = main.children(recursive=True)
    return next((child for child in children if title(child).startswith(f"sglang::{which}")), main)


def title(process: psutil.Process) -> str:
    """Its command line, which SGLang and Ray set to what it is."""
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


@contextlib.asynccontextmanager
async def stopped(pid: int) -> AsyncIterator[None]:
    """Keep a process stopped."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
