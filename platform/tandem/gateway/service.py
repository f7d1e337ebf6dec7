"""What every request needs, made once per replica; and the way from a body to the pair table."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import msgspec

from tandem.config import GatewayConfig
from tandem.core.routing import RouteAsk
from tandem.gateway.access.admission import Admission
from tandem.gateway.access.auth import Authenticator
from tandem.gateway.api.choices import answer_for, prompts_of, sampling_for
from tandem.gateway.api.requests import Wanted, check_length, parse_json
from tandem.gateway.asked import Asked
from tandem.gateway.http.endpoints import Endpoint
from tandem.gateway.observe.logs import RequestLog
from tandem.gateway.observe.metrics import Metrics
from tandem.gateway.observe.tracing import Tracing
from tandem.gateway.pairing.bell import Bell
from tandem.gateway.pairing.engine_body import EngineRequest
from tandem.gateway.pairing.pairs import PairDriver, Patience
from tandem.gateway.pairing.reply import Reply, Run
from tandem.gateway.pairing.ticket import Ticket
from tandem.gateway.text.detokenize import Vocabulary
from tandem.gateway.text.lanes import Lanes
from tandem.gateway.text.model_card import ModelCard
from tandem.gateway.text.tokenize import ChatPrompt, Tokenizer
from tandem.gateway.usage.metering import Meter

Body = bytes | Mapping[str, Any]


WHOLE_HOLD_S = 10.0
"""How long the first tokens of an answer that is not streamed may wait for prefill's word."""


class Prepared(msgspec.Struct, frozen=True, kw_only=True):
    """A request that is ready for the engines."""

    wanted: Wanted
    prompts: list[ChatPrompt]
    limit: int
    """Tokens that each choice may have."""

    @property
    def prompt_ids(self) -> list[list[int]]:
        return [prompt.ids for prompt in self.prompts]


class Service:
    """What the endpoints need. Belongs to the event loop that it was made on."""

    def __init__(
        self,
        config: GatewayConfig,
        card: ModelCard,
        tokenizer: Tokenizer,
        vocabulary: Vocabulary,
        driver: PairDriver,
        metrics: Metrics,
        *,
        authenticator: Authenticator,
        admission: Admission,
        meter: Meter,
        tracing: Tracing,
        log: RequestLog,
        queue_s: float,
        replica: str,
    ) -> None:
        """`queue_s`: how long a request may wait for its turn."""
        self.config = config
        self.card = card
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary
        self.driver = driver
        self.metrics = metrics
        self.authenticator = authenticator
        self.admission = admission
        self.meter = meter
        self.tracing = tracing
        self.log = log
        self.queue_s = queue_s
        self.replica = replica
        self._loop = asyncio.get_running_loop()
        self.lanes = Lanes()

    async def prepare(self, endpoint: Endpoint, body: Body, tenant: str) -> Prepared:
        """Everything that needs no engine. Raises ApiError."""
        size = len(body) if isinstance(body, bytes) else 0
        return await self.lanes.work(tenant, size, lambda: self._prepare(endpoint, body))

    def reply_to(self, asked: Asked, prepared: Prepared) -> Reply:
        """The reply of an admitted request, with a run for each choice; nothing is sent yet."""
        wanted, bell, form = prepared.wanted, Bell(), self.tokenizer.tool_format
        tenant = self.metrics.tenant(asked.identity.tenant.name)
        reply = Reply(bell, prepared.prompt_ids, tenant, asked.arrived, asked.permit, asked.trace)
        asks = [
            RouteAsk(prompt.ids, asked.session, output_tokens=wanted.max_tokens or 0) for prompt in prepared.prompts
        ]
        for index in range(wanted.choices):
            prompt = prepared.prompts[index // wanted.n]
            sampling = sampling_for(wanted, index, thinking=prompt.thinking, limit=prepared.limit, form=form)
            request = EngineRequest(prompt.ids, sampling, wanted.engine)
            name = asked.number if index == 0 else f"{asked.number}-{index}"
            ask = asks[index // wanted.n]
            ticket = Ticket(name, request, ask, bell, limit=prepared.limit, trace=asked.trace)
            answer = answer_for(wanted, self.vocabulary, thinking=prompt.thinking, form=form)
            reply.add(Run(index, ticket, answer, self.driver, reply))
        tenant.prompt(sum(map(len, reply.prompts)))
        return reply

    def submit(self, asked: Asked, reply: Reply) -> None:
        """Send it on its way."""
        gateway, streams = self.config, asked.wanted.stream
        patience = Patience(
            timeout=max(0.0, asked.deadline - self._loop.time()),
            first_token_s=gateway.first_token_timeout_s,
            stall_s=gateway.stall_timeout_s,
            capacity_s=gateway.capacity_wait_s,
            # Who waits for the whole answer does not mind when its first tokens come.
            hold_s=gateway.confirm_kv_s if streams else WHOLE_HOLD_S,
        )
        for run in reply.runs:
            self.driver.submit(run.ticket, patience)

    def close(self) -> None:
        self.lanes.close()

    def _prepare(self, endpoint: Endpoint, body: Body) -> Prepared:
        wanted = endpoint.parse(parse_json(body) if isinstance(body, bytes) else body, self.card)
        prompts = prompts_of(wanted, self.tokenizer)
        limit = min(check_length(wanted, len(prompt.ids), self.card) for prompt in prompts)
        return Prepared(wanted=wanted, prompts=prompts, limit=limit)
