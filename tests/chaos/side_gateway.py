"""A second gateway whose way to every group leads through a fault proxy of ours.

It is the product's own `GatewayReplica`. It reads a copy of the fleet's store that is the same but for the groups'
URLs, so the product knows nothing of the proxies. Its wall clock is libfaketime's, where that is installed.
"""

from __future__ import annotations

import asyncio
import contextlib
import glob
import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from chaos.fault_proxy import FaultProxy
from chaos.gateway_process import Wanted
from tandem.config import FleetConfig, GatewayConfig
from tandem.core.types import GatewayReplica, Group
from tandem.state import Store, StoreError, open_store

START_S = 60.0
_RETRY_S = 0.2
_OTHERS = frozenset({"gateways", "incarnations", "leaving", "reaped"})
"""Not copied: the fleet's own gateways. One without a lease would be a dead one, whose requests are aborted."""


def fake_time() -> str | None:
    """The library that fakes a process's clock; None = not installed."""
    return next(iter(glob.glob("/usr/lib/*/faketime/libfaketimeMT.so.1")), None)


def faked(library: str, clock: Path) -> dict[str, str]:
    """Environment of a process whose wall clock `clock` tells: by how many seconds it is ahead (`+3600`). Its monotonic
    clock goes on as ever, as after a step by NTP."""
    return {
        "LD_PRELOAD": library,
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_CACHE_DURATION": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        # Else waits of threads on the monotonic clock end at once, and Python threads take turns at their lock without
        # a pause: 25 times the processor time (libfaketime 0.9.10).
        "FAKETIME_FORCE_MONOTONIC_FIX": "0",
    }


class SideGateway:
    """The gateway, its copy of the store, and the proxies by the group's name."""

    def __init__(self, config: FleetConfig, model: Path, folder: Path) -> None:
        """`folder`: for the copy, the usage records and the log; it is there."""
        self.proxies: dict[str, FaultProxy] = {}
        self.usage = folder / "usage"
        self.usage.mkdir(exist_ok=True)
        self.log = folder / "gateway.log"
        self.record: GatewayReplica | None = None
        self._clock = folder / "clock"
        self._folder = folder
        self._model = model
        gateway = GatewayConfig.model_validate({**config.gateway.model_dump(), "replicas": 1, "port": 0})
        metering = config.metering.model_copy(update={"folder": self.usage, "sink": "file"})
        self._config = config.model_copy(update={"gateway": gateway, "metering": metering})
        self._process: subprocess.Popen[bytes] | None = None
        self._copying: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        assert self.record is not None, "it listens only once it was started"
        return self.record.url

    @property
    def pid(self) -> int:
        assert self._process is not None, "it runs only once it was started"
        return self._process.pid

    async def start(self, store: Store) -> None:
        """Copy the store, and go on copying; then start the gateway. `store` is the fleet's own."""
        self._copy = await open_store("embedded", fleet=self._config.name, folder=self._folder)
        for entry in await store.list(""):
            await self._take(entry.key, entry.value)
        self._copying = asyncio.create_task(self._follow(store), name="copy of the store")
        self.set_clock(0)
        await asyncio.to_thread(self._start)

    def set_clock(self, ahead: float) -> None:
        """Let its wall clock be so many seconds ahead."""
        draft = self._clock.with_suffix(".new")
        draft.write_text(f"{ahead:+g}\n")
        draft.replace(self._clock)

    async def close(self) -> None:
        if self._copying is not None:
            self._copying.cancel()
            await asyncio.gather(self._copying, return_exceptions=True)
            await self._copy.close()
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            try:
                await asyncio.to_thread(self._process.wait, 20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            for left in glob.glob(f"/dev/shm/*faketime_*_{self._process.pid}"):  # a process that is killed leaves them
                Path(left).unlink()
        for proxy in self.proxies.values():
            await proxy.close()

    def _start(self) -> None:
        wanted = Wanted(
            config=self._config.model_dump_json(),
            model_path=str(self._model),
            store_url="embedded",
            folder=str(self._folder),
            replica="side",
        )
        environment = dict(os.environ)
        if library := fake_time():
            environment |= faked(library, self._clock)
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "chaos.gateway_process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                cwd=Path(__file__).parents[1],
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(msgspec.json.encode(wanted) + b"\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"the side gateway did not start; its log: {self.log}"
        self.record = msgspec.json.decode(line, type=GatewayReplica)

    async def _follow(self, store: Store) -> None:
        async for change in store.watch(""):
            while True:
                try:
                    await self._take(change.key, change.value)
                    break
                except StoreError:
                    # Its disk may be full: that is one of our faults.
                    await asyncio.sleep(_RETRY_S)

    async def _take(self, key: str, value: bytes | None) -> None:
        folder, _, name = key.partition("/")
        if folder in _OTHERS:
            return
        if value is None:
            await self._copy.delete(key)
            return
        if folder == "groups":
            group = msgspec.json.decode(value, type=Group)
            if group.url:
                value = msgspec.json.encode(msgspec.structs.replace(group, url=await self._proxied(name, group.url)))
        await self._copy.put(key, value)

    async def _proxied(self, name: str, url: str) -> str:
        proxy = self.proxies.get(name)
        if proxy is None:
            proxy = FaultProxy()
            await proxy.start()
            self.proxies[name] = proxy
        parts = urlsplit(url)
        assert parts.hostname is not None
        assert parts.port is not None
        proxy.aim(parts.hostname, parts.port)
        return proxy.url

    def mend(self) -> None:
        """Undo what was done to its connections and its clock."""
        for proxy in self.proxies.values():
            proxy.mend()
        with contextlib.suppress(OSError):
            self.set_clock(0)
