"""One rank of a group: a Ray actor on the rank's node that owns one engine process.

It lives on while the controller is away, and whoever comes back finds it by its name. Its engine dies with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from tandem.core.heartbeat import Limits
from tandem.core.types import RankState
from tandem.engine import heartbeat
from tandem.engine.http1 import HttpFailure, Pool
from tandem.engine.launch import RankEndpoints
from tandem.engine.supervisor import EngineCommand, EngineProcess, StartError
from tandem.fleet.bound import die_with_parent
from tandem.fleet.engine_health import EngineWatch, gone, log_tail, read_counters, serve_counters
from tandem.fleet.ports import PortBlock, interface_of
from tandem.fleet.run_folder import KUBE_NODE_VARIABLE, POD_VARIABLE, node_folder

HTTP, DIST, KV_EVENTS = 0, 2, 32
"""Where in its block of ports a rank has what; from DIST on, SGLang takes several in a row, and from KV_EVENTS
on KV_EVENT_PORTS."""
METRICS = 31
"""Where the actor itself serves what its engine has counted."""

_BOOTSTRAP = range(24, METRICS)
"""Where the KV bootstrap server may be; see `bootstrap_place`."""

READY_PATHS = ("/ready", "/health")
"""Rank 0 answers the first once it takes requests; the others have only a small server with the second."""

START_S = 120.0
"""Until the engine's process must be there; the nursery that forks it may still be importing."""

_LOOK_S = 0.2
_HEALTH_S = 1.0
_log = logging.getLogger(__name__)


def bootstrap_place(epoch: int) -> int:
    """Where in its block the KV bootstrap server of a prefill leader is; a restarted group has another one.

    SGLang's decode side keeps what it once learned of a prefill server under the server's address, and forgets it only
    when the address fails to answer twice, 2 s apart (SGLang 0.5.23, `disaggregation/common/conn.py`). A group that is
    back sooner at the same address would be spoken to as the one that died, and each request to it would hang.
    """
    return _BOOTSTRAP[epoch % len(_BOOTSTRAP)]


class RankName(NamedTuple):
    """Which rank; as a string, the name of its actor in the fleet's Ray namespace."""

    group: str
    epoch: int
    rank: int

    def __str__(self) -> str:
        return f"rank/{self.group}/{self.epoch}/{self.rank}"

    @classmethod
    def parse(cls, name: str) -> RankName | None:
        """The rank that an actor's name means; None for another kind of actor."""
        match name.split("/"):
            case ["rank", group, epoch, rank] if epoch.isdecimal() and rank.isdecimal():
                return cls(group, int(epoch), int(rank))
        return None


class RankSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What every rank of a fleet is told."""

    logs: str = ""
    """Folder of the engines' log files; empty = in each node's own folder."""
    scratch: str = ""
    """Folder for the engines' temporary files and counters, of a short path; removed with them. Empty = each node's own
    folder, and the nursery that is there."""
    nursery: str = ""
    """Socket of the machine's nursery; empty = none."""
    limits: Limits = Limits()
    """How long an engine that is ready may show no progress."""

    def here(self) -> RankSettings:
        """The same with the folders of the node that this process is on."""
        if self.scratch and self.logs:
            return self
        folder = node_folder()
        nursery = folder / "nursery"
        found = str(nursery) if nursery.is_socket() else ""
        return msgspec.structs.replace(
            self,
            logs=self.logs or str(folder / "logs"),
            scratch=self.scratch or str(folder),
            nursery=self.nursery or ("" if self.scratch else found),
        )


class Prepared(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank found on its node."""

    node: str
    host: str
    interface: str
    first_port: int
    pod: str = ""
    kube_node: str = ""


class RankStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank says of itself."""

    state: RankState
    pid: int = 0
    log: str = ""
    detail: str = ""
    """How the engine ended, in one sentence without a subject."""
    endpoints: RankEndpoints | None = None
    metrics: str = ""
    """URL of what the engine has counted."""


class RankActor:
    """Runs in a process of its own, as an async Ray actor; see the module."""

    def __init__(
        self, group: str, epoch: int, rank: int, settings: RankSettings, host: str = "", node: str = ""
    ) -> None:
        """`host` and `node`: address and id of the node; empty = ask Ray."""
        self._rank = rank
        self._settings = settings = settings.here()
        self._name = f"{group}-e{epoch}-r{rank}"
        if not host:
            die_with_parent()
            host, node = _whereabouts()
        self._host, self._node = host, node
        self._log = Path(settings.logs) / f"{self._name}.log"
        self._counters = Path(settings.scratch) / "metrics" / self._name
        self._beats = Path(settings.scratch) / "beats" / self._name
        self._block: PortBlock | None = None
        self._process: EngineProcess | None = None
        self._status = RankStatus(state=RankState.PENDING)
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._end_metrics: Callable[[], None] | None = None

    async def prepare(self, former: Mapping[str, Sequence[int]], deadline: float = 15.0) -> Prepared:
        """Claim ports, once the engines of older epochs have gone from this node; `former`: their PIDs by node id.

        Raises NoPortsError, or TimeoutError if one of them stays.
        """
        await gone(former.get(self._node, ()), deadline)
        if self._block is None:
            self._block = PortBlock.claim(self._host)
        return Prepared(
            node=self._node,
            host=self._host,
            interface=interface_of(self._host),
            first_port=self._block.first,
            pod=os.environ.get(POD_VARIABLE, ""),
            kube_node=os.environ.get(KUBE_NODE_VARIABLE, ""),
        )

    async def start(self, argv: Sequence[str], env: dict[str, str], endpoints: RankEndpoints) -> RankStatus:
        """Start the engine. What becomes of it, `watch` tells. A repeated call changes nothing."""
        if self._process is not None or self._status.state is not RankState.PENDING:
            return self._status
        for folder in (self._counters, self._beats):
            folder.mkdir(parents=True, exist_ok=True)
        command = EngineCommand(
            argv=tuple(argv),
            env={**env, "PROMETHEUS_MULTIPROC_DIR": str(self._counters), heartbeat.FOLDER: str(self._beats)},
            log=self._log,
            scratch=Path(self._settings.scratch) / self._name,
        )
        nursery = Path(self._settings.nursery) if self._settings.nursery else None
        try:
            self._process = await EngineProcess.start(command, nursery=nursery, deadline=START_S)
        except (StartError, OSError) as error:
            self._become(RankStatus(state=RankState.DEAD, log=str(self._log), detail=f"could not be started: {error}"))
            return self._status
        self._become(
            RankStatus(
                state=RankState.STARTING,
                pid=self._process.pid,
                log=str(self._log),
                endpoints=endpoints,
                metrics=self._serve_metrics(),
            )
        )
        self._go(self._await_exit(self._process), "exit")
        self._go(self._follow_health(self._process, endpoints), "health")
        return self._status

    async def watch(self, known: RankState, within: float) -> RankStatus:
        """Return as soon as the state differs from `known`, at the latest after `within` seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within):
                while self._status.state is known:
                    self._changed.clear()
                    await self._changed.wait()
        return self._status

    async def wait_ready(self, within: float) -> bool:
        """Wait until the engine is ready or has died; return whether it is ready."""
        await self.watch(RankState.STARTING, within)
        return self._status.state is RankState.READY

    async def health(self) -> RankStatus:
        """The present state, at once."""
        return self._status

    async def counters(self) -> dict[str, float]:
        """What the engine has counted (`engine/cpu/counters.py`): Prometheus sample → value."""
        return await asyncio.to_thread(read_counters, self._counters)

    async def stop(self, grace: float) -> RankStatus:
        """End the engine: SIGTERM, SIGKILL after `grace` seconds (0 = at once). Returns when nothing of it is left.

        Raises TimeoutError if the kernel does not let go of it.
        """
        if self._process is not None:
            how = await self._process.stop(grace=grace)
            if self._status.state is not RankState.DEAD:
                self._become(msgspec.structs.replace(self._status, state=RankState.DEAD, detail=f"stopped ({how})"))
        self._let_be()
        if self._block is not None:
            self._block.close()
            self._block = None
        if self._end_metrics is not None:
            await asyncio.to_thread(self._end_metrics)
            self._end_metrics = None
        for folder in (self._counters, self._beats):
            shutil.rmtree(folder, ignore_errors=True)
        return self._status

    def _serve_metrics(self) -> str:
        """Serve the counters on a port of the block; return the URL, empty if that is not possible."""
        if self._block is None:
            return ""
        port = self._block.first + METRICS
        try:
            self._end_metrics = serve_counters(self._counters, self._host, port)
        except OSError as error:
            _log.warning("the counters of %s are not served on port %d: %s", self._name, port, error)
            return ""
        return f"http://[{self._host}]:{port}/metrics" if ":" in self._host else f"http://{self._host}:{port}/metrics"

    # -- what goes on by itself

    async def _await_exit(self, process: EngineProcess) -> None:
        how = await process.wait()
        was = "was " if how.signal is not None else ""
        await self._die(f"{was}{how}")

    async def _follow_health(self, process: EngineProcess, endpoints: RankEndpoints) -> None:
        """Find out when the engine is ready, then look at its processes and their progress every second, and at once
        when one of them ends."""
        if await self._answers(process, endpoints):
            self._become(msgspec.structs.replace(self._status, state=RankState.READY))
        else:
            await self._die(f"does not own port {endpoints.http_port}: another process answers there")
            return
        watch = EngineWatch(process, self._beats, self._settings.limits)
        while True:
            if ill := watch.ailment(asyncio.get_running_loop().time()):
                await self._die(ill)
                return
            await watch.pause(_HEALTH_S)

    async def _answers(self, process: EngineProcess, endpoints: RankEndpoints) -> bool:
        """Ask until something answers well; return whether it is this engine."""
        host = f"[{endpoints.host}]" if ":" in endpoints.host else endpoints.host
        pool = Pool()
        try:
            while True:
                for path in READY_PATHS if self._rank == 0 else READY_PATHS[1:]:
                    with contextlib.suppress(HttpFailure):
                        url = f"http://{host}:{endpoints.http_port}{path}"
                        status, _ = await pool.fetch("GET", url, connect_s=1.0, within=5.0)
                        if status == 200:
                            return process.owns_listener(endpoints.http_port)
                        if status != 404:
                            break
                await asyncio.sleep(_LOOK_S)
        finally:
            await pool.close()

    async def _die(self, how: str) -> None:
        if self._status.state is not RankState.DEAD:
            tail = await asyncio.to_thread(log_tail, self._log)
            detail = f"{how}; its log ends: {tail}" if tail else f"{how}; its log is empty"
            self._become(msgspec.structs.replace(self._status, state=RankState.DEAD, detail=detail))
        self._let_be()

    def _let_be(self) -> None:
        """Stop watching."""
        for task in self._tasks - {asyncio.current_task()}:
            task.cancel()

    def _become(self, status: RankStatus) -> None:
        self._status = status
        self._changed.set()

    def _go(self, work: Coroutine[object, object, None], what: str) -> None:
        task = asyncio.create_task(work, name=f"{self._name} {what}")
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """A watcher that breaks leaves the engine unwatched, so the rank counts as dead."""
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("%s broke", task.get_name(), exc_info=error)
            if self._status.state is not RankState.DEAD:
                detail = f"is not watched any more: {type(error).__name__}: {error}"
                self._become(msgspec.structs.replace(self._status, state=RankState.DEAD, detail=detail))


def _whereabouts() -> tuple[str, str]:
    """Address and id of this actor's node."""
    import ray

    return ray.util.get_node_ip_address(), ray.get_runtime_context().get_node_id()
