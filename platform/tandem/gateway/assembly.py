"""Puts the parts of one gateway replica together, on its event loop, and takes them apart again."""

from __future__ import annotations

import asyncio
import logging
import math
import socket
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec

from tandem.config import FleetConfig
from tandem.core.answers import Limits
from tandem.core.layout import CPU_KV_TOKENS, ELEMENT_BYTES
from tandem.core.prefix_index import PrefixIndex
from tandem.core.route_cost import RouteSettings, Slo
from tandem.core.routing import Router
from tandem.core.types import Role
from tandem.engine.client import EngineClient
from tandem.gateway.access import tls
from tandem.gateway.access.admission import Admission
from tandem.gateway.access.admission_metrics import AdmissionMetrics
from tandem.gateway.access.auth import Authenticator
from tandem.gateway.access.keys import KeyRing
from tandem.gateway.access.oidc import TokenVerifier
from tandem.gateway.access.shared_limits import open_limits
from tandem.gateway.answers.answers import Answers
from tandem.gateway.answers.redis_journal import open_journal
from tandem.gateway.http.app import App
from tandem.gateway.http.pages import Pages
from tandem.gateway.http.server import HttpServer
from tandem.gateway.observe.logs import RequestLog
from tandem.gateway.observe.metrics import Metrics
from tandem.gateway.observe.tracing import Tracing
from tandem.gateway.observe.traffic import TrafficTeller
from tandem.gateway.pairing.fleet_view import FleetView
from tandem.gateway.pairing.kv_events import KvEvents
from tandem.gateway.pairing.load_poller import LoadPoller
from tandem.gateway.pairing.pairs import PairDriver
from tandem.gateway.rpc.front import ServiceAnswers
from tandem.gateway.rpc.server import GrpcServer
from tandem.gateway.service import Service
from tandem.gateway.survival.reaper import Reaper
from tandem.gateway.survival.registration import Registration
from tandem.gateway.text.detokenize import Vocabulary
from tandem.gateway.text.model_card import load_card
from tandem.gateway.text.tokenize import Tokenizer
from tandem.gateway.usage.metering import Meter, make_meter
from tandem.state import Store, open_store

log = logging.getLogger(__name__)

BACKLOG = 4096


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """What one replica is told."""

    config: FleetConfig
    model_path: Path
    store_url: str
    folder: Path
    """Where the embedded store's file lives."""
    replica: str


class Gateway:
    """All parts of one replica. `open` it, `listen`, `stop`; whatever fails meanwhile ends `tasks`."""

    def __init__(self, setting: Setting, stack: AsyncExitStack) -> None:
        self._setting = setting
        self._stack = stack
        self.tasks: list[asyncio.Task[None]] = []
        """What goes on by itself for as long as the replica lives; none of them ends well by itself."""
        self._grpc: GrpcServer | None = None
        self._pages: Pages | None = None
        self._reaper: Reaper | None = None

    async def open(self) -> None:
        """Make the parts. Raises StoreError, ModelError, TlsError, SinkError, IssuerDown: each says what to do."""
        setting, stack, config = self._setting, self._stack, self._setting.config
        self.store: Store = await open_store(setting.store_url, fleet=config.name, folder=setting.folder)
        stack.push_async_callback(self.store.close)
        self._go(self.store.keep(), "keep")
        self._client = client = EngineClient()
        stack.push_async_callback(client.close)
        self.metrics = Metrics()
        wanted = config.routing
        router = Router(
            RouteSettings(slo=Slo(ttft_s=wanted.ttft_s, itl_s=wanted.itl_s)),
            PrefixIndex(max_bytes=wanted.index_bytes),
        )
        router.summoned = summoned(config)
        self.driver = PairDriver(client, self.metrics, router)
        self._events = KvEvents(router.index)
        stack.callback(self._events.close)
        poller = LoadPoller(client, router)
        stack.push_async_callback(poller.close)
        # The index must know a rank before its events come.
        listeners = (self.driver, self._events, poller)
        self._view = FleetView(self.store, listeners, on_change=self._fleet_changed)
        self._admission = await self._make_admission()
        await self._view.load()
        self._go(self._view.follow(), "fleet-view")
        self._context = None
        if config.gateway.tls is not None:
            self._context = tls.server_ssl_context(config.gateway.tls)
            self._go(tls.follow(self._context, config.gateway.tls), "tls")
        self._go(self._traffic().keep(), "traffic")
        service = await self._make_service()
        self._pages = pages = Pages(
            setting.replica, config.name, service, self._view.snapshot, lambda: self._events.counts
        )
        self._answers = await self._make_answers(service)
        self._http = HttpServer(App(service, pages, self._answers))
        self._grpc = GrpcServer(
            ServiceAnswers(service, lambda: self._view.snapshot().model_version, self._answers),
            shortage=self._shortage,
            longest_s=config.gateway.request_timeout_s,
            max_request_bytes=config.gateway.max_body_bytes,
        )
        self._fleet_changed()

    async def listen(self, listener: socket.socket) -> int:
        """Answer HTTP on the bound socket, and gRPC; returns the port of the latter. Raises OSError."""
        assert self._grpc is not None, "it listens only after it was opened"
        gateway = self._setting.config.gateway
        credentials = None if gateway.tls is None else tls.grpc_server_credentials(gateway.tls)
        port = await self._grpc.start(
            gateway.host, gateway.grpc_port, credentials=credentials, share_port=gateway.replicas > 1
        )
        await self._http.start(listener, backlog=BACKLOG, tls=self._context)
        return port

    def watch_over(self, registration: Registration) -> None:
        """From now on, see to what gateways that die leave behind."""
        self._reaper = Reaper(
            self.store,
            self._client,
            self._view.snapshot,
            incarnation=self.driver.incarnation,
            steady_at=lambda: registration.steady_at,
        )
        self._go(self._reaper.work(), "reaper")

    def leave(self) -> None:
        """Tell load balancers that ask for its health to send requests to others; take what comes all the same."""
        assert self._pages is not None, "it is left only after it was opened"
        assert self._grpc is not None, "it is left only after it was opened"
        self._pages.leaving = self._http.leaving = True
        self._grpc.health_changed()

    async def stop(self, grace: float) -> None:
        """Let requests end for `grace` seconds, then end the rest."""
        assert self._grpc is not None, "it is stopped only after it was opened"
        grpc = asyncio.create_task(self._grpc.stop(grace))
        if not await self._http.stop(grace):
            self._answers.withdraw()
            self.driver.withdraw_all()
            await self._http.stop(5)
        self._http.abort()
        await grpc
        await self.driver.drain(within=1.0)
        for task in self.tasks:
            task.cancel()
        if self.tasks:
            await asyncio.wait(self.tasks, timeout=5)

    def _traffic(self) -> TrafficTeller:
        return TrafficTeller(
            self.store,
            self.metrics,
            self._admission,
            parked=lambda: self.driver.table.parked,
            fleet=self._view.snapshot,
            replica=self._setting.replica,
            incarnation=self.driver.incarnation,
        )

    async def _make_admission(self) -> Admission:
        setting, wanted = self._setting, self._setting.config.admission
        limits = open_limits(
            setting.store_url, fleet=setting.config.name, replica=setting.replica, replicas=self._replicas
        )
        admission = Admission(limits, max_waiting=wanted.max_waiting, observer=AdmissionMetrics(self.metrics))
        await admission.start()
        self._stack.push_async_callback(admission.close)
        return admission

    async def _make_service(self) -> Service:
        setting, config = self._setting, self._setting.config
        card = load_card(setting.model_path, config.model.name, self._smallest_pool())
        tokenizer = Tokenizer.load(setting.model_path)
        seen = config.observability
        tracing = Tracing(
            seen.otlp_endpoint,
            sample_ratio=seen.sample_ratio,
            follow_client=seen.follow_client,
            fleet=config.name,
            replica=setting.replica,
            on_drop=self.metrics.spans_dropped.inc,
        )
        self._stack.push_async_callback(tracing.close)
        service = Service(
            config.gateway,
            card,
            tokenizer,
            Vocabulary(tokenizer.inner),
            self.driver,
            self.metrics,
            authenticator=await self._make_authenticator(),
            admission=self._admission,
            meter=await self._make_meter(),
            tracing=tracing,
            log=RequestLog(log_prompts=seen.log_prompts),
            queue_s=config.admission.queue_s,
            replica=setting.replica,
        )
        self._stack.callback(service.close)
        self.metrics.model(card.name, config.model.version)
        if card.shape is not None:
            dtype: str = config.model.dtype
            if dtype == "auto":
                dtype = "float32" if config.device == "cpu" else card.shape.dtype
            self.driver.kv_bytes_per_token = card.shape.kv_bytes_per_token(ELEMENT_BYTES.get(dtype, 0))
        return service

    async def _make_answers(self, service: Service) -> Answers:
        setting, config = self._setting, self._setting.config
        wanted = config.idempotency
        limits = Limits(
            keep_s=wanted.keep_s,
            open_s=config.gateway.request_timeout_s + wanted.keep_s,
            tenant_bytes=wanted.tenant_bytes,
            total_bytes=wanted.total_bytes,
        )
        journal = open_journal(setting.store_url, limits, fleet=config.name, incarnation=self.driver.incarnation)
        answers = Answers(service, journal, wanted)
        # Before the meter: an answer that is let go of has its record then.
        self._stack.push_async_callback(answers.close)
        return answers

    async def _make_authenticator(self) -> Authenticator:
        config = self._setting.config
        keys = KeyRing(self.store)
        self._go(keys.follow(), "keys")
        await keys.loaded()
        tokens = None
        if config.oidc is not None:
            tokens = TokenVerifier(config.oidc)
            self._stack.push_async_callback(tokens.close)
        return Authenticator(config, keys, tokens)

    async def _make_meter(self) -> Meter:
        setting, wanted = self._setting, self._setting.config.metering
        meter = make_meter(
            self.metrics,
            sink=wanted.sink,
            folder=wanted.folder or setting.folder.parent / "usage",
            replica=setting.replica,
            fleet=setting.config.name,
            store_url=setting.store_url,
            rotate_bytes=wanted.rotate_bytes,
            retention_days=wanted.retention_days,
            fsync_s=wanted.fsync_s,
            stream_records=wanted.stream_records,
            spool_bytes=wanted.spool_bytes,
        )
        await meter.start()
        self._stack.push_async_callback(meter.close)
        return meter

    def _fleet_changed(self) -> None:
        """What this replica may run follows the groups that are ready, and how many replicas share them."""
        wanted, ranks = self._setting.config.admission, dict.fromkeys(Role, 0)
        for group in self._view.snapshot().groups:
            if group.routable:
                ranks[group.role] += max(1, group.dp_size)
        # While a role has no group, requests wait for one in the pair table, or are told at once that none is coming:
        # as many of them as one group could run, so that they are no more than memory has room for.
        self._admission.set_capacity(
            math.ceil(max(1, ranks[Role.DECODE]) * wanted.running_per_decode_rank / self._replicas()),
            math.ceil(max(1, ranks[Role.PREFILL]) * wanted.tokens_per_prefill_rank / self._replicas()),
        )
        if self._grpc is not None:
            self._grpc.health_changed()
        if self._reaper is not None:
            self._reaper.look()

    def _replicas(self) -> int:
        return max(1, len(self._view.snapshot().gateways))

    def _shortage(self) -> str | None:
        """Why gRPC clients should not ask here. Not a lack of groups that come when somebody asks, or nobody would."""
        if self._pages is not None and self._pages.leaving:
            return "this gateway leaves"
        found = self.driver.router.shortage()
        return None if found is None or found.asleep else found.reason

    def _smallest_pool(self) -> int | None:
        """KV tokens of the DP ranks with the fewest; None where SGLang measures a GPU's memory itself."""
        config = self._setting.config
        on_cpu = CPU_KV_TOKENS if config.device == "cpu" else None
        pools = [pool.max_total_tokens or on_cpu for pool in (config.prefill, config.decode)]
        return min((tokens for tokens in pools if tokens), default=None)

    def _go(self, work: Coroutine[Any, Any, None], name: str) -> None:
        self.tasks.append(asyncio.create_task(work, name=name))


def summoned(config: FleetConfig) -> frozenset[Role]:
    """Roles that autoscaling may leave without any group, and gives one as soon as a request waits for it."""
    pools = {Role.PREFILL: config.prefill.autoscaling, Role.DECODE: config.decode.autoscaling}
    own = {role for role, scaling in pools.items() if scaling is not None and scaling.min_groups == 0}
    return frozenset(own | {Role(role) for role in config.gateway.summoned})
