"""What is new of an answer, as its reader hands it to its writer."""

from __future__ import annotations

import msgspec


class ToolDelta(msgspec.Struct, frozen=True, kw_only=True):
    """News of one tool call: the first of a call has its `id` and `name`; `arguments` is what is new of them."""

    index: int
    """Place of the call in the answer, from 0."""
    id: str | None = None
    name: str | None = None
    arguments: str = ""


class TokenLogprob(msgspec.Struct, frozen=True):
    """The natural logarithm of a token's probability, and of its likeliest alternatives'."""

    token: int
    text: str
    bytes: bytes
    """The token's own; a character may need several tokens, and then `text` shows U+FFFD."""
    logprob: float
    top: list[TokenLogprob] = msgspec.field(default_factory=list)
    reasoning: bool = False
    """The token is reasoning, not content."""


class Piece(msgspec.Struct):
    """New text of an answer, and the tokens that were read for it."""

    reasoning: str = ""
    content: str = ""
    ids: list[int] = msgspec.field(default_factory=list)
    tools: list[ToolDelta] = msgspec.field(default_factory=list)
    logprobs: list[TokenLogprob] = msgspec.field(default_factory=list)
    """One for each token that a character of the text here is of, in their order."""

    def __bool__(self) -> bool:
        return bool(self.content or self.reasoning or self.ids or self.tools or self.logprobs)

    def __add__(self, more: Piece) -> Piece:
        """Both, one after the other."""
        return Piece(
            self.reasoning + more.reasoning,
            self.content + more.content,
            self.ids + more.ids,
            self.tools + more.tools,
            self.logprobs + more.logprobs,
        )


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What an answer cost, in tokens, and who gave it."""

    prompt: int
    completion: int
    reasoning: int
    cached: int
    version: str = ""
    """Of the weights that answered; empty = not known."""
