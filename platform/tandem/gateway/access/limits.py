"""Limits of tenants: what may be used per minute and at once.

`LocalLimits` counts what this replica grants, and grants its share: the limit ÷ the number of replicas. That is all
there is where the state is embedded. `SharedLimits` (`shared_limits.py`) asks Redis, where all replicas count together,
and falls back to the local ones while Redis is gone.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

import msgspec

from tandem.core.rate_limit import Account, Budget, Quota, Reading, Shortage
from tandem.core.tenants import Tenant


class Grant(msgspec.Struct, kw_only=True):
    """Leave to go on, and what was taken for it; `settle` it exactly once."""

    tenant: Tenant
    member: str
    """Its name among the tenant's running requests: `<replica>:<serial>:<expected output>`."""
    input_tokens: int
    expected_output: int
    concurrency: int | None = None
    """How many requests of the tenant may wait or run on this replica; None where they were counted already."""
    readings: list[Reading]
    settled: bool = False


class Denial(msgspec.Struct, frozen=True, kw_only=True):
    """A limit has no room. `shortage` None = as many requests as may run at once do so."""

    shortage: Shortage | None
    limit: int
    readings: list[Reading]


class Limits(Protocol):
    """What `Admission` needs of them."""

    async def start(self) -> None: ...

    async def take(self, tenant: Tenant, input_tokens: int, max_output_tokens: int) -> Grant | Denial:
        """Take one request and its input; see that output is left. Never fails, never waits long."""

    def settle(self, grant: Grant, output_tokens: int, *, refund: bool = False) -> None:
        """The request is over: debit its output, or with `refund` give back what was taken. Never waits."""

    async def close(self) -> None: ...


def is_limited(tenant: Tenant) -> bool:
    return (
        tenant.requests_per_minute is not None
        or tenant.input_tokens_per_minute is not None
        or tenant.output_tokens_per_minute is not None
        or tenant.concurrency is not None
    )


def quota_of(tenant: Tenant) -> Quota:
    return Quota(tenant.requests_per_minute, tenant.input_tokens_per_minute, tenant.output_tokens_per_minute)


def never_fits(tenant: Tenant, input_tokens: int) -> Denial | None:
    """The refusal of a request that no waiting would help."""
    for budget, limit, cost in zip(Budget, quota_of(tenant).each(), (1, input_tokens, 1), strict=True):
        if limit is not None and cost > limit:
            return Denial(shortage=Shortage(budget, math.inf), limit=int(limit), readings=[])
    return None


class LocalLimits:
    """See `Limits`. `replicas` tells how many gateways share each limit."""

    def __init__(self, replica: str, replicas: Callable[[], int], clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` in seconds; it must never go back."""
        self._replica = replica
        self._replicas = replicas
        self._clock = clock
        self._accounts: OrderedDict[str, Account] = OrderedDict()
        self._tenants: dict[str, Tenant] = {}
        self._serial = itertools.count(1)

    async def start(self) -> None:
        return None

    async def close(self) -> None:
        return None

    async def take(self, tenant: Tenant, input_tokens: int, max_output_tokens: int) -> Grant | Denial:
        return self.take_share(tenant, input_tokens, max_output_tokens)

    def take_share(self, tenant: Tenant, input_tokens: int, max_output_tokens: int) -> Grant | Denial:
        """Grant it if this replica's share has room. What is larger than the share needs all of it, and more later."""
        denial = never_fits(tenant, input_tokens)
        if denial is not None:
            return denial
        now = self._clock()
        replicas = max(1, self._replicas())
        share = quota_of(tenant).share(replicas)
        account = self.account(tenant.name)
        shortage = account.shortage(share, input_tokens, now)
        if shortage is not None:
            limit = dict(zip(Budget, quota_of(tenant).each(), strict=True))[shortage.budget] or 0
            return Denial(shortage=shortage, limit=int(limit), readings=account.readings(share, now))
        grant = self.grant(tenant, input_tokens, max_output_tokens)
        self.record(grant, share)
        grant.readings = account.readings(share, now)
        if tenant.concurrency is not None:
            grant.concurrency = max(1, tenant.concurrency // replicas) if tenant.concurrency > 0 else 0
        return grant

    def grant(self, tenant: Tenant, input_tokens: int, max_output_tokens: int) -> Grant:
        """A grant that is not recorded yet."""
        expected = self.account(tenant.name).expected_output(max_output_tokens)
        member = f"{self._replica}:{next(self._serial)}:{expected}"
        return Grant(tenant=tenant, member=member, input_tokens=input_tokens, expected_output=expected, readings=[])

    def record(self, grant: Grant, quota: Quota) -> None:
        """Count the grant as this replica's."""
        self._tenants[grant.tenant.name] = grant.tenant
        account = self.account(grant.tenant.name)
        account.spend(quota, (1, grant.input_tokens, 0), self._clock())
        account.held += grant.expected_output

    def settle(self, grant: Grant, output_tokens: int, *, refund: bool = False) -> None:
        share = quota_of(grant.tenant).share(self._replicas())
        self.settle_within(grant, share, output_tokens, refund=refund)

    def settle_within(self, grant: Grant, quota: Quota, output_tokens: int, *, refund: bool) -> tuple[int, int, int]:
        """Count the end of a grant against `quota`; returns the requests, input and output tokens to debit."""
        if grant.settled:
            return (0, 0, 0)
        grant.settled = True
        account = self.account(grant.tenant.name)
        account.held = max(0.0, account.held - grant.expected_output)
        amounts = (-1, -grant.input_tokens, 0) if refund else (0, 0, output_tokens)
        if not refund:
            account.learn(output_tokens)
        account.spend(quota, amounts, self._clock())
        return amounts

    def now(self) -> float:
        return self._clock()

    def spend_share(self, account: Account, tenant: Tenant, amounts: tuple[int, int, int]) -> None:
        """Count it in an account of the caller's own, as against this replica's share."""
        account.spend(quota_of(tenant).share(self._replicas()), amounts, self._clock())

    def accounts(self) -> list[tuple[Tenant, Account]]:
        """Of all whom this replica granted anything in the last minute, and maybe some more."""
        return [(tenant, self._accounts[name]) for name, tenant in self._tenants.items() if name in self._accounts]

    def account(self, tenant: str) -> Account:
        account = self._accounts.get(tenant)
        if account is None:
            self._forget()
            account = self._accounts[tenant] = Account()
        else:
            self._accounts.move_to_end(tenant)
        return account

    def _forget(self) -> None:
        """Drop the accounts that were unused for longest and tell nothing; a few per call."""
        now = self._clock()
        for name in list(itertools.islice(self._accounts, 2)):
            if self._accounts[name].idle(now):
                del self._accounts[name]
                self._tenants.pop(name, None)
            else:
                self._accounts.move_to_end(name)
