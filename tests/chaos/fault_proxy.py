"""A TCP proxy that stands between a gateway and one group, and does to connections what a network does.

It looks so far into HTTP/1.1 that it knows which connections carry a leg: a POST of `/generate` whose answer is not
complete. Others are polled loads, aborts, and idle ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct

_CHUNK = 64 * 1024
_CONNECT_S = 3.0
_LEG = b"POST /generate"


class FaultProxy:
    """Listens on loopback; forwards to where it is aimed. All methods belong to the loop it was started on."""

    def __init__(self) -> None:
        self.delay_s = 0.0
        """Each piece, in either direction, waits for so long."""
        self.refusing = False
        """New connections are reset when their first request comes, old ones when a leg begins on them."""
        self.connections = 0
        """Ever taken."""
        self.legs = 0
        """Ever begun that were not refused."""
        self.legs_cut = 0
        """By `cut_after`, ever."""
        self.legs_refused = 0
        """Ever."""
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

    @property
    def legs_open(self) -> int:
        """Legs that are not complete now."""
        return sum(flow.exchange is not None for flow in self._flows)

    @property
    def legs_streaming(self) -> int:
        """Of these, the ones that have had a part of their answer."""
        return sum(flow.exchange is not None and flow.exchange.streaming for flow in self._flows)

    def cut(self) -> int:
        """Reset all connections; return how many these were."""
        flows = list(self._flows)
        for flow in flows:
            flow.reset()
        return len(flows)

    def cut_idle(self) -> None:
        """Reset the connections without a leg: the next leg needs a new one."""
        for flow in self._flows:
            if flow.exchange is None:
                flow.reset()

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
            await self._refuse(reader, flow)
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
            await asyncio.gather(self._pump(reader, behind, flow, up=True), self._pump(ahead, writer, flow, up=False))
        finally:
            self._flows.discard(flow)
            flow.close()

    async def _refuse(self, reader: asyncio.StreamReader, flow: _Flow) -> None:
        """Only what is asked tells whether a leg was hit."""
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(_CONNECT_S):
                self.legs_refused += (await reader.read(_CHUNK)).startswith(_LEG)
        flow.reset()

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, flow: _Flow, *, up: bool) -> None:
        """Pass on until the source ends, then end the sink. A connection that breaks, breaks on the other side too.

        `up`: from the gateway to the engine.
        """
        try:
            while data := await source.read(_CHUNK):
                if up and data.startswith(_LEG):
                    if self.refusing:
                        self.legs_refused += 1
                        flow.reset()
                        return
                    self.legs += 1
                    flow.exchange = _Exchange()
                await self._passing.wait()
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                    await self._passing.wait()
                if not up and flow.left is not None:
                    data, flow.left = data[: flow.left], flow.left - len(data)
                sink.write(data)
                if not up and flow.exchange is not None and flow.exchange.over(data):
                    flow.exchange = None
                await sink.drain()
                if not up and flow.left is not None and flow.left <= 0:
                    self.legs_cut += flow.exchange is not None
                    flow.reset()
                    return
            await self._passing.wait()
            if sink.can_write_eof():
                sink.write_eof()
        except OSError:
            # The half that broke: the other one is told by a reset, as the network would.
            for one in flow.ends:
                _reset(one)


class _Exchange:
    """A leg's answer, as far as it has passed."""

    def __init__(self) -> None:
        self._head = b""
        self._size: int | None = None
        """Of its body; None = it comes in chunks."""
        self._passed = 0
        self._tail = b""

    @property
    def streaming(self) -> bool:
        """Something of the body has passed."""
        return self._passed > 0

    def over(self, data: bytes) -> bool:
        """Whether the answer is complete with what passes now."""
        if self._passed == 0:
            self._head += data
            head, end, data = self._head.partition(b"\r\n\r\n")
            if not end:
                return False
            sizes = [
                line.partition(b":")[2] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")
            ]
            self._size = int(sizes[0]) if sizes else None
        self._passed += len(data)
        self._tail = (self._tail + data)[-5:]
        return self._tail == b"0\r\n\r\n" if self._size is None else self._passed >= self._size


class _Flow:
    """Both ends of one connection."""

    def __init__(self, client: asyncio.StreamWriter) -> None:
        self.ends = [client]
        self.left: int | None = None
        """Bytes of answers that may still pass; None = all."""
        self.exchange: _Exchange | None = None
        """The leg that it carries now."""

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
