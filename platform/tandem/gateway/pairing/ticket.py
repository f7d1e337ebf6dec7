"""One choice of a reply in the pair table, as the one who submitted it sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from tandem.core.pair_events import Fail, Finish
from tandem.core.routing import Pair, RouteAsk
from tandem.engine.client import Ended, Logprob
from tandem.gateway.observe.tracing import RequestTrace
from tandem.gateway.pairing.bell import Bell
from tandem.gateway.pairing.engine_body import EngineRequest


class TicketListener(Protocol):
    """Somebody else who wants to know what becomes of it. Called on the event loop: must be quick, and not raise."""

    def delivered(self, ids: list[int], logprobs: list[Logprob] | None) -> None:
        """These tokens belong to the client."""

    def finished(self, end: Finish | Fail, ended: Ended | None) -> None:
        """It is over."""


class Ticket:
    """The pair driver writes into it and rings; the reply reads it."""

    def __init__(
        self,
        request: str,
        asked: EngineRequest,
        ask: RouteAsk,
        bell: Bell,
        *,
        limit: int = 0,
        trace: RequestTrace | None = None,
    ) -> None:
        """
        Args:
            asked: what the engines are asked for.
            ask: the prompt, as routing looks at it.
            limit: tokens that the answer may have; 0 = not known.
        """
        self.request = request
        self.asked = asked
        self.first_ask = ask
        self.bell = bell
        self.limit = limit
        self.trace = trace
        self.listener: TicketListener | None = None
        self.attempts = 0
        self.migrations = 0
        self.pair: Pair | None = None
        """The latest."""
        self.weight_version = ""
        """Version of the weights that the latest pair has."""
        self.cached_tokens = 0
        """Of the prompt, as the first prefill that ended well found them."""
        self.prefilled: float | None = None
        """When the latest prefill leg ended well, on the loop's clock."""
        self.ended: Ended | None = None
        """How decode ended; set before the `Finish` is seen."""
        self.ids: list[int] = []
        """Tokens that nobody has taken yet, and their logprobs if they were asked for."""
        self.logprobs: list[Logprob] | None = None
        self.history: list[int] = []
        """All tokens of the answer so far: where another pair would have to go on."""
        self.scored: dict[int, list[Logprob]] = {}
        """Logprobs that came with the tokens of a room and are not delivered yet."""
        self.end: Finish | Fail | None = None
        self._ask = ask
        self._asked_behind = 0
        self._begun: list[float] = []
        self._worked = 0.0

    @property
    def prompt(self) -> Sequence[int]:
        """Token ids, without what was answered."""
        return self.first_ask.prompt

    @property
    def ask(self) -> RouteAsk:
        """The prompt and what was answered, as routing looks at it."""
        if len(self.history) != self._asked_behind:
            self._ask, self._asked_behind = self.first_ask.behind(self.history), len(self.history)
        return self._ask

    @property
    def answered_by(self) -> str:
        """Version of the weights that answered: the engine's own word, or what its group is known to have."""
        return (self.ended.weight_version if self.ended is not None else "") or self.weight_version

    def restore(self, ids: list[int], logprobs: list[Logprob] | None, version: str) -> None:
        """Before it is submitted: a gateway that is no more has delivered these tokens, of weights of this version.
        They are the first that come."""
        self.weight_version = version
        self.migrations += 1
        self._take(ids, logprobs)

    def leg_begun(self, at: float) -> None:
        """An engine gets to work for it; times are on the loop's clock."""
        self._begun.append(at)

    def leg_over(self, begun: float, at: float) -> None:
        """The leg that began then is over."""
        self._begun.remove(begun)
        self._worked += at - begun

    def service_seconds(self, now: float) -> float:
        """How long engines have been at work for it, all legs together."""
        return self._worked + sum(now - begun for begun in self._begun)

    def deliver(self, room: int, ids: list[int]) -> None:
        """The room's next tokens are the client's."""
        logprobs = self.scored.pop(room, None) if self.scored else None
        if not self.history:
            # Should another pair have to go on, it is asked for something else.
            self.asked.forget()
        self._take(ids, logprobs)
        if self.listener is not None:
            self.listener.delivered(ids, logprobs)

    def finish(self, end: Finish | Fail) -> None:
        self.end = end
        self.bell.ring()
        if self.listener is not None:
            self.listener.finished(end, self.ended)

    def _take(self, ids: list[int], logprobs: list[Logprob] | None) -> None:
        # Whoever takes them leaves a new list behind; so this one is ours.
        self.ids += ids
        self.history += ids
        if logprobs is not None:
            if self.logprobs is None:
                self.logprobs = []
            self.logprobs += logprobs
        self.bell.ring()


def request_fields(ticket: Ticket) -> dict[str, Any]:
    """What `Submit` says of a ticket that was restored."""
    if not ticket.history:
        return {}
    return {"delivered": len(ticket.history), "version": ticket.weight_version}
