"""Lets whoever runs a gateway's node tell the gateway to stop: a Unix socket in the node's own folder.

Serve stops replicas too, but one at a time and from the head, which may be away when a pod is told to end.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Callable
from pathlib import Path

NODE_FOLDER_VARIABLE = "TANDEM_NODE_FOLDER"
"""Names a folder of this node's own (`tandem node join`), where nodes do not share a file system."""
STOP_SOCKET = "gateway-stop"
"""Its name in the folder."""

_DONE = b"stopped\n"
_BEYOND_S = 20.0
log = logging.getLogger(__name__)


def serve_stop(path: Path, stop: Callable[[float], None]) -> None:
    """Listen at `path`, in a thread of its own; `stop` gets the seconds that requests may still take."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen(4)

    def listen() -> None:
        while True:
            connection, _ = listener.accept()
            with connection, connection.makefile("rb") as asked:
                try:
                    grace = float(asked.readline())
                except ValueError:
                    continue
                log.info("told to stop within %.0f s", grace)
                stop(grace)
                connection.sendall(_DONE)

    threading.Thread(target=listen, name="tandem-stop", daemon=True).start()


async def ask_stop(path: Path, grace: float) -> str:
    """Have the gateway of this node stop, and wait for it; return in one sentence what came of it."""
    try:
        async with asyncio.timeout(grace + _BEYOND_S):
            reader, writer = await asyncio.open_unix_connection(str(path))
            try:
                writer.write(f"{grace}\n".encode())
                await writer.drain()
                done = await reader.readline()
            finally:
                writer.close()
    except TimeoutError:
        return f"the gateway did not stop within {grace + _BEYOND_S:.0f} s"
    except OSError as error:
        return f"no gateway runs here: {error}"
    return "the gateway has stopped" if done == _DONE else "the gateway ended while it stopped"
