"""HTTP/2 written by hand: calls of `tandem.v1.Inference` frame by frame, so that they can stop anywhere."""

from __future__ import annotations

import asyncio
import socket
import struct

from google.protobuf.message import Message
from hostile_stage import MODEL

from tandem.v1 import inference_pb2 as pb

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, SETTINGS, PING, WINDOW_UPDATE = 0, 1, 4, 6, 8
_ACK = END_STREAM = 1
_END_HEADERS = 4
_FIRST_WINDOW = 65_535
_INITIAL_WINDOW_SIZE = 4
"""A setting."""


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def text(value: bytes) -> bytes:
    """A string of HPACK, not compressed."""
    assert len(value) < 127
    return bytes([len(value)]) + value


def headers(path: bytes, *more: tuple[bytes, bytes]) -> bytes:
    """A header block: no table, no compression."""
    named = [
        (b":method", b"POST"), (b":scheme", b"http"), (b":path", path), (b":authority", b"x"), (b"te", b"trailers"),
        (b"content-type", b"application/grpc"), *more,
    ]  # fmt: skip
    return b"".join(b"\x00" + text(name) + text(value) for name, value in named)


def message(request: Message) -> bytes:
    data: bytes = request.SerializeToString()
    return b"\0" + struct.pack(">I", len(data)) + data


def opening(method: str, *, window: int | None = None) -> bytes:
    """A connection and a call on it, of which the request is to follow. `window`: bytes of the answer that it takes."""
    settings = b"" if window is None else struct.pack(">HI", _INITIAL_WINDOW_SIZE, window)
    path = b"/tandem.v1.Inference/" + method.encode()
    return PREFACE + frame(SETTINGS, 0, 0, settings) + frame(HEADERS, _END_HEADERS, 1, headers(path))


def streaming(tokens: int, *, window: int | None = None) -> bytes:
    """A whole call for a stream of so many tokens."""
    request = pb.GenerateRequest(model=MODEL, prompt=pb.Prompt(text="hi"))
    request.options.max_tokens = tokens
    return opening("Generate", window=window) + frame(DATA, END_STREAM, 1, message(request))


GENERATE = pb.GenerateOnceRequest(model=MODEL, prompt=pb.Prompt(text="hi"))
GENERATE.options.max_tokens = 2
CALL = [
    PREFACE,
    frame(4, 0, 0, b""),
    frame(1, 4, 1, headers(b"/tandem.v1.Inference/GenerateOnce")),
    frame(0, 1, 1, message(GENERATE)),
]
STREAM = [*CALL[:2], frame(1, 4, 1, headers(b"/tandem.v1.Inference/Generate")), CALL[3]]


class Upload:
    """One call whose request is sent as fast as the server's windows allow."""

    def __init__(self, connection: socket.socket) -> None:
        self.sent = 0
        self.ended = False
        """The server has answered or closed."""
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._initial = _FIRST_WINDOW
        self._windows = {0: _FIRST_WINDOW, 1: _FIRST_WINDOW}
        self._read = b""

    async def send(self, data: bytes) -> None:
        """All of it, as parts of the request; until the server has had enough."""
        await self._loop.sock_sendall(self._connection, opening("GenerateOnce"))
        while self.sent < len(data) and not self.ended:
            room = min(*self._windows.values(), 16_384, len(data) - self.sent)
            if room <= 0:
                await self.hear()
                continue
            await self._loop.sock_sendall(self._connection, frame(DATA, 0, 1, data[self.sent : self.sent + room]))
            self.sent += room
            for stream in self._windows:
                self._windows[stream] -= room

    async def hear(self) -> None:
        """Wait for what the server says, and take note of it."""
        found = await self._loop.sock_recv(self._connection, 65_536)
        self.ended = self.ended or not found
        self._read += found
        while len(self._read) >= 9:
            length = int.from_bytes(self._read[:3])
            if len(self._read) < 9 + length:
                return
            kind, flags, stream = struct.unpack(">BBI", self._read[3:9])
            payload, self._read = self._read[9 : 9 + length], self._read[9 + length :]
            await self._frame(kind, flags, stream, payload)

    def close(self) -> None:
        self._connection.close()

    async def _frame(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == WINDOW_UPDATE and stream in self._windows:
            self._windows[stream] += int.from_bytes(payload)
        elif kind == SETTINGS and not flags & _ACK:
            for place in range(0, len(payload), 6):
                name, value = struct.unpack(">HI", payload[place : place + 6])
                if name == _INITIAL_WINDOW_SIZE:
                    self._windows[1] += value - self._initial
                    self._initial = value
            await self._loop.sock_sendall(self._connection, frame(SETTINGS, _ACK, 0, b""))
        elif kind == PING and not flags & _ACK:
            await self._loop.sock_sendall(self._connection, frame(PING, _ACK, 0, payload))
        elif stream == 1 and flags & END_STREAM:
            self.ended = True
