"""Which release's operator acts on a namespace: the one that holds the Lease `tandem-fleets` there.

A release elects one of its replicas by a Lease in its own namespace (`lease.py`). Two releases that look at the same
namespace know nothing of each other there: so before anything is done in a namespace, it is claimed in that namespace.
The holder is the release, not the replica: its next leader goes on at once. A claim is not given back when an operator
ends, lest the two take turns at every upgrade; it runs out.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

from tandem_operator.kube import Kube
from tandem_operator.lease import LeaderLease
from tandem_operator.metrics import CLAIMED
from tandem_operator.names import CLAIM, LEASE, Key

_log = logging.getLogger(__name__)


class _Claim(LeaderLease):
    async def try_once(self) -> bool:
        # Where a namespace is being deleted nobody gets a Lease any more, and the finalizers of its groups have to go.
        return await super().try_once() or self.ending


class Claims:
    """The claims of the leader of one release. For one event loop."""

    def __init__(
        self,
        kube: Kube,
        release: str,
        *,
        duration: float,
        needed: Callable[[str], bool],
        gained: Callable[[str], None],
        waits: Callable[[str, str], Awaitable[None]],
        lost: asyncio.Event,
        clock: Callable[[], float] | None = None,
    ) -> None:
        """A namespace is claimed while it is `needed`. `gained(namespace)` is called when it may be acted on, and
        `waits(namespace, holder)` now and then while another release has it. Others take over `duration` seconds after
        the last renewal that they saw. `lost` is set when a namespace may be another's: this replica must not write any
        more."""
        self._kube, self._release, self._duration = kube, release, duration
        self._needed, self._gained, self._waits = needed, gained, waits
        self._held: set[str] = set()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._told: dict[str, str] = {}
        self._lost = lost
        self._clock = clock

    def may_act(self, namespace: str) -> bool:
        """Whether it is this release's; if it was not claimed yet, that begins. Where nothing is, nothing is to do."""
        if namespace in self._held or not self._needed(namespace):
            return True
        if namespace not in self._tasks:
            task = asyncio.get_running_loop().create_task(self._tend(namespace), name=f"tandem-claim-{namespace}")
            self._tasks[namespace] = task
        return False

    async def close(self) -> None:
        """End the renewals."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        for namespace in list(self._tasks):
            self._forget(namespace)

    async def _tend(self, namespace: str) -> None:
        key = Key(LEASE, namespace, CLAIM)
        claim = _Claim(self._kube, key, self._release, duration=self._duration, clock=self._clock)

        def needed() -> bool:
            return self._needed(namespace)

        async def waits(holder: str) -> None:
            CLAIMED.labels(namespace).set(0)
            if self._told.get(namespace) != holder:
                self._told[namespace] = holder
                why = "Another release's operator (%s) acts on the fleets of namespace %s; this one waits."
                _log.warning(why, holder, namespace)
            await self._waits(namespace, holder)

        try:
            if await claim.acquire(needed, waits):
                _log.info("This release (%s) acts on the fleets of namespace %s.", self._release, namespace)
                CLAIMED.labels(namespace).set(1)
                self._held.add(namespace)
                self._gained(namespace)
                await claim.hold(needed)
                self._held.discard(namespace)
                if self._needed(namespace):
                    self._lost.set()
                    return
                await claim.release()
        except Exception:  # noqa: BLE001 - a claim that nobody tends must not be taken for held
            _log.exception("The claim on namespace %s failed.", namespace)
            self._lost.set()
            return
        self._forget(namespace)
        if self._needed(namespace):  # something has come meanwhile
            self.may_act(namespace)

    def _forget(self, namespace: str) -> None:
        self._held.discard(namespace)
        self._tasks.pop(namespace, None)
        self._told.pop(namespace, None)
        with contextlib.suppress(KeyError):
            CLAIMED.remove(namespace)
