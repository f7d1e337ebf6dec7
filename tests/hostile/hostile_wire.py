"""Raw bytes to a server, and what comes back."""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Sequence

Address = tuple[str, int]


def talk(address: Address, pieces: Sequence[bytes], within: float = 5.0) -> tuple[bytes, bool]:
    """(all that came, whether the server closed) of one conversation, each piece sent in a packet of its own."""
    with socket.create_connection(address, timeout=within) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        end = time.monotonic() + within
        with contextlib.suppress(ConnectionError):  # it has answered and closed already
            for piece in pieces:
                connection.sendall(piece)
        return _rest(connection, end)


def _rest(connection: socket.socket, end: float) -> tuple[bytes, bool]:
    found = b""
    while (left := end - time.monotonic()) > 0:
        connection.settimeout(left)
        try:
            data = connection.recv(65_536)
        except TimeoutError:
            break
        except ConnectionError:
            return found, True
        if not data:
            return found, True
        found += data
    return found, False


def shout(address: Address, conversations: Sequence[Sequence[bytes]], within: float) -> list[bytes]:
    """What came of each conversation by then; all at once, each on a connection of its own that is then reset."""
    connections = [socket.create_connection(address, timeout=5) for _ in conversations]
    found = dict.fromkeys(connections, b"")
    try:
        for connection, pieces in zip(connections, conversations, strict=True):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with contextlib.suppress(ConnectionError):
                for piece in pieces:
                    connection.sendall(piece)
        open_ = set(connections)
        end = time.monotonic() + within
        while open_ and (left := end - time.monotonic()) > 0:
            for connection in select.select(list(open_), [], [], left)[0]:
                data = b""
                with contextlib.suppress(ConnectionError):
                    data = connection.recv(65_536)
                found[connection] += data
                if not data:
                    open_.discard(connection)
    finally:
        for connection in connections:
            connection.close()
    return list(found.values())
