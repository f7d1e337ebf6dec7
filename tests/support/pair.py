"""A prefill and a decode group of real engines, of two ranks each, without Ray, controller or gateway."""

from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
import random
import sys
import threading
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from tandem.core.heartbeat import Beat, Limits
from tandem.core.layout import GroupLayout, plan_group
from tandem.core.types import RankState, Role
from tandem.engine.client import EngineClient, EngineError, TokenStream
from tandem.engine.heartbeat import read_beats
from tandem.engine.launch import RankEndpoints, launch_args, launch_env
from tandem.fleet.nursery import NurseryProcess
from tandem.fleet.rank import DIST, HTTP, RankActor, RankSettings, RankStatus, bootstrap_place
from tandem.models.catalog import load_shape

HOST = "127.0.0.1"
NODES = 2
START_S = 150.0
T = TypeVar("T")


class EngineGroup:
    """The ranks of one group, each with its actor, which here is an object of this process."""

    def __init__(self, role: Role, settings: RankSettings) -> None:
        self.role = role
        self.actors = [RankActor(f"{role}-0", 1, rank, settings, host=HOST, node="here") for rank in range(NODES)]
        self.endpoints: list[RankEndpoints] = []
        self.folders = [Path(settings.scratch) / "beats" / f"{role}-0-e1-r{rank}" for rank in range(NODES)]

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.endpoints[0].http_port}"

    async def start(self, model: Path, extra: Sequence[str] = ()) -> None:
        """Start all ranks; returns when they are ready."""
        layout = GroupLayout(role=self.role, nodes=NODES)
        plan = plan_group(load_shape("tiny"), layout)
        ports = [(await actor.prepare({})).first_port for actor in self.actors]
        self.endpoints = [
            RankEndpoints(
                host=HOST,
                http_port=port + HTTP,
                dist_init=f"{HOST}:{ports[0] + DIST}",
                bootstrap_port=ports[0] + bootstrap_place(1) if self.role is Role.PREFILL else 0,
                interface="lo",
            )
            for port in ports
        ]
        for rank, (actor, where) in enumerate(zip(self.actors, self.endpoints, strict=True)):
            arguments = launch_args(str(model), layout, plan, rank, where, extra)
            command = (sys.executable, "-m", "tandem.engine.cpu.launch_server", *arguments)
            await actor.start(command, launch_env(layout, plan, rank, where), where)
        ready = await asyncio.gather(*(actor.wait_ready(START_S) for actor in self.actors))
        assert all(ready), [await actor.health() for actor in self.actors]

    def beats(self, rank: int) -> dict[int, Beat]:
        """What the processes of a rank last wrote, by PID."""
        return dict(read_beats(self.folders[rank]))

    def pid(self, rank: int, who: str) -> int:
        """PID of the process of a rank that calls itself so."""
        return next(pid for pid, beat in self.beats(rank).items() if beat.who.startswith(who))

    async def stop(self) -> None:
        await asyncio.gather(*(actor.stop(0) for actor in self.actors))


class EnginePair:
    """Both groups, and a client. Its loop runs in a thread, so tests call it as they like."""

    def __init__(
        self, model: Path, folder: Path, *, limits: Limits | None = None, decode: Sequence[str] = (), scratch: Path
    ) -> None:
        """`decode`: further flags of the decode group. `scratch`: a folder with a short path."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._rooms = itertools.count(random.randrange(1, 2**40) * 2, 2)
        folder.mkdir(parents=True, exist_ok=True)
        self.client = self.call(self._client())
        self.nursery = self.call(NurseryProcess.start(scratch, folder / "nursery.log"), START_S)
        settings = RankSettings(
            logs=str(folder), scratch=str(scratch), nursery=str(self.nursery.path), limits=limits or Limits()
        )
        self.prefill, self.decode = (EngineGroup(role, settings) for role in (Role.PREFILL, Role.DECODE))
        try:
            self.call(self._start(model, decode), 2 * START_S)
        except BaseException:
            self.stop()
            raise

    def call(self, work: Coroutine[Any, Any, T], within: float = 60.0) -> T:
        """Run `work` in the pair's loop and wait for it."""
        return self.begin(work).result(within)

    def begin(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Run `work` in the pair's loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def stop(self) -> None:
        self.call(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def generate(self, ids: Sequence[int], *, rid: str = "", dp: int = 0, **sampling: Any) -> list[int]:
        """Output token ids of one greedy request on both groups; raises the EngineError of the leg that fails first."""
        return self.call(self.both(ids, rid=rid, dp=dp, **sampling))

    async def both(self, ids: Sequence[int], *, rid: str = "", dp: int = 0, **sampling: Any) -> list[int]:
        """The same in the pair's loop."""
        room = next(self._rooms) + dp
        legs = [
            asyncio.ensure_future(self.leg(group, ids, room, dp, f"{rid}{room:x}-{number}", sampling))
            for number, group in enumerate((self.prefill, self.decode))
        ]
        try:
            first, output = await asyncio.gather(*legs)
        finally:
            for leg in legs:
                leg.cancel()
            await asyncio.gather(*legs, return_exceptions=True)
        assert first == output[:1]
        return output

    async def leg(
        self, group: EngineGroup, ids: Sequence[int], room: int, dp: int, rid: str, sampling: dict[str, Any]
    ) -> list[int]:
        """Output of one leg."""
        body = {
            "rid": rid,
            "input_ids": list(ids),
            "sampling_params": {"temperature": 0, "max_new_tokens": 24, **sampling},
            "stream": True,
            "bootstrap_host": HOST,
            "bootstrap_port": self.prefill.endpoints[0].bootstrap_port,
            "bootstrap_room": room,
            "routed_dp_rank": dp,
            "disagg_prefill_dp_rank": dp,
        }
        stream = await self.client.generate(group.url, msgspec.json.encode(body), first_byte_s=50, stall_s=50)
        try:
            return await self._read(stream)
        finally:
            stream.close()

    async def watch(self, group: EngineGroup, rank: int, within: float) -> RankStatus:
        """What a rank says once it is not ready any more."""
        return await group.actors[rank].watch(RankState.READY, within)

    async def blind(self, group: EngineGroup, rank: int) -> None:
        """Have the actor of a rank look at its engine no more, as if its node stood still."""
        group.actors[rank]._let_be()

    async def _read(self, stream: TokenStream) -> list[int]:
        output: list[int] = []
        async for chunk in stream:
            output += chunk.ids
        return output

    async def _client(self) -> EngineClient:
        return EngineClient()

    async def _start(self, model: Path, decode: Sequence[str]) -> None:
        await asyncio.gather(self.prefill.start(model), self.decode.start(model, decode))

    async def _stop(self) -> None:
        await asyncio.gather(self.prefill.stop(), self.decode.stop())
        await self.client.close()
        await self.nursery.stop()


__all__ = ["EngineError", "EngineGroup", "EnginePair"]
