"""A thread that does one thing at a time, in the order in which it was asked; some things later."""

from __future__ import annotations

import heapq
import itertools
import queue
import threading
import time
import traceback
from collections.abc import Callable

from kube.kubelet.rest import Stopped

Action = Callable[[], None]


class Actor:
    """`post` may be called from any thread; what is posted runs on the actor's own."""

    def __init__(self, name: str) -> None:
        self._inbox: queue.Queue[Action] = queue.Queue()
        self._later: list[tuple[float, int, Action]] = []
        self._sequence = itertools.count()
        self._finished = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin with what was posted."""
        self._thread.start()

    def join(self, within: float) -> bool:
        """Wait until it has finished; False after `within` seconds."""
        self._thread.join(within)
        return not self._thread.is_alive()

    def post(self, action: Action) -> None:
        """Have something done, soon."""
        self._inbox.put(action)

    def later(self, seconds: float, action: Action) -> None:
        """Have something done in a while. On the actor's own thread only."""
        heapq.heappush(self._later, (time.monotonic() + seconds, next(self._sequence), action))

    def finish(self) -> None:
        """End after the action that runs. On the actor's own thread only."""
        self._finished = True

    def _run(self) -> None:
        while not self._finished:
            wait = max(0.0, self._later[0][0] - time.monotonic()) if self._later else None
            try:
                action = self._inbox.get(timeout=wait)
            except queue.Empty:
                action = heapq.heappop(self._later)[2]
            try:
                action()
            except Stopped:
                pass  # what it wanted of the API is of no use any longer
            except Exception:  # noqa: BLE001  one pod's trouble must not stop the others; pytest shows what is printed
                traceback.print_exc()
