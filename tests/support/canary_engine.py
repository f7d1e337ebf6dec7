"""An engine over a loopback connection that takes weights and answers prompts, as a test says."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from msgspec.structs import replace

from tandem.core.types import Group, GroupState, Role

Reply = Callable[[dict[str, Any]], dict[str, Any]]


def good(body: dict[str, Any]) -> dict[str, Any]:
    """The tokens 7, 8, 9, …, as many as are asked for."""
    return saying(body, list(range(7, 7 + body["sampling_params"]["max_new_tokens"])))


def saying(body: dict[str, Any], ids: list[int]) -> dict[str, Any]:
    """An answer of these tokens."""
    meta: dict[str, Any] = {"completion_tokens": len(ids), "finish_reason": {"type": "length"}}
    if body.get("return_logprob"):
        meta["output_token_logprobs"] = [[-0.5, one, None] for one in ids]
    return {"output_ids": ids, "meta_info": meta}


class Engine:
    """Answers prompts with whatever `reply` says, takes whatever weights there are, and keeps what was asked."""

    def __init__(self, role: Role, dp_size: int, reply: Reply) -> None:
        self.group = Group(
            group=f"{role}-0",
            role=role,
            epoch=1,
            state=GroupState.READY,
            dp_size=dp_size,
            bootstrap_host="10.0.0.1" if role is Role.PREFILL else "",
            bootstrap_port=9 if role is Role.PREFILL else 0,
        )
        self.reply = reply
        self.asked: list[dict[str, Any]] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length"))
        body = json.loads(await reader.readexactly(int(length.split(b":")[1])))
        if b"update_weights" in head:
            return await self._send(writer, "{}")
        self.asked.append(body)
        await self._send(writer, f"data: {json.dumps(self.reply(body))}\n\ndata: [DONE]\n\n")

    async def _send(self, writer: asyncio.StreamWriter, text: str) -> None:
        writer.write(f"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {len(text)}\r\n\r\n{text}".encode())
        await writer.drain()
        writer.close()


@contextlib.asynccontextmanager
async def engine(role: Role, dp_size: int = 2, reply: Reply = good) -> AsyncIterator[Engine]:
    made = Engine(role, dp_size, reply)
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    made.group = replace(made.group, url=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    try:
        yield made
    finally:
        server.close()
