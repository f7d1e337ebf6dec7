"""Drives the state machines of all groups: wishes and news in, records stored, then hands put to work."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import msgspec
from ray.exceptions import RayError

from tandem.core import group as groups
from tandem.core.group_events import Action, Desired, Event, Forget, Tick
from tandem.core.types import Group, GroupSpec, GroupState
from tandem.fleet import clock as process_clock
from tandem.fleet import placement
from tandem.fleet.engines import Engines
from tandem.fleet.hands import Hands, HandsSettings
from tandem.fleet.rank_actors import find_actor, kill_actor, named_ranks, sentence
from tandem.fleet.snapshot import DESIRED, GROUPS
from tandem.fleet.weights import WeightLoader
from tandem.state import Store

EPOCHS = "epochs/"
"""`epochs/<group>` = the last epoch of a group that has gone, so that one of the same name goes on from there."""
_RESYNC_S = 10.0

_log = logging.getLogger(__name__)


class ConflictError(RuntimeError):
    """Someone else wrote a group's record: what this controller believes is no longer what is."""


class Reconciler:
    """One run of the controller's work: from the store's records, until something fails. Nothing is lost by a failure:
    the next run starts from the same records, and finds what lives."""

    def __init__(
        self,
        store: Store,
        engines: Engines,
        hands: HandsSettings,
        policy: groups.Policy,
        *,
        clock: Callable[[], float] = process_clock.now,
    ) -> None:
        self._store = store
        self._engines = engines
        self._settings = hands
        self._policy = policy
        self._weights = WeightLoader(store, engines)
        self._clock = clock
        self._records: dict[str, groups.Record] = {}
        self._versions: dict[str, int] = {}
        self._hands: dict[str, Hands] = {}
        self._news: asyncio.Queue[tuple[str, Event]] = asyncio.Queue()
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.loaded = asyncio.Event()
        """Set when every stored group has been taken over."""

    async def run(self) -> None:
        """Work until something fails, which is raised; the ranks live on."""
        try:
            async with asyncio.TaskGroup() as tasks:
                await self._load()
                self.loaded.set()
                tasks.create_task(self._listen(), name="follow wishes")
                tasks.create_task(self._work(), name="follow news")
                tasks.create_task(self._resync(), name="resync")
                tasks.create_task(self._await_failure(), name="await failure")
        finally:
            await asyncio.gather(*(hands.close() for hands in self._hands.values()))
            await self._weights.close()

    # -- the store

    async def _load(self) -> None:
        """Take over the groups that the store has, alive or not."""
        specs = {spec.group: spec for spec in await self._wishes()}
        for entry in await self._store.list(GROUPS):
            group = msgspec.json.decode(entry.value, type=Group)
            spec = specs.get(group.group)
            self._versions[group.group] = entry.version
            self._records[group.group] = groups.adopt(group, spec, policy=self._policy, now=self._clock())
            if spec is not None and (group.state in groups.SERVING or group.state is GroupState.STARTING):
                self._hands_of(group.group).adopt(group, spec)
            else:
                self._post(group.group, Tick())
        for spec in specs.values():
            self._post(spec.group, Desired(spec=spec))

    async def _wishes(self) -> list[GroupSpec]:
        specs = [self._decode(entry.key, entry.value) for entry in await self._store.list(DESIRED)]
        return [spec for spec in specs if spec is not None]

    def _decode(self, key: str, value: bytes) -> GroupSpec | None:
        """A wish; None for one that makes no sense, which must not stop the others."""
        try:
            spec = msgspec.json.decode(value, type=GroupSpec)
        except msgspec.MsgspecError as error:
            _log.error("The key %s in the store is not a GroupSpec, and is left alone: %s", key, error)
            return None
        if DESIRED + spec.group == key:
            return spec
        _log.error("The key %s in the store names the group %s, and is left alone", key, spec.group)
        return None

    async def _write(self, group: Group) -> None:
        key, value = GROUPS + group.group, msgspec.json.encode(group)
        version = await self._store.compare_and_set(key, value, version=self._versions.get(group.group, 0))
        if version is None:
            raise ConflictError(f"{key} was changed by someone else; everything is read again")
        self._versions[group.group] = version

    async def _forget(self, group: str, record: groups.Record) -> None:
        """Remove a group that is gone, and the wish that it drain; a wish that has changed since stands."""
        await self._store.put(EPOCHS + group, str(record.group.epoch).encode())
        key = GROUPS + group
        if await self._store.compare_and_set(key, None, version=self._versions.pop(group, 0)) is None:
            raise ConflictError(f"{key} was changed by someone else; everything is read again")
        wish = await self._store.get(DESIRED + group)
        if wish is not None and self._decode(wish.key, wish.value) == record.spec:
            await self._store.compare_and_set(wish.key, None, version=wish.version)
        del self._records[group]
        await self._hands.pop(group).close()

    # -- what goes on

    async def _listen(self) -> None:
        async for change in self._store.watch(DESIRED):
            group = change.key.removeprefix(DESIRED)
            if change.value is None:
                self._post(group, Desired(spec=None))
            elif (spec := self._decode(change.key, change.value)) is not None:
                self._post(group, Desired(spec=spec))
        raise RuntimeError("the store's watch ended")

    async def _work(self) -> None:
        while True:
            try:
                async with asyncio.timeout(self._idle()):
                    group, event = await self._news.get()
            except TimeoutError:
                now = self._clock()
                for group, record in list(self._records.items()):
                    if (due := groups.wake_at(record)) is not None and due <= now:
                        await self._hear(group, Tick())
                continue
            await self._hear(group, event)

    def _idle(self) -> float | None:
        """Seconds until the next Tick is due; None = none is."""
        times = [due for record in self._records.values() if (due := groups.wake_at(record)) is not None]
        return max(0.0, min(times) - self._clock()) if times else None

    async def _hear(self, group: str, event: Event) -> None:
        record = self._records.get(group)
        if record is None:
            if not (isinstance(event, Desired) and event.spec is not None):
                return
            last = await self._store.get(EPOCHS + group)
            record = groups.new(event.spec, policy=self._policy, epoch=int(last.value) if last else 0)
        new, actions = groups.step(record, event, self._clock())
        if new.group != record.group:
            await self._write(new.group)
            self._tell(record.group, new.group)
        self._records[group] = new
        for action in actions:
            await self._do(action, new)

    async def _do(self, action: Action, record: groups.Record) -> None:
        group = record.group.group
        if isinstance(action, Forget):
            self._hands_of(group)
            await self._forget(group, record)
        else:
            self._hands_of(group).do(action, record.group)

    async def _resync(self) -> None:
        """Now and then, compare with what is: catches a wish whose end was missed, and ranks that nobody owns."""
        while True:
            await self._sweep()
            await asyncio.sleep(_RESYNC_S)
            wishes = {spec.group: spec for spec in await self._wishes()}
            for group in wishes.keys() | self._records.keys():
                record = self._records.get(group)
                if record is None or record.spec != wishes.get(group):
                    self._post(group, Desired(spec=wishes.get(group)))

    async def _sweep(self) -> None:
        """End ranks and placements of groups and epochs that are no more."""
        try:
            for rank in await named_ranks():
                record = self._records.get(rank.group)
                if record is not None and rank.epoch >= record.group.epoch:
                    continue
                if record is not None and record.stopping:
                    continue
                if (actor := await find_actor(str(rank))) is not None:
                    _log.warning("%s belongs to no living group: it is killed", rank)
                    await kill_actor(actor)
            for group in await placement.placed_groups():
                if group not in self._records:
                    _log.warning("the placement of %s belongs to no group: it is given back", group)
                    await placement.release(group)
        except (RayError, TimeoutError) as error:
            _log.warning("ranks that nobody owns cannot be looked for: %s", sentence(error))

    # -- small things

    def _hands_of(self, group: str) -> Hands:
        if group not in self._hands:
            self._hands[group] = Hands(
                group,
                self._engines,
                self._settings,
                self._weights,
                post=lambda event: self._post(group, event),
                broken=self._break,
            )
        return self._hands[group]

    def _post(self, group: str, event: Event) -> None:
        self._news.put_nowait((group, event))

    def _break(self, error: BaseException) -> None:
        if not self._failure.done():
            self._failure.set_exception(error)

    async def _await_failure(self) -> None:
        await self._failure

    def _tell(self, old: Group, new: Group) -> None:
        if (old.state, old.epoch) != (new.state, new.epoch):
            why = f": {new.reason}" if new.reason else ""
            _log.info("%s (epoch %d) is %s%s", new.group, new.epoch, new.state, why)


def failures(error: BaseException) -> list[BaseException]:
    """The failures in a (possibly nested) group of them."""
    if isinstance(error, BaseExceptionGroup):
        return [inner for item in error.exceptions for inner in failures(item)]
    return [error]
