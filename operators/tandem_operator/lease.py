"""Leader election by a Lease: of several replicas one acts; and of several releases in a namespace (`claims.py`).

Not the official client's `leaderelection`: its calls have no deadline, so that a leader whose connection hangs would
act on after its time, and an error of the network ends its loop.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
from collections.abc import Awaitable, Callable

from tandem_operator.kube import Kube, KubeError
from tandem_operator.names import LEASE, Key, Object

_log = logging.getLogger(__name__)

_FORMAT = "%Y-%m-%dT%H:%M:%S.%fZ"
_LOOK_S = 2.0
"""Who waits looks so often, if it does not wait for a shorter lease."""
_ENDING = "because it is being terminated"
"""How the server says that a namespace takes nothing new."""

Waits = Callable[[str], Awaitable[None]]


def _always() -> bool:
    return True


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
        self._looks = min(self._every, _LOOK_S)
        self._seen: tuple[str, str] | None = None
        """Holder and time of renewal that were last read, and when, on our own clock: those of others may be wrong."""
        self._seen_at = 0.0
        self._clock = clock or asyncio.get_running_loop().time
        self.ending = False
        """Whether the server makes no Lease there any more, since the namespace is being deleted."""

    @property
    def holder(self) -> str:
        """Who had it when it was last read; empty = nobody, or it was not read yet."""
        return self._seen[0] if self._seen is not None else ""

    async def acquire(self, needed: Callable[[], bool] = _always, waits: Waits | None = None) -> bool:
        """Return True when it is had, False when it is not `needed` any more. `waits` is told, at each look, who has it
        meanwhile."""
        while needed():
            if await self.try_once():
                return True
            if waits is not None and self.holder not in ("", self._identity):
                await waits(self.holder)
            await asyncio.sleep(self._looks)
        return False

    async def hold(self, needed: Callable[[], bool] = _always) -> None:
        """Renew; return when the lease is lost, or not `needed` any more."""
        renewed = self._clock()
        while True:
            await asyncio.sleep(self._every)
            if not needed():
                return
            asked = self._clock()
            try:
                async with asyncio.timeout(renewed + self._renew_within - asked):
                    if await self.try_once():
                        renewed = asked  # others count from the writing, which is no earlier
                        continue
            except TimeoutError:
                why = "the API server did not answer"
                _log.error("%s was not renewed within %g s: %s.", self._key, self._renew_within, why)
                return
            if self._clock() - renewed >= self._renew_within:
                _log.error("%s could not be renewed within %g s.", self._key, self._renew_within)
                return
            if self.holder not in ("", self._identity):
                _log.error("%s is held by %s now.", self._key, self.holder)
                return

    async def release(self) -> None:
        """Let another replica lead at once."""
        try:
            lease = await self._kube.get(self._key)
            if lease is not None and lease["spec"].get("holderIdentity") == self._identity:
                spec = {**lease["spec"], "holderIdentity": "", "renewTime": _now(), "leaseDurationSeconds": 1}
                await self._kube.replace(self._key, {**lease, "spec": spec})
        except KubeError as error:
            _log.warning("%s was not released, others wait until it runs out: %s", self._key, error)

    async def try_once(self) -> bool:
        """Take or renew the lease if that is allowed; whether this replica has it now."""
        self.ending = False  # it may be another namespace of that name by now
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
            self.ending = error.status == 403 and _ENDING in error.said
            if error.status != 409 and not self.ending:  # 409: somebody was faster; the next look tells who
                _log.warning("%s cannot be read or written: %s", self._key, error)
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
