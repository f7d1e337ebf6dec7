"""One choice of a reply in the pair table, as the one who submitted it sees it."""

from __future__ import annotations

from collections.abc import Sequence

from tandem.core.pair_events import Fail, Finish
from tandem.core.routing import Pair, RouteAsk
from tandem.engine.client import Ended, Logprob
from tandem.gateway.observe.tracing import RequestTrace
from tandem.gateway.pairing.bell import Bell


class Ticket:
    """The pair driver writes into it and rings; the reply reads it."""

    def __init__(
        self,
        request: str,
        common: bytes,
        ask: RouteAsk,
        bell: Bell,
        *,
        trace: RequestTrace | None = None,
    ) -> None:
        """
        Args:
            common: the part of the engines' JSON body that all legs share (see `leg_body`).
            ask: the prompt, as routing looks at it.
        """
        self.request = request
        self.common = common
        self.ask = ask
        self.bell = bell
        self.trace = trace
        self.attempts = 0
        self.pair: Pair | None = None
        """The latest."""
        self.weight_version = ""
        """Version of the weights that the latest pair has."""
        self.cached_tokens = 0
        self.prefilled: float | None = None
        """When the latest prefill leg ended well, on the loop's clock."""
        self.ended: Ended | None = None
        """How decode ended; set before the `Finish` is seen."""
        self.ids: list[int] = []
        """Tokens that nobody has taken yet, and their logprobs if they were asked for."""
        self.logprobs: list[Logprob] | None = None
        self.coming: list[Logprob] | None = None
        """Logprobs of the tokens that the table is being told of."""
        self.end: Finish | Fail | None = None
        self._begun: list[float] = []
        self._worked = 0.0

    @property
    def prompt(self) -> Sequence[int]:
        """Token ids."""
        return self.ask.prompt

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

    def deliver(self, ids: list[int]) -> None:
        self.ids = self.ids + ids if self.ids else ids
        if self.coming is not None:
            self.logprobs = self.logprobs + self.coming if self.logprobs else self.coming
        self.bell.ring()

    def finish(self, end: Finish | Fail) -> None:
        self.end = end
        self.bell.ring()
