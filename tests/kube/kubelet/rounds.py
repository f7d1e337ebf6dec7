"""A thread that looks at everything again whenever something has changed."""

from __future__ import annotations

import threading
import traceback
from abc import ABC, abstractmethod

from kubernetes.client.exceptions import ApiException

from kube.kubelet.rest import Stopped


class Rounds(ABC):
    """`dirty` asks for a round; changes that come during one are looked at together in the next."""

    def __init__(self, name: str) -> None:
        self._dirty = threading.Event()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @abstractmethod
    def round(self) -> None:
        """Look at everything. What it cannot do now is tried again in the next round."""

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End, once the round that goes on is over."""
        self._stopped = True
        self._dirty.set()
        self._thread.join()

    def dirty(self) -> None:
        """Something changed."""
        self._dirty.set()

    def _run(self) -> None:
        while True:
            self._dirty.wait()
            self._dirty.clear()
            if self._stopped:
                return
            try:
                self.round()
            except Stopped:
                return
            except (ApiException, RuntimeError, OSError):
                traceback.print_exc()
