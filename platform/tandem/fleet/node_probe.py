"""What Kubernetes asks of a pod that runs `tandem node`: `/live` and `/ready` on a small HTTP port."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable

_LONGEST_S = 5.0


class Probe:
    """Answers while it is open: `/live` always, `/ready` unless `missing` says in a sentence what is not there yet."""

    def __init__(self, missing: Callable[[], str]) -> None:
        self._missing = missing
        self._server: asyncio.Server | None = None

    async def open(self, host: str, port: int) -> int:
        """Listen; return the port. Raises OSError."""
        self._server = await asyncio.start_server(self._answer, host, port)
        return int(self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        """Listen no more."""
        if self._server is not None:
            self._server.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, TimeoutError, ValueError):
            async with asyncio.timeout(_LONGEST_S):
                words = (await reader.readline()).split()
                while (await reader.readline()).strip():
                    pass
                path = words[1].decode("latin-1") if len(words) > 1 else ""
                status, why = self._status(path)
                body = json.dumps({"ok": not why, "why": why}).encode() + b"\n"
                writer.write(
                    f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
                    "connection: close\r\n\r\n".encode()
                    + body
                )
                await writer.drain()
        writer.close()

    def _status(self, path: str) -> tuple[str, str]:
        if path == "/live":
            return "200 OK", ""
        if path == "/ready":
            why = self._missing()
            return ("503 Service Unavailable" if why else "200 OK"), why
        return "404 Not Found", "there are /live and /ready"
