"""Plays a scenario: brings the stage up, lets traffic run, does one fault after the other, and judges."""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import time
from collections.abc import Callable, Container
from pathlib import Path

import psutil

from chaos import checks
from chaos.engine_faults import Happening
from chaos.faults import Fault
from chaos.inject import carry_out
from chaos.measure import Report, moved, rows
from chaos.recipes import Expected
from chaos.scenarios import Scenario
from chaos.stage import WHOLE_S, Stage, staged
from chaos.traffic import References, Traffic, take_references
from chaos.watch import NotInTime
from support.fleet import shared_memory
from tandem.engine.http1 import HttpFailure
from tandem.state import StoreError

Show = Callable[[str], None]
_PROGRESS_S = 90.0
"""Traffic that has brought no token for so long has stopped: that is a failure in itself."""


async def play(
    scenario: Scenario,
    count: int,
    seed: int,
    *,
    home: Path,
    cache: Path,
    keep: Path | None = None,
    show: Show = print,
    until: float | None = None,
) -> Report:
    """Play `count` faults, and what is asked for among them.

    Args:
        home: for the fleet's files (`TANDEM_HOME`).
        cache: where the oracle's answers are kept.
        keep: where logs and usage records are copied to at the end; None = nowhere.
        until: on the monotonic clock; no fault begins later. None = all do.
    """
    began, memory = time.monotonic(), shared_memory()
    async with contextlib.AsyncExitStack() as stack:
        show(f"{scenario.name}: starting the fleet")
        stage = await stack.enter_async_context(staged(scenario.shape, home))
        if keep is not None:
            stack.callback(_keep, stage, keep)
        show(f"{scenario.name}: taking references")
        expected = Expected(stage.model, cache)
        references = await take_references(stage.fleet.base, stage.fleet.status_model, expected)
        play_ = _Play(scenario, stage, references, seed, show)
        wrong = await play_.run(count, until)
        found, ports = stage.fleet.processes(), stage.fleet.listening()
        records = checks.records(stage)
        if "answers" in scenario.checks:
            wrong += [f"moved: {line}" for line in checks.moved(play_.happened, play_.traffic.done, records)]
    if "nothing left" in scenario.checks:
        wrong += [f"nothing left: {line}" for line in checks.nothing_left(stage.fleet.record.run, memory, found, ports)]
    done = play_.traffic.done
    found_rows = rows(play_.happened, done, records)
    wrong += [f"aims: {line}" for aim in scenario.aims if (line := aim.missed(found_rows))]
    return Report(
        scenario=scenario.name,
        seed=seed,
        seconds=time.monotonic() - began,
        requests=len(done),
        tokens=play_.traffic.tokens,
        faults=play_.happened,
        rows=found_rows,
        moved=moved(done, records),
        errors=dict(checks.codes(done)),
        wrong=wrong,
    )


class _Play:
    def __init__(self, scenario: Scenario, stage: Stage, references: References, seed: int, show: Show) -> None:
        self.happened: list[Happening] = []
        self._scenario = scenario
        self._stage = stage
        self._references = references
        self._rng = random.Random(f"{scenario.name} {seed}")
        self._show = show
        self.traffic = Traffic(
            stage.bases, stage.fleet.status_model, references, random.Random(seed), silence_s=scenario.silence_s
        )
        self._going: dict[asyncio.Task[Happening], Fault] = {}
        self._done = 0

    async def run(self, count: int, until: float | None) -> list[str]:
        """All faults for which there is time, then all checks; returns what was wrong."""
        self.traffic.start(self._scenario.clients, self._scenario.pause_s)
        wrong: list[str] = []
        faults = self._scenario.draw(count, self._rng)
        try:
            for number, fault in enumerate(faults):
                if number and number % self._scenario.rest == 0:
                    wrong += [f"after {number} faults: {line}" for line in await self._rest()]
                if until is not None and time.monotonic() >= until:
                    break
                await self._room_for(fault)
                await self.traffic.progress(self._rng.randint(*self._scenario.between), _PROGRESS_S)
                await self._begin(fault, len(faults))
            await self._end_of(list(self._going))
            await self.traffic.progress(50, _PROGRESS_S)
            await self.traffic.stop()
        except (NotInTime, TimeoutError) as error:
            wrong.append(f"the run stopped after {len(self.happened)} of {len(faults)} faults: {error!r}")
            for task in self._going:
                task.cancel()
        wrong += [f"{one.kind} ({one.where}): {one.problem}" for one in self.happened if one.problem]
        return wrong + await self._judge()

    async def _room_for(self, fault: Fault) -> None:
        """Wait until every role that it takes a group of has a spare."""
        if not self._scenario.overlap:
            await self._end_of(list(self._going))
            await self._stage.whole()
        elif fault.takes:
            await self._end_of([task for task, other in self._going.items() if other.takes & fault.takes])
            roles = tuple(fault.takes)
            await self._stage.watch.until(
                f"all groups of {roles} are ready", lambda: self._stage.watch.ready(*roles), WHOLE_S
            )

    async def _begin(self, fault: Fault, of: int) -> None:
        self._show(f"{self._scenario.name}: {self._done + 1}/{of} {fault.kind}")
        self._done += 1
        struck = asyncio.Event()
        task = asyncio.create_task(carry_out(self._stage, self.traffic, fault, self._rng, struck.set), name=fault.kind)
        self._going[task] = fault
        if self._scenario.overlap and fault.takes:
            hit = asyncio.create_task(struck.wait())
            await asyncio.wait({task, hit}, return_when=asyncio.FIRST_COMPLETED)
            hit.cancel()
        else:
            await self._end_of([task])
        # The promise is about any single thing that dies: nobody is hit again before he has gone on.
        await self.traffic.settled(_PROGRESS_S)

    async def _end_of(self, tasks: list[asyncio.Task[Happening]]) -> None:
        for task in tasks:
            happening = await task
            self.happened.append(happening)
            del self._going[task]
            if happening.problem:
                self._show(f"  {happening.kind} ({happening.where}): {happening.problem}")

    async def _rest(self) -> list[str]:
        """Nothing new is asked until everything was looked at that must be empty then."""
        await self._end_of(list(self._going))
        await self._stage.whole()
        async with self.traffic.held():
            return await self._judge(frozenset({"rooms", "engines", "groups", "leases", "processes"}))

    async def _judge(self, only: Container[str] = checks.ALL_CHECKS) -> list[str]:
        scenario, wrong = self._scenario, list[str]()
        for name in [name for name in scenario.checks if name in only]:
            self._show(f"{scenario.name}: checking {name}")
            try:
                found = await self._look(name)
            except (HttpFailure, StoreError, psutil.Error, OSError) as error:
                found = [f"this could not be looked at: {error!r}"]
            wrong += [f"{name}: {line}" for line in found]
        return wrong

    async def _look(self, check: str) -> list[str]:
        stage, done = self._stage, self.traffic.done
        match check:
            case "answers":
                found = checks.answers(done, self._references, self._scenario.allows)
                return [*found, *(f"{name} has not ended" for name in self.traffic.running)]
            case "usage":
                return await checks.usage(stage, done, self._references)
            case "rooms":
                return await checks.rooms(stage)
            case "engines":
                return await checks.engines(stage)
            case "groups":
                return await checks.groups(stage)
            case "leases":
                return await checks.leases(stage)
            case "processes":
                return await checks.processes(stage)
        return []  # that is looked at after the fleet has stopped


def _keep(stage: Stage, folder: Path) -> None:
    target = folder / stage.shape.name
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    shutil.copytree(stage.fleet.folder.logs, target / "logs", ignore=shutil.ignore_patterns("ballast"))
    for number, usage in enumerate(stage.usage_folders):
        shutil.copytree(usage, target / f"usage-{number}", ignore=shutil.ignore_patterns("ballast"))
    if stage.side is not None:
        shutil.copy(stage.side.log, target / "side-gateway.log")
