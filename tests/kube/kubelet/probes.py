"""Probes and hooks: is a container well, and what it wants done before it ends."""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
from collections.abc import Callable

from kube.kubelet.processes import ContainerProcess
from kube.kubelet.rest import Object

Outcome = tuple[bool, str]
"""Success, and what was seen."""


def port_number(port: int | str, container: Object) -> int:
    """A port's number; names are those of the container's ports. Raises ValueError."""
    if isinstance(port, int) or port.isdigit():
        return int(port)
    for one in container.get("ports", []):
        if one.get("name") == port:
            return int(one["containerPort"])
    raise ValueError(f"container {container['name']} has no port named {port}")


def act(handler: Object, container: Object, process: ContainerProcess, address: str, within: float) -> Outcome:
    """Do what a probe or a hook says, once, within `within` seconds."""
    try:
        if "exec" in handler:
            code, output = process.run(handler["exec"]["command"], within)
            return code == 0, output if code is not None else f"command timed out after {within:g} s"
        if "httpGet" in handler:
            return _http_get(handler["httpGet"], container, address, within)
        if "tcpSocket" in handler:
            where = handler["tcpSocket"].get("host") or address
            socket.create_connection((where, port_number(handler["tcpSocket"]["port"], container)), within).close()
            return True, ""
    except (OSError, ValueError, http.client.HTTPException) as error:
        return False, str(error) or type(error).__name__
    return False, f"{', '.join(handler)}: the process kubelet knows exec, httpGet and tcpSocket"


def _http_get(get: Object, container: Object, address: str, within: float) -> Outcome:
    host, port = get.get("host") or address, port_number(get["port"], container)
    connection: http.client.HTTPConnection
    if get.get("scheme", "HTTP") == "HTTPS":
        # As the real kubelet: a probe does not check certificates.
        context = ssl._create_unverified_context()
        connection = http.client.HTTPSConnection(host, port, timeout=within, context=context)
    else:
        connection = http.client.HTTPConnection(host, port, timeout=within)
    try:
        headers = {one["name"]: one["value"] for one in get.get("httpHeaders", [])}
        connection.request("GET", get.get("path", "/"), headers={"User-Agent": "kube-probe/1.20", **headers})
        answer = connection.getresponse()
        body = answer.read(1024).decode(errors="replace")
        return 200 <= answer.status < 400, f"HTTP probe: status {answer.status}: {body}".strip(": ")
    finally:
        connection.close()


class Prober(threading.Thread):
    """One probe of a container that runs, until `stop`.

    `told(success, seen)` is called for every failure, and when a row of successes or failures reaches its threshold:
    `decided` is then the verdict, else None.
    """

    def __init__(self, probe: Object, once: Callable[[float], Outcome], told: Callable[[bool | None, bool, str], None]):
        super().__init__(daemon=True, name="prober")
        self._probe = probe
        self._once = once
        self._told = told
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Probe no more."""
        self._stopped.set()

    def run(self) -> None:
        """The thread."""
        probe = self._probe
        needed = {True: probe.get("successThreshold", 1), False: probe.get("failureThreshold", 3)}
        last, row = False, 0
        self._stopped.wait(probe.get("initialDelaySeconds", 0))
        while not self._stopped.is_set():
            success, seen = self._once(float(probe.get("timeoutSeconds", 1)))
            if self._stopped.is_set():
                return
            row = row + 1 if success == last else 1
            last = success
            decided = success if row == needed[success] else None
            if decided is not None or not success:
                self._told(decided, success, seen)
            self._stopped.wait(probe.get("periodSeconds", 10))
