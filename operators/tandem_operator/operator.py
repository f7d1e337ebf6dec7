"""The operator as a whole: elected, it lists and watches, works through its queue, and plans."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import signal
import time
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass

import kopf

from tandem_operator.apply import Applier
from tandem_operator.cache import Cache
from tandem_operator.claims import Claims
from tandem_operator.control import Links
from tandem_operator.events import Recorder
from tandem_operator.health import Health, serve_health
from tandem_operator.kube import Kube, KubeError, connect
from tandem_operator.lease import LeaderLease
from tandem_operator.metrics import LEADER, RECONCILES, SECONDS, WAITING
from tandem_operator.names import EP_GROUP, FLEET, LEASE, OWN, POOLS, Key, Kind
from tandem_operator.reconcile.context import Context, find_budget
from tandem_operator.reconcile.fleet import reconcile_fleet
from tandem_operator.reconcile.group import reconcile_group
from tandem_operator.reconcile.pools import reconcile_pools
from tandem_operator.reconcile.scaling import Planner
from tandem_operator.watch import Feed, watched
from tandem_operator.workqueue import WorkQueue

_log = logging.getLogger(__name__)

WORKERS = 8
CLAIM_TIMES = 4
"""A claim stands so many times longer than the lease: another replica of the release should keep it."""
_ONE_LOOK_S = 120.0
"""A look at an object that takes longer is given up and begun again."""
_RETRY_S = 2.0

Reconciler = Callable[[Context, Key], Awaitable[float | None]]
RECONCILERS: dict[Kind, Reconciler] = {FLEET: reconcile_fleet, POOLS: reconcile_pools, EP_GROUP: reconcile_group}


class LeadershipLost(Exception):
    """Another replica leads, or may: this one must not write any more."""


async def run(
    *,
    namespaces: Collection[str],
    port: int,
    lease: str,
    lease_namespace: str,
    identity: str,
    lease_s: float,
    resync_s: float,
) -> None:
    """Run until told to stop (SIGTERM). Raises LeadershipLost, and KubeError if there are no credentials."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    kube = await connect()
    health = Health()
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(kube.close)
        await stack.enter_async_context(serve_health(health, port))
        election = LeaderLease(kube, Key(LEASE, lease_namespace, lease), identity, duration=lease_s)
        health.ready = True  # as a standby it does what it should
        if not await _unless(stop, election.acquire()):
            return
        _log.info("This replica (%s) leads now.", identity)
        LEADER.set(1)
        stack.callback(LEADER.set, 0)
        try:
            work = Work(
                kube, health, namespaces, identity, f"{lease_namespace}/{lease}", CLAIM_TIMES * lease_s, resync_s
            )
            await _lead(election, work, stop)
        except LeadershipLost:
            raise
        except BaseException:
            await election.release()
            raise
        await election.release()


@dataclass(frozen=True)
class Work:
    """What the leader's work is done with."""

    kube: Kube
    health: Health
    namespaces: Collection[str]
    identity: str
    release: str
    """Under which name it claims namespaces."""
    claim_s: float
    """How long a claim stands without renewal."""
    resync_s: float


async def _lead(election: LeaderLease, work: Work, stop: asyncio.Event) -> None:
    unclaimed = asyncio.Event()
    held = asyncio.create_task(election.hold(), name="tandem-lease")
    done = asyncio.create_task(_work(work, stop, unclaimed), name="tandem-operator")
    stopped = asyncio.create_task(stop.wait(), name="tandem-stop")
    taken = asyncio.create_task(unclaimed.wait(), name="tandem-unclaimed")
    tasks = (held, done, stopped, taken)
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        lost = "The lease" if held.done() else "The claim on a namespace" if taken.done() else ""
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    if lost:
        raise LeadershipLost(f"{lost} was lost; this replica stops, and begins again as a standby.")
    if isinstance(results[1], Exception):
        raise results[1]


async def _work(work: Work, stop: asyncio.Event, unclaimed: asyncio.Event) -> None:
    """Do what an operator does, until cancelled. Sets `unclaimed` when it must not go on in some namespace."""
    kube = work.kube
    budget = await _once_served(kube)
    cache, queue = Cache(), WorkQueue[Key]()
    feed: Feed | None = None

    def news(namespace: str, fleet: str) -> None:
        assert feed is not None, "links are opened by reconcilers, which begin later"
        feed.fleet_changed(namespace, fleet)

    links, recorder = Links(news), Recorder(kube, work.identity)
    ctx = Context(kube, cache, Applier(kube, cache, watched(budget)), queue, links, recorder, budget)
    feed = Feed(ctx, work.namespaces)
    planner = Planner(ctx)
    claims = Claims(
        kube,
        work.release,
        duration=work.claim_s,
        needed=lambda namespace: any(cache.any(kind, namespace) for kind in OWN),
        gained=feed.look_again,
        waits=functools.partial(_tell_who_acts, ctx),
        lost=unclaimed,
    )
    try:
        # A cache that has not everything would have children made twice, or groups drained that are wanted.
        while True:
            try:
                await feed.relist()
                break
            except KubeError as error:
                _log.warning("The first listing failed, it is tried again: %s", error)
                await asyncio.sleep(_RETRY_S)
        work.health.beat = lambda: kube.reached_at
        async with asyncio.TaskGroup() as tasks:
            for number in range(WORKERS):
                tasks.create_task(_worker(ctx, claims, planner), name=f"tandem-worker-{number}")
            tasks.create_task(feed.relist_forever(work.resync_s), name="tandem-relist")
            tasks.create_task(_watch(feed, work.namespaces, stop), name="tandem-watch")
    finally:
        queue.close()
        await planner.close()
        await ctx.checks.close()
        await links.close_all()
        await claims.close()


async def _tell_who_acts(ctx: Context, namespace: str, holder: str) -> None:
    """Tell the Fleets of a namespace that two operators look at it."""
    for fleet in ctx.cache.all(FLEET, namespace):
        message = f"The operator of {holder} acts here; that of another release looks at this namespace too, and waits."
        await ctx.recorder.tell(FLEET, fleet, "AnotherOperator", message, type_="Warning")


async def _watch(feed: Feed, namespaces: Collection[str], stop: asyncio.Event) -> None:
    """kopf's watches. They go on through whatever happens; kopf raises, or ends since it took the signal to stop."""
    await kopf.operator(
        registry=feed.registry(),
        settings=feed.settings(),
        standalone=True,
        clusterwide=not namespaces,
        namespaces=tuple(namespaces),
    )
    stop.set()


async def _worker(ctx: Context, claims: Claims, planner: Planner) -> None:
    while True:
        key = await ctx.queue.get()
        WAITING.set(len(ctx.queue))
        if not claims.may_act(key.namespace):
            ctx.queue.done(key)  # it is asked for again when the namespace is ours
            continue
        began = time.perf_counter()
        try:
            async with asyncio.timeout(_ONE_LOOK_S):
                again = await RECONCILERS[key.kind](ctx, key)
        except Exception as error:  # noqa: BLE001 - one object's trouble must not end the work on the others
            delay = ctx.queue.failed(key)
            conflict = isinstance(error, KubeError) and error.status == 409
            RECONCILES.labels(key.kind.kind, "conflict" if conflict else "error").inc()
            if conflict:  # somebody was faster: look again at what is there now
                _log.info("%s: has changed meanwhile, again in %.1f s: %s", key, delay, error)
            else:
                expected = isinstance(error, KubeError | TimeoutError)
                _log.warning("%s: failed, again in %.1f s: %s", key, delay, error, exc_info=not expected)
        else:
            ctx.queue.done(key)
            RECONCILES.labels(key.kind.kind, "done").inc()
            if again is not None:
                ctx.queue.add_after(key, again)
        SECONDS.labels(key.kind.kind).observe(time.perf_counter() - began)
        if key.kind is FLEET:
            planner.look()


async def _once_served(kube: Kube) -> Kind | None:
    """Wait until the server has our resources; return its kind of PodDisruptionBudget."""
    while True:
        try:
            missing = [kind.plural for kind in OWN if not await kube.serves(kind)]
            if not missing:
                return await find_budget(kube)
            _log.warning("The cluster has no %s: install the CRDs of the chart. Waiting.", ", ".join(missing))
        except KubeError as error:
            _log.warning("The API server cannot be asked what it serves: %s", error)
        await asyncio.sleep(_RETRY_S)


async def _unless(stop: asyncio.Event, wanted: Awaitable[object]) -> bool:
    """Wait for `wanted`; False = told to stop first."""
    task, stopped = asyncio.ensure_future(wanted), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait((task, stopped), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            await task
        return task.done()
    finally:
        for one in (task, stopped):
            one.cancel()
        await asyncio.gather(task, stopped, return_exceptions=True)
