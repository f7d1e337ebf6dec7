"""Carries out what the state machine of one group asks for, with Ray, and reports back what came of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import msgspec
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError

from tandem.core.group_events import (
    Action,
    Adopted,
    Event,
    LoadWeights,
    Place,
    Placed,
    RankDied,
    RankReady,
    RankStarted,
    Release,
    Released,
    RoomsClosed,
    StartFailed,
    StartRanks,
    Stopped,
    StopRanks,
    Waiting,
    WatchRooms,
    WeightsFailed,
    WeightsLoaded,
)
from tandem.core.group_record import with_own_weights
from tandem.core.kv_source import KvSource
from tandem.core.types import Group, GroupSpec, GroupState, Rank, RankState
from tandem.engine.launch import RankEndpoints
from tandem.fleet import placement
from tandem.fleet.engines import Engines, NoEngineError
from tandem.fleet.rank import (
    DIST,
    HTTP,
    KV_EVENTS,
    START_S,
    Prepared,
    RankActor,
    RankName,
    RankSettings,
    RankStatus,
    bootstrap_place,
)
from tandem.fleet.rank_actors import answer, find_actor, kill_actor, make_actor, named_ranks, sentence
from tandem.fleet.rooms import RoomCounter
from tandem.fleet.weights import WeightLoader, WeightsError

_ACTOR_S = 60.0
"""For a rank's actor to start and answer; its node may be busy importing."""
_WATCH_S, _SILENT_S = 5.0, 15.0
"""Length of one long poll of a rank; a rank that has not answered after _SILENT_S more is lost."""
_ADOPT_S = 10.0
_STOP_S = 30.0
"""Beyond the grace, until a rank that does not stop is killed with its actor."""
_RETRY_S = 1.0
_GONE_S = 0.02
"""Ray forgets a killed actor's name soon, and tells nobody when."""

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class HandsSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What the hands of all groups share. Times in seconds."""

    rank: RankSettings
    stop_grace: float = 10.0
    """Between SIGTERM and SIGKILL for a group that leaves; one that failed is killed at once."""
    quiet: float = 1.0
    """A group must be without requests for so long: a gateway that learned late of the drain may still send one."""


class Hands:
    """The hands of one group. `post` takes their events; `broken` is told of a failure that nobody foresaw."""

    def __init__(
        self,
        group: str,
        engines: Engines,
        settings: HandsSettings,
        weights: WeightLoader,
        *,
        post: Callable[[Event], None],
        broken: Callable[[BaseException], None],
    ) -> None:
        self._group = group
        self._engines = engines
        self._settings = settings
        self._weights = weights
        self._post = post
        self._broken = broken
        self._rooms = RoomCounter()
        self._work: dict[str, asyncio.Task[None]] = {}
        self._watches: set[asyncio.Task[None]] = set()
        self._creating: asyncio.Future[list[ActorHandle[RankActor]]] | None = None
        self._answered: set[tuple[int, int]] = set()
        self._pids: dict[str, list[int]] = {}
        """Engines that were started on each node (by id); a new epoch waits for their end."""

    def do(self, action: Action, group: Group) -> None:
        """Begin to carry out `action` for `group` as it is now; what it supersedes is given up."""
        match action:
            case Place(epoch=epoch, spec=spec):
                self._begin("start", self._place(epoch, spec))
            case StartRanks(epoch=epoch, spec=spec):
                self._begin("start", self._start(epoch, spec))
            case StopRanks(epoch=epoch):
                failed = group.state is GroupState.FAILED
                self._give_up("start", "rooms", "weights")
                self._begin("stop", self._stop(epoch, 0.0 if failed else self._settings.stop_grace))
            case WatchRooms(epoch=epoch):
                self._begin("rooms", self._watch_rooms(epoch, group.url))
            case LoadWeights(epoch=epoch, path=path, version=version):
                self._begin("weights", self._load(group, epoch, path, version))
            case Release():
                self._give_up("start")
                self._begin("release", self._release())

    def adopt(self, group: Group, spec: GroupSpec) -> None:
        """Find the living ranks of a group that another controller left; answered by Adopted or RankDied."""
        self._begin("start", self._adopt(group, spec))

    async def close(self) -> None:
        """Give up everything; the ranks live on."""
        tasks = [*self._work.values(), *self._watches]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._rooms.close()

    # -- starting

    async def _place(self, epoch: int, spec: GroupSpec) -> None:
        try:
            async for missing in placement.place(self._group, spec.nodes, self._engines.bundle(spec)):
                self._post(Waiting(epoch=epoch, reason=missing))
        except RayError as error:
            self._post(StartFailed(epoch=epoch, reason=f"cannot be placed: {sentence(error)}"))
            return
        self._post(Placed(epoch=epoch))

    async def _start(self, epoch: int, spec: GroupSpec) -> None:
        try:
            actors = await self._create(epoch, spec)
            found = await _all(*(self._prepare(epoch, rank, actor) for rank, actor in enumerate(actors)))
            started = await _all(*(self._launch(spec, epoch, rank, actor, found) for rank, actor in enumerate(actors)))
        except (NoEngineError, RayError, TimeoutError, ValueError) as error:
            self._post(StartFailed(epoch=epoch, reason=f"cannot be started: {sentence(error)}"))
            return
        self._pids.clear()  # these have gone, and their numbers may come to mean other processes
        for rank, (prepared, (status, kv_events)) in enumerate(zip(found, started, strict=True)):
            self._pids.setdefault(prepared.node, []).append(status.pid)
            self._post(
                RankStarted(
                    epoch=epoch,
                    rank=Rank(
                        rank=rank,
                        state=RankState.STARTING,
                        node=prepared.node,
                        host=prepared.host,
                        pid=status.pid,
                        log=status.log,
                        metrics=status.metrics,
                        kv_events=kv_events,
                        pod=prepared.pod,
                        kube_node=prepared.kube_node,
                    ),
                )
            )
            self._follow(epoch, spec, rank, actors[rank], RankState.STARTING)

    async def _create(self, epoch: int, spec: GroupSpec) -> list[ActorHandle[RankActor]]:
        """Make the actors. A thread cannot be given up, so whoever stops the ranks waits for it first."""
        bundle = self._engines.bundle(spec)

        def create() -> list[ActorHandle[RankActor]]:
            return [
                make_actor(
                    RankName(self._group, epoch, rank),
                    self._settings.rank,
                    placement.rank_options(self._group, rank, bundle),
                )
                for rank in range(spec.nodes)
            ]

        self._creating = asyncio.get_running_loop().run_in_executor(None, create)
        return await asyncio.shield(self._creating)

    async def _prepare(self, epoch: int, rank: int, actor: ActorHandle[RankActor]) -> Prepared:
        prepared: Prepared = await answer(actor.prepare.remote(self._pids), _ACTOR_S)
        self._answered.add((epoch, rank))
        return prepared

    async def _launch(
        self, spec: GroupSpec, epoch: int, rank: int, actor: ActorHandle[RankActor], found: list[Prepared]
    ) -> tuple[RankStatus, tuple[KvSource, ...]]:
        leader, own = found[0], found[rank]
        host = f"[{leader.host}]" if ":" in leader.host else leader.host
        endpoints = RankEndpoints(
            host=own.host,
            http_port=own.first_port + HTTP,
            dist_init=f"{host}:{leader.first_port + DIST}",
            bootstrap_port=leader.first_port + bootstrap_place(epoch),
            interface=own.interface,
            kv_events_port=own.first_port + KV_EVENTS,
            kv_topic=f"{self._group}/{epoch}/",
        )
        command = self._engines.command(spec, rank, endpoints)
        status: RankStatus = await answer(
            actor.start.remote(tuple(command.argv), dict(command.env), endpoints), START_S + _ACTOR_S
        )
        if status.state is RankState.DEAD:
            raise NoEngineError(f"rank {rank} {status.detail}")
        return status, command.kv_events

    # -- watching

    def _follow(self, epoch: int, spec: GroupSpec, rank: int, actor: ActorHandle[RankActor], known: RankState) -> None:
        task = asyncio.create_task(
            self._watch(epoch, spec, rank, actor, known), name=f"watch {RankName(self._group, epoch, rank)!s}"
        )
        self._watches.add(task)
        task.add_done_callback(self._watches.discard)
        task.add_done_callback(self._check)

    async def _watch(
        self, epoch: int, spec: GroupSpec, rank: int, actor: ActorHandle[RankActor], known: RankState
    ) -> None:
        while known is not RankState.DEAD:
            try:
                status: RankStatus = await answer(actor.watch.remote(known, _WATCH_S), _WATCH_S + _SILENT_S)
                if status.state is RankState.READY is not known:
                    leader = status.endpoints if rank == 0 else None
                    service = self._engines.service(spec, leader) if leader else None
                    self._post(RankReady(epoch=epoch, rank=rank, service=service))
                detail = status.detail
                known = status.state
            except TimeoutError:
                known, detail = RankState.DEAD, f"has not answered for {_WATCH_S + _SILENT_S:.0f} s"
                self._answered.discard((epoch, rank))  # nor will it when it is told to stop
            except RayError as error:
                known, detail = RankState.DEAD, f"is lost with its actor: {sentence(error)}"
        self._post(RankDied(epoch=epoch, rank=rank, reason=detail))

    async def _adopt(self, group: Group, spec: GroupSpec) -> None:
        names = [str(RankName(self._group, group.epoch, rank.rank)) for rank in group.ranks]
        actors: list[ActorHandle[RankActor]] = []
        ranks: list[Rank] = []
        for rank, name in zip(group.ranks, names, strict=True):
            actor = await find_actor(name)
            lost = "" if actor is not None else "its actor is not there any more"
            if actor is not None:
                try:
                    status: RankStatus = await answer(actor.health.remote(), _ADOPT_S)
                    if status.state in (RankState.PENDING, RankState.DEAD):
                        lost = status.detail or "its engine had not been started"
                except TimeoutError:
                    lost = f"its actor has not answered for {_ADOPT_S:.0f} s"
                except RayError as error:
                    lost = f"its actor is lost: {sentence(error)}"
            if lost or actor is None:
                reason = f"was not found alive when the controller came back: {lost}"
                self._post(RankDied(epoch=group.epoch, rank=rank.rank, reason=reason))
                return
            self._answered.add((group.epoch, rank.rank))
            self._pids.setdefault(rank.node, []).append(status.pid)
            actors.append(actor)
            ranks.append(msgspec.structs.replace(rank, state=status.state, pid=status.pid, log=status.log))
        self._post(Adopted(epoch=group.epoch, ranks=tuple(ranks)))
        for number, actor in enumerate(actors):
            # As if not yet known to be ready: a group that was starting is told so.
            self._follow(group.epoch, with_own_weights(spec, group), number, actor, RankState.STARTING)

    # -- a group without requests

    async def _watch_rooms(self, epoch: int, url: str) -> None:
        await self._rooms.until_empty(url, quiet=self._settings.quiet)
        self._post(RoomsClosed(epoch=epoch))

    async def _load(self, group: Group, epoch: int, path: str, version: str) -> None:
        try:
            await self._weights.load(group, path, version)
        except WeightsError as error:
            self._post(WeightsFailed(epoch=epoch, version=version, reason=str(error)))
        else:
            self._post(WeightsLoaded(epoch=epoch, path=path, version=version))

    # -- stopping

    async def _stop(self, epoch: int, grace: float) -> None:
        await self._stop_watching()
        while True:
            try:
                ours = [rank for rank in await named_ranks() if rank.group == self._group and rank.epoch <= epoch]
                if not ours:
                    break
                await _all(*(self._end(rank, grace) for rank in ours))
            except RayError as error:
                _log.warning("%s: its ranks cannot be stopped yet: %s", self._group, sentence(error))
                await asyncio.sleep(_RETRY_S)
        self._answered.clear()
        self._post(Stopped(epoch=epoch))

    async def _stop_watching(self) -> None:
        for task in self._watches:
            task.cancel()
        if self._creating is not None:
            await asyncio.wait([self._creating], timeout=_ACTOR_S)

    async def _end(self, rank: RankName, grace: float) -> None:
        actor, name = await find_actor(str(rank)), str(rank)
        if actor is None:
            return
        # An actor that never answered may still wait for a process of its own: it has no engine.
        patience = grace + _STOP_S if (rank.epoch, rank.rank) in self._answered else _RETRY_S
        try:
            await answer(actor.stop.remote(grace), patience)
        except TimeoutError:
            _log.warning("%s has not stopped its engine within %.0f s: it is killed", name, patience)
        except RayTaskError as error:
            _log.warning("%s cannot stop its engine: %s: it is killed", name, sentence(error))
        except RayError:
            pass  # it is dead already, and its engine with it
        await kill_actor(actor)
        await asyncio.sleep(_GONE_S)

    async def _release(self) -> None:
        while True:
            try:
                await placement.release(self._group)
                break
            except (RayError, TimeoutError) as error:
                _log.warning("%s: its nodes cannot be given back yet: %s", self._group, sentence(error))
                await asyncio.sleep(_RETRY_S)
        self._pids.clear()
        self._post(Released())

    # -- tasks

    def _begin(self, slot: str, work: Coroutine[Any, Any, None]) -> None:
        self._give_up(slot)
        task = asyncio.create_task(work, name=f"{slot} {self._group}")
        task.add_done_callback(self._check)
        self._work[slot] = task

    def _give_up(self, *slots: str) -> None:
        for slot in slots:
            if (task := self._work.pop(slot, None)) is not None:
                task.cancel()

    def _check(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._broken(error)


async def _all(*work: Coroutine[Any, Any, _T]) -> list[_T]:
    """All results; the first failure gives up the others and is raised."""
    tasks = [asyncio.ensure_future(item) for item in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
