"""What Tandem asks of an SGLang server, over HTTP. Written against SGLang 0.5.23 (`srt/entrypoints/http_server.py`,
`srt/managers/tokenizer_manager.py`, `srt/managers/io_struct.py`).

A stream of `/generate` with `stream: true` is a series of events, each with `output_ids` and `meta_info`:
- `output_ids` is everything so far, or only what is new when the server runs with `--incremental-streaming-output`.
  `meta_info.completion_tokens` is always the count so far, so the two can be told apart event by event.
- the last has `meta_info.finish_reason`: `{"type": "stop" | "length", …}`, or `{"type": "abort", "message", …}` with
  a `status_code` or without one, all inside an HTTP 200. Of an abort the tokens are not to be trusted: in the
  incremental mode it repeats the last one.
- a request that is refused before it runs is one event `{"error": {"message", "code"}}`, also inside a 200.
- then `data: [DONE]`.

With `return_logprob`, `meta_info.output_token_logprobs` has a (logprob, token id, text) for each of `output_ids`, and
with `top_logprobs_num` above 0 `output_top_logprobs` has a list of such for each (null if there are none). The first
token's come with the KV from prefill.
"""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import Any, NamedTuple

import msgspec

from tandem.core.pair_events import Failure, FailureKind
from tandem.core.types import DpLoad
from tandem.engine.http1 import HttpFailure, Interrupted, Pool, Response, TimedOut
from tandem.engine.sse import EventTooLong, SseParser


class EngineError(Exception):
    """The engine did not do what it was asked; `failure` says how."""

    def __init__(self, kind: FailureKind, message: str) -> None:
        super().__init__(message)
        self.failure = Failure(kind=kind, message=message)


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """How the engine ended a stream well."""

    reason: str
    """"stop" or "length"."""
    matched: int | str | None = None
    """The token id, or the string, that it stopped at; the token is the last of the stream."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens that came from the prefix cache."""
    weight_version: str = ""


class Logprob(NamedTuple):
    """A token's logarithmic probability, and those of the likeliest tokens at its place."""

    logprob: float
    token: int
    top: list[tuple[float, int]]


class TokenChunk(msgspec.Struct, frozen=True, kw_only=True):
    """New tokens of a stream, as many as have arrived together; `ended` with the last."""

    ids: list[int]
    ended: Ended | None = None
    logprobs: list[Logprob] | None = None
    """One for each token, if the request asked for them."""
    failure: Failure | None = None
    """The stream failed behind these tokens: nothing more comes."""


_Scored = tuple[float | None, int, str | None]
"""(logprob, token id, text); minus infinity has no number in JSON."""


class _Meta(msgspec.Struct):
    completion_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    weight_version: str | None = None
    finish_reason: dict[str, Any] | None = None
    output_token_logprobs: list[_Scored] | None = None
    output_top_logprobs: list[list[_Scored] | None] | None = None


class _Chunk(msgspec.Struct):
    output_ids: list[int] | None = None
    meta_info: _Meta | None = None
    error: dict[str, Any] | None = None


class _Load(msgspec.Struct):
    dp_rank: int = 0
    num_running_reqs: int = 0
    num_waiting_reqs: int = 0
    num_waiting_uncached_tokens: int = 0
    num_used_tokens: int = 0
    max_total_num_tokens: int = 0
    token_usage: float = 0.0


class _Loads(msgspec.Struct):
    loads: list[_Load]


_chunk_decoder = msgspec.json.Decoder(_Chunk)
_loads_decoder = msgspec.json.Decoder(_Loads)


class TokenStream:
    """One running `/generate`. Iterate it for TokenChunks; `close` it when it is not wanted to its end.

    Iteration raises EngineError, and after `ended` it stops.
    """

    def __init__(self, response: Response, stall_s: float | None) -> None:
        self._response = response
        self._stall_s = stall_s
        self._sse = SseParser()
        self._seen = 0
        self._over = False
        self._failed: Failure | None = None
        self.weight_version = ""
        """What the engine says that it has; empty while it has not said so."""

    def __aiter__(self) -> TokenStream:
        return self

    async def __anext__(self) -> TokenChunk:
        while not self._over:
            if self._failed is not None:
                raise EngineError(self._failed.kind, self._failed.message)
            try:
                data = await self._response.chunk(self._stall_s)
            except HttpFailure as error:
                raise from_http(error) from error
            if data is None:
                raise self.unfinished()
            chunk = self.feed(data)
            if chunk is not None:
                self._failed = chunk.failure
                return chunk
        raise StopAsyncIteration

    @property
    def over(self) -> bool:
        """The last token has come."""
        return self._over

    def feed(self, data: bytes) -> TokenChunk | None:
        """What these bytes of the answer's body add; None = nothing yet. Raises EngineError."""
        try:
            events = self._sse.feed(data)
        except EventTooLong as error:
            raise EngineError(FailureKind.BROKEN, str(error)) from error
        return self._take(events)

    @staticmethod
    def unfinished() -> EngineError:
        """The body has ended before the last token."""
        return EngineError(FailureKind.BROKEN, "the engine's stream ended without a finish reason")

    async def drain(self, within: float) -> None:
        """Read to the end of the HTTP answer (`[DONE]`), so that the connection can be used again."""
        try:
            while await self._response.chunk(within) is not None:
                pass
        except HttpFailure:
            self.close()

    def close(self) -> None:
        """Give it up. The engine notices the closed connection only after seconds: `abort` as well."""
        self._over = True
        self._response.close()

    def _take(self, events: list[bytes]) -> TokenChunk | None:
        fresh: list[int] = []
        logprobs: list[Logprob] | None = None
        for event in events:
            try:
                meta, new = self._read(event)
            except EngineError as error:
                if not fresh:
                    raise
                # What came before is as good as if it had come alone.
                return TokenChunk(ids=fresh, logprobs=logprobs, failure=error.failure)
            finish = meta.finish_reason
            fresh += new
            if meta.output_token_logprobs is not None or logprobs is not None:
                logprobs = (logprobs or []) + _logprobs(meta, new)
            if finish is not None:
                self._over = True
                return TokenChunk(ids=fresh, ended=_ended(finish, meta), logprobs=logprobs)
        return TokenChunk(ids=fresh, logprobs=logprobs) if fresh else None

    def _read(self, event: bytes) -> tuple[_Meta, list[int]]:
        """What one event says, and the tokens that are new with it."""
        if event == b"[DONE]":
            raise self.unfinished()
        try:
            chunk = _chunk_decoder.decode(event)
        except msgspec.MsgspecError as error:
            raise EngineError(FailureKind.BROKEN, f"the engine's stream makes no sense: {error}") from error
        if chunk.error is not None:
            raise _from_error(chunk.error)
        meta = chunk.meta_info
        if meta is None:
            raise EngineError(FailureKind.BROKEN, "the engine's stream has an event without meta_info")
        if meta.weight_version:
            self.weight_version = meta.weight_version
        finish = meta.finish_reason
        if finish is not None and finish.get("type") == "abort":
            raise _from_abort(finish)
        return meta, self._new_ids(chunk.output_ids or [], meta.completion_tokens)

    def _new_ids(self, ids: list[int], total: int) -> list[int]:
        new = total - self._seen
        if len(ids) == new:
            fresh = ids
        elif len(ids) == total:
            fresh = ids[self._seen :]
        else:
            raise EngineError(
                FailureKind.BROKEN,
                f"the engine's stream lost tokens: {len(ids)} ids in an event, {self._seen} before it, {total} in all",
            )
        if new < 0:
            raise EngineError(FailureKind.BROKEN, f"the engine's stream went back from {self._seen} to {total} tokens")
        self._seen = total
        return fresh


class EngineClient:
    """All engines of a fleet, by URL. Belongs to one event loop."""

    def __init__(self, *, connect_s: float = 5.0) -> None:
        self._connect_s = connect_s
        self._pool = Pool()

    async def generate(
        self, url: str, body: bytes, *, first_byte_s: float | None, stall_s: float | None = None
    ) -> TokenStream:
        """POST `/generate` with a ready-made JSON body (`stream` must be true); returns once the engine has taken it.

        `first_byte_s` bounds the wait for the answer's head, `stall_s` each later wait; None = no bound of its own
        (the caller has one). Raises EngineError.
        """
        response: Response | None = None
        try:
            response = await self._pool.request("POST", url + "/generate", body=body, connect_s=self._connect_s)
            status = await response.head(first_byte_s)
            if status == 200:
                stream, response = TokenStream(response, stall_s), None
                return stream
            raise from_status(status, await response.read(within=5.0, limit=2**20))
        except HttpFailure as error:
            raise from_http(error) from error
        finally:
            if response is not None:
                response.close()

    def request(
        self, url: str, body: bytes, headers: Sequence[tuple[bytes, bytes]] = ()
    ) -> Response | Awaitable[Response]:
        """POST `/generate`, for a caller that listens to the response itself (`Response.listen`): at once where a
        connection is open, else to be awaited. Raises HttpFailure."""
        return self._pool.begin("POST", url + "/generate", body=body, headers=headers, connect_s=self._connect_s)

    async def abort(self, url: str, rid: str, *, within: float = 2.0) -> None:
        """POST `/abort_request`. SGLang answers 200 whether or not it knows the request; raises EngineError."""
        body = msgspec.json.encode({"rid": rid})
        status, answer = await self._fetch("POST", url + "/abort_request", body, within)
        if status != 200:
            raise from_status(status, answer)

    async def loads(self, url: str, *, within: float = 5.0) -> list[DpLoad]:
        """GET `/v1/loads`: one DpLoad per DP rank; raises EngineError."""
        status, answer = await self._fetch("GET", url + "/v1/loads?include=core", b"", within)
        if status != 200:
            raise from_status(status, answer)
        try:
            found = _loads_decoder.decode(answer)
        except msgspec.MsgspecError as error:
            raise EngineError(FailureKind.BROKEN, f"/v1/loads makes no sense: {error}") from error
        return [
            DpLoad(
                dp_rank=load.dp_rank,
                running=load.num_running_reqs,
                waiting=load.num_waiting_reqs,
                waiting_uncached_tokens=load.num_waiting_uncached_tokens,
                token_usage=load.token_usage,
                used_tokens=load.num_used_tokens,
                max_total_tokens=load.max_total_num_tokens,
            )
            for load in found.loads
        ]

    async def ready(self, url: str, *, within: float = 5.0) -> bool:
        """Whether the engine takes requests (GET `/ready`); an engine that can't be reached is not ready."""
        try:
            status, _ = await self._fetch("GET", url + "/ready", b"", within)
        except EngineError:
            return False
        return status == 200

    async def close(self) -> None:
        await self._pool.close()

    async def _fetch(self, method: str, url: str, body: bytes, within: float) -> tuple[int, bytes]:
        try:
            return await self._pool.fetch(method, url, body=body, connect_s=min(within, self._connect_s), within=within)
        except HttpFailure as error:
            raise from_http(error) from error


def _logprobs(meta: _Meta, ids: list[int]) -> list[Logprob]:
    """Those of an event's new tokens, which are the last ones it has."""
    scored = (meta.output_token_logprobs or [])[-len(ids) :] if ids else []
    if [token for _, token, _ in scored] != ids:
        raise EngineError(FailureKind.BROKEN, "the engine's stream has logprobs of other tokens than its own")
    tops = (meta.output_top_logprobs or [])[-len(ids) :] if ids else []
    if not tops:
        return [Logprob(_number(value), token, []) for value, token, _ in scored]
    if len(tops) != len(ids):
        raise EngineError(FailureKind.BROKEN, f"the engine's stream has {len(tops)} top logprobs for {len(ids)} tokens")
    return [
        Logprob(_number(value), token, [(_number(other), number) for other, number, _ in top or ()])
        for (value, token, _), top in zip(scored, tops, strict=True)
    ]


def _number(logprob: float | None) -> float:
    return float("-inf") if logprob is None else logprob


def _ended(finish: dict[str, Any], meta: _Meta) -> Ended:
    matched = finish.get("matched")
    return Ended(
        reason="length" if finish.get("type") == "length" else "stop",
        matched=matched if isinstance(matched, int | str) else None,
        prompt_tokens=meta.prompt_tokens,
        cached_tokens=meta.cached_tokens,
        weight_version=meta.weight_version or "",
    )


def _from_abort(finish: dict[str, Any]) -> EngineError:
    message = str(finish.get("message") or "no reason given")
    if finish.get("status_code") == 400:
        return EngineError(FailureKind.BAD_REQUEST, message)
    return EngineError(FailureKind.ABORTED, f"the engine aborted the request: {message}")


def _from_error(error: dict[str, Any]) -> EngineError:
    message = str(error.get("message") or "no reason given")
    code = error.get("code")
    if isinstance(code, int) and 400 <= code < 500 and code not in (408, 429, 499):
        return EngineError(FailureKind.BAD_REQUEST, message)
    return EngineError(FailureKind.REFUSED, f"the engine refused the request: {message}")


def from_status(status: int, body: bytes) -> EngineError:
    """What an error status of the engine means."""
    message = body[:500].decode("utf-8", "replace").strip()
    try:
        found = msgspec.json.decode(body)
    except msgspec.MsgspecError:
        found = None
    if isinstance(found, dict):
        inner = found.get("error", found)
        inner = inner if isinstance(inner, dict) else found
        message = str(inner.get("message") or inner.get("detail") or message)
    if status == 400 or status == 422:
        return EngineError(FailureKind.BAD_REQUEST, message)
    return EngineError(FailureKind.REFUSED, f"the engine answered {status}: {message}")


def from_http(error: HttpFailure) -> EngineError:
    """What a failed exchange with the engine means."""
    if isinstance(error, TimedOut):
        return EngineError(FailureKind.STALLED, str(error))
    if isinstance(error, Interrupted):
        return EngineError(FailureKind.BROKEN, str(error))
    return EngineError(FailureKind.UNREACHABLE, str(error))
