"""A prefill and a decode group of real engines, without Ray, controller or gateway."""

from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
import random
import sys
import threading
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from tandem.core.heartbeat import Beat, Limits
from tandem.core.layout import GroupLayout, plan_group
from tandem.core.types import RankState, Role
from tandem.engine.client import EngineClient, EngineError, TokenStream
from tandem.engine.heartbeat import read_beats
from tandem.engine.launch import RankEndpoints, launch_args, launch_env
from tandem.fleet.engines import CPU_SERVER, GPU_SERVER
from tandem.fleet.nursery import NurseryProcess
from tandem.fleet.plan import read_shape
from tandem.fleet.rank import DIST, HTTP, RankActor, RankSettings, RankStatus, bootstrap_place

HOST = "127.0.0.1"
NODES = 2
START_S = {"cpu": 150.0, "cuda": 400.0}
"""On a GPU SGLang compiles its kernels at their first use."""
T = TypeVar("T")
Device = Literal["cpu", "cuda"]


class EngineGroup:
    """The ranks of one group, each with its actor, which here is an object of this process."""

    def __init__(self, role: Role, settings: RankSettings, device: Device, *, number: int = 0) -> None:
        """On GPUs it has one rank, with one GPU."""
        self.role = role
        self.name = f"{role}-{number}"
        self.layout = GroupLayout(role=role, nodes=NODES if device == "cpu" else 1, device=device)
        ranks = range(self.layout.nodes)
        self.actors = [RankActor(self.name, 1, rank, settings, host=HOST, node="here") for rank in ranks]
        self.endpoints: list[RankEndpoints] = []
        self._logs = Path(settings.logs)
        self.folders = [Path(settings.scratch) / "beats" / f"{self.name}-e1-r{rank}" for rank in ranks]

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.endpoints[0].http_port}"

    async def start(self, model: Path, extra: Sequence[str] = (), without: Sequence[str] = ()) -> None:
        """Start all ranks; returns when they are ready. `without`: flags that they do not get."""
        layout, server = self.layout, CPU_SERVER if self.layout.device == "cpu" else GPU_SERVER
        plan = plan_group(read_shape(model), layout)
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
            kept = (argument for argument in arguments if argument not in without)
            command = (sys.executable, "-m", server, *kept)
            await actor.start(command, launch_env(layout, plan, rank, where), where)
        ready = await asyncio.gather(*(actor.wait_ready(START_S[layout.device]) for actor in self.actors))
        assert all(ready), [await actor.health() for actor in self.actors]

    def logs(self) -> list[str]:
        """What its ranks have logged so far."""
        return [(self._logs / f"{self.name}-e1-r{rank}.log").read_text() for rank in range(self.layout.nodes)]

    def beats(self, rank: int) -> dict[int, Beat]:
        """What the processes of a rank last wrote, by PID."""
        return dict(read_beats(self.folders[rank]))

    def pid(self, rank: int, who: str) -> int:
        """PID of the process of a rank that calls itself so."""
        return next(pid for pid, beat in self.beats(rank).items() if beat.who.startswith(who))

    async def stop(self) -> None:
        await asyncio.gather(*(actor.stop(0) for actor in self.actors))


class EnginePair:
    """Both groups, and a client. Its loop runs in a thread, so tests call it as they like.

    On a GPU the engines share it, and there may be spare decode groups.
    """

    def __init__(
        self,
        model: Path,
        folder: Path,
        *,
        scratch: Path,
        device: Device = "cpu",
        spares: int = 0,
        limits: Limits | None = None,
        args: Sequence[str] = (),
        decode: Sequence[str] = (),
        overlap: bool = False,
    ) -> None:
        """`scratch`: a folder with a short path. `args`: further flags of all groups; `decode`: of decode's only.
        `overlap`: decode has SGLang's overlap scheduler, which it always has on a GPU."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._rooms = itertools.count(random.randrange(1, 2**40) * 2, 2)
        folder.mkdir(parents=True, exist_ok=True)
        self.client = self.call(self._client())
        self.nursery = None
        if device == "cpu":
            self.nursery = self.call(NurseryProcess.start(scratch, folder / "nursery.log"), START_S[device])
        settings = RankSettings(
            logs=str(folder),
            scratch=str(scratch),
            nursery=str(self.nursery.path) if self.nursery else "",
            limits=limits or Limits.within(None, device),
        )
        self.prefill = EngineGroup(Role.PREFILL, settings, device)
        self.decodes = [EngineGroup(Role.DECODE, settings, device, number=number) for number in range(1 + spares)]
        self.decode = self.decodes[0]
        try:
            self.call(self._start(model, args, decode, overlap), 2 * START_S[device])
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

    async def _start(self, model: Path, args: Sequence[str], decode: Sequence[str], overlap: bool) -> None:
        without = ("--disable-overlap-schedule",) if overlap else ()
        decodes = (group.start(model, [*args, *decode], without) for group in self.decodes)
        await asyncio.gather(self.prefill.start(model, args), *decodes)

    async def _stop(self) -> None:
        await asyncio.gather(*(group.stop() for group in (self.prefill, *self.decodes)))
        await self.client.close()
        if self.nursery:
            await self.nursery.stop()


__all__ = ["EngineError", "EngineGroup", "EnginePair"]
