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
_PAUSE_S = 1.0
log = logging.getLogger(__name__)


def serve_stop(path: Path, stop: Callable[[float], None], *, patience_s: float = 5.0) -> Callable[[], None]:
    """Listen at `path`, in a thread of its own; `stop` gets the seconds that requests may still take.

    Callers wait for each other. One that says nothing for `patience_s`, or goes away, changes nothing for the next.
    Returns what ends it; the process may as well end without.
    """
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen(4)

    closed = threading.Event()

    def listen() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError as error:
                if closed.is_set():
                    return
                # Such as no file descriptor that is free.
                log.warning("nobody can tell this gateway to stop now: %s", error)
                closed.wait(_PAUSE_S)
                continue
            try:
                with connection, connection.makefile("rb") as asked:
                    connection.settimeout(patience_s)
                    grace = float(asked.readline())
                    log.info("told to stop within %.0f s", grace)
                    stop(grace)
                    connection.sendall(_DONE)
            except (ValueError, OSError) as error:
                log.warning("who came to have this gateway stop was not served: %s", error)

    thread = threading.Thread(target=listen, name="tandem-stop", daemon=True)
    thread.start()

    def close() -> None:
        closed.set()
        listener.shutdown(socket.SHUT_RDWR)  # wakes `accept`
        thread.join(patience_s)
        listener.close()

    return close


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
