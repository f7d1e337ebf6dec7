"""A greedy tenant beside a polite one at a real gateway, in real time; engines are stand-ins that take their time.

The exact figure is proven in simulated time (`tests/unit/core/test_admission_greedy.py`) and measured by
`bench.fairness`. This shows that the whole way through a gateway does it: keys, admission, the pair table, the first
byte of the answer.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from statistics import median

import msgspec
import orjson
import pytest

from bench.gateway.standin import Connection, Fleet, Token
from tandem.config import FleetConfig
from tandem.core.types import Group, GroupState, Role
from tandem.engine.http1 import Pool, Response
from tandem.gateway.access.keys import keep, mint
from tandem.gateway.replica import GatewayReplica
from tandem.state import open_store
from unit.gateway.gateway_model import model_folder

SLOTS = 32
TTFT_S = 0.1
ITL_S = 0.05
MOST_TOKENS = 9
"""Answers have from one token to so many: of equal ones, all slots would become free at once."""
HELD_S = TTFT_S + (MOST_TOKENS - 1) / 2 * ITL_S
CAPACITY = SLOTS / HELD_S
"""Requests/s that the engines can serve: 107."""
BACKLOG = 10 * SLOTS // 2
"""Requests that the greedy tenant always has open: ten times its share of the slots."""
ROUND_S, ROUNDS = 4.0, 3
"""A busy machine only ever adds to what is measured, and not in every round; unfairness would be there in each."""
LEAD_S = 1.0
"""A round begins so long before it counts. Whoever was alone may hold every slot when another comes."""
SLACK_S = 0.4
"""What a busy machine may add to the slowest of a hundred first tokens: client, gateway and engines share one
interpreter, and when others keep it waiting, all requests of that moment are late (0.3 s were seen while ten processes
wanted two cores). Without fairness the polite tenant waits as long as the greedy one: 1.8 s."""
WITHIN_S = 20.0


class Gateway:
    """One replica, and a client that knows two tenants."""

    def __init__(self, url: str, keys: dict[str, bytes]) -> None:
        self.statuses: dict[str, Counter[int]] = {name: Counter() for name in keys}
        self._url = f"{url}/v1/completions"
        self._keys = keys
        self._pool = Pool()
        self._draw = random.Random(1)

    async def ask(self, tenant: str) -> float:
        """Stream one answer; seconds until its first token, with which the gateway begins to answer."""
        tokens = self._draw.randint(1, MOST_TOKENS)
        body = orjson.dumps({"model": "tiny", "prompt": [5, 6], "max_tokens": tokens, "stream": True})
        headers = [(b"authorization", b"Bearer " + self._keys[tenant])]
        began = time.perf_counter()
        begun = self._pool.begin("POST", self._url, body=body, headers=headers)
        response = begun if isinstance(begun, Response) else await begun
        try:
            self.statuses[tenant][await response.head(WITHIN_S)] += 1
            first = time.perf_counter() - began
            await response.read(WITHIN_S)
        finally:
            response.close()
        return first

    async def polite(self, seed: int) -> list[float]:
        """A fifth of what the engines can serve, at random times; the times to first token."""
        draw = random.Random(seed)
        loop = asyncio.get_running_loop()
        due = counts = loop.time()
        counts += LEAD_S
        early, asked = [], []
        while (due := due + draw.expovariate(0.2 * CAPACITY)) < counts + ROUND_S:
            await asyncio.sleep(due - loop.time())
            (early if due < counts else asked).append(asyncio.create_task(self.ask("polite")))
        await asyncio.gather(*early)
        return list(await asyncio.gather(*asked))

    async def beside_greedy(self, seed: int) -> tuple[list[float], list[float]]:
        """The same while the other tenant always has its backlog here; its times to first token as well."""
        enough = asyncio.Event()
        times: list[float] = []

        async def again() -> None:
            while not enough.is_set():
                times.append(await self.ask("greedy"))

        greedy = [asyncio.create_task(again()) for _ in range(BACKLOG)]
        polite = await self.polite(seed)
        enough.set()
        await asyncio.gather(*greedy)
        return polite, times

    async def close(self) -> None:
        await self._pool.close()


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[Gateway]:
    config = FleetConfig.model_validate(
        {
            "name": "fair",
            "gateway": {"port": 0, "grpc_port": 0, "auth": "required"},
            "admission": {"running_per_decode_rank": SLOTS},
            "tenants": {"greedy": {}, "polite": {}},
            "metering": {"sink": "off"},
        }
    )
    model_folder(tmp_path / "tiny")
    loop = asyncio.get_running_loop()
    store = await open_store("embedded", fleet="fair", folder=tmp_path)
    engines = Fleet([Token(70, "a")], TTFT_S * 1e3, ITL_S * 1e3)
    servers = []
    for role in Role:
        server = await loop.create_server(lambda role=role: Connection(engines, role.value, 1), "127.0.0.1", 0)
        servers.append(server)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        group = Group(group=role.value, role=role, epoch=1, state=GroupState.READY, url=url)
        await store.put(f"groups/{role.value}", msgspec.json.encode(group))
    keys = {}
    for tenant in config.tenants:
        record, key = mint(tenant, now=time.time())
        assert await keep(store, record)
        keys[tenant] = key.encode()
    replica = GatewayReplica(config, model_path=tmp_path / "tiny", folder=tmp_path)
    made = Gateway((await asyncio.to_thread(replica.start, WITHIN_S)).url, keys)
    try:
        yield made
    finally:
        await made.close()
        await asyncio.to_thread(replica.stop, 2)
        for server in servers:
            server.close()
        await store.close()


def p99(values: list[float]) -> float:
    return sorted(values)[int(len(values) * 0.99)]


async def test_a_greedy_tenant_hardly_delays_the_first_tokens_of_a_polite_one(gateway: Gateway) -> None:
    await asyncio.gather(*(gateway.ask("polite") for _ in range(SLOTS)))  # connections and caches are made
    for seed in range(1, ROUNDS + 1):
        alone = await gateway.polite(seed)
        beside, greedy = await gateway.beside_greedy(seed)
        print(
            f"polite tenant's first token, ms: alone p50 {median(alone) * 1e3:.0f} p99 {p99(alone) * 1e3:.0f}, "
            f"beside the greedy one p50 {median(beside) * 1e3:.0f} p99 {p99(beside) * 1e3:.0f} "
            f"({p99(beside) / p99(alone):.2f} times); the greedy one's own p50 {median(greedy) * 1e3:.0f}; "
            f"{len(beside)} and {len(greedy)} requests"
        )
        # It was greedy: its requests queued for long, and it got what the polite one left.
        assert median(greedy) > 3 * SLACK_S
        assert len(greedy) > 0.5 * 0.8 * CAPACITY * ROUND_S
        assert set(gateway.statuses["polite"]) == set(gateway.statuses["greedy"]) == {200}
        if p99(beside) <= 1.2 * p99(alone) + SLACK_S and median(beside) <= 1.2 * median(alone) + 0.1 * SLACK_S:
            return
    pytest.fail("the polite tenant waited for the greedy one in every round")
