"""Limits that all gateway replicas share through Redis.

Each request is one atomic script there, so that together the replicas grant what one would. While Redis is gone or
slower than `deadline`, each replica goes on with its share (`LocalLimits`), which knows what this replica has granted
in the last minute also when Redis was there. When Redis is back, it is told what was granted without it and still
counts; if it came back empty, all that this replica granted and that still counts.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from tandem.core.rate_limit import Account, Budget, Reading, Shortage
from tandem.core.tenants import Tenant
from tandem.gateway.access.limit_scripts import KEY_NAMES, RENEW, RESTORE, SETTLE, SHA, TAKE
from tandem.gateway.access.limits import Denial, Grant, Limits, LocalLimits, never_fits, quota_of
from tandem.gateway.access.redis_line import Line, LineDown

DEADLINE_S = 0.05
LEASE_S = 30.0
"""A request counts as running for so long after its gateway last said so."""

_Amounts = tuple[int, int, int]


class SharedLimits:
    """See `Limits`."""

    def __init__(
        self,
        url: str,
        *,
        fleet: str,
        replica: str,
        replicas: Callable[[], int],
        deadline: float = DEADLINE_S,
        clock: Callable[[], float] | None = None,
    ) -> None:
        """`replica`: a name that no other gateway of the fleet has or had. `clock` in Unix seconds stands in for Redis'
        own and this machine's. Raises ValueError for a URL that is none."""
        self._fleet = fleet
        self._clock = clock
        self._local = LocalLimits(replica, replicas, clock or time.monotonic)
        self._line = Line(url, scripts=SHA, deadline=deadline, hello=self._hello, on_up=self._reconcile)
        self._born: bytes | None = None
        self._lost = False
        """Whether Redis came back without what it knew."""
        self._unsent: dict[str, tuple[Tenant, Account]] = {}
        self._running: dict[str, tuple[Tenant, set[str]]] = {}
        self._renewal: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()

    @property
    def shared(self) -> bool:
        """Whether limits are counted together now."""
        return self._line.up

    async def start(self) -> None:
        """Reach for Redis; if it is not there, limits are local until it is."""
        await self._line.start()
        self._renewal = asyncio.create_task(self._renew(), name="limit-leases")

    async def close(self) -> None:
        self._closing.set()
        if self._renewal is not None:
            await asyncio.wait([self._renewal], timeout=1)
        await self._line.close()

    async def take(self, tenant: Tenant, input_tokens: int, max_output_tokens: int) -> Grant | Denial:
        """See `Limits`. Takes `deadline` at most; when cancelled, what was taken is given back."""
        denial = never_fits(tenant, input_tokens)
        if denial is not None:
            return denial
        if not self._line.up:
            return self._alone(tenant, input_tokens, max_output_tokens)
        grant = self._local.grant(tenant, input_tokens, max_output_tokens)
        concurrency = "" if tenant.concurrency is None else tenant.concurrency
        arguments = [*self._head(tenant), concurrency, input_tokens, grant.member]
        asked = self._line.ask(TAKE, self._keys(tenant.name), arguments)
        try:
            reply = await asyncio.shield(asked)
        except LineDown:
            return self._alone(tenant, input_tokens, max_output_tokens)
        except asyncio.CancelledError:
            asked.add_done_callback(partial(self._give_back, grant))
            raise
        return self._read(grant, reply)

    def settle(self, grant: Grant, output_tokens: int, *, refund: bool = False) -> None:
        if grant.settled:
            return
        tenant = grant.tenant
        amounts = self._local.settle_within(grant, quota_of(tenant), output_tokens, refund=refund)
        _, members = self._running.get(tenant.name, (tenant, set[str]()))
        members.discard(grant.member)
        if not members:
            self._running.pop(tenant.name, None)
        self._debit(tenant, amounts, grant.member)

    # Redis is there

    def _read(self, grant: Grant, reply: list[Any]) -> Grant | Denial:
        born, short, wait_ms, *state = reply
        if born != self._born:
            self._line.take_down("Redis has lost what it knew")
        tenant = grant.tenant
        quota = quota_of(tenant).each()
        readings = [
            Reading(budget, limit, float(left), reset_ms / 1000)
            for budget, limit, left, reset_ms in zip(Budget, quota, state[::2], state[1::2], strict=True)
            if limit is not None
        ]
        if short == 4:
            return Denial(shortage=None, limit=tenant.concurrency or 0, readings=readings)
        if short:
            budget = list(Budget)[short - 1]
            return Denial(
                shortage=Shortage(budget, wait_ms / 1000), limit=int(quota[short - 1] or 0), readings=readings
            )
        self._local.record(grant, quota_of(tenant))
        grant.readings = readings
        self._keep_running(grant)
        return grant

    def _give_back(self, grant: Grant, asked: asyncio.Future[list[Any]]) -> None:
        """Its client left while Redis was asked."""
        if asked.cancelled() or asked.exception() is not None:
            return
        granted = self._read(grant, asked.result())
        if isinstance(granted, Grant):
            self.settle(granted, 0, refund=True)

    def _debit(self, tenant: Tenant, amounts: _Amounts, member: str = "") -> None:
        if not self._line.up:
            self._remember(tenant, amounts)
            return
        sent = self._line.tell(SETTLE, self._keys(tenant.name), [*self._head(tenant), *amounts, member])
        sent.add_done_callback(partial(self._sent, tenant, amounts))

    def _sent(self, tenant: Tenant, amounts: _Amounts, sent: asyncio.Future[list[Any]]) -> None:
        if sent.cancelled() or sent.exception() is not None:
            self._remember(tenant, amounts)

    async def _renew(self) -> None:
        """Tell Redis that this gateway's requests run on."""
        while not self._closing.is_set():
            try:
                await asyncio.wait_for(self._closing.wait(), LEASE_S / 3)
            except TimeoutError:
                self._tell_running()

    def _tell_running(self) -> None:
        for name, (tenant, members) in self._running.items():
            self._line.tell(RENEW, self._keys(name), [*self._head(tenant), *members])

    # Redis is gone

    def _alone(self, tenant: Tenant, input_tokens: int, max_output_tokens: int) -> Grant | Denial:
        granted = self._local.take_share(tenant, input_tokens, max_output_tokens)
        if isinstance(granted, Grant):
            self._keep_running(granted)
            self._remember(tenant, (1, input_tokens, 0))
        return granted

    def _keep_running(self, grant: Grant) -> None:
        self._running.setdefault(grant.tenant.name, (grant.tenant, set()))[1].add(grant.member)

    def _remember(self, tenant: Tenant, amounts: _Amounts) -> None:
        if any(amounts):
            _, account = self._unsent.setdefault(tenant.name, (tenant, Account()))
            self._local.spend_share(account, tenant, amounts)

    async def _hello(self) -> None:
        """Ask whether Redis is there, and still the same. Raises LineDown."""
        [born] = await self._line.direct(RENEW, self._keys(""), ["", "", "", "", _lease_ms()])
        self._lost = self._lost or (self._born is not None and born != self._born)
        self._born = born

    def _reconcile(self) -> None:
        """Redis is back: tell it what it does not know."""
        unsent, self._unsent = self._unsent, {}
        lost, self._lost = self._lost, False
        accounts = self._local.accounts() if lost else list(unsent.values())
        for tenant, account in accounts:
            entries = [number for entry in account.entries(self._local.now()) for number in entry]
            if entries:
                told = self._line.tell(RESTORE, self._keys(tenant.name), [*self._head(tenant), *entries])
                told.add_done_callback(partial(self._restored, lost, tenant, account))
        self._tell_running()

    def _restored(self, lost: bool, tenant: Tenant, account: Account, told: asyncio.Future[list[Any]]) -> None:
        if not told.cancelled() and told.exception() is None:
            return
        self._lost = self._lost or lost
        if lost or self._unsent.setdefault(tenant.name, (tenant, account))[1] is account:
            return
        for kind, _, amount in account.entries(self._local.now()):
            # Counted from now: a little too long, and never too little.
            self._remember(tenant, _of_kind(kind, amount))

    # What the scripts are told

    def _keys(self, tenant: str) -> list[str]:
        # The braces are a hash tag: in a Redis Cluster all keys of a fleet live in one slot.
        space = f"tandem:{{{self._fleet}}}:limits:"
        return [f"{space}born", *(f"{space}{tenant}:{name}" for name in KEY_NAMES)]

    def _head(self, tenant: Tenant) -> list[str | int]:
        now = "" if self._clock is None else int(self._clock() * 1000)
        limits = ("" if limit is None else int(limit) for limit in quota_of(tenant).each())
        return [now, *limits, _lease_ms()]


def open_limits(url: str, *, fleet: str, replica: str, replicas: Callable[[], int]) -> Limits:
    """The limits for a `state.url`: shared through Redis, or this replica's share where the state is embedded.

    Raises ValueError for a URL that is none.
    """
    if url.startswith("embedded"):
        return LocalLimits(replica, replicas)
    return SharedLimits(url, fleet=fleet, replica=replica, replicas=replicas)


def _of_kind(kind: int, amount: int) -> _Amounts:
    return (amount if kind == 1 else 0, amount if kind == 2 else 0, amount if kind == 3 else 0)


def _lease_ms() -> int:
    return int(LEASE_S * 1000)
