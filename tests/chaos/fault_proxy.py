"""A TCP proxy that stands between a gateway and one group, and does to connections what a network does."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct

_CHUNK = 64 * 1024
_CONNECT_S = 3.0


class FaultProxy:
    """Listens on loopback; forwards to where it is aimed. All methods belong to the loop it was started on."""

    def __init__(self) -> None:
        self.delay_s = 0.0
        """Each piece, in either direction, waits for so long."""
        self.refusing = False
        """New connections are reset."""
        self.connections = 0
        """Ever taken."""
        self._target = ("", 0)
        self._flows: set[_Flow] = set()
        self._passing = asyncio.Event()
        self._passing.set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)

    @property
    def url(self) -> str:
        assert self._server is not None, "it has a port only once it was started"
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def aim(self, host: str, port: int) -> None:
        """Where connections that are made from now on go."""
        self._target = (host, port)

    @property
    def open(self) -> int:
        """Connections that are open now."""
        return len(self._flows)

    def cut(self) -> int:
        """Reset all connections; return how many these were."""
        flows = list(self._flows)
        for flow in flows:
            flow.reset()
        return len(flows)

    def cut_after(self, size: int) -> None:
        """Reset each of the connections that are open now when `size` more bytes of answers have passed."""
        for flow in self._flows:
            flow.left = size

    def stall(self) -> None:
        """Let nothing pass; connections stay open, and new ones are taken."""
        self._passing.clear()

    def mend(self) -> None:
        """Undo all but what was cut."""
        self.delay_s = 0.0
        self.refusing = False
        self._passing.set()
        for flow in self._flows:
            flow.left = None

    async def close(self) -> None:
        self.mend()
        self.cut()
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        flow = _Flow(writer)
        if self.refusing:
            flow.reset()
            return
        try:
            async with asyncio.timeout(_CONNECT_S):
                ahead, behind = await asyncio.open_connection(*self._target)
        except (OSError, TimeoutError):
            flow.reset()
            return
        flow.also(behind)
        self._flows.add(flow)
        try:
            await asyncio.gather(self._pump(reader, behind, None), self._pump(ahead, writer, flow))
        finally:
            self._flows.discard(flow)
            flow.close()

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, answers: _Flow | None) -> None:
        """Pass on until the source ends, then end the sink. A connection that breaks, breaks on the other side too."""
        try:
            while data := await source.read(_CHUNK):
                await self._passing.wait()
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                    await self._passing.wait()
                if answers is not None and answers.left is not None:
                    data, answers.left = data[: answers.left], answers.left - len(data)
                sink.write(data)
                await sink.drain()
                if answers is not None and answers.left is not None and answers.left <= 0:
                    answers.reset()
                    return
            await self._passing.wait()
            if sink.can_write_eof():
                sink.write_eof()
        except OSError:
            # The half that broke: the other one is told by a reset, as the network would.
            for one in (sink, *([] if answers is None else answers.ends)):
                _reset(one)


class _Flow:
    """Both ends of one connection."""

    def __init__(self, client: asyncio.StreamWriter) -> None:
        self.ends = [client]
        self.left: int | None = None
        """Bytes of answers that may still pass; None = all."""

    def also(self, engine: asyncio.StreamWriter) -> None:
        self.ends.append(engine)

    def reset(self) -> None:
        for end in self.ends:
            _reset(end)

    def close(self) -> None:
        for end in self.ends:
            end.close()


def _reset(end: asyncio.StreamWriter) -> None:
    """Close with RST: with SO_LINGER of 0 s nothing that waits is sent."""
    inner = end.get_extra_info("socket")
    if inner is not None:
        with contextlib.suppress(OSError):
            inner.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    end.transport.abort()
