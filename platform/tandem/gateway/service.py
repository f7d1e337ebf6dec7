"""From a request's body to its answer: check, tokenize, put into the pair table, read the answer as it comes."""

from __future__ import annotations

import asyncio
import uuid
from concurrent.futures import ThreadPoolExecutor
from enum import Enum

import msgspec

from tandem.config import GatewayConfig
from tandem.core.pair_events import Fail, FailureKind
from tandem.gateway.answer import Answer, Piece, Usage
from tandem.gateway.chat_template import TemplateRefusal
from tandem.gateway.detokenize import Vocabulary
from tandem.gateway.errors import ApiError, bad_value, from_failure
from tandem.gateway.legs import common_body
from tandem.gateway.metrics import Metrics
from tandem.gateway.model_card import ModelCard, ModelError
from tandem.gateway.pairs import PairDriver
from tandem.gateway.requests import Wanted, chat_request, check_length, completion_request, parse_json
from tandem.gateway.ticket import Ticket
from tandem.gateway.tokenize import Tokenizer
from tandem.gateway.wire import ChatWriter, CompletionWriter, Writer

INLINE_BYTES = 4096
"""Bodies up to this size are parsed and tokenized on the event loop (about a millisecond); larger ones in a thread."""


class Endpoint(Enum):
    CHAT = "chat"
    COMPLETIONS = "completions"


class ClientLeft(Exception):
    """The client has gone: there is nobody to answer."""


class Prepared(msgspec.Struct, frozen=True, kw_only=True):
    """A request that is ready for the engines."""

    wanted: Wanted
    chat: bool
    thinking: bool
    prompt_ids: list[int]
    common: bytes


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """What is new of an answer; with `reason` and `usage` at its end."""

    piece: Piece
    reason: str | None = None
    usage: Usage | None = None


class Run:
    """One answer on its way. `step` until it has a reason; `leave` when nobody wants it any more."""

    def __init__(self, service: Service, prepared: Prepared, arrived: float) -> None:
        wanted = prepared.wanted
        self.ticket = Ticket(uuid.uuid4().hex, prepared.common, len(prepared.prompt_ids))
        writer = ChatWriter if prepared.chat else CompletionWriter
        self.writer: Writer = writer(wanted, self.ticket.request, prepared.prompt_ids)
        self._driver = service.driver
        self._metrics = service.metrics
        self._arrived = arrived
        self._last = 0.0
        self._loop = asyncio.get_running_loop()
        self._end: Fail | None = None
        self._answer = Answer(service.vocabulary, stops=wanted.stops, chat=prepared.chat, thinking=prepared.thinking)

    async def step(self) -> Step:
        """Wait for more. Raises ApiError when the request has failed, ClientLeft when nobody waits."""
        if self._end is not None:
            raise _error(self._end)
        news = await self.ticket.news()
        piece = self._answer.feed(news.ids, self.ticket.ended)
        if piece.ids:
            self._observe(len(piece.ids))
        if self._answer.stopped:
            if news.end is None:
                self._driver.satisfied(self.ticket)
            return self._finish(piece, "stop")
        if news.end is None:
            return Step(piece=piece)
        if isinstance(news.end, Fail):
            self._end = news.end
            if not piece:
                raise _error(news.end)
            return Step(piece=piece)
        return self._finish(piece, news.end.reason)

    def leave(self) -> None:
        """Nobody wants the rest: both legs are ended. Harmless when it is over."""
        self._driver.client_gone(self.ticket)

    def _finish(self, piece: Piece, reason: str) -> Step:
        rest = self._answer.end()
        # Text held back to the end can itself complete a stop string.
        reason = "stop" if self._answer.stopped else reason
        piece = Piece(piece.reasoning + rest.reasoning, piece.content + rest.content, piece.ids)
        usage = self._answer.usage(self.ticket.prompt_tokens, self.ticket.cached_tokens)
        self._metrics.completion_tokens.inc(usage.completion)
        self._metrics.reasoning_tokens.inc(usage.reasoning)
        self._metrics.cached_tokens.inc(usage.cached)
        return Step(piece=piece, reason=reason, usage=usage)

    def _observe(self, tokens: int) -> None:
        now = self._loop.time()
        if self._last:
            for _ in range(tokens):
                self._metrics.between.observe((now - self._last) / tokens)
        else:
            self._metrics.first_token.observe(now - self._arrived)
        self._last = now


class Service:
    """What the endpoints need, made once per replica."""

    def __init__(
        self,
        config: GatewayConfig,
        card: ModelCard,
        tokenizer: Tokenizer,
        vocabulary: Vocabulary,
        driver: PairDriver,
        metrics: Metrics,
    ) -> None:
        self.config = config
        self.card = card
        self.vocabulary = vocabulary
        self.driver = driver
        self.metrics = metrics
        self._tokenizer = tokenizer
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="tandem-tokenize")

    async def prepare(self, endpoint: Endpoint, body: bytes) -> Prepared:
        """Everything that needs no engine. Raises ApiError."""
        if len(body) <= INLINE_BYTES:
            return self._prepare(endpoint, body)
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._prepare, endpoint, body)

    def submit(self, prepared: Prepared, arrived: float) -> Run:
        """Send it on its way. `arrived` is when the request came, on the loop's clock."""
        run = Run(self, prepared, arrived)
        self.metrics.prompt_tokens.inc(len(prepared.prompt_ids))
        self.driver.submit(
            run.ticket,
            timeout=self.config.request_timeout_s,
            first_token_s=self.config.first_token_timeout_s,
            stall_s=self.config.stall_timeout_s,
        )
        return run

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _prepare(self, endpoint: Endpoint, body: bytes) -> Prepared:
        parsed = parse_json(body)
        chat = endpoint is Endpoint.CHAT
        wanted = chat_request(parsed, self.card) if chat else completion_request(parsed, self.card)
        ids, thinking = self._tokenize(wanted)
        limit = check_length(wanted, len(ids), self.card)
        common = common_body(ids, {**wanted.sampling, "max_new_tokens": limit})
        return Prepared(wanted=wanted, chat=chat, thinking=thinking, prompt_ids=ids, common=common)

    def _tokenize(self, wanted: Wanted) -> tuple[list[int], bool]:
        if wanted.ids is not None:
            return wanted.ids, False
        if wanted.text is not None:
            return self._tokenizer.encode(wanted.text), False
        try:
            prompt = self._tokenizer.chat(wanted.messages or [])
        except TemplateRefusal as error:
            raise bad_value("messages", f"The model's chat template refuses these messages: {error}") from error
        except ModelError as error:
            raise ApiError(400, f"This model cannot chat: {error}.", param="model", code="model_not_chat") from error
        return prompt.ids, prompt.thinking


def _error(end: Fail) -> ApiError | ClientLeft:
    if end.failure.kind is FailureKind.CLIENT_GONE:
        return ClientLeft()
    return from_failure(end.failure)
