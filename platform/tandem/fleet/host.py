"""The host process of a fleet: what `tandem up` starts, and what everything else belongs to.

`python -m tandem.fleet.host` reads the configuration (one JSON line) from standard input, starts the fleet, tells its
progress on standard output (see `progress.py`) and runs until SIGTERM, or until standard input ends, that is until the
command that started it does. The line `detach` lets it run on.

On a machine of its own it starts Ray and the nursery; with `ray.address` set it only brings controller and gateway to
that cluster.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import psutil

from tandem.config import FleetConfig
from tandem.core.heartbeat import Limits
from tandem.core.types import GroupState
from tandem.fleet.cluster import ClusterError, LocalCluster, connect, disconnect, nodes_for
from tandem.fleet.host_steps import (
    HostError,
    ServedModel,
    check_model,
    controller_settings,
    fleet_record,
    run_controller,
)
from tandem.fleet.nursery import NurseryProcess
from tandem.fleet.plan import wanted_groups
from tandem.fleet.progress import Failed, Groups, Ready, Step, Teller
from tandem.fleet.run_folder import (
    RUN_VARIABLE,
    AlreadyRunningError,
    HostRecord,
    RunFolder,
    make_scratch,
    sweep,
)
from tandem.fleet.snapshot import DESIRED, FLEET_KEY, watch_snapshots
from tandem.state import Store, StoreError, open_store

log = logging.getLogger(__name__)


GATEWAY_DEADLINE_S = 120.0
STOP_DEADLINE_S = 75.0
STATE_PREFIXES = ("desired/", "groups/", "gateways/", "control", "refresh", "planning/", "planner")
"""What an earlier run may have left in a store that outlives it; of a Ray cluster that was its own, nothing lives."""


class Host:
    """Starts the parts of a fleet in order, and ends them in the opposite one."""

    def __init__(self, config: FleetConfig, folder: RunFolder, teller: Teller) -> None:
        self._config = config
        self._folder = folder
        self._teller = teller
        self._began = time.monotonic()
        self._namespace = config.ray.namespace or f"tandem-{config.name}"
        self._model = ServedModel.of(config, folder.path)
        self.run_id = uuid.uuid4().hex
        self._scratch = make_scratch()
        self._ready = asyncio.Event()
        self._missing = "no group has begun to start"

    async def run(self, stop: asyncio.Event) -> None:
        """Start everything, then wait for `stop`. Raises `HostError` when the fleet cannot go on."""
        async with AsyncExitStack() as stack:
            stack.callback(self._end)
            os.environ[RUN_VARIABLE] = self.run_id  # every process from here on inherits it
            self._write_record()
            with self._step("model" if self._config.model.path else "model: the tiny one"):
                await check_model(self._config, self._model)
            nursery = await self._start_nursery(stack)
            cluster = stack.enter_context(self._ray())
            store = await self._open_store(stack)
            await self._start_controller(nursery.path if nursery else None)
            from tandem.fleet.controller_watch import keep_controller_moving  # it imports Ray, as that does

            gateway = asyncio.create_task(self._gateway(stack), name="gateway")
            told = asyncio.create_task(self._follow(store, gateway, cluster), name="follow")
            broken = asyncio.create_task(self._tend(cluster), name="cluster")
            moving = asyncio.create_task(keep_controller_moving(), name="controller")
            late = asyncio.create_task(self._expect_ready(), name="deadline")
            stopped = asyncio.create_task(stop.wait(), name="stop")
            tasks = {gateway, told, broken, moving, late, stopped}
            if nursery is not None:
                tasks.add(asyncio.create_task(nursery.keep(), name="nursery"))
            try:
                await self._until_over(tasks, stopped)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _until_over(self, tasks: set[asyncio.Task[Any]], stopped: asyncio.Task[Any]) -> None:
        """Wait for the stop; a task that fails first ends the fleet with its error."""
        while not stopped.done():
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            tasks -= done

    @contextmanager
    def _step(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        self._teller.tell(Step(name))
        yield
        self._teller.tell(Step(name, time.monotonic() - began))

    def _write_record(self, ray: str = "") -> None:
        self._folder.write(
            HostRecord(
                pid=os.getpid(),
                created=psutil.Process().create_time(),
                run=self.run_id,
                scratch=str(self._scratch),
                store=self._config.state.url,
                ray=ray,
                namespace=self._namespace,
            )
        )

    async def _start_nursery(self, stack: AsyncExitStack) -> NurseryProcess | None:
        """On this machine's CPU, import the engine once for all ranks. It goes on while the rest starts."""
        if self._config.device != "cpu" or self._config.ray.address:
            return None
        nursery = await NurseryProcess.start(self._scratch, self._folder.logs / "nursery.log")
        stack.push_async_callback(nursery.stop)
        return nursery

    @contextmanager
    def _ray(self) -> Iterator[LocalCluster | None]:
        """Connect to Ray; on this machine, start it first."""
        address, cluster = self._config.ray.address, None
        if address is None and self._config.device == "cuda":
            raise HostError("device: cuda needs a Ray cluster that knows its GPUs: start one, and set ray.address")
        try:
            with self._step("Ray"):
                if address is None:
                    ranks = {spec.group: spec.nodes for spec in wanted_groups(self._config)}
                    cluster = LocalCluster.start(self._scratch / "r", nodes_for(ranks))  # Ray opens it to all
                    address = cluster.address
                self._write_record(address)
                connect(address, namespace=self._namespace)
        except ClusterError as error:
            raise HostError(str(error)) from error
        try:
            yield cluster
        finally:
            disconnect()
            if cluster:
                cluster.stop()

    async def _open_store(self, stack: AsyncExitStack) -> Store:
        """Open the store and write what the fleet has in common, and the groups that it wants."""
        store = await open_store(self._config.state.url, fleet=self._config.name, folder=self._folder.store)
        stack.push_async_callback(store.close)
        if self._config.ray.address is None:
            for prefix in STATE_PREFIXES:
                for entry in await store.list(prefix):
                    await store.delete(entry.key)
        await store.put(FLEET_KEY, msgspec.json.encode(fleet_record(self._config, self._model)))
        for spec in wanted_groups(self._config):
            await store.put(f"{DESIRED}{spec.group}", msgspec.json.encode(spec))
        return store

    async def _start_controller(self, nursery: Path | None) -> None:
        """Start the controller; the groups begin to start with it."""
        from tandem.fleet.rank import RankSettings

        ranks = RankSettings(
            logs=str(self._folder.logs),
            scratch=str(self._scratch),
            nursery=str(nursery) if nursery else "",
            limits=Limits.within(self._config.timeouts.hang_s, self._config.device),
        )
        settings = controller_settings(
            self._config,
            self._model,
            ranks,
            store_folder=self._folder.store,
            log=self._folder.logs / "controller.log",
        )
        with self._step("controller"):
            await run_controller(settings)

    async def _gateway(self, stack: AsyncExitStack) -> None:
        """Start the gateways; they wait for groups by themselves."""
        from tandem.gateway.deployment import deploy, remove

        with self._step("gateway"):
            stack.push_async_callback(asyncio.to_thread, remove, self._config)
            given_up = threading.Event()
            deployed = asyncio.create_task(
                asyncio.to_thread(
                    deploy,
                    self._config,
                    model_path=self._model.path,
                    store_url=self._config.state.url,
                    folder=self._folder.store,
                    deadline=GATEWAY_DEADLINE_S,
                    given_up=given_up,
                ),
                name="deploy",
            )
            try:
                await asyncio.shield(deployed)
            except RuntimeError as error:
                raise HostError(str(error)) from error
            except asyncio.CancelledError:
                # The thread must not outlive the connection to Ray: it would look for another cluster.
                given_up.set()
                await asyncio.wait([deployed], timeout=GATEWAY_DEADLINE_S)
                raise

    async def _tend(self, cluster: LocalCluster | None) -> None:
        if cluster is not None:
            raise HostError(await cluster.tend())
        await asyncio.Event().wait()

    async def _follow(self, store: Store, gateway: asyncio.Task[None], cluster: LocalCluster | None) -> None:
        """Tell every change of the groups, and once that all is ready; on this machine, make room for new groups."""
        async for snapshot in watch_snapshots(store):
            if cluster is not None:
                cluster.grow(nodes_for({spec.group: spec.nodes for spec in snapshot.desired}))
            self._teller.tell(Groups(snapshot.groups))
            wanted = {spec.group for spec in snapshot.desired}
            up = {group.group for group in snapshot.groups if group.state is GroupState.READY}
            self._missing = "; ".join(
                f"{group.group} is {group.state}: {group.reason or 'no reason given'}"
                for group in snapshot.groups
                if group.group in wanted - up
            )
            if not self._ready.is_set() and wanted <= up and snapshot.gateways:
                await asyncio.wait_for(asyncio.shield(gateway), GATEWAY_DEADLINE_S)
                self._ready.set()
                control = await store.get("control")
                self._teller.tell(
                    Ready(
                        http=snapshot.gateways[0].url,
                        control=msgspec.json.decode(control.value)["address"] if control else "",
                        seconds=time.monotonic() - self._began,
                    )
                )

    async def _expect_ready(self) -> None:
        """Give up when the fleet is not ready in the time that a group may take, and a minute more."""
        limit = self._config.timeouts.group_start_s + 60
        try:
            await asyncio.wait_for(self._ready.wait(), limit)
        except TimeoutError as error:
            raise HostError(f"the fleet was not ready after {limit:.0f} s: {self._missing}") from error

    def _end(self) -> None:
        """Make sure that nothing is left."""
        if left := sweep(self.run_id):
            log.warning("%d processes had to be killed at the end", left)
        shutil.rmtree(self._scratch, ignore_errors=True)


async def _lifeline(stop: asyncio.Event) -> None:
    """Set `stop` when standard input ends without the word that lets this process run on."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    if await reader.readline() != b"detach\n":
        stop.set()


async def _limit(stop: asyncio.Event, run: str) -> None:
    """Give the end of the fleet a deadline that holds whatever this process waits for."""
    await stop.wait()
    timer = threading.Timer(STOP_DEADLINE_S, _end_late, [run])
    timer.daemon = True
    timer.start()


def _end_late(run: str) -> None:
    """End this process although something in it does not."""
    log.critical("the fleet did not stop within %.0f s: it is killed", STOP_DEADLINE_S)
    sweep(run)
    os._exit(1)


async def _main(config: FleetConfig, teller: Teller) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    lifeline = asyncio.create_task(_lifeline(stop), name="lifeline")
    folder = RunFolder(config.name)
    with folder.hold():
        folder.clear()
        folder.write_config(config)
        host = Host(config, folder, teller)
        limit = asyncio.create_task(_limit(stop, host.run_id), name="limit")
        await host.run(stop)
    lifeline.cancel()
    limit.cancel()


def main() -> None:
    """Entry point of the module."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # Unbuffered: what follows the first line is for the lifeline.
    with os.fdopen(os.dup(0), "rb", buffering=0) as stdin:
        config = FleetConfig.model_validate_json(stdin.readline())
    # Libraries print to standard output, where our messages go: give them standard error instead.
    messages = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    teller = Teller(messages)
    try:
        asyncio.run(_main(config, teller))
    except (HostError, AlreadyRunningError, StoreError) as error:
        log.error("%s", error)
        teller.tell(Failed(str(error)))
        sys.exit(1)


if __name__ == "__main__":
    main()
