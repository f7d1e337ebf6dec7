"""Keeps names and ClusterIPs true: hosts files and rules are made anew whenever Services or Endpoints change."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

from kube.kubelet import proxy
from kube.kubelet.informer import Informer
from kube.kubelet.names import hosts
from kube.kubelet.rounds import Rounds

if TYPE_CHECKING:
    from kube.kubelet.pod import Pod


class Wiring(Rounds):
    """A thread of its own; `dirty` tells it that something changed."""

    def __init__(self, informers: dict[str, Informer]) -> None:
        super().__init__("wiring")
        self._informers = informers
        self._pods: dict[str, Pod] = {}
        self._written: dict[str, str] = {}
        self._rules = ""
        self._lock = threading.Lock()

    def add(self, pod: Pod) -> None:
        """A pod has its address: its hosts file is there when this returns."""
        with self._lock:
            self._pods[pod.uid] = pod
            self._write_hosts(pod)

    def remove(self, pod: Pod) -> None:
        """A pod has ended."""
        with self._lock:
            self._pods.pop(pod.uid, None)
            self._written.pop(pod.uid, None)

    def round(self) -> None:
        new = proxy.ruleset(self._informers["services"].all(), self._informers["endpoints"].all())
        if new != self._rules:
            proxy.apply(new)
            self._rules = new
        with self._lock:
            for pod in self._pods.values():
                self._write_hosts(pod)

    def _write_hosts(self, pod: Pod) -> None:
        spec = pod.object["spec"]
        own = (pod.address, spec.get("hostname") or pod.key[1])
        services, endpoints = self._informers["services"].all(), self._informers["endpoints"].all()
        text = hosts(services, endpoints, pod.key[0], own, spec.get("hostAliases", []))
        if self._written.get(pod.uid) == text:
            return
        # In one step: who reads it sees the old file or the new one.
        new = pod.names / "hosts.new"
        new.write_text(text)
        os.replace(new, pod.names / "hosts")
        self._written[pod.uid] = text
