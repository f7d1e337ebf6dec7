"""What `tandem node head` and `tandem node join` have in common: the process that a pod's container runs.

It ends when it is told to (SIGTERM), with code 0; it may be PID 1, and then takes in orphans.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
from collections.abc import Callable, Collection, Coroutine
from pathlib import Path
from typing import Any

from tandem.fleet.host_steps import HostError
from tandem.fleet.ray_processes import ClusterError

log = logging.getLogger(__name__)

RUN_FOLDER = Path("/run/tandem")
"""Where nodes keep what ends with their pod, unless they are told otherwise."""


def make_folder(run: Path, host: str) -> Path:
    """An empty folder of this node's own below `run`, for this user's eyes. Short: Unix sockets are in it. Nodes may
    share the file system (the address tells them apart), and a container that starts again finds its old one."""
    folder = run / host.replace(":", "-")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700, parents=True)
    (folder / "logs").mkdir()
    return folder


def run_node(work: Callable[[asyncio.Event], Coroutine[Any, Any, None]], own: Callable[[], Collection[int]]) -> int:
    """Run `work` until it ends by itself or, told by its argument, by SIGTERM; return the exit code, to end the process
    by at once (`os._exit`). `own`: PIDs of children that somebody waits for."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("watchfiles").setLevel(logging.WARNING)
    # Not asyncio.run: it waits for threads, and one may wait for an answer of Ray's that will not come.
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        loop.run_until_complete(_run(work, own))
    except (HostError, ClusterError) as error:
        log.error("%s", error)
        return 1
    return 0


async def _run(work: Callable[[asyncio.Event], Coroutine[Any, Any, None]], own: Callable[[], Collection[int]]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGCHLD, lambda: reap(own()))
    await work(stop)


def reap(own: Collection[int]) -> None:
    """Wait for children that have ended and are not our own: orphans that came to us, as to any PID 1."""
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            children = Path(f"/proc/self/task/{task}/children").read_text().split()
            for pid in {int(word) for word in children} - set(own):
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
