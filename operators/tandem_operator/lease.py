"""Leader election by a Lease: of several replicas one acts.

Not the official client's `leaderelection`: its calls have no deadline, so that a leader whose connection hangs would
act on after its time, and an error of the network ends its loop.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
from collections.abc import Callable

from tandem_operator.kube import Kube, KubeError
from tandem_operator.names import LEASE, Key, Object

_log = logging.getLogger(__name__)

_FORMAT = "%Y-%m-%dT%H:%M:%S.%fZ"


class LeaderLease:
    """One replica's part in the election. A leader that could not renew in time must stop at once (`lost`)."""

    def __init__(
        self,
        kube: Kube,
        key: Key,
        identity: str,
        *,
        duration: float = 15.0,
        clock: Callable[[], float] | None = None,
    ) -> None:
        """Others take over `duration` seconds after the last renewal that they saw; a leader gives up sooner, after
        two thirds of that."""
        self._kube = kube
        self._key = key
        self._identity = identity
        self._duration, self._renew_within, self._every = duration, duration * 2 / 3, duration / 7.5
        self._seen: tuple[str, str] | None = None
        """Holder and time of renewal that were last read, and when, on our own clock: those of others may be wrong."""
        self._seen_at = 0.0
        self._clock = clock or asyncio.get_running_loop().time

    async def acquire(self) -> None:
        """Return when this replica is the leader."""
        while not await self.try_once():  # noqa: ASYNC110 - a Lease is looked at, it gives no event
            await asyncio.sleep(self._every)
        _log.info("This replica (%s) leads now.", self._identity)

    async def hold(self) -> None:
        """Renew; return when the lease is lost."""
        renewed = self._clock()
        while True:
            await asyncio.sleep(self._every)
            asked = self._clock()
            try:
                async with asyncio.timeout(renewed + self._renew_within - asked):
                    if await self.try_once():
                        renewed = asked  # others count from the writing, which is no earlier
                        continue
            except TimeoutError:
                _log.error("The lease was not renewed within %g s: the API server did not answer.", self._renew_within)
                return
            if self._clock() - renewed >= self._renew_within:
                _log.error("The lease could not be renewed within %g s.", self._renew_within)
                return
            if self._seen is not None and self._seen[0] != self._identity:
                _log.error("The lease is held by %s now.", self._seen[0])
                return

    async def release(self) -> None:
        """Let another replica lead at once."""
        try:
            lease = await self._kube.get(self._key)
            if lease is not None and lease["spec"].get("holderIdentity") == self._identity:
                spec = {**lease["spec"], "holderIdentity": "", "renewTime": _now(), "leaseDurationSeconds": 1}
                await self._kube.replace(self._key, {**lease, "spec": spec})
        except KubeError as error:
            _log.warning("The lease was not released, others wait until it runs out: %s", error)

    async def try_once(self) -> bool:
        """Take or renew the lease if that is allowed; whether this replica has it now."""
        try:
            lease = await self._kube.get(self._key)
            if lease is None:
                body = {"metadata": {"name": self._key.name, "namespace": self._key.namespace}}
                await self._kube.create(LEASE, self._key.namespace, {**body, "spec": self._spec(None)})
                return True
            spec = lease.get("spec") or {}
            holder, renewed = spec.get("holderIdentity") or "", spec.get("renewTime") or ""
            if (holder, renewed) != self._seen:
                self._seen, self._seen_at = (holder, renewed), self._clock()
            runs_out = self._seen_at + (spec.get("leaseDurationSeconds") or self._duration)
            if holder not in ("", self._identity) and self._clock() < runs_out:
                return False
            answer = await self._kube.replace(self._key, {**lease, "spec": self._spec(spec)})
            self._seen = (self._identity, answer["spec"]["renewTime"])
            self._seen_at = self._clock()
            return True
        except KubeError as error:
            if error.status != 409:  # somebody was faster; the next look tells who
                _log.warning("The lease cannot be read or written: %s", error)
            return False

    def _spec(self, before: Object | None) -> Object:
        now, before = _now(), before or {}
        same = before.get("holderIdentity") == self._identity
        transitions = before.get("leaseTransitions") or 0
        return {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": int(self._duration),
            "acquireTime": before.get("acquireTime", now) if same else now,
            "renewTime": now,
            "leaseTransitions": transitions if same or not before else transitions + 1,
        }


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime(_FORMAT)
