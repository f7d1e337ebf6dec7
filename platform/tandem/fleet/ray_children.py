"""Ray's own processes as children of ours: they die with us, and what they started is ended with them."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future

from tandem.engine import guard
from tandem.fleet import bound
from tandem.fleet.ray_processes import ENVIRONMENT, NodePlace, Session

_GRACE_S = 3.0


class RayProcess:
    """One of Ray's processes. A thread waits for its end, so it never stays a zombie: workers of a dead raylet notice
    its death only when it has been reaped."""

    def __init__(self, name: str, place: NodePlace, command: Sequence[str], session: Session) -> None:
        self.name = name
        self.log = session.logs
        devices = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, place.gpus))} if place.gpus else {}
        # Here go only the complaints of what comes before Ray; Ray's own go to the files named in the command.
        with open(session.logs / f"{name}.start", "ab") as output:
            self._child = subprocess.Popen(
                [sys.executable, "-S", "-E", bound.__file__, str(os.getpid()), *place.prefix, *command],
                env={**os.environ, **ENVIRONMENT, **devices},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.pid = self._child.pid
        self.ended: Future[int] = Future()
        self.ended.set_running_or_notify_cancel()  # who gives up waiting for it must not cancel it for others
        threading.Thread(target=self._reap, name=f"reap {name}", daemon=True).start()

    def _reap(self) -> None:
        self.ended.set_result(self._child.wait())

    def signal(self, number: signal.Signals) -> None:
        if not self.ended.done():
            self._child.send_signal(number)

    def epitaph(self) -> str:
        code = self.ended.result()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        return f"Ray's {self.name} (PID {self.pid}) {how}; its logs are in {self.log}"


def end(processes: Iterable[RayProcess], *, grace: float = _GRACE_S) -> None:
    """SIGTERM, and SIGKILL to what is left after a while."""
    processes = list(processes)
    for process in processes:
        process.signal(signal.SIGTERM)
    ends = time.monotonic() + grace
    for process in processes:
        with contextlib.suppress(TimeoutError):
            process.ended.result(max(0.0, ends - time.monotonic()))
        process.signal(signal.SIGKILL)
        process.ended.result(guard.KILL_DEADLINE_S)


@contextlib.contextmanager
def held(pids: Iterable[int]) -> Iterator[list[int]]:
    """Handles of processes (pidfd), which go on meaning the same ones when PIDs are used anew."""
    with contextlib.ExitStack() as stack:
        handles = []
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                handles.append(os.pidfd_open(pid))
                stack.callback(os.close, handles[-1])
        yield handles


def kill(handles: Iterable[int]) -> None:
    """SIGKILL processes that need not be our children, and wait for their end."""
    ends = time.monotonic() + guard.KILL_DEADLINE_S
    for handle in handles:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, signal.SIGKILL)
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        poll.poll(max(0.0, ends - time.monotonic()) * 1000)
