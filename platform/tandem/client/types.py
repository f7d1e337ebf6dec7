"""What the client gives back."""

from __future__ import annotations

from typing import Literal

import msgspec

FinishReason = Literal["stop", "length", "tool_calls", "other"]
Role = Literal["system", "developer", "user", "assistant", "tool"]


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What an answer cost, in tokens, over all its choices."""

    prompt_tokens: int
    cached_tokens: int
    """Of the prompt's, those whose KV cache was found."""
    completion_tokens: int
    """Reasoning included."""
    reasoning_tokens: int


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """A call of a function by the model."""

    id: str
    name: str
    arguments: str
    """JSON text, as the model wrote it: it may be wrong."""


class ToolCallDelta(msgspec.Struct, frozen=True, kw_only=True):
    """News of one call. `id` and `name` come with its first."""

    index: int
    """Number of the call in its choice."""
    id: str = ""
    name: str = ""
    arguments: str = ""
    """What comes after the arguments so far."""


class Logprob(msgspec.Struct, frozen=True, kw_only=True):
    """Natural logarithm of one token's probability."""

    token: str
    """Its text; U+FFFD stands for a part of a character."""
    token_id: int
    token_bytes: bytes
    logprob: float


class TokenLogprob(Logprob, frozen=True, kw_only=True):
    """That of a token of the answer, and of the likeliest ones in its place."""

    top: tuple[Logprob, ...] = ()
    reasoning: bool = False
    """The token is reasoning, not content."""


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One turn of a conversation."""

    role: Role
    content: str | None = None
    name: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    reasoning_content: str = ""
    """The server drops it, as R1 is to see no old reasoning."""
    prefix: bool = False
    """The last message of a request, by the assistant: its answer begins so."""


class Piece(msgspec.Struct, frozen=True, kw_only=True):
    """What is new of one choice."""

    index: int = 0
    """The choice, 0 … n-1."""
    text: str = ""
    reasoning: str = ""
    """Comes before `text`."""
    tool_calls: tuple[ToolCallDelta, ...] = ()
    token_ids: tuple[int, ...] = ()
    """With `return_token_ids`; the text of a token may come some tokens later."""
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    """Set in the last piece of a choice."""


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """One of the answers to a request."""

    index: int = 0
    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None

    @property
    def message(self) -> Message:
        """The choice as a turn of the conversation, for the next request."""
        content = self.text if self.text or not self.tool_calls else None
        return Message(role="assistant", content=content, tool_calls=self.tool_calls, reasoning_content=self.reasoning)


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """A whole answer. `text`, `reasoning`, `tool_calls`, `message` … are those of its first choice."""

    id: str
    model: str
    created: int
    """Unix seconds."""
    weight_version: str
    """Version of the weights that computed the last token."""
    choices: tuple[Choice, ...]
    usage: Usage
    prompt_token_ids: tuple[int, ...] = ()
    """With `return_token_ids`."""

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def reasoning(self) -> str:
        return self.choices[0].reasoning

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        return self.choices[0].tool_calls

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.choices[0].finish_reason

    @property
    def message(self) -> Message:
        return self.choices[0].message
