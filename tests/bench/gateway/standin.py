"""Stand-in SGLang workers for the benchmark: the protocol of SGLang 0.5.23 with a fixed timing model, and no model.

One process is a whole fleet, so that the two legs of a request can be matched by their room: the first token comes
`ttft_ms` after the *later* of both legs, as it would when the KV has to move, and then one every `itl_ms`. A request
without a room is served by the worker alone. Every worker counts what it saw; `totals` (a `GET /standin/totals` on any
of them) tells whether legs came in pairs with one prompt, and whether any was lost.

Spoken: `/generate` (streams with `--incremental-streaming-output`, and whole answers), `/v1/chat/completions`,
`/v1/completions`, `/abort_request`, `/health*`, `/ready`, `/v1/loads`, `/get_load`, `/server_info`, `/model_info`,
`/v1/models`, `/flush_cache`.

Run as a process it prints one JSON line with the URLs, and ends with its standard input.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Callable
from typing import Any

import httptools
import msgspec
import orjson
import uvloop

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
DONE = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
CREATED = 1_700_000_000


class Token(msgspec.Struct, frozen=True, array_like=True):
    """One token that the stand-ins say, and its text."""

    id: int
    text: str


class Totals(msgspec.Struct, kw_only=True):
    """What the workers of one fleet saw."""

    requests: int = 0
    """Both legs of a pair count."""
    finished: int = 0
    tokens: int = 0
    """Tokens of decode legs and of unpaired requests."""
    pairs: int = 0
    """Rooms whose two legs came, one on a prefill and one on a decode worker."""
    unlike: int = 0
    """Pairs whose legs did not have the same prompt."""
    reused: int = 0
    """Rooms that came a second time to the same role. (The second leg of a room whose first was aborted is no such.)"""
    aborted: int = 0
    disconnected: int = 0
    """Connections closed before the answer was complete."""
    waiting: int = 0
    """Rooms that still lack a leg."""
    running: int = 0


class Fleet:
    """The timing model, the tokens and the counts that the workers share."""

    def __init__(self, tokens: list[Token], ttft_ms: float, itl_ms: float) -> None:
        self.tokens = tokens
        self.ttft = ttft_ms / 1e3
        self.itl = itl_ms / 1e3
        self.totals = Totals()
        self.loop = asyncio.get_running_loop()
        self.running: dict[str, Answer] = {}
        self._rooms: dict[int, Answer] = {}
        self._used: set[tuple[int, str]] = set()

    def begin(self, answer: Answer) -> None:
        """Start an answer, or let it wait for its other leg."""
        self.totals.requests += 1
        self.running[answer.rid] = answer
        if answer.room is None:
            answer.start(self.loop.time() + self.ttft)
            return
        self.totals.reused += (answer.room, answer.role) in self._used
        self._used.add((answer.room, answer.role))
        other = self._rooms.pop(answer.room, None)
        if other is None:
            self._rooms[answer.room] = answer
            return
        self.totals.pairs += {other.role, answer.role} == {"prefill", "decode"}
        self.totals.unlike += other.prompt != answer.prompt
        other.prompt = answer.prompt = None
        first = self.loop.time() + self.ttft
        for leg in (other, answer):
            leg.start(first)

    def end(self, answer: Answer) -> None:
        self.running.pop(answer.rid, None)
        if answer.room is not None and self._rooms.get(answer.room) is answer:
            del self._rooms[answer.room]

    def snapshot(self) -> Totals:
        self.totals.waiting, self.totals.running = len(self._rooms), len(self.running)
        return self.totals


class Answer:
    """One `/generate` or OpenAI request on one worker."""

    def __init__(self, worker: Connection, path: str, body: dict[str, Any]) -> None:
        self._worker = worker
        self._fleet = worker.fleet
        self.role = worker.role
        self._native = path == "/generate"
        self._chat = path == "/v1/chat/completions"
        self.rid: str = body.get("rid") or f"standin-{id(self)}-{worker.fleet.totals.requests}"
        self.room: int | None = body.get("bootstrap_room")
        self.prompt: Any = body.get("input_ids") or body.get("messages") or body.get("prompt") or body.get("text")
        self._prompt_tokens = len(self.prompt) if body.get("input_ids") else len(str(self.prompt)) // 4
        sampling = body.get("sampling_params") or body
        wanted = next(
            (sampling[k] for k in ("max_new_tokens", "max_completion_tokens", "max_tokens") if k in sampling), 16
        )
        self._count: int = 1 if self.role == "prefill" and self.room is not None else wanted
        self._stream: bool = bool(body.get("stream"))
        self._usage = bool((body.get("stream_options") or {}).get("include_usage"))
        self._model: str = body.get("model") or "standin"
        self._sent = 0
        self._first = 0.0
        self._timer: asyncio.TimerHandle | None = None
        # The constant parts of every event of this answer.
        self._opening, self._closing = self._native_parts() if self._native else self._openai_parts()

    def start(self, first: float) -> None:
        self._first = first
        due = first if self._stream else first + self._fleet.itl * (self._count - 1)
        if self._fleet.ttft or self._fleet.itl:
            self._timer = self._fleet.loop.call_at(due, self._tick)
        else:
            self._tick()

    def stop(self) -> None:
        """No more of it; whoever stops it sees to the connection."""
        if self._timer is not None:
            self._timer.cancel()
        self._fleet.end(self)

    def abort(self) -> None:
        """As SGLang ends an aborted stream: a last event inside the 200."""
        self.stop()
        reason = {"type": "abort", "message": "Aborted by the client", "status_code": 500}
        if self._stream and self._native:
            head = b"" if self._sent else HEAD
            self._worker.answered(head + _chunk(self._native_event(b"", "", reason)) + DONE)
        else:
            self._worker.reply(500, {"error": {"message": "Aborted by the client"}})

    def _tick(self) -> None:
        if not self._stream:
            self._sent = self._count
            self._finish()
            self._worker.reply(200, self._whole())
            return
        fleet = self._fleet
        data = HEAD if not self._sent else b""
        if not self._sent and not self._native:
            data += _chunk(self._opening + self._role_delta() + self._closing)
        until = self._count if not fleet.itl else min(self._sent + 1, self._count)
        while self._sent < until:
            self._sent += 1
            data += _chunk(self._event())
        if self._sent < self._count:
            self._worker.write(data)
            self._timer = fleet.loop.call_at(self._first + self._sent * fleet.itl, self._tick)
            return
        if self._usage and not self._native:
            usage = b'],"usage":' + orjson.dumps(self._usage_object()) + b"}\n\n"
            data += _chunk(self._opening.removesuffix(b'{"index":0,') + usage)
        self._finish()
        self._worker.answered(data + DONE)

    def _finish(self) -> None:
        totals = self._fleet.totals
        totals.finished += 1
        if self.role != "prefill" or self.room is None:
            totals.tokens += self._count
        self._fleet.end(self)

    def _event(self) -> bytes:
        token = self._fleet.tokens[(self._sent - 1) % len(self._fleet.tokens)]
        last = self._sent == self._count
        if self._native:
            return self._native_event(b"%d" % token.id, token.text, self._reason() if last else None)
        end = (
            b',"logprobs":null,"finish_reason":"length","matched_stop":null}'
            if last
            else b',"logprobs":null,"finish_reason":null,"matched_stop":null}'
        )
        text = orjson.dumps(token.text)
        if self._chat:
            delta = b'"delta":{"role":null,"content":' + text + b',"reasoning_content":null,"tool_calls":null}'
        else:
            delta = b'"text":' + text
        return self._opening + delta + end + self._closing

    def _role_delta(self) -> bytes:
        if not self._chat:
            return b'"text":"","logprobs":null,"finish_reason":null,"matched_stop":null}'
        return (
            b'"delta":{"role":"assistant","content":"","reasoning_content":null,"tool_calls":null}'
            b',"logprobs":null,"finish_reason":null,"matched_stop":null}'
        )

    def _native_parts(self) -> tuple[bytes, bytes]:
        head = b'"meta_info":{"id":' + orjson.dumps(self.rid) + b',"finish_reason":'
        tail = b',"prompt_tokens":%d,"weight_version":"default","num_retractions":0' % self._prompt_tokens
        return head, tail + b',"reasoning_tokens":0,"completion_tokens":'

    def _native_event(self, ids: bytes, text: str, reason: dict[str, Any] | None) -> bytes:
        return b'data: {"text":%b,"output_ids":[%b],%b%b%b%d,"cached_tokens":0}}\n\n' % (
            orjson.dumps(text),
            ids,
            self._opening,
            b"null" if reason is None else orjson.dumps(reason),
            self._closing,
            self._sent,
        )

    def _openai_parts(self) -> tuple[bytes, bytes]:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        head = {"id": self.rid, "object": kind, "created": CREATED, "model": self._model}
        return b"data: " + orjson.dumps(head)[:-1] + b',"choices":[{"index":0,', b'],"usage":null}\n\n'

    def _reason(self) -> dict[str, Any]:
        return {"type": "length", "length": self._count}

    def _usage_object(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._count,
            "total_tokens": self._prompt_tokens + self._count,
            "prompt_tokens_details": None,
            "reasoning_tokens": 0,
        }

    def _whole(self) -> dict[str, Any]:
        said = [self._fleet.tokens[n % len(self._fleet.tokens)] for n in range(self._count)]
        text = "".join(token.text for token in said)
        if self._native:
            meta = {"id": self.rid, "finish_reason": self._reason(), "prompt_tokens": self._prompt_tokens}
            meta |= {"completion_tokens": self._count, "cached_tokens": 0, "weight_version": "default"}
            return {"text": text, "output_ids": [token.id for token in said], "meta_info": meta}
        body: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        choice = {"index": 0, **body, "logprobs": None, "finish_reason": "length"}
        kind = "chat.completion" if self._chat else "text_completion"
        head = {"id": self.rid, "object": kind, "created": CREATED, "model": self._model}
        return {**head, "choices": [choice], "usage": self._usage_object()}


class Connection(asyncio.Protocol):
    """One connection to one worker; one request at a time."""

    def __init__(self, fleet: Fleet, role: str, port: int) -> None:
        self.fleet = fleet
        self.role = role
        self._port = port
        self._answer: Answer | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self.write: Callable[[bytes], None] = transport.write  # type: ignore[attr-defined]
        self._parser = httptools.HttpRequestParser(self)
        self._body: list[bytes] = []
        self._url = b""

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer is not None:
            self.fleet.totals.disconnected += 1
            self._answer.stop()

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._transport.close()

    def on_message_begin(self) -> None:
        self._body, self._url = [], b""

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_body(self, piece: bytes) -> None:
        self._body.append(piece)

    def on_message_complete(self) -> None:
        path = self._url.partition(b"?")[0].decode()
        if path in ("/generate", "/v1/chat/completions", "/v1/completions"):
            self._answer = Answer(self, path, orjson.loads(b"".join(self._body)))
            self.fleet.begin(self._answer)
            return
        if path == "/abort_request":
            victim = self.fleet.running.get(orjson.loads(b"".join(self._body) or b"{}").get("rid", ""))
            if victim is not None:
                self.fleet.totals.aborted += 1
                victim.abort()
        self.reply(200, self._page(path))

    def answered(self, data: bytes) -> None:
        """The last of an answer."""
        self._answer = None
        self.write(data)

    def reply(self, status: int, value: object) -> None:
        data = orjson.dumps(value)
        head = b"HTTP/1.1 %d x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % (status, len(data))
        self.answered(head + data)

    def _page(self, path: str) -> object:
        if path == "/standin/totals":
            return msgspec.to_builtins(self.fleet.snapshot())
        if path == "/v1/models":
            return {
                "object": "list",
                "data": [{"id": "standin", "object": "model", "owned_by": "sglang", "root": "standin"}],
            }
        if path in ("/v1/loads", "/get_load"):
            running = len(self.fleet.running)
            load = {"dp_rank": 0, "num_running_reqs": running, "num_waiting_reqs": 0, "num_waiting_uncached_tokens": 0}
            load |= {"num_used_tokens": 0, "max_total_num_tokens": 10**7, "token_usage": 0.0, "num_reqs": running}
            load |= {"num_tokens": 0, "num_total_tokens": 0}
            return {"loads": [load]} if path == "/v1/loads" else [load]
        # /server_info, /model_info and their older names; the rest reads the status only.
        return {
            "status": "ready",
            "version": "0.5.23",
            "model_path": "standin",
            "served_model_name": "standin",
            "tokenizer_path": "standin",
            "model_type": "deepseek_v3",
            "is_generation": True,
            "disaggregation_mode": "null" if self.role == "unified" else self.role,
            "disaggregation_bootstrap_port": self._port,
            "page_size": 64,
            "tp_size": 1,
            "dp_size": 1,
            "max_total_num_tokens": 10**7,
            "max_req_input_len": 10**6,
            "internal_states": [{"waiting_queue": 0}],
        }


def _chunk(event: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(event), event)


async def serve(options: argparse.Namespace) -> None:
    """Listen until standard input ends."""
    loop = asyncio.get_running_loop()
    tokens = msgspec.json.decode(options.tokens, type=list[Token])
    fleet = Fleet(tokens, options.ttft_ms, options.itl_ms)
    urls: dict[str, list[str]] = {}
    for role in ("prefill", "decode"):
        for _ in range(options.workers):
            made = await loop.create_server(
                lambda role=role: Connection(fleet, role, 8998), "127.0.0.1", 0, backlog=4096
            )
            urls.setdefault(role, []).append(f"http://127.0.0.1:{made.sockets[0].getsockname()[1]}")
    print(msgspec.json.encode(urls).decode(), flush=True)
    ended = asyncio.Event()
    await loop.connect_read_pipe(lambda: _UntilEnd(ended), sys.stdin)
    await ended.wait()


class _UntilEnd(asyncio.Protocol):
    def __init__(self, ended: asyncio.Event) -> None:
        self._ended = ended

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended.set()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="of each role")
    parser.add_argument("--ttft-ms", type=float, default=25)
    parser.add_argument("--itl-ms", type=float, default=20)
    parser.add_argument("--tokens", default='[[5," a"]]', help="JSON: [[id, text], …], said again and again")
    uvloop.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
