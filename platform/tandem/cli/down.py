"""`tandem down`: stop the fleet, and make sure that nothing of it is left."""

from __future__ import annotations

import contextlib
import signal

import psutil

from tandem.cli.console import make_console
from tandem.cli.running import FleetName, fail
from tandem.fleet.run_folder import AlreadyRunningError, RunFolder

STOP_DEADLINE_S = 90.0


def down(fleet: FleetName = "laptop") -> None:
    """Stop the fleet and everything that belongs to it."""
    folder = RunFolder(fleet)
    record = folder.record()
    console = make_console()
    if record is None:
        console.print(f"no fleet named {fleet} runs on this machine")
        return
    with console.status(f"stopping fleet {fleet} …"):
        clean = True
        if record.alive:
            clean = end_host(folder, psutil.Process(record.pid))
        else:
            clear(folder)
    if not clean:
        fail(f"the fleet did not stop within {STOP_DEADLINE_S:.0f} s and was killed; {folder.logs} says why")
    console.print(f"fleet {fleet} is down; its logs stay in {folder.logs}")


def end_host(folder: RunFolder, host: psutil.Process) -> bool:
    """Ask the host to stop, wait, and sweep what is left. False: it had to be killed."""
    clean = True
    try:
        host.send_signal(signal.SIGTERM)
        host.wait(STOP_DEADLINE_S)
    except psutil.TimeoutExpired:
        host.kill()
        clean = False
    except psutil.NoSuchProcess:
        clean = True
    clear(folder)
    return clean


def clear(folder: RunFolder) -> None:
    """Remove what the last run left, unless another host has begun a new one meanwhile."""
    with contextlib.suppress(AlreadyRunningError), folder.hold():
        folder.clear()
