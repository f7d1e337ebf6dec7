"""Traffic, faults and checks, as data."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Sequence

import msgspec

from chaos.aims import Aim
from chaos.checks import ALL_CHECKS
from chaos.client import SILENCE_S
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
    Place,
    Process,
    ScaleDown,
    Signal,
    WireHow,
)
from chaos.side_gateway import fake_time
from chaos.stage import Shape, spare
from tandem.core.types import Role

PREFILL, DECODE = Role.PREFILL, Role.DECODE


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """What is done to a fleet, and what must hold afterwards."""

    name: str
    shape: Shape
    faults: tuple[Fault, ...]
    clients: int = 3
    """Of each gateway, each with one stream after the other."""
    silence_s: float = SILENCE_S
    """After so long without a word clients drop their connection and ask again."""
    pause_s: float = 0.0
    """The most that a client waits before it asks again."""
    between: tuple[int, int] = (20, 150)
    """Tokens that clients are given from one fault to the next: drawn between these."""
    overlap: bool = False
    """A fault comes while groups still start from an earlier one, as long as each role has a spare."""
    allows: frozenset[str] = frozenset()
    """Codes of errors that an answer may be."""
    checks: tuple[str, ...] = ALL_CHECKS
    rest: int = 12
    """After so many faults nothing new is asked and everything is looked at: what an engine has kept would be gone
    with it when a later fault ends it."""
    aims: tuple[Aim, ...] = ()
    share: float = 0.0
    """Of the faults of a long run; where nothing does harm, so many come on top of them."""

    @property
    def harms(self) -> bool:
        """Whether any of it is a fault."""
        return any(fault.harms for fault in self.faults)

    @property
    def counted(self) -> tuple[Fault, ...]:
        """Those that do harm; where none does, all."""
        return tuple(fault for fault in self.faults if fault.harms or not self.harms)

    def draw(self, count: int, rng: random.Random) -> list[Fault]:
        """`count` faults, each as often as the others, in an order of chance. Drains and scale-downs come among them,
        and are not counted where there is anything else."""
        counted, drawn, left = set(self.counted), list[Fault](), count
        while left:
            for fault in rng.sample(self.faults, len(self.faults)):
                if fault not in counted:
                    drawn.append(fault)
                elif left:
                    drawn.append(fault)
                    left -= 1
        return drawn


# One group of each role has two ranks, the other one.
_MIXED = (spare(PREFILL, 1), spare(DECODE, 1))


_PARTS: tuple[tuple[Place, Process], ...] = (
    ("leader", "main"),
    ("leader", "scheduler"),
    ("leader", "detokenizer"),
    ("follower", "main"),
    ("follower", "scheduler"),
)
_SIGNALS: tuple[Signal, ...] = ("kill", "freeze", "pause")
_ENGINE: tuple[Fault, ...] = tuple(
    HitEngine(role=role, rank=rank, process=process, how=how)
    for role in Role
    for rank, process in _PARTS
    for how in _SIGNALS
)

_WIRES: tuple[tuple[WireHow, float], ...] = (
    ("cut", 0),
    ("cut_after", 2),
    ("refuse", 1),
    ("stall", 2),
    ("stall", 14),
    ("delay", 3),
)
_WIRE: tuple[Fault, ...] = tuple(
    HitWire(role=role, how=how, seconds=seconds) for role in Role for how, seconds in _WIRES
)

_CLOCK: tuple[Fault, ...] = (JumpClock(by=3600), JumpClock(by=-3600)) if fake_time() else ()
_DISK: tuple[Fault, ...] = (FillDisk(what="logs"), FillDisk(what="usage")) if os.geteuid() == 0 else ()
_HAS_REDIS = shutil.which("redis-server") is not None

_PLATFORM: tuple[Fault, ...] = (
    *(HitPlatform(which=which, role=role) for which in ("rank actor", "guard", "raylet") for role in Role),
    *(HitPlatform(which="rank actor", role=role, how="freeze") for role in Role),
    *(HitPlatform(which=which) for which in ("GCS", "nursery", "Serve controller")),
    HitGateway(how="kill"),
    HitGateway(how="freeze"),
    HitController(how="freeze"),
)
"""What stands around the engines. The head's raylet is not among it: it has no spare, the fleet ends with it."""

SCENARIOS: Sequence[Scenario] = (
    Scenario(
        name="engines",
        shape=Shape(name="chaos-engines", further=_MIXED),
        # A group that fails again and again waits up to a minute before it starts again; one that was drained and
        # made anew does not. So drains between the deaths keep the pace.
        faults=(*_ENGINE, *(Drain(role=role) for role in Role for _ in range(3))),
        overlap=True,
        clients=2,
        pause_s=1.0,
        share=0.37,
    ),
    Scenario(
        name="front",
        shape=Shape(name="chaos-front", further=_MIXED),
        faults=(
            HitGateway(how="kill"),
            HitGateway(how="pause"),
            HitController(how="kill"),
            HitController(how="pause"),
            *_WIRE,
            *_CLOCK,
            *_DISK,
            Leave(),
            Orphan(),
        ),
        clients=2,
        pause_s=1.0,
        share=0.33,
    ),
    Scenario(
        name="platform",
        shape=Shape(name="chaos-platform", further=_MIXED, redis=_HAS_REDIS, side=False),
        faults=_PLATFORM,
        clients=4,
        pause_s=1.0,
        # Whoever asked a gateway that stands still hears nothing of it.
        silence_s=20.0,
        share=0.13,
    ),
    Scenario(
        name="drains",
        shape=Shape(name="chaos-drains", groups=2, nodes=1, side=False),
        faults=tuple(make(role=role) for make in (Drain, ScaleDown) for role in Role),
        overlap=True,
        # Engines that start are to have the processors, too: else a hundred drains take an hour.
        pause_s=1.5,
        between=(5, 50),
        share=0.20,
    ),
    *(
        [
            Scenario(
                name="redis",
                shape=Shape(name="chaos-redis", groups=2, nodes=1, redis=True, side=False),
                faults=(
                    HitRedis(how="hang"),
                    HitRedis(how="kill"),
                    HitRedis(how="empty"),
                    HitRedis(how="hang", seconds=8),
                    HitRedis(how="slow", seconds=6),
                    HitGateway(how="kill"),
                ),
                share=0.12,
            )
        ]
        if _HAS_REDIS
        else []
    ),
    *(
        [
            Scenario(
                name="network",
                shape=Shape(name="chaos-network", groups=2, nodes=1, replicas=1, side=False, apart=True),
                faults=(HitNetwork(how="drop"), HitNetwork(how="slow"), HitNetwork(how="drop", seconds=20)),
                share=0.05,
            )
        ]
        if os.geteuid() == 0 and shutil.which("nft") and shutil.which("tc")
        else []
    ),
)

SLICE = Scenario(
    name="slice",
    shape=Shape(name="chaos-slice", further=_MIXED, redis=_HAS_REDIS),
    overlap=True,
    clients=2,
    pause_s=1.0,
    between=(10, 80),
    faults=(
        HitEngine(role=PREFILL, process="main"),
        HitEngine(role=DECODE, process="main"),
        HitEngine(role=PREFILL, rank="follower", process="scheduler"),
        HitEngine(role=DECODE, rank="follower"),
        HitEngine(role=PREFILL, process="detokenizer", how="freeze"),
        HitEngine(role=DECODE, process="scheduler", how="freeze"),
        HitEngine(role=PREFILL, process="scheduler", how="pause"),
        HitEngine(role=DECODE, process="scheduler", how="pause"),
        HitGateway(how="kill"),
        HitController(how="kill"),
        HitPlatform(which="rank actor", role=DECODE),
        HitPlatform(which="raylet", role=PREFILL),
        HitPlatform(which="GCS"),
        HitWire(role=PREFILL, how="cut"),
        HitWire(role=DECODE, how="cut"),
        HitWire(role=DECODE, how="cut_after", seconds=2),
        HitWire(role=PREFILL, how="refuse", seconds=1),
        HitWire(role=DECODE, how="stall", seconds=2),
        HitWire(role=PREFILL, how="delay", seconds=2),
        *((HitRedis(how="hang"), HitRedis(how="kill"), HitRedis(how="slow")) if _HAS_REDIS else ()),
        *_CLOCK,
        *_DISK,
        Drain(role=PREFILL),
        Drain(role=DECODE),
        ScaleDown(role=DECODE),
        Leave(),
        Orphan(),
    ),
)
"""A fault of most kinds, for CI: without those that take a minute, or machines of their own."""

DEATHS = Scenario(
    name="deaths",
    shape=Shape(name="chaos-deaths", further=_MIXED, side=False),
    clients=4,
    pause_s=1.0,
    faults=(
        *(
            HitEngine(role=role, rank=rank, process=process, how=how)
            for role in Role
            for rank, process in _PARTS
            for how in ("kill", "freeze")
        ),
        *(Drain(role=role) for role in Role for _ in range(3)),
    ),
    aims=(
        Aim(kinds="kill decode", wait="next_after", within=1.0),
        Aim(kinds="kill prefill", wait="first", within=2.0),
    ),
)
"""Engines die one at a time, each while all other groups are ready: how long do streams wait for their next token?"""

LEAVING = Scenario(
    name="leaving",
    shape=Shape(name="chaos-leaving", side=False),
    clients=2,
    between=(5, 30),
    faults=(Leave(within=1.0), Leave(within=1.0), Leave(within=1.0), Leave(within=1.0), Orphan()),
)
"""On a fleet that has nothing else to do: how soon are engines idle when their clients have gone?"""


def left_out() -> list[str]:
    """What this machine cannot do, and why."""
    missing = []
    if not _CLOCK:
        missing.append("jumps of the clock: there is no libfaketime")
    if not _HAS_REDIS:
        missing.append("all of Redis: there is no redis-server")
    if not _DISK:
        missing.append("full disks: only root can make small ones")
    if all(scenario.name != "network" for scenario in SCENARIOS):
        missing.append("the network between machines: it takes root, nft and tc")
    return missing


def by_name(name: str) -> Scenario:
    return next(scenario for scenario in (*SCENARIOS, SLICE, DEATHS, LEAVING) if scenario.name == name)
