"""The nursery: one process per machine that has imported the CPU engine and forks ranks from it.

Importing SGLang takes about 12 s of CPU, and one fleet on one machine needs it in every rank. The nursery pays it
once: a rank forked from it starts (and restarts after a death) in a few seconds and shares its memory.

`python -m tandem.engine.nursery FD METRICS` accepts on the listening Unix socket FD, which whoever started it has made:
a client may connect while the engine is still being imported, and waits. METRICS is an empty folder.

A client sends one JSON line `{"argv": [SGLang's arguments…], "env": {…}, "log": path, "scratch": path}`; from then on
it speaks with the guard of its engine (see `guard.py`) on the same connection. The engine runs in the client's network
namespace. The nursery stops when its standard input ends, that is with whoever started it; engines forked from it live
on, they belong to their owners.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import select
import signal
import socket
import struct
import sys
import tempfile

from tandem.engine import guard
from tandem.engine.cpu import launch_server
from tandem.engine.cpu.versions import EngineError

MAX_REQUEST = 1 << 20
CLONE_NEWNET = 0x40000000


def _request(connection: socket.socket) -> dict[str, object]:
    data = b""
    while not data.endswith(b"\n"):
        part = connection.recv(65536)
        data += part
        if not part or len(data) > MAX_REQUEST:
            raise ValueError("an incomplete or oversized request")
    request: dict[str, object] = json.loads(data)
    return request


def _peer(connection: socket.socket) -> tuple[int, int]:
    """PID and user of the process at the other end."""
    pid, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, user


def _join_network(connection: socket.socket) -> None:
    """Enter the network namespace of the process at the other end, unless it is this one's."""
    peer, _ = _peer(connection)
    if os.readlink(f"/proc/{peer}/ns/net") == os.readlink("/proc/self/ns/net"):
        return
    with open(f"/proc/{peer}/ns/net") as namespace:
        if guard.libc.setns(namespace.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "cannot enter the client's network namespace")


def _engine(request: dict[str, object]) -> None:
    """Become an engine: runs in the forked child."""
    guard.redirect(str(request["log"]))
    env = request["env"]
    argv = request["argv"]
    assert isinstance(env, dict)
    assert isinstance(argv, list)
    os.environ.update(env)
    tempfile.tempdir = None  # look at TMPDIR again: an import has asked for it already
    sys.argv = ["tandem.engine.cpu.launch_server", *argv]
    launch_server.serve(argv)


def _raise_child(listener: socket.socket, connection: socket.socket) -> None:
    """Fork a guard for the request on `connection`, which forks the engine."""
    connection.settimeout(1)  # the request is sent in one piece, at once
    try:
        if _peer(connection)[1] != os.getuid():
            raise ValueError("its user is not this one")
        request = _request(connection)
    except (OSError, ValueError) as error:
        print(f"tandem nursery: refused a request: {error}", file=sys.stderr, flush=True)
        return
    if os.fork() == 0:
        listener.close()
        connection.settimeout(None)
        status = 1
        try:
            _join_network(connection)
            guard.run_guarded(connection, lambda: _engine(request), str(request["scratch"]))
            status = 0
        finally:
            os._exit(status)


def main() -> None:
    """Entry point of the module."""
    os.environ.update(launch_server.ENVIRONMENT)
    # prometheus_client chooses its multi-process mode at import; each engine brings a folder of its own.
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = sys.argv[2]
    with socket.socket(fileno=int(sys.argv[1])) as listener:
        try:
            launch_server.prepare()
        except EngineError as error:
            sys.exit(f"tandem: {error}")
        gc.collect()
        gc.freeze()  # keeps the collector from touching, and so copying, pages that engines share
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        _accept(listener)


def _accept(listener: socket.socket) -> None:
    while True:
        ready, _, _ = select.select([listener.fileno(), 0], [], [])
        if 0 in ready and not os.read(0, 4096):
            return
        if listener.fileno() in ready:
            connection, _ = listener.accept()
            with connection:
                _raise_child(listener, connection)


if __name__ == "__main__":
    main()
