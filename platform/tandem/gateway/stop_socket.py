"""Lets whoever runs a gateway's node tell the gateway to stop: a Unix socket in the node's own folder.

Serve stops replicas too, but one at a time and from the head, which may be away when a pod is told to end. Whoever
asks while Serve does so waits for that.
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
LINGER_VARIABLE = "TANDEM_LINGER_S"
"""For so many seconds a gateway that is to stop takes requests, while `/health` says that it leaves."""
LONGEST_LINGER_S = 30.0
SERVE_GRACE_S = 30.0
"""For requests to end when it is Serve that stops the gateway."""
SERVE_PATIENCE_S = LONGEST_LINGER_S + SERVE_GRACE_S + 10.0
"""Serve ends a replica that has not stopped after this; on a node that ends, it begins so long before its end."""
STOP_SOCKET = "gateway-stop"
"""Its name in the folder."""

_DONE = b"stopped\n"
_BEYOND_S = 20.0
_PAUSE_S = 1.0
log = logging.getLogger(__name__)


def serve_stop(path: Path, stop: Callable[[float], None], *, patience_s: float = 5.0) -> Callable[[], None]:
    """Listen at `path`, in a thread of its own; `stop` gets the seconds that requests may still take.

    Callers wait for each other. One that says nothing for `patience_s`, or goes away, changes nothing for the next.
    Returns what ends it once the gateway has stopped; a process that ends without leaves a socket that refuses.
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
        path.unlink(missing_ok=True)

    return close


async def ask_stop(path: Path, grace: float, linger: float = 0.0) -> str:
    """Have the gateway of this node stop, and wait for it; return in one sentence what came of it.

    `linger`: what it was told by LINGER_VARIABLE.
    """
    within = linger + grace + _BEYOND_S
    try:
        async with asyncio.timeout(within):
            reader, writer = await asyncio.open_unix_connection(str(path))
            try:
                writer.write(f"{grace}\n".encode())
                await writer.drain()
                done = await reader.readline()
            finally:
                writer.close()
    except TimeoutError:
        return f"the gateway did not stop within {within:.0f} s"
    except FileNotFoundError:
        return "no gateway runs here, or not any more"
    except OSError as error:
        return f"no gateway runs here, and the last one did not stop in order: {error}"
    return "the gateway has stopped" if done == _DONE else "the gateway ended while it stopped"
